"""Common interface to the codecs that an evaluation compares.

These are the codecs of this package, stock NeMo and alternatives. Opus and Codec2 run as external programs. EnCodec,
DAC and Mimi are the implementations of transformers. Their weights must be available locally, since nothing is
downloaded.
"""

import math
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from nemo_lfr.errors import NEMO_PACKAGES, NemoLfrError, install_command
from nemo_lfr.evaluation import CODECS
from nemo_lfr.io.audio import AudioReader, resample
from nemo_lfr.io.shortage import missing_extra

if TYPE_CHECKING:
    from nemo_lfr.io.entropy.model import EntropyModel


@dataclass
class Transmission:
    """Result of encoding and decoding one recording.

    Attributes:
        audio: reconstruction, float32, shape [T], with the rate and length of the recording.
        num_bytes: size of the payload without a container.
        file_bytes: size of a file in the codec's usual format, including the container.
        encode_seconds: wall-clock time of encoding; for external programs including their startup.
        decode_seconds: wall-clock time of decoding, likewise.
        tokens: token ids, shape [C, T_encoded], or None if the codec has no tokens.
        compressed_bytes: as `num_bytes` with the tokens compressed by an entropy model, or None without a model.
        compressed_file_bytes: as `file_bytes` with the tokens compressed by an entropy model, or None without a model.
    """

    audio: np.ndarray
    num_bytes: float
    file_bytes: float
    encode_seconds: float
    decode_seconds: float
    tokens: np.ndarray | None = field(default=None, repr=False)
    compressed_bytes: float | None = None
    compressed_file_bytes: float | None = None


class Peer(ABC):
    """Base class of the compared codecs, each at one setting.

    Attributes:
        name: name in tables.
        identity: string that identifies the weights or the version of the program, and thus the results.
        delay: delay of the output in seconds, which `send` compensates.
        levels: FSQ levels of each dimension of a codebook; (size,) for codebooks other than FSQ; () without tokens.
    """

    name: str
    identity: str
    delay: float = 0.0
    levels: tuple[int, ...] = ()

    @abstractmethod
    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        """Encode and decode one recording.

        Args:
            audio: mono samples, shape [T].
            rate: sample rate of the audio in Hz.

        Returns:
            The reconstruction at the same rate and of the same length, with its sizes and times.
        """


class Original(Peer):
    """Identity codec, whose metrics are the best possible; sizes are of 16-bit PCM."""

    name, identity = "original", "original"

    def __init__(self, source: str = "", device: str | None = None) -> None:
        if source:
            raise NemoLfrError(f"original:{source}: the original has no options.")

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        """Return the audio unchanged."""
        return Transmission(audio, 2 * len(audio), 2 * len(audio) + 44, 0.0, 0.0)


class LFR(Peer):
    """Codec loaded by this package."""

    def __init__(self, source: str = "", device: str | None = None) -> None:
        from nemo_lfr.pretrained import load

        self.codec = load(source or None, device)
        self.name = f"nemo_lfr ({Path(source).name if source else 'bundled'})"
        self.identity, self.levels = self.codec.fingerprint, self.codec.levels

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        """Encode and decode audio [T] with the standalone API."""
        from nemo_lfr.codec.arrays import to_numpy
        from nemo_lfr.io.entropy.find import model_if_any

        own = resampled(audio, rate, self.codec.sample_rate)
        started = time.perf_counter()
        tokens = to_numpy(self.codec.encode(own)[0][0])
        encoded = time.perf_counter()
        output = to_numpy(self.codec.decode(tokens)[0][0])
        decoded = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            size = self._written(Path(folder, "tokens.lfr"), tokens, len(own))[1]
            model = model_if_any(self.codec)
            compressed: tuple[int | None, int | None] = (None, None)
            if model is not None:
                compressed = self._written(Path(folder, "compressed.lfr"), tokens, len(own), model)
        bits = self.codec.num_codebooks * math.log2(self.codec.codebook_size) * tokens.shape[1]
        output = fit(resampled(output, self.codec.sample_rate, rate), len(audio))
        return Transmission(output, bits / 8, size, encoded - started, decoded - encoded, tokens, *compressed)

    def _written(
        self, path: Path, tokens: np.ndarray, num_samples: int, model: "EntropyModel | None" = None
    ) -> tuple[int, int]:
        """Write a token file, and return the bytes of its payload and of the file."""
        from nemo_lfr.io.token_file import TokenReader, TokenWriter

        with TokenWriter.for_codec(path, self.codec, model=model) as writer:
            writer.write(tokens)
            writer.finish(num_samples)
        with TokenReader(path) as reader:
            return reader.payload_bytes, path.stat().st_size


