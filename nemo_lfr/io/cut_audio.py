"""Read the audio of Lhotse cuts. No program is started, and URLs are opened only if the user allows it.

Lhotse itself starts a shell for sources of type "command", for URLs that begin with "pipe:" and for file names that
end in ".sph". It also opens any URL in a manifest. This module reads only regular files and bytes in memory,
and also http(s) URLs if the caller allows them. Lhotse receives only the samples.

Relative paths in cuts start from the current folder, as in Lhotse, and `~` is expanded.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lfr.errors import AudioError, quoted, shorten
from nemo_lfr.io.audio import AudioReader, check_peak, check_rate, resample
from nemo_lfr.io.manifests import MAX_SECONDS, resolve_audio_path
from nemo_lfr.io.reading import count_missing, read_part

# Types of storage in Lhotse for arrays and images in regular files, in memory, or in a Shar. Other types are refused:
# they open URLs ("lilcom_url"), run programs ("kaldiio"), or unpickle data ("memory_raw").
ARRAY_STORAGE = {
    "lilcom_files", "lilcom_chunky", "lilcom_hdf5", "chunked_lilcom_hdf5", "numpy_files", "numpy_hdf5",
    "memory_lilcom", "memory_npy", "shar", "pillow_files", "pillow_memory",
}  # fmt: skip
URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+://|\s*pipe:")
# Attributes of cuts, recordings and transforms that are rates in Hz.
RATE_ATTRIBUTES = ("sampling_rate", "source_sampling_rate", "target_sampling_rate")
MAX_FACTOR = 20  # limit on the factors of speed and tempo transforms, and on their inverses
# Maximum size of a download in bytes.
MAX_DOWNLOAD = 1 << 31
DOWNLOAD_TIMEOUT = 60  # seconds after which a download without new data fails
MAX_DOWNLOAD_SECONDS = 900


def check_cut(manifest: Mapping[str, Any], allow_url: bool = False) -> None:
    """Raise an error if reading a cut would run a program or open a source that is not allowed.

    Args:
        manifest: cut of any type as a dict. The check covers its recording, custom recordings, tracks, supervisions,
            transforms, features and arrays.
        allow_url: whether http(s) URLs are allowed.

    Raises:
        AudioError: if a source is not allowed.
    """
    for item in _mappings(manifest):
        if "storage_type" in item and ("storage_key" in item or "storage_path" in item):
            _check_array(item)
    for source in sources_of(manifest):
        check_source(source.get("type"), source["source"], allow_url)


def sources_of(manifest: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the audio sources in the manifest of a cut or recording, including those in tracks and custom fields.

    Each source is a dict that has at least the key "source".
    """
    for item in _mappings(manifest):
        sources = item.get("sources")
        for source in sources if isinstance(sources, list | tuple) else []:
            if isinstance(source, Mapping) and "source" in source:
                yield source


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all mappings in nested mappings and lists."""
    waiting: list[Any] = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            yield item
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item


def check_source(kind: object, source: object, allow_url: bool = False) -> None:
    """Check that a Lhotse audio source may be read.

    Files and audio in memory or in a Shar may be read, and http(s) URLs if `allow_url` is set. Commands are refused.

    Args:
        kind: attribute `type` of Lhotse's `AudioSource`, such as "file".
        source: attribute `source` of the `AudioSource`: a path, a URL, a command or bytes.
        allow_url: whether http(s) URLs are allowed.

    Raises:
        AudioError: if the source is not allowed.
    """
    shown = "..." if isinstance(source, bytes) else shorten(source)
    if kind == "command":
        raise AudioError(
            f"the audio is the output of a command ({shown}), and commands are not run; write the audio to a file."
        )
    if kind == "url":
        if not isinstance(source, str) or not source.startswith(("http://", "https://")):
            raise AudioError(
                f"the audio is at {shown}, but only http(s) URLs can be read; download it, and pass the path of the "
                "file."
            )
        if not allow_url:
            raise AudioError(f"the audio is at {shown}; pass --allow-url (allow_url in training) to read URLs.")
    elif kind == "file":
        if not isinstance(source, str) or URL.match(source):
            raise AudioError(f"the audio is at {shown}, which is not a valid file name.")
    elif kind not in ("memory", "shar"):
        raise AudioError(f"the audio has a source of the unknown type {shorten(kind)!r}; expected a file.")


def _check_array(item: Mapping[str, Any]) -> None:
    kind = item["storage_type"]
    if kind not in ARRAY_STORAGE:
        raise AudioError(
            f"the cut has a field with an array of storage type {shorten(kind)!r}, which is not an allowed type; "
            "remove the field."
        )
    for key in ("storage_path", "storage_key"):
        if isinstance(item.get(key), str) and URL.match(item[key]):
            raise AudioError(
                f"the cut has a field with an array at {shorten(item[key])}, and URLs are not allowed for arrays; "
                "remove the field."
            )


def read_cut(cut: Any, sample_rate: int, longest: float = math.inf, allow_url: bool = False) -> np.ndarray:
    """Read a Lhotse cut or recording as mono samples.

    The samples are the same as those of Lhotse's `load_audio`, mixed to mono and resampled. An unmodified excerpt of
    all channels of one file is read without Lhotse.

    If a file ends before the cut does, the missing samples are filled by reflection, up to Lhotse's tolerance; see
    `lhotse.audio.get_audio_duration_mismatch_tolerance`.

    Args:
        cut: cut of any type, or recording.
        sample_rate: sample rate of the result in Hz.
        longest: maximum duration in seconds.
        allow_url: whether to read http(s) URLs.

    Returns:
        Mono float32 samples [T_audio].

    Raises:
        AudioError: if the cut cannot be read or is not allowed. Also if the cut lasts more than `longest` seconds, or
            exceeds its audio by more than Lhotse's tolerance.
    """
    name = f"cut {shorten(getattr(cut, 'id', cut))}"
    try:
        if not hasattr(cut, "load_audio"):
            raise AudioError(f"expected a Lhotse cut or recording, got {shorten(repr(cut))}.")
        start, duration = _seconds(cut, "start"), _seconds(cut, "duration")
        if not 0 <= start <= MAX_SECONDS or not 0 <= duration <= MAX_SECONDS:
            raise AudioError(
                f"the cut starts at {start:.10g} s and lasts {duration:.10g} s; expected values from 0 to "
                f"{MAX_SECONDS:g}."
            )
        if duration > longest:
            raise AudioError(f"the cut lasts {duration:.1f} s, more than the limit of {longest:g} s.")
        source = _only_source(cut)
        if source is not None:
            return read_part(_open(source, allow_url), name, start, duration, sample_rate, _tolerance())
        channels = _with_own_sources(cut, allow_url).load_audio()
        if channels is None:
            raise AudioError("the cut has no audio.")
        audio = np.asarray(channels, dtype=np.float32).mean(axis=0)
        check_peak(float(np.abs(audio).max(initial=0.0)), "the audio")
        rate = float(cut.sampling_rate)
        return resample(audio, rate, sample_rate) if rate != sample_rate and len(audio) else audio
    except Exception as error:  # any part of Lhotse may raise
        reason = _reason(error)
        raise AudioError(reason if reason.startswith(name) else f"{name}: {reason}") from error


def _seconds(cut: Any, field: str) -> float:
    """Return `cut.start` or `cut.duration` in seconds. A Lhotse `Recording` has no start, so its start is 0."""
    value = getattr(cut, field, 0.0)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise AudioError(f"{field} is {shorten(value)!r}; expected a number of seconds.") from error


def forbid_programs() -> None:
    """Keep Lhotse's default audio backends from starting a shell.

    The change lasts until this process ends. NeMo's data loaders use the default backends to find the sample rate of
    audio files.
    """
    from lhotse.audio.backend import (
        FfmpegSubprocessOpusBackend,
        Sph2pipeSubprocessBackend,
        get_default_audio_backend,
    )

    default: Any = get_default_audio_backend()
    shells = (FfmpegSubprocessOpusBackend, Sph2pipeSubprocessBackend)
    default.backends = [backend for backend in default.backends if not isinstance(backend, shells)]


class OwnSource:
    """Replacement for Lhotse's `AudioSource` that does not use Lhotse's audio backends.

    Args:
        audio: path of the audio file, or its bytes.
        channels: ids of the channels in the file.
    """

    type = "memory"
    video = None
    has_video = False

    def __init__(self, audio: Path | bytes, channels: list[int]) -> None:
        self.audio, self.channels = audio, channels

    def load_audio(self, offset: float = 0.0, duration: float | None = None, **_: Any) -> np.ndarray:
        """Read samples [C, T] at the sample rate of the file.

        Args:
            offset: start in seconds.
            duration: duration in seconds; None for the rest of the file.

        Raises:
            AudioError: if the file cannot be read, or is shorter than requested.
        """
        name = str(self.audio) if isinstance(self.audio, Path) else "audio in memory"
        is_mono = len(self.channels) == 1
        with AudioReader(name, None, None if isinstance(self.audio, Path) else self.audio) as reader:
            if is_mono and not offset and duration is None:
                return np.concatenate([np.zeros(0, np.float32), *reader.blocks()])[None]
            if duration is None:
                duration = reader.duration - offset
            else:
                count_missing(reader, offset, duration, name, _tolerance())  # Lhotse fills the end
            return reader.segment(offset, duration)[None] if is_mono else reader.channels_of(offset, duration)


def _only_source(cut: Any) -> Any:
    """Return the source of a cut if the cut is an unmodified excerpt of all channels of one source; else None."""
    if getattr(cut, "tracks", None) is not None:
        return None
    recording = getattr(cut, "recording", None) or cut
    sources = getattr(recording, "sources", None)
    if not sources or len(sources) != 1 or recording.transforms:
        return None
    channels = getattr(cut, "channel", recording.channel_ids)
    wanted = {channels} if isinstance(channels, int) else set(channels)
    return sources[0] if wanted == set(recording.channel_ids) else None


def _with_own_sources(item: Any, allow_url: bool) -> Any:
    """Return a copy of a cut, recording or transform in which `OwnSource` replaces every audio source."""
    from lhotse.augmentation import AudioTransform

    changes: dict[str, Any] = {}
    if isinstance(item, dict):  # a transform that has not been applied yet
        item = AudioTransform.from_dict(item)
    _check_numbers(item)
    for name in ("recording", "cut", "rir"):
        if getattr(item, name, None) is not None:
            changes[name] = _with_own_sources(getattr(item, name), allow_url)
    for name in ("tracks", "transforms"):
        if getattr(item, name, None):
            changes[name] = [_with_own_sources(part, allow_url) for part in getattr(item, name)]
    if hasattr(item, "sources"):
        if not item.sources:
            raise AudioError("a recording of the cut has no audio source; add its file, or remove the cut.")
        changes["sources"] = [OwnSource(_open(source, allow_url), list(source.channels)) for source in item.sources]
    return dataclasses.replace(item, **changes) if changes else item


def _check_numbers(item: Any) -> None:
    """Raise AudioError for implausible sample rates and speed factors.

    Such values could turn a few seconds of audio into days.
    """
    for name in RATE_ATTRIBUTES:
        if (rate := getattr(item, name, None)) is not None:
            check_rate(rate)
    if type(item).__name__ in ("Speed", "Tempo"):
        factor = item.factor
        if not isinstance(factor, int | float) or not 1 / MAX_FACTOR <= factor <= MAX_FACTOR:
            raise AudioError(
                f"the speed factor is {quoted(factor)}; expected a number from {1 / MAX_FACTOR:g} to {MAX_FACTOR}."
            )


def _open(source: Any, allow_url: bool) -> Path | bytes:
    """Check an audio source, and return its path, or its bytes if it is in memory or at a URL."""
    check_source(source.type, source.source, allow_url)
    if source.type == "file":
        return resolve_audio_path("", source.source)
    if source.type == "url":
        return _download(source.source)
    if not isinstance(source.source, bytes) or not source.source:
        place = "a Shar" if source.type == "shar" else "memory"
        raise AudioError(f"the cut says that its audio is in {place}, but there is no audio; create the cut again.")
    return source.source


def _download(url: str) -> bytes:
    """Download a file from an http(s) URL.

    Raises:
        AudioError: if the file cannot be downloaded within `MAX_DOWNLOAD` and `MAX_DOWNLOAD_SECONDS`, or if the URL
            redirects to an address other than http(s).
    """
    import http.client
    import urllib.request

    opener = urllib.request.OpenerDirector()
    for handler in ("ProxyHandler", "HTTPHandler", "HTTPSHandler", "HTTPRedirectHandler", "HTTPErrorProcessor"):
        opener.add_handler(getattr(urllib.request, handler)())
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    try:
        answer = opener.open(url, timeout=DOWNLOAD_TIMEOUT)
        if answer is None:  # the redirect has a scheme without a handler
            raise AudioError(f"{shorten(url)} redirects to an address that is not an http(s) URL.")
        with answer:
            data = _read_all(answer, url)
    except (OSError, http.client.HTTPException) as error:
        raise AudioError(f"{shorten(url)} cannot be downloaded: {shorten(error, 200)}.") from error
    return data


def _read_all(answer: Any, url: str) -> bytes:
    """Read an HTTP response in pieces, with limits on its size and on the time that it takes."""
    end = time.monotonic() + MAX_DOWNLOAD_SECONDS
    pieces, size = [], 0
    while piece := answer.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_DOWNLOAD:
            raise AudioError(
                f"the file at {shorten(url)} is larger than {MAX_DOWNLOAD} bytes, the limit for downloads; "
                "download it yourself, and pass the path of the file."
            )
        if time.monotonic() > end:
            raise AudioError(
                f"the download of {shorten(url)} takes longer than {MAX_DOWNLOAD_SECONDS} s; download the file "
                "yourself, and pass its path."
            )
    if answer.length:  # unlike `read`, `read1` does not report a download that ends too early
        raise AudioError(f"the download of {shorten(url)} ends {answer.length} bytes too early; try again.")
    return b"".join(pieces)


def _tolerance() -> float:
    """Return Lhotse's tolerance in seconds: how much longer a cut may be than its audio (0.5 s by default)."""
    from lhotse.audio import get_audio_duration_mismatch_tolerance

    return float(get_audio_duration_mismatch_tolerance())


def _reason(error: Exception) -> str:
    """Return the message of an error from Lhotse on one line, without the lines that Lhotse appends."""
    # Lhotse constructs each exception again to append text, which fails for exceptions with several arguments.
    while isinstance(error, TypeError) and "__init__()" in str(error) and isinstance(error.__context__, Exception):
        error = error.__context__
    text = str(error).partition("\n[extra info]")[0] or type(error).__name__
    return shorten(" ".join(text.split()), 400)
