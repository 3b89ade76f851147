"""Tests of `encode`, `decode` and `encode_file` with every kind of argument and audio file, one row of a table each.

Stock NeMo silently accepts many of the arguments that are refused here: one NaN gives tokens of -2147483648, token
values wrap around, two clips may have only one length, and 16-bit integers are used as floats without scaling.
"""

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_lfr.errors import AudioError, NemoLfrError, TokensError
from nemo_lfr.io.token_file import TokenReader
from tests.models import cached_codec, synthesize
from tests.tiers import slow_if

WAVE = synthesize(0.1)
PAIR = np.stack([WAVE, WAVE[::-1]])
T = len(WAVE)


def tensor(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# name -> (audio, audio_len, sample_rate); each clip must get the tokens of WAVE
GOOD_AUDIO: dict[str, tuple[Any, Any, Any]] = {
    "numpy": (WAVE, None, None),
    "numpy float64": (WAVE.astype(np.float64), None, None),
    "torch": (torch.from_numpy(WAVE), None, None),
    "torch float64": (torch.from_numpy(WAVE).double(), None, None),
    "list": (WAVE.tolist(), None, None),
    "list of lists": ([WAVE.tolist()], None, None),
    "read-only": (np.frombuffer(WAVE.tobytes(), np.float32), None, None),
    "every second sample of a larger array": (np.repeat(WAVE, 2)[::2], None, None),
    "backwards in memory": (WAVE[::-1].copy()[::-1], None, None),
    "big-endian": (WAVE.astype(">f4"), None, None),
    "Fortran order": (np.asfortranarray(PAIR), None, None),
    "transposed tensor": (torch.from_numpy(PAIR).T.contiguous().T, None, None),
    "with a gradient": (torch.from_numpy(WAVE).requires_grad_(), None, None),
    "a negated view": (torch.complex(torch.zeros(T), torch.from_numpy(-WAVE)).conj().imag, None, None),
    "inference tensor": (torch.inference_mode()(lambda: torch.from_numpy(WAVE).clone())(), None, None),
    "padding of NaN": (np.concatenate([WAVE, np.full(50, np.nan, np.float32)]), [T], None),
    "padding of 1e30": (np.concatenate([WAVE, np.full(50, 1e30, np.float32)]), [T], None),
    "lengths as a tuple": (PAIR, (T, T), None),
    "lengths as int32": (PAIR, np.array([T, T], np.int32), None),
    "lengths as uint16": (PAIR, np.array([T, T], np.uint16), None),
    "lengths as a tensor": (PAIR, torch.tensor([T, T]), None),
    "its own rate": (WAVE, None, 22050),
    "its own rate as a float": (WAVE, None, 22050.0),
    "its own rate from numpy": (WAVE, None, np.int64(22050)),
    "the pair": (PAIR, None, None),
}

FAKE = object()  # in place of a tensor that takes seconds to make
# name -> (audio, audio_len, sample_rate, message)
BAD_AUDIO: dict[str, tuple[Any, Any, Any, str]] = {
    # Types
    "nothing": (None, None, None, "audio has type NoneType"),
    "a file that does not exist": ("speech.wav", None, None, "speech.wav: no such file"),
    "bytes": (b"RIFF", None, None, "audio has type bytes|audio has dtype torch.uint8"),
    "dictionary": ({"audio": WAVE}, None, None, "audio is a dict with the keys"),
    "empty list": ([], None, None, "audio is an empty list; pass one clip or more"),
    "empty tuple with lengths": ((), [], 16000, "audio is an empty tuple"),
    "objects": (np.array([None, 1.0]), None, None, r"audio\[0\] has type NoneType"),
    "an array of text": (np.array(["a", "b"]), None, None, r"^a: no such file"),
    "sparse": (torch.eye(8).to_sparse(), None, None, "plain"),
    "meta": (torch.empty(1, 100, device="meta"), None, None, "plain"),
    "fake": (FAKE, None, None, "FakeTensor"),
    "nested": (
        torch.nested.as_nested_tensor([torch.from_numpy(WAVE), torch.from_numpy(WAVE[:9])]),
        None,
        None,
        "nested",
    ),
    "masked": (np.ma.masked_array(WAVE, np.arange(T) < 9), None, None, "9 masked values"),
    **{
        f"of {dtype}": (tensor(1, 100, dtype=dtype), None, None, f"audio has dtype {dtype}")
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.complex64, torch.complex128)
    },
    # Shapes
    "a number": (np.float32(0.5), None, None, r"shape \[\]"),
    "stereo, channels first": (np.zeros((1, 2, 100), np.float32), None, None, r"\[1, 2, 100\].*mono"),
    "stereo, channels last": (np.zeros((22050, 2), np.float32), None, None, r"\[22050, 2\].*2 channels"),
    "stereo twice": (torch.zeros(2, 2, 100), None, None, r"\[2, 2, 100\].*mono"),
    "four dimensions": (torch.zeros(1, 1, 1, 100), None, None, r"\[1, 1, 1, 100\]"),
    "no clips": (np.zeros((0, 100), np.float32), None, None, r"\[0, 100\]"),
    "no clips and lengths": (np.zeros((0, 100), np.float32), [], None, r"\[0, 100\]"),
    # Values
    "one NaN": (np.where(np.arange(T) == 7, np.nan, WAVE), None, None, "clip 0 contains NaN"),
    "NaN in the last sample": (np.append(WAVE, np.nan), None, None, "clip 0 contains NaN"),
    "infinite in the second clip": (PAIR + np.array([[0.0], [np.inf]]), None, None, "clip 1 contains NaN or inf"),
    "minus infinity": (WAVE - np.inf, None, None, "infinite"),
    "16-bit numbers as floats": (WAVE * 32768, None, None, r"clip 0 reaches \d.*divide by 32768"),
    "1e30": (WAVE * 1e30, None, None, "reaches"),
    "float64 beyond float32": (WAVE.astype(np.float64) * 1e300, None, None, "infinite"),
    # Lengths
    "lengths as floats": (PAIR, [10.0, 10.0], None, "audio_len has dtype torch.float32"),
    "lengths as booleans": (PAIR, [True, True], None, "audio_len has dtype torch.bool"),
    "lengths as text": (PAIR, "10", None, "audio_len has type str"),
    "lengths as a dictionary": (PAIR, {0: 10}, None, "audio_len has type dict"),
    "a length of nothing": (PAIR, [10, None], None, "audio_len has type list"),
    "one length for two clips": (PAIR, [10], None, r"audio_len .*\[1\].*\[2\]"),
    "one number for one clip": (WAVE, 10, None, r"audio_len .*\[\].*\[1\]"),
    "three lengths for two clips": (PAIR, [10, 10, 10], None, r"\[3\].*\[2\]"),
    "lengths in two dimensions": (PAIR, [[10, 10]], None, r"\[1, 2\].*\[2\]"),
    "no lengths": (PAIR, [], None, "audio_len"),
    "negative length": (PAIR, [10, -1], None, r"audio_len\[1\] is -1"),
    "length beyond the samples": (PAIR, [T + 1, 10], None, rf"audio_len\[0\] is {T + 1}.*{T}"),
    "length beyond int64": (PAIR, [2**70, 10], None, r"audio_len\[0\] is 1180591620717411303424"),
    "smallest length": (PAIR, [-(2**63), 10], None, r"audio_len\[0\] is -9223372036854775808"),
    # Sample rates
    **{
        f"rate {rate!r}": (WAVE, None, rate, "sample_rate is .*; expected a number from 100 to 1000000")
        for rate in (0, -16000, 99, 10**7, 10**30, float("nan"), float("inf"), "16000", True, [16000], 1 + 2j, None)
        if rate is not None
    },
}

