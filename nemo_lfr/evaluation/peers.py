"""Codecs behind one interface: this one, stock NeMo's, and those that a user would pick instead.

A codec takes one recording, sends it through, and says what that took. Opus and Codec2 are the system's programs;
EnCodec, DAC and Mimi are transformers', when their weights are there: nothing is downloaded.
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
    """What came of sending a recording.

    Attributes:
        audio: float32 [T], of the recording's rate and length.
        num_bytes: without a container.
        file_bytes: of a file of its usual format, container and all.
        encode_seconds, decode_seconds: as a user runs it; of the system's programs with their start.
        tokens: [C, T], where the codec has tokens.
        compressed_bytes, compressed_file_bytes: the same two, where an entropy model compresses the tokens.
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
    """A codec at one setting.

    Attributes:
        name: for tables.
        identity: what its results depend on: weights or version.
        delay: seconds that its output is late, which `send` takes out.
        levels: of each dimension of a codebook; (size,) for a codebook that is not FSQ's; () without tokens.
    """

    name: str
    identity: str
    delay: float = 0.0
    levels: tuple[int, ...] = ()

    @abstractmethod
    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        """Encode and decode samples [T] at `rate` Hz."""


class Original(Peer):
    """No codec at all: what the metrics say of 16-bit audio that lost nothing."""

    name, identity = "original", "original"

    def __init__(self, source: str = "", device: str | None = None) -> None:
        if source:
            raise NemoLfrError(f"original:{source}: the original has no options.")

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        return Transmission(audio, 2 * len(audio), 2 * len(audio) + 44, 0.0, 0.0)


class LFR(Peer):
    """A codec that this package loads."""

    def __init__(self, source: str = "", device: str | None = None) -> None:
        from nemo_lfr.pretrained import load

        self.codec = load(source or None, device)
        self.name = f"nemo_lfr ({Path(source).name if source else 'bundled'})"
        self.identity, self.levels = self.codec.fingerprint, self.codec.levels

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
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
        """Write a token file; bytes of its blocks' payload, and of the file."""
        from nemo_lfr.io.token_file import TokenReader, TokenWriter

        with TokenWriter.for_codec(path, self.codec, model=model) as writer:
            writer.write(tokens)
            writer.finish(num_samples)
        with TokenReader(path) as reader:
            return reader.payload_bytes, path.stat().st_size


class StockNeMo(Peer):
    """NeMo's own `AudioCodecModel`, without this package."""

    def __init__(self, source: str = "", device: str | None = None) -> None:
        import torch

        try:
            from nemo.collections.tts.models import AudioCodecModel
        except Exception as error:  # whatever that package does when it is imported
            raise missing_extra(error, "NeMo", f"nemo: needs NeMo: {install_command(*NEMO_PACKAGES)}") from error
        from nemo_lfr.checkpoint import read_config
        from nemo_lfr.codec.devices import choose_device
        from nemo_lfr.pretrained import find_checkpoint

        path = find_checkpoint(source or None)
        read_config(path)  # ours refuses what stock would choke on, with a sentence
        self.device = choose_device(device)
        with torch.no_grad():
            self.model = AudioCodecModel.restore_from(str(path), map_location=self.device).eval()
        self.name = f"stock NeMo ({path.name if source else 'bundled'})"
        self.identity = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
        self.levels = tuple(int(level) for level in self.model.vector_quantizer.fsqs[0].num_levels.flatten())

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
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
    """opusenc and opusdec (opus-tools) at a number of kbit/s, variable rate, as they come."""

    def __init__(self, kilobits: str, device: str | None = None) -> None:
        self.kilobits = _number(kilobits, "opus", 6, 256, "kbit/s")
        self.name = f"Opus {kilobits} kbit/s"
        self.identity = _version("opusenc", "opus-tools", "--version")

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        with tempfile.TemporaryDirectory() as name:
            source, coded, decoded = (Path(name, file) for file in ("in.wav", "coded.opus", "out.wav"))
            soundfile.write(source, audio, rate, subtype="PCM_16")
            encode = _timed("opusenc", "--quiet", "--bitrate", str(self.kilobits), str(source), str(coded))
            decode = _timed("opusdec", "--quiet", "--float", "--rate", str(rate), str(coded), str(decoded))
            output, _ = soundfile.read(decoded, dtype="float32")
            return Transmission(
                fit(output, len(audio)), ogg_payload(coded.read_bytes()), coded.stat().st_size, encode, decode
            )