class StockNeMo(Peer):
    """NeMo's own `AudioCodecModel`, without any code of this package."""

    def __init__(self, source: str = "", device: str | None = None) -> None:
        import torch

        try:
            from nemo.collections.tts.models import AudioCodecModel
        except Exception as error:  # a broken installation can raise anything
            raise missing_extra(error, "NeMo", f"nemo: needs NeMo: {install_command(*NEMO_PACKAGES)}") from error
        from nemo_lfr.checkpoint import read_config
        from nemo_lfr.codec.devices import choose_device
        from nemo_lfr.pretrained import find_checkpoint

        path = find_checkpoint(source or None)
        read_config(path)  # reports an unsupported checkpoint in one line, where NeMo would fail later
        self.device = choose_device(device)
        with torch.no_grad():
            self.model = AudioCodecModel.restore_from(str(path), map_location=self.device).eval()
        self.name = f"stock NeMo ({path.name if source else 'bundled'})"
        self.identity = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
        self.levels = tuple(int(level) for level in self.model.vector_quantizer.fsqs[0].num_levels.flatten())

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        """Encode and decode audio [T] with NeMo."""
        import torch

        own = resampled(audio, rate, self.model.sample_rate)
        started = time.perf_counter()
        with torch.no_grad():
            batch = torch.from_numpy(own)[None].to(self.device)
            length = torch.tensor([len(own)], device=self.device)
            tokens, tokens_len = self.model.encode(audio=batch, audio_len=length)
            numbers = tokens[0].cpu().numpy()
            encoded = time.perf_counter()
            output, _ = self.model.decode(tokens=tokens, tokens_len=tokens_len)
            output = output[0].cpu().numpy()
        decoded = time.perf_counter()
        size = math.ceil(math.log2(math.prod(self.levels)) * numbers.size / 8)
        output = fit(resampled(output, self.model.sample_rate, rate), len(audio))
        return Transmission(output, size, 2 * numbers.size, encoded - started, decoded - encoded, numbers)


class Opus(Peer):
    """Opus at a variable bit rate in kbit/s.

    Runs opusenc and opusdec (opus-tools) with default settings.
    """

    def __init__(self, kilobits: str, device: str | None = None) -> None:
        self.kilobits = _number(kilobits, "opus", 6, 256, "kbit/s")
        self.name = f"Opus {kilobits} kbit/s"
        self.identity = _version("opusenc", "opus-tools", "--version")

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        """Encode and decode audio [T] with opusenc and opusdec."""
        with tempfile.TemporaryDirectory() as name:
            source, coded, decoded = (Path(name, file) for file in ("in.wav", "coded.opus", "out.wav"))
            soundfile.write(source, audio, rate, subtype="PCM_16")
            encode = _timed("opusenc", "--quiet", "--bitrate", str(self.kilobits), str(source), str(coded))
            decode = _timed("opusdec", "--quiet", "--float", "--rate", str(rate), str(coded), str(decoded))
            output, _ = soundfile.read(decoded, dtype="float32")
            return Transmission(
                fit(output, len(audio)), ogg_payload(coded.read_bytes()), coded.stat().st_size, encode, decode
            )


# Codec2's programs do not compensate their delay. Delays in seconds that give the best ESTOI and mel distance,
# measured to within 1 ms.
CODEC2_DELAYS = {mode: 0.02 for mode in ("3200", "2400", "1600", "1400", "1300", "1200")} | {"700C": 0.03}


