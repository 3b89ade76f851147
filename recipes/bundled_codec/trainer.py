"""Run training updates of all networks. On a GPU, an update is captured as a CUDA graph."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.losses import spread
from recipes.bundled_codec.data import SpeechSegments
from recipes.bundled_codec.discriminators import Adversary
from recipes.bundled_codec.losses import ReconstructionTerms
from recipes.bundled_codec.model import Generator
from recipes.bundled_codec.optimizer import GeneratorOptimizer

EAGER_UPDATES = 3  # number of updates before the capture, in which libraries choose kernels and allocate memory


class Stopwatch:
    """Stopwatch that measures the time of named sections of an update.

    Args:
        enabled: whether to measure. Pass False on a GPU, where kernels run later than they are launched.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the duration of a `with` block to the time of the section named `part`."""
        began = time.perf_counter()
        yield
        if self.enabled:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def pop(self) -> dict[str, float]:
        """Return the time of each section in seconds, and reset all times."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class Trainer:
    """Trainer of a generator and, if they are added, of discriminators.

    The optimizer updates fp32 weights. The network runs in `dtype`, with a copy of the weights. Values that change
    between updates (segments and learning rates) are in tensors with fixed addresses, as CUDA graphs require.

    Args:
        generator: generator on its final device. Its weights are changed to channels-last layout in place.
        segments: training speech, on the same device.
        terms: losses, on the same device.
        batch_size: number of segments per update.
        dtype: dtype in which the network and Muon compute.
    """

    def __init__(
        self,
        generator: Generator,
        segments: SpeechSegments,
        terms: ReconstructionTerms,
        batch_size: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.generator, self.segments, self.terms, self.dtype = generator, segments, terms, dtype
        self.optimizer = GeneratorOptimizer(list(generator.parameters()), dtype=dtype)
        self.device = self.optimizer.lr.device
        self.adversary: Adversary | None = None
        self.stopwatch = Stopwatch(enabled=self.device.type == "cpu")
        self._fast = copy.deepcopy(generator).to(dtype)
        self._parameters: list[torch.Tensor] = list(generator.parameters())
        self._fast_parameters: list[torch.Tensor] = list(self._fast.parameters())
        self._batch = torch.zeros(batch_size, segments.length, device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_left = EAGER_UPDATES
        self._result: dict[str, torch.Tensor] = {}

    def add_adversary(self, adversary: Adversary) -> None:
        """Use and train discriminators in all later updates."""
        self.adversary = adversary
        self._forget_graph()

    def step(self, lr: float, seed: Sequence[int]) -> dict[str, torch.Tensor]:
        """Train on one batch.

        Args:
            lr: learning rate of the generator.
            seed: seed of the batch.

        Returns:
            A dict of tensors: the loss terms by name, "gradient_norm", and "tokens" [C, B, T_encoded]. The next call
            may overwrite these tensors.
        """
        self._batch.copy_(self.segments.batch(len(self._batch), seed))
        self.optimizer.set_rate(lr)
        if self.adversary is not None:
            if self.adversary.updates == self.adversary.config.learn_alone:
                self._forget_graph()  # from this update on, the generator uses the gradients of the discriminators
            self.adversary.begin_update()
        result = self._update() if self.device.type == "cpu" else self._update_on_gpu()
        if self.adversary is not None:
            self.adversary.updates += 1
        return result

    def _forget_graph(self) -> None:
        self._graph, self._eager_left = None, EAGER_UPDATES

    def _update_on_gpu(self) -> dict[str, torch.Tensor]:
        if self._graph is None and self._eager_left:
            self._eager_left -= 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = self._update()
            torch.cuda.current_stream().wait_stream(side)
            return result
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._update()
        self._graph.replay()
        return self._result

    def _update(self) -> dict[str, torch.Tensor]:
        with self.stopwatch("network"):
            with torch.no_grad():
                torch._foreach_copy_(self._fast_parameters, self._parameters)
            output, encoded, tokens = self._fast(self._batch.to(self.dtype))
        heard = output.detach().requires_grad_()
        real, gen = Spectra(self._batch), Spectra(heard)
        with self.stopwatch("losses"):
            terms = self.terms(real, gen)
            total = self.terms.total(terms)
            # Retain the graph for the discriminators, which use the same spectra.
            (gradient,) = torch.autograd.grad(total, heard, retain_graph=self.adversary is not None)
        if self.adversary is not None:
            with self.stopwatch("discriminators"):
                judged, other = self._judge(self.adversary, real, gen)
            terms |= judged
            if other is not None:
                terms["adversarial_share"] = other.norm() / gradient.norm().clamp_min(1e-12)
                gradient = gradient + other
        terms["variance"] = spread(encoded)
        with self.stopwatch("network"):
            ends = [output, self.terms.config.variance * terms["variance"]]
            grads = torch.autograd.grad(ends, self._fast_parameters, [gradient, torch.ones_like(ends[1])])
        with self.stopwatch("optimizer"):
            terms["gradient_norm"] = self.optimizer.step(grads)
        return {name: term.detach() for name, term in terms.items()} | {"tokens": tokens}

    @staticmethod
    def _judge(
        adversary: Adversary, real: Spectra, gen: Spectra
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Update the discriminators with segments of a batch.

        These are the first `adversary.config.batch_size` segments, or all if this size is not set.

        Returns:
            The loss terms and the gradient that `Adversary.step` returns for these segments. A gradient is
            extended with zeros for the other segments.
        """
        size = adversary.config.batch_size or len(real.audio)
        if size >= len(real.audio):
            return adversary.step(real, gen, adversary.is_heard)
        part = gen.audio[:size].detach().requires_grad_()
        terms, gradient = adversary.step(Spectra(real.audio[:size]), Spectra(part), adversary.is_heard)
        if gradient is None:
            return terms, None
        return terms, torch.cat([gradient, gradient.new_zeros(len(real.audio) - size, gradient.shape[1])])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer and the discriminators."""
        adversary = None if self.adversary is None else self.adversary.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "adversary": adversary}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state dict. If it contains discriminators, call `add_adversary` first."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.adversary is not None and state["adversary"] is not None:
            self.adversary.load_state_dict(state["adversary"])
