"""Tests that the CPU inference network equals the modules, and that batching does not change an example."""

import pytest
import torch

from nemo_lfr import frames
from nemo_lfr.codec.backend import Batching
from nemo_lfr.codec.cpu import malloc
from nemo_lfr.codec.cpu import network as inference
from tests.models import cached_codec, speech_like
from tests.tiers import ALL_KINDS, slow_except


@pytest.fixture(params=ALL_KINDS)
def codec(request):
    return cached_codec(request.param)


def frames_of(codec, count: int, seed: int) -> torch.Tensor:
    """Return dequantized frames [1, D, count]."""
    tokens = torch.randint(
        codec.codebook_size, (codec.num_codebooks, 1, count), generator=torch.Generator().manual_seed(seed)
    )
    return codec.quantizer.decode(tokens)


@pytest.fixture(params=slow_except([inference.PIECE, 1], inference.PIECE), ids=["whole", "pieces"])
def piece(request, monkeypatch):
    """Process the signal in residual layers at once, or in the smallest pieces."""
    monkeypatch.setattr(inference, "PIECE", request.param)


@pytest.mark.slow
@torch.no_grad()
def test_cpu_network_equals_modules(codec, piece):
    count = max(codec.encoder.min_frames, codec.decoder.min_frames) + 9
    audio = speech_like(2 * count * codec.samples_per_frame).reshape(2, -1)
    expected = codec.encoder.encode_frames(audio)
    found = inference.encode_frames(codec.encoder, audio)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5 * (1 + expected.abs().max())
    inputs = torch.cat([frames_of(codec, count, seed) for seed in range(2)])
    expected = codec.decoder.decode_frames(inputs)
    found = inference.decode_frames(codec.decoder, inputs)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_examples_of_different_lengths_equal_single_examples(codec, piece):
    least = max(codec.encoder.min_frames, codec.decoder.min_frames)
    lengths = [least + 7, least, least + 3, least + 12]
    width, frame = least + 12, codec.samples_per_frame
    audio = torch.randn(4, width * frame) / 10  # the padding of each example is noise too
    inputs = torch.randn(4, frames_of(codec, 1, 0).shape[1], width)
    clips = [speech_like(length * frame, seed=length) for length in lengths]
    codes = [frames_of(codec, length, length) for length in lengths]
    for row, length in enumerate(lengths):
        audio[row, : length * frame] = clips[row]
        inputs[row, :, :length] = codes[row]
    encoded = inference.encode_frames(codec.encoder, audio, lengths)
    decoded = inference.decode_frames(codec.decoder, inputs, lengths)
    for row, length in enumerate(lengths):
        alone = codec.encoder.encode_frames(clips[row][None])[0]
        assert (encoded[row, :, :length] - alone).abs().max() < 1e-5 * (1 + alone.abs().max())
        alone = codec.decoder.decode_frames(codes[row])[0]
        assert (decoded[row, : length * frame] - alone).abs().max() < 1e-5


@pytest.mark.slow
def test_padded_width_changes_no_token(monkeypatch):
    codec = cached_codec("symmetric")
    audio = speech_like(40_000)
    tokens, audio_back = codec.encode(audio)[0], None
    for step in (1, 5, 16):
        monkeypatch.setattr(type(codec.backend), "batching", Batching(pad_multiple=step))
        assert torch.equal(codec.encode(audio)[0], tokens)
        found = codec.decode(tokens)[0]
        assert audio_back is None or (found - audio_back).abs().max() < 1e-6
        audio_back = found


def test_malloc_is_trimmed_between_widths_and_periodically(monkeypatch):
    released = []
    monkeypatch.setattr(malloc, "trim_malloc", lambda: released.append(len(seen)))
    widths = [138, *[144] * 16, 131]
    windows = [(number, frames.Window(0, width, 0, width)) for number, width in enumerate(widths)]
    seen = []
    for window in malloc.trim_between_windows(windows):
        seen.append(window)  # noqa: PERF402  `trim_malloc` above sees it grow
    assert seen == windows
    assert released == [1, 8, 16, 17]


def test_malloc_functions_do_nothing_without_glibc(monkeypatch):
    malloc.configure_malloc()
    malloc.trim_malloc()
    monkeypatch.setattr(malloc, "_glibc", lambda: None)
    malloc.configure_malloc()
    malloc.trim_malloc()