TOKENS = np.arange(2 * 8 * 5, dtype=np.int64).reshape(2, 8, 5) * 25

GOOD_TOKENS: dict[str, Any] = {
    "numpy int64": TOKENS,
    "numpy int32": TOKENS.astype(np.int32),
    "numpy int16": TOKENS.astype(np.int16),
    "numpy uint16": TOKENS.astype(np.uint16),
    "numpy uint32": TOKENS.astype(np.uint32),
    "big-endian": TOKENS.astype(">i4"),
    "backwards in memory": TOKENS[:, :, ::-1].copy()[:, :, ::-1],
    "torch int64": torch.from_numpy(TOKENS),
    "torch int32": torch.from_numpy(TOKENS).int(),
    "lists": TOKENS.tolist(),
    "Fortran order": np.asfortranarray(TOKENS),
    "permuted": torch.from_numpy(TOKENS).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "read-only": np.frombuffer(TOKENS.tobytes(), np.int64).reshape(TOKENS.shape),
}

# name -> (tokens, tokens_len, audio_len, message)
BAD_TOKENS: dict[str, tuple[Any, Any, Any, str]] = {
    "nothing": (None, None, None, "tokens has type NoneType"),
    "text": ("a.lfr", None, None, "tokens has type str"),
    "dictionary": ({"tokens": TOKENS}, None, None, "tokens has type dict"),
    "objects": (np.array([[[None]]]), None, None, "tokens is an array of dtype object"),
    "uneven lists": ([[1, 2], [3]], None, None, "tokens has type list"),
    "sparse": (torch.eye(8).long().to_sparse(), None, None, "plain"),
    "meta": (torch.empty(1, 8, 5, device="meta", dtype=torch.int64), None, None, "plain"),
    **{
        f"of {dtype}": (tensor(1, 8, 5, dtype=dtype), None, None, str(dtype).replace("torch.", r"torch\."))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool)
    },
    "halves": (TOKENS + 0.5, None, None, "torch.float64"),
    "one dimension": (TOKENS[0, 0], None, None, r"\[5\].*\[B, 8, T\]"),
    "four dimensions": (TOKENS[None], None, None, r"\[1, 2, 8, 5\]"),
    "seven codebooks": (TOKENS[:, :7], None, None, r"\[2, 7, 5\].*\[B, 8, T\]"),
    "nine codebooks": (np.concatenate([TOKENS, TOKENS[:, :1]], axis=1), None, None, r"\[2, 9, 5\]"),
    "frames before codebooks": (TOKENS.transpose(0, 2, 1), None, None, r"\[2, 5, 8\]"),
    "codebooks first": (TOKENS.transpose(1, 0, 2), None, None, r"\[8, 2, 5\]"),
    "empty list": ([], None, None, "tokens is an empty list; pass one utterance or more"),
    "empty tuple with lengths": ((), [], [], "tokens is an empty tuple"),
    "no utterances": (TOKENS[:0], None, None, r"\[0, 8, 5\]"),
    **{
        f"a token of {token}": (
            np.where(TOKENS == 25, token, TOKENS),
            None,
            None,
            rf"utterance 0 contains the token {token}, ",
        )
        for token in (2016, 2017, 4032, 100_000, 2**31 - 1, 2**31, 2**62, -1, -2016, -(2**31), -(2**63))
    },
    "a wrong token in the second utterance": (TOKENS * np.array([[[1]], [[10]]]), None, None, "utterance 1 contains"),
    "uint8 does not wrap round": (np.full((1, 8, 5), 255, np.uint8), [6], None, r"tokens_len\[0\] is 6"),
    "lengths as floats": (TOKENS, [5.0, 5.0], None, "tokens_len has dtype torch.float32"),
    "lengths as booleans": (TOKENS, [True, False], None, "tokens_len has dtype torch.bool"),
    "lengths as text": (TOKENS, "5", None, "tokens_len has type str"),
    "one length for two": (TOKENS, [5], None, r"tokens_len .*\[1\].*\[2\]"),
    "one number": (TOKENS[0], 5, None, r"tokens_len .*\[\].*\[1\]"),
    "three lengths for two": (TOKENS, [5, 5, 5], None, r"\[3\].*\[2\]"),
    "length beyond the frames": (TOKENS, [5, 6], None, r"tokens_len\[1\] is 6.*5"),
    "negative length": (TOKENS, [-2, 5], None, r"tokens_len\[0\] is -2"),
    "length beyond int64": (TOKENS, [2**70, 5], None, r"tokens_len\[0\] is 1180591620717411303424"),
    "more samples than the frames contain": (
        TOKENS,
        None,
        [5121, 5120],
        r"audio_len\[0\] is 5121.*5 frames.* 4097 to 5120",
    ),
    "fewer samples than the frames contain": (TOKENS, None, [5120, 4096], r"audio_len\[1\] is 4096"),
    "samples for another length": (
        TOKENS,
        [4, 5],
        [5120, 5120],
        r"audio_len\[0\] is 5120.*4 frames.* 3073 to 4096",
    ),
    "no samples for frames": (TOKENS, None, [0, 5120], r"audio_len\[0\] is 0"),
    "negative samples": (TOKENS, None, [-1, 5120], r"audio_len\[0\] is -1"),
    "samples as floats": (TOKENS, None, [5120.0, 5120.0], "audio_len has dtype torch.float32"),
    "samples as text": (TOKENS, None, "5120", "audio_len has type str"),
    "too many sample counts": (TOKENS, None, [5120] * 3, r"\[3\].*\[2\]"),
    "one sample count for two": (TOKENS, None, [5120], r"\[1\].*\[2\]"),
}


