"""Tests that `weights_version` changes with every kind of write to a weight, and only then."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from nemo_lfr.codec.cuda.graphs import cuda_module
from nemo_lfr.modules import weights
from nemo_lfr.modules.weights import DerivedForms, checksum_once, weights_version
from tests.models import cached_codec, synthesize
from tests.reference import assert_same_tokens
from tests.tiers import slow_after

CPU = torch.device("cpu")


def weight_of(part: torch.nn.Module) -> torch.Tensor:
    return part.post_conv.conv.weight


def swap_two(part: torch.nn.Module) -> None:
    flat = weight_of(part).data.view(-1)
    flat[3], flat[1024] = flat[1024].clone(), flat[3].clone()


# Writes that PyTorch does not count.
WRITES: dict[str, Callable[[torch.nn.Module], object]] = {
    "data, all": lambda part: weight_of(part).data.mul_(1.1),
    "data, one": lambda part: weight_of(part).data.view(-1)[-1:].add_(1e-3),
    "data, first of a bias": lambda part: part.pre_conv.conv.bias.data[:1].add_(1e-3),
    "data, one bit": lambda part: weight_of(part).data.view(torch.int32).view(-1)[7:8].bitwise_xor_(1),
    "sign": lambda part: weight_of(part).data.neg_(),
    "flipped kernels": lambda part: weight_of(part).data.copy_(weight_of(part).data.flip(2)),
    "permuted outputs": lambda part: weight_of(part).data.copy_(weight_of(part).data.roll(1, 0)),
    "permuted inputs": lambda part: weight_of(part).data.copy_(weight_of(part).data.roll(1, 1)),
    "two weights swapped": swap_two,
    "numpy view": lambda part: np.negative(weight_of(part).numpy(), out=weight_of(part).numpy()),
    "dlpack": lambda part: np.from_dlpack(weight_of(part).data).__setitem__((0, 0, 0), 0.5),
    "detached": lambda part: weight_of(part).detach().add_(0.1),
    "NaN": lambda part: weight_of(part).data.view(-1)[:1].fill_(float("nan")),
    "minus zero": lambda part: part.pre_conv.conv.bias.data.fill_(-0.0),
    "another layer": lambda part: setattr(part, "post_conv", copy.deepcopy(part.post_conv)),
}


@pytest.mark.parametrize("write", slow_after(4, [*WRITES]))
@pytest.mark.parametrize("kind", ["two_stages", "nano"])
def test_every_write_changes_the_version(kind, write):
    encoder = copy.deepcopy(cached_codec(kind)).encoder
    encoder.pre_conv.conv.bias.data.zero_()
    now = weights_version(encoder)
    before = now()
    assert now() == before
    WRITES[write](encoder)
    assert now() != before


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("size", [1, 3, 508, 1018, 1019, 70_000, 200_001])
def test_both_checksums_change_with_any_byte_of_any_type(dtype, size):
    rng = np.random.default_rng(size)
    values = torch.from_numpy(rng.integers(0, 2, size)).to(dtype)
    flat = values.view(torch.uint8)
    sums, device_sum = weights.checksums([values]), weights._device_checksum(values.view(torch.uint8))
    for place in {0, len(flat) // 2, len(flat) - 1}:
        flat[place] ^= 1
        assert weights.checksums([values]) != sums
        assert not torch.equal(weights._device_checksum(values.view(torch.uint8)), device_sum)
        flat[place] ^= 1
    assert weights.checksums([values]) == sums


# Places and factors of changes that a sum of products would miss.
CHANGES: dict[str, tuple[list[int] | slice, float]] = {
    "two signs": ([1, 3], -1),
    "two signs, far apart": ([1, 1 + 2 * weights.COLUMNS * weights.ROWS], -1),
    "every second sign": (slice(1, None, 2), -1),
    "all signs": (slice(None), -1),
    "two values doubled": ([5, 9], 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_checksums_change_if_several_values_change(dtype, change):
    places, factor = CHANGES[change]
    values = torch.rand(300_000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    sums, device_sum = weights.checksums([values]), weights._device_checksum(values)
    values[places] *= factor
    assert weights.checksums([values]) != sums
    assert not torch.equal(weights._device_checksum(values), device_sum)


@pytest.mark.slow
@pytest.mark.parametrize("write", slow_after(1, ["data, one", "numpy view", "permuted outputs"]))
def test_cuda_module_and_packed_weights_notice_uncounted_writes(write):
    codec = copy.deepcopy(cached_codec("symmetric"))
    wave = synthesize(0.5)
    first, tokens = cuda_module(codec.encoder, codec.quantizer, "fp32", CPU), codec.encode(wave)[0]
    assert cuda_module(codec.encoder, codec.quantizer, "fp32", CPU) is first
    before = codec.fingerprint
    WRITES[write](codec.encoder)
    assert cuda_module(codec.encoder, codec.quantizer, "fp32", CPU) is not first
    fresh = copy.deepcopy(codec)
    assert torch.equal(codec.encode(wave)[0], fresh.encode(wave)[0])
    assert codec.fingerprint == fresh.fingerprint != before
    assert write == "data, one" or not torch.equal(codec.encode(wave)[0], tokens)


@pytest.mark.slow
@pytest.mark.parametrize("has_weight_norm", slow_after(1, [False, True]))
@pytest.mark.parametrize("write", slow_after(1, ["data, one", "numpy view", "permuted outputs"]))
def test_streams_notice_uncounted_writes(write, has_weight_norm):
    codec = copy.deepcopy(cached_codec("two_stages"))
    wave = synthesize(0.05)

    def stream() -> tuple[np.ndarray, np.ndarray]:
        encoder, decoder = codec.stream_encoder(), codec.stream_decoder()
        tokens = np.concatenate([encoder.push(wave), encoder.flush()], axis=1)
        return tokens, np.concatenate([decoder.push(tokens), decoder.flush(len(wave))])

    stream()
    for part in (codec.encoder, codec.decoder):
        WRITES[write](part)
        if has_weight_norm:
            torch.nn.utils.parametrizations.weight_norm(part.pre_conv.conv)
    tokens, audio = stream()
    expected = codec.encode(wave)[0][0]
    assert_same_tokens(codec, wave, torch.from_numpy(tokens), expected)
    assert np.abs(audio - codec.decode(tokens, audio_len=[len(wave)])[0][0].numpy()).max() < 1e-5


def test_forms_are_built_once_for_each_key_and_again_after_a_write():
    codec = copy.deepcopy(cached_codec("two_stages"))
    forms: DerivedForms[object] = DerivedForms()

    def form(key="fp32", *others):
        return forms.get(codec.encoder, key, object, *others)

    first = form()
    assert form() is first and form("bf16") is not first and len(forms) == 1
    with_quantizer = form("fp32", codec.quantizer)
    assert with_quantizer is not first and form("fp32", codec.quantizer) is with_quantizer
    assert form("fp32", copy.deepcopy(codec.quantizer)) is not with_quantizer
    second = form()
    WRITES["data, one"](codec.encoder)
    assert form() is not second
    forms.drop(codec.encoder)
    forms.drop(codec.encoder)
    assert len(forms) == 0


@pytest.mark.slow
def test_checksum_once_reads_contents_once(monkeypatch):
    looks = []
    read = weights.checksums
    monkeypatch.setattr(weights, "checksums", lambda tensors: looks.append(1) or read(tensors))
    codec = copy.deepcopy(cached_codec("two_stages"))
    now = weights_version(codec.encoder)
    with checksum_once():
        before = now()
        assert now() == before and len(looks) == 1
        codec.encoder.pre_conv.conv.bias.add_(1.0)  # a write that PyTorch counts is noticed even there
        assert now() != before
    looks.clear()
    codec.chunk_frames = 5
    codec.encode(synthesize(0.1))
    assert len(looks) <= 2
