"""Tests of a codec inside functions that PyTorch traces, compiles or transforms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from nemo_lfr.errors import NemoLfrError
from tests.models import cached_codec, speech_like
from tests.tiers import slow_if

AUDIO = speech_like(5000)


class Tokens(torch.nn.Module):
    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return cached_codec().encode(audio)[0]


class Audio(torch.nn.Module):
    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return cached_codec().decode(cached_codec().encode(audio)[0])[0]


def in_fake_mode(function: Callable[..., Any]) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return function(AUDIO)


TRACERS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "vmap": lambda module: torch.func.vmap(module)(AUDIO[None]),
    "vmap around constants": lambda module: torch.func.vmap(lambda _: module(AUDIO))(torch.zeros(2)),
    "grad": lambda module: torch.func.grad(lambda audio: module(audio).sum())(AUDIO),
    "jvp": lambda module: torch.func.jvp(module, (AUDIO,), (AUDIO,)),
    "functionalize": lambda module: torch.func.functionalize(module)(AUDIO),
    "fake mode": in_fake_mode,
    "make_fx": lambda module: make_fx(module)(AUDIO),
    "torch.export": lambda module: torch.export.export(module, (AUDIO,)),
    "torch.jit.trace": lambda module: torch.jit.trace(module, (AUDIO,)),
}


COMPILER = ("fake mode", "make_fx", "torch.export")  # these import PyTorch's compiler, which takes seconds


@pytest.mark.parametrize("tracer", slow_if(TRACERS, COMPILER))
@pytest.mark.filterwarnings("ignore")
def test_tracers_raise_and_leave_the_codec_unchanged(tracer):
    expected = Tokens()(AUDIO)
    with pytest.raises(NemoLfrError, match=r"Call the codec outside"):
        TRACERS[tracer](Tokens())
    assert torch.equal(Tokens()(AUDIO), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_is_not_traced_with_the_lengths_of_one_example(part):
    module = getattr(cached_codec(), part)
    example = AUDIO[None] if part == "encoder" else torch.randn(1, 32, 20)
    with pytest.raises(NemoLfrError, match=r"within torch\.jit\.trace"):
        torch.jit.trace(module, (example, torch.tensor([example.shape[-1]])))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "backend"), [(Tokens, "eager"), (Audio, "aot_eager")])
def test_a_compiled_function_leaves_the_codec_out_of_its_graphs(kind, backend):
    expected = kind()(AUDIO)
    torch._dynamo.reset()
    compiled = torch.compile(kind(), backend=backend)
    assert all(torch.equal(compiled(audio), expected) for audio in (AUDIO, AUDIO.clone()))
    assert compiled(AUDIO[:3000]).shape[-1] < expected.shape[-1]
