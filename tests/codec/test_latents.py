"""Tests that the vectors before and after FSQ match the tokens, for all batches and windows."""

import pytest
import torch

from nemo_lfr.codec.backend import ModuleLimits, NumpyBackend
from nemo_lfr.codec.codec import Codec
from nemo_lfr.errors import AudioError, NemoLfrError
from nemo_lfr.frames import Context
from nemo_lfr.spec import CodecSpec
from tests.models import build_codec, cached_codec, same_parts, speech_like

RATE = 22050
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nano", "causal"])
def test_they_fit_the_tokens_and_the_quantizer(kind):
    codec = cached_codec(kind)
    audio, lengths = torch.stack([speech_like(9000), speech_like(9000, seed=1)]), [9000, 5000]
    encoded, codes, num_frames = codec.encode_latents(audio, lengths, RATE)
    tokens, tokens_len = codec.encode(audio, lengths, RATE)
    dim = codec.num_codebooks * len(codec.levels)
    assert encoded.shape == codes.shape == (2, dim, tokens.shape[2])
    assert encoded.dtype == codes.dtype == torch.float32 and not encoded.requires_grad
    assert torch.equal(num_frames, tokens_len)
    for row, frames in enumerate(num_frames.tolist()):
        assert not encoded[row, :, frames:].any() and not codes[row, :, frames:].any()
        ids = codec.quantizer.codes_to_indices(codes[row, None, :, :frames])
        assert torch.equal(ids[0], tokens[row, :, :frames])
        assert torch.equal(codec.quantizer(encoded[row, None, :, :frames])[0][0], codes[row, :, :frames])
        alone = codec.encode_latents(audio[row, : lengths[row]], sample_rate=RATE).encoded[0]
        torch.testing.assert_close(alone, encoded[row, :, :frames], **CLOSE)


@pytest.mark.slow
def test_windows_and_hooks_do_not_change_them():
    codec = build_codec("nano")
    audio = speech_like(20 * 1024)
    whole = codec.encode_latents(audio, sample_rate=RATE)
    windows = same_parts(codec, chunk_frames=3).encode_latents(audio, sample_rate=RATE)
    torch.testing.assert_close(windows.encoded, whole.encoded, **CLOSE)
    codec.encoder.register_forward_hook(lambda module, inputs, output: None)
    torch.testing.assert_close(codec.encode_latents(audio, sample_rate=RATE).encoded, whole.encoded, **CLOSE)


def test_an_empty_clip_has_none():
    codec = cached_codec("nano")
    encoded, codes, num_frames = codec.encode_latents(torch.zeros(0), sample_rate=RATE)
    assert encoded.shape == codes.shape == (1, codec.num_codebooks * len(codec.levels), 0)
    assert num_frames.tolist() == [0]


class TokensOnly(NumpyBackend):
    """A backend without latents."""

    name = "tokens only"
    spec = CodecSpec(RATE, 1024, (8, 7), 2)
    encoder = decoder = ModuleLimits(Context(0, 0), 1)


@pytest.mark.slow
def test_bad_input_and_backends_without_latents_are_errors():
    with pytest.raises(NemoLfrError, match="only returns tokens, not latents; load the checkpoint"):
        Codec(TokensOnly()).encode_latents(torch.zeros(9000))
    codec = build_codec("nano")
    with pytest.raises(AudioError, match=r"not finite|NaN"):
        codec.encode_latents(torch.full((9000,), float("nan")), sample_rate=RATE)
    with torch.no_grad():
        next(codec.encoder.parameters()).fill_(float("inf"))
    with pytest.raises(NemoLfrError, match="clip 0"):
        codec.encode_latents(speech_like(9000), sample_rate=RATE)