class Codec2(Peer):
    """Codec2 at a bit rate in bit/s and a sample rate of 8 kHz.

    Runs c2enc and c2dec (codec2).
    """

    def __init__(self, mode: str, device: str | None = None) -> None:
        if mode not in CODEC2_DELAYS:
            raise NemoLfrError(f"codec2:{mode}: unknown mode; use one of {', '.join(CODEC2_DELAYS)}.")
        self.mode, self.delay = mode, CODEC2_DELAYS[mode]
        self.name = f"Codec2 {mode} bit/s"
        self.identity = f"{_version('c2enc', 'codec2')} {mode}"

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        """Encode and decode audio [T] with c2enc and c2dec."""
        with tempfile.TemporaryDirectory() as name:
            source, coded, decoded = (Path(name, file) for file in ("in.raw", "coded.bit", "out.raw"))
            # The encoder drops an incomplete last frame.
            padded = np.pad(resampled(audio, rate, 8000), (0, 1000))
            (padded * 32767).clip(-32768, 32767).astype("<i2").tofile(source)
            encode = _timed("c2enc", self.mode, str(source), str(coded))
            decode = _timed("c2dec", self.mode, str(coded), str(decoded))
            output = np.fromfile(decoded, "<i2").astype(np.float32)[round(self.delay * 8000) :] / 32768
            # c2enc pads each frame to whole bytes.
            bits = {"700C": 28 / 32, "1300": 52 / 56}.get(self.mode, 1.0)
            file_bytes = coded.stat().st_size * len(audio) / rate * 8000 / len(padded)
            size = file_bytes * bits
            return Transmission(fit(resampled(output, 8000, rate), len(audio)), size, file_bytes, encode, decode)


# Model class, Hub id and unit of the setting.
TRANSFORMERS = {
    "encodec": ("EncodecModel", "facebook/encodec_24khz", "kbit/s"),
    "dac": ("DacModel", "descript/dac_24khz", "codebooks"),
    "mimi": ("MimiModel", "kyutai/mimi", "codebooks"),
}


class Transformers(Peer):
    """EnCodec, DAC or Mimi from transformers.

    Args:
        kind: key of `TRANSFORMERS`.
        options: SETTING or SETTING:FOLDER, where the setting is a bit rate in kbit/s or a number of codebooks.
        device: PyTorch device.
    """

    def __init__(self, kind: str, options: str, device: str | None = None) -> None:
        try:
            import transformers
        except Exception as error:  # a broken installation can raise anything
            message = f"{kind}: needs transformers: {install_command('transformers')}"
            raise missing_extra(error, "transformers", message) from error
        from nemo_lfr.codec.devices import choose_device

        setting, _, source = options.partition(":")
        class_name, hub, unit = TRANSFORMERS[kind]
        self.kind, self.setting = kind, _number(setting, kind, 0.1, 1000, unit)
        self.device = choose_device(device)
        try:
            model = getattr(transformers, class_name).from_pretrained(source or hub, local_files_only=True)
        except (OSError, ValueError) as error:
            raise NemoLfrError(
                f"{kind}: no weights in {source or 'the Hub cache'}; fetch them first: hf download {source or hub}"
            ) from error
        self.model = model.eval().to(self.device)
        known = getattr(model.config, "target_bandwidths", None)
        if known and self.setting not in known:
            raise NemoLfrError(
                f"{kind}:{setting}: no bit rate of this model; use one of {', '.join(map(str, known))}."
            )
        self.rate = int(model.config.sampling_rate)
        self.levels = (int(model.config.codebook_size),)
        self.name = f"{class_name.removesuffix('Model')} {setting} {unit}"
        self.identity = f"{source or hub} {getattr(model.config, '_commit_hash', None)}"

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        """Encode and decode audio [T] with the transformers model."""
        import torch

        own = torch.from_numpy(resampled(audio, rate, self.rate))[None, None].to(self.device)
        started = time.perf_counter()
        with torch.no_grad():
            if self.kind == "encodec":
                coded = self.model.encode(own, bandwidth=self.setting)
                codes, scales = coded.audio_codes, coded.audio_scales
            elif self.kind == "dac":
                codes = self.model.encode(own, n_quantizers=round(self.setting)).audio_codes
            else:
                codes = self.model.encode(own, num_quantizers=round(self.setting)).audio_codes
            tokens = codes.reshape(-1, codes.shape[-1]).cpu().numpy()
            encoded = time.perf_counter()
            if self.kind == "encodec":
                output = self.model.decode(codes, scales).audio_values
            else:
                output = self.model.decode(audio_codes=codes).audio_values
            output = output.reshape(-1).cpu().numpy()
        decoded = time.perf_counter()
        size = tokens.size * math.log2(self.levels[0]) / 8
        output = fit(resampled(output, self.rate, rate), len(audio))
        return Transmission(output, size, size, encoded - started, decoded - encoded, tokens)