def sound(suffix: str, subtype: str | None = None, wave: np.ndarray = WAVE, rate: int = 22050) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, subtype, format=suffix.upper())
    return buffer.getvalue()


def wav_header(
    channels: int = 1, rate: int = 22050, bits: int = 16, kind: int = 1, data: bytes = bytes(2000)
) -> bytes:
    align = max(1, channels * bits // 8)
    fmt = struct.pack("<HHIIHH", kind, channels, rate, (rate * align) & 0xFFFFFFFF, align & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


# name -> (contents, suffix, samples at 22.05 kHz)
GOOD_FILES: dict[str, tuple[Callable[[], bytes], str, int]] = {
    **{
        f"{suffix} {subtype}": (lambda suffix=suffix, subtype=subtype: sound(suffix, subtype), suffix, T)
        for suffix, subtype in [
            ("wav", "PCM_U8"), ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_32"), ("wav", "FLOAT"),
            ("wav", "DOUBLE"), ("wav", "ULAW"), ("wav", "ALAW"), ("flac", "PCM_16"), ("flac", "PCM_24"),
            ("aiff", "PCM_16"), ("au", "PCM_16"), ("caf", "PCM_16"), ("w64", "PCM_16"), ("ogg", "VORBIS"),
        ]
    },
    "stereo": (lambda: sound("wav", wave=PAIR.T), "wav", T),
    "six channels": (lambda: sound("wav", wave=np.repeat(PAIR, 3, axis=0).T), "wav", T),
    "8 kHz": (lambda: sound("wav", rate=8000), "wav", round(T * 22050 / 8000)),
    "44.1 kHz": (lambda: sound("wav", rate=44100), "wav", round(T / 2)),
    "96 kHz": (lambda: sound("wav", rate=96000), "wav", round(T * 22050 / 96000)),
    "a rate of no small ratio": (lambda: sound("wav", rate=22049), "wav", round(T * 22050 / 22049)),
    "no samples": (lambda: sound("wav", wave=WAVE[:0]), "wav", 0),
    "one sample": (lambda: sound("wav", wave=WAVE[:1]), "wav", 1),
    "another suffix": (lambda: sound("flac"), "wav", T),
    "no suffix": (lambda: sound("wav"), "", T),
    "a length that is not known": (
        lambda: sound("wav").replace(struct.pack("<I", 2 * T), b"\xff\xff\xff\xff"), "wav", T,
    ),
    "beyond full scale": (lambda: sound("wav", "FLOAT", WAVE * 10), "wav", T),
    "silence": (lambda: sound("wav", wave=WAVE * 0), "wav", T),
}  # fmt: skip

BAD_FILES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty file": (lambda: b"", "wav", "the file is empty"),
    "text": (lambda: b"hello", "wav", "not an audio file"),
    "text as mp3": (lambda: b"hello", "mp3", "not an audio file"),
    "raw numbers without a header": (lambda: WAVE.tobytes(), "raw", "not an audio file"),
    "a token file": (lambda: b"LFRT\1" + bytes(50), "lfr", "not an audio file"),
    "web page": (lambda: b"<!DOCTYPE html>" * 100, "wav", "not an audio file"),
    "header alone": (lambda: sound("wav")[:20], "wav", "truncated: it ends within its header"),
    "wav truncated": (lambda: sound("wav")[:3000], "wav", r"truncated: its header declares 44\d\d bytes, but there are 2956"),
    "float wav truncated": (lambda: sound("wav", "FLOAT")[:3000], "wav", "truncated"),
    "aiff truncated": (lambda: sound("aiff")[:3000], "aiff", "truncated"),
    "au truncated": (lambda: sound("au")[:3000], "au", "truncated"),
    "flac truncated": (lambda: sound("flac", wave=np.tile(WAVE, 20))[:9000], "flac", "truncated: its last frame"),
    "flac with a damaged middle": (
        lambda: sound("flac", wave=np.tile(WAVE, 20))[:9000] + bytes(99) + sound("flac", wave=np.tile(WAVE, 20))[9099:],
        "flac", "the audio is damaged",
    ),
    "NaN": (lambda: sound("wav", "FLOAT", np.append(WAVE, np.nan)), "wav", "NaN or infinite"),
    "infinite": (lambda: sound("wav", "FLOAT", np.append(WAVE, np.inf)), "wav", "NaN or infinite"),
    "minus infinity in one channel": (
        lambda: sound("wav", "FLOAT", np.stack([WAVE, np.full(T, -np.inf, np.float32)], 1)), "wav", "NaN or infinite",
    ),
    "16-bit numbers as floats": (lambda: sound("wav", "FLOAT", WAVE * 32768), "wav", "divide by 32768"),
    "1e30": (lambda: sound("wav", "FLOAT", WAVE * 1e30), "wav", "reaches"),
    "rate 0": (lambda: wav_header(rate=0), "wav", "not an audio file|sample_rate 0"),
    "rate 1": (lambda: wav_header(rate=1), "wav", "sample_rate is 1; expected"),
    "rate of 4 GHz": (lambda: wav_header(rate=4_000_000_000), "wav", "not an audio file|sample_rate"),
    "no channels": (lambda: wav_header(channels=0), "wav", "not an audio file"),
    "65535 channels": (lambda: wav_header(channels=65535), "wav", "not an audio file"),
    "17 bits of an unknown kind": (lambda: wav_header(bits=17, kind=9999), "wav", "not an audio file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def codec():
    return cached_codec("symmetric")


@pytest.mark.parametrize("name", GOOD_AUDIO)
def test_valid_audio_forms_are_accepted(codec, name):
    audio, lengths, rate = GOOD_AUDIO[name]
    tokens, tokens_len = codec.encode(audio, lengths, rate)
    expected, _ = codec.encode(PAIR)
    assert torch.equal(tokens, expected[: len(tokens)]) and tokens_len.tolist() == [3] * len(tokens)
    assert not tokens.requires_grad and tokens.dtype == torch.int32


@pytest.mark.parametrize("name", slow_if(BAD_AUDIO, ["fake"]))
def test_invalid_audio_raises_and_names_the_value(codec, name):
    audio, lengths, rate, message = BAD_AUDIO[name]
    if audio is FAKE:
        audio = FakeTensorMode().from_tensor(torch.from_numpy(WAVE))
    with pytest.raises(AudioError, match=message) as caught:
        codec.encode(audio, lengths, rate)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GOOD_TOKENS)
def test_valid_token_forms_are_accepted(codec, name):
    audio, audio_len = codec.decode(GOOD_TOKENS[name])
    assert torch.equal(audio, codec.decode(torch.from_numpy(TOKENS))[0]) and audio_len.tolist() == [5120, 5120]


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_invalid_tokens_raise_and_name_the_value(codec, name):
    tokens, lengths, samples, message = BAD_TOKENS[name]
    with pytest.raises(TokensError, match=message) as caught:
        codec.decode(tokens, lengths, samples)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GOOD_FILES)
def test_audio_files_of_every_kind_are_encoded(codec, tmp_path, name):
    make, suffix, samples = GOOD_FILES[name]
    path = tmp_path / f"a.{suffix}".rstrip(".")
    path.write_bytes(make())
    assert abs(codec.encode_file(path, tmp_path / "out.lfr") - samples) <= 1
    with TokenReader(tmp_path / "out.lfr") as reader:
        assert abs(reader.num_samples - samples) <= 1


@pytest.mark.parametrize("name", BAD_FILES)
def test_other_files_are_refused_by_name_and_leave_nothing(codec, tmp_path, name):
    make, suffix, message = BAD_FILES[name]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(make())
    with pytest.raises(NemoLfrError, match=message) as caught:
        codec.encode_file(path, tmp_path / "out.lfr")
    assert str(path) in str(caught.value) and list(tmp_path.iterdir()) == [path]


def test_the_tables_have_at_least_150_rows():
    assert (
        len(GOOD_AUDIO) + len(BAD_AUDIO) + len(GOOD_TOKENS) + len(BAD_TOKENS) + len(GOOD_FILES) + len(BAD_FILES) >= 150
    )


class _Series:
    """Object like a pandas Series whose index does not start at 0."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: int) -> float:
        return {index + 5: value for index, value in enumerate(self.values)}[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.values, dtype)


@pytest.mark.parametrize("form", [_Series, lambda clip: clip.astype(np.longdouble)], ids=["series", "longdouble"])
def test_audio_in_less_common_arrays_is_encoded(form):
    codec = cached_codec("two_stages")
    clip = np.linspace(-0.5, 0.5, 300, dtype=np.float32)
    assert torch.equal(codec.encode(form(clip))[0], codec.encode(clip)[0])


def test_messages_show_the_value_that_was_passed():
    codec = cached_codec("two_stages")
    with pytest.raises(AudioError, match=r"audio_len\[0\] is 9223372036854775808; pass a value between 0 and 300"):
        codec.encode(np.zeros((2, 300), np.float32), [2**63, 1])
    tokens = np.zeros((8, 4), np.uint64)
    tokens[2, 3] = 2**64 - 7
    with pytest.raises(TokensError, match="utterance 0 contains the token 18446744073709551609"):
        codec.decode(tokens)
