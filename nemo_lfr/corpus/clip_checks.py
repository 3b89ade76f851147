"""Checks of clips, which may come from the corpus readers of other packages. An invalid clip affects no other clip."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from nemo_lfr.corpus.sources import READER
from nemo_lfr.corpus.sources.base import AudioLoader, Clip, CorpusReader, ShardSpec
from nemo_lfr.errors import AudioError, NemoLfrError, shorten
from nemo_lfr.io.shortage import shortage_of
from nemo_lfr.io.text import is_nested_deeper
from nemo_lfr.plugins import described, named_items, naming_extension

# Maximum nesting depth of lists and objects in the labels of a clip. JSON libraries differ in the depth they can read.
MAX_DEPTH = 100


def read_clips(corpus: CorpusReader, shard: ShardSpec) -> Iterator[Clip]:
    """Yield the clips of a shard.

    Raises:
        NemoLfrError: if a corpus reader of another package fails, or yields an object that is not a clip.
    """
    with naming_extension(corpus, READER):
        clips = corpus.read(shard)
    for clip in named_items(corpus, READER, clips):
        if not isinstance(clip, Clip) or not isinstance(clip.origin, str):
            what = "a clip whose origin is not a string" if isinstance(clip, Clip) else f"a {type(clip).__name__}"
            raise NemoLfrError(
                f"the {READER} {described(corpus)} yielded {what}; `read` must yield `Clip` "
                "objects whose `origin` is a string."
            )
        yield clip


def _why_not_utf8(names: str) -> str:
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        with suppress(UnicodeError):
            names.encode(errors="surrogateescape").decode()
            return f"the file name is not valid in the locale's encoding, {encoding}; set PYTHONUTF8=1"
    return "the id or the file name is not valid UTF-8; rename it"


def check_clip(clip: Clip) -> None:
    """Raise AudioError if the id or a label of a clip cannot be written."""
    where = clip.origin
    if not isinstance(clip.id, str) or not clip.id:
        raise AudioError(f"{where}: the id of the clip is {shorten(repr(clip.id))}; expected a non-empty string.")
    try:
        (clip.id + where).encode()
    except UnicodeEncodeError:
        raise AudioError(f"{where}: {_why_not_utf8(clip.id + where)}.") from None
    if clip.id.startswith("/") or ".." in PurePosixPath(clip.id).parts or "\0" in clip.id:
        raise AudioError(
            f"{where}: the id of the clip, {shorten(repr(clip.id))}, leads out of the output folder; pass it through "
            "nemo_lfr.corpus.ids.clean_id."
        )
    if not isinstance(clip.labels, dict):
        raise AudioError(f"{where}: the labels of the clip are a {type(clip.labels).__name__}; expected a dictionary.")
    if any(is_nested_deeper(values, MAX_DEPTH) for values in (clip.labels, clip.cut)):
        raise AudioError(
            f"{where}: a label is nested deeper than {MAX_DEPTH} levels; remove it, or flatten its value."
        )
    try:
        json.dumps([clip.labels, clip.cut], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise AudioError(
            f"{where}: a label contains an unpaired surrogate, as in truncated UTF-16 text; correct the label."
        ) from None
    except (TypeError, ValueError) as error:
        raise AudioError(
            f"{where}: a label cannot be written as JSON ({shorten(error, 200)}); use strings, numbers, booleans, "
            "None, lists and dictionaries."
        ) from error


def load_samples(loader: AudioLoader, what: str, sample_rate: int, max_duration: float) -> np.ndarray:
    """Call the audio loader of a clip, and check the samples that it returns.

    Args:
        loader: the audio loader.
        what: subject of the messages, with the origin of the clip.
        sample_rate: sample rate to load the audio at, Hz.
        max_duration: maximum duration in seconds. The loader raises an error for longer audio.

    Returns:
        Samples [T], floating point.

    Raises:
        AudioError: if the loader fails, or returns anything but a floating-point array [T] of finite samples that are
            not all zero.
        OSError: if the loader cannot read the audio file.
    """
    try:
        wave: Any = loader(sample_rate, max_duration)
    except (NemoLfrError, OSError):
        raise
    except Exception as error:  # the loader of another package may raise anything
        if shortage_of(error) is not None:
            raise
        reason = f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 200)}"
        raise AudioError(
            f"{what} cannot be loaded ({reason}); correct the file, or the loader of the audio."
        ) from error
    if not isinstance(wave, np.ndarray) or wave.ndim != 1 or wave.dtype.kind != "f":
        kind = f"array with dtype {wave.dtype} and shape {list(wave.shape)}" if isinstance(wave, np.ndarray) else None
        raise AudioError(
            f"{what} was loaded as {kind or type(wave).__name__}; the loader must return a float32 array [T]."
        )
    if not len(wave):
        raise AudioError(f"{what} contains no samples.")
    if not np.isfinite(wave).all():
        raise AudioError(f"{what} contains NaN or infinite samples; remove them first.")
    if not wave.any():
        raise AudioError(f"{what} is silent: every sample is zero.")
    return wave