KINDS: dict[str, Callable[[str, str | None], Peer]] = {
    "original": Original,
    "lfr": LFR,
    "nemo": StockNeMo,
    "opus": Opus,
    "codec2": Codec2,
} | {kind: partial(Transformers, kind) for kind in TRANSFORMERS}


def open_codec(text: str, device: str | None = None) -> Peer:
    """Open the codec that `text` names.

    Args:
        text: one of the forms in `CODECS`; a `.nemo` or `.ckpt` file or a Hub id without a prefix is opened as `LFR`.
        device: PyTorch device; chosen automatically if None.

    Returns:
        The codec.

    Raises:
        NemoLfrError: if the codec is unknown, or a program, package or weights that it needs are missing.
    """
    kind, _, options = text.partition(":")
    if kind in KINDS:
        return KINDS[kind](options, device)
    if text.endswith((".nemo", ".ckpt")) or "/" in text:
        return LFR(text, device)
    raise NemoLfrError(f"--codec {text}: unknown; use {CODECS}.")


def read(path: Path, rate: int, offset: float, duration: float) -> np.ndarray:
    """Read a segment of a recording.

    Args:
        path: audio file.
        rate: sample rate to convert to, in Hz.
        offset: start of the segment in seconds.
        duration: length of the segment in seconds.

    Returns:
        Mono samples, shape [T].
    """
    with AudioReader(path, rate) as reader:
        return reader.segment(offset, duration)


def resampled(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample audio [T]; equal rates return it unchanged."""
    return wave if from_rate == to_rate else resample(wave, from_rate, to_rate)


def fit(wave: np.ndarray, length: int) -> np.ndarray:
    """Trim or zero-pad audio [T] to `length` samples, as float32."""
    return np.pad(wave[:length], (0, max(length - len(wave), 0))).astype(np.float32)


def ogg_payload(data: bytes) -> int:
    """Count the bytes of the audio packets of an Ogg Opus file.

    The headers of the pages (RFC 3533) and the first two packets, which hold headers and tags, are not counted.
    """
    position, packets, size = 0, 0, 0
    while position < len(data):
        if data[position : position + 4] != b"OggS":
            raise NemoLfrError("opusenc wrote something else than Ogg pages.")
        count = data[position + 26]
        for lacing in data[position + 27 : position + 27 + count]:
            if packets >= 2:
                size += lacing
            packets += lacing < 255
            position += lacing
        position += 27 + count
    return size


def _number(text: str, kind: str, low: float, high: float, unit: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise NemoLfrError(f"{kind}:{text}: give a number of {unit} from {low:g} to {high:g}, as in {kind}:6.")
    return value


def _version(program: str, package: str, *arguments: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise NemoLfrError(f"{program} is not installed; on Debian or Ubuntu: apt install {package}")
    if not arguments:  # the program cannot print its version
        return f"{program} of {Path(path).stat().st_size} bytes"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _timed(*command: str) -> float:
    started = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise NemoLfrError(f"{command[0]} failed: {run.stderr.strip()[-200:]}")
    return time.perf_counter() - started