# Codec2's programs take no delay out. Seconds where ESTOI and the mel distance are best, measured within 1 ms.
CODEC2_DELAYS = {mode: 0.02 for mode in ("3200", "2400", "1600", "1400", "1300", "1200")} | {"700C": 0.03}


class Codec2(Peer):
    """c2enc and c2dec (codec2) at a number of bit/s, of 8 kHz."""

    def __init__(self, mode: str, device: str | None = None) -> None:
        if mode not in CODEC2_DELAYS:
            raise NemoLfrError(f"codec2:{mode}: unknown mode; use one of {', '.join(CODEC2_DELAYS)}.")
        self.mode, self.delay = mode, CODEC2_DELAYS[mode]
        self.name = f"Codec2 {mode} bit/s"
        self.identity = f"{_version('c2enc', 'codec2')} {mode}"

    def send(self, audio: np.ndarray, rate: int) -> Transmission:
        with tempfile.TemporaryDirectory() as name:
            source, coded, decoded = (Path(name, file) for file in ("in.raw", "coded.bit", "out.raw"))
            # What the encoder has not seen whole at the end, it does not send.
            padded = np.pad(resampled(audio, rate, 8000), (0, 1000))
            (padded * 32767).clip(-32768, 32767).astype("<i2").tofile(source)
            encode = _timed("c2enc", self.mode, str(source), str(coded))
            decode = _timed("c2dec", self.mode, str(coded), str(decoded))
            output = np.fromfile(decoded, "<i2").astype(np.float32)[round(self.delay * 8000) :] / 32768
            # c2enc fills a frame's last byte.
            bits = {"700C": 28 / 32, "1300": 52 / 56}.get(self.mode, 1.0)
            file_bytes = coded.stat().st_size * len(audio) / rate * 8000 / len(padded)
            size = file_bytes * bits
            return Transmission(fit(resampled(output, 8000, rate), len(audio)), size, file_bytes, encode, decode)


# Class, Hub id, and what the setting is.
TRANSFORMERS = {
    "encodec": ("EncodecModel", "facebook/encodec_24khz", "kbit/s"),
    "dac": ("DacModel", "descript/dac_24khz", "codebooks"),
    "mimi": ("MimiModel", "kyutai/mimi", "codebooks"),
}


class Transformers(Peer):
    """EnCodec, DAC and Mimi: KIND:SETTING or KIND:SETTING:FOLDER, the setting being kbit/s or codebooks."""

    def __init__(self, kind: str, options: str, device: str | None = None) -> None:
        try:
            import transformers
        except Exception as error:  # whatever that package does when it is imported
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
    """The codec that `text` names; `CODECS` has the forms, and a bare `.nemo` file or Hub id is one of ours.

    Raises:
        NemoLfrError: if it is unknown, or what it needs is not there.
    """
    kind, _, options = text.partition(":")
    if kind in KINDS:
        return KINDS[kind](options, device)
    if text.endswith((".nemo", ".ckpt")) or "/" in text:
        return LFR(text, device)
    raise NemoLfrError(f"--codec {text}: unknown; use {CODECS}.")


def read(path: Path, rate: int, offset: float, duration: float) -> np.ndarray:
    """A recording, or a part of one, as samples [T] at `rate` Hz."""
    with AudioReader(path, rate) as reader:
        return reader.segment(offset, duration)


def resampled(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    return wave if from_rate == to_rate else resample(wave, from_rate, to_rate)


def fit(wave: np.ndarray, length: int) -> np.ndarray:
    """Cut, or filled with zeros, to `length` samples."""
    return np.pad(wave[:length], (0, max(length - len(wave), 0))).astype(np.float32)


def ogg_payload(data: bytes) -> int:
    """Bytes of an Ogg Opus file's audio packets: pages (RFC 3533) without their headers, nor the first two packets."""
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
    if not arguments:  # has no way to ask
        return f"{program} of {Path(path).stat().st_size} bytes"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _timed(*command: str) -> float:
    started = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise NemoLfrError(f"{command[0]} failed: {run.stderr.strip()[-200:]}")
    return time.perf_counter() - started
