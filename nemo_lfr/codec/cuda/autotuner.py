"""Autotuner that chooses among several implementations of the same layer (the candidates).

For each shape, the autotuner measures all candidates once, and keeps the fastest one whose result matches the
reference.
"""

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_lfr.errors import shorten

logger = logging.getLogger("nemo_lfr")

_CUDA: Any = torch.cuda
Candidate = Callable[[], torch.Tensor]

# A candidate that runs longer than this (seconds) has negligible launch overhead.
LONG_RUN = 2e-3
# Largest allowed difference from the reference, relative to the reference's largest magnitude: a few rounding errors.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 4e-3}


@dataclass
class Autotuner:
    """Autotuner with a table of the fastest candidate for each layer and shape.

    Attributes:
        benchmark: function that runs a candidate several times and returns its run time in seconds.
        chosen: dict from each `key` passed to `run` to the name of the fastest candidate.
        measured: `measured[key][name]` is the run time in seconds of a candidate that matches the reference.
        force: name of a candidate to use wherever it exists, without measuring; for benchmarks and tests.
    """

    benchmark: Callable[[Candidate], float]
    chosen: dict[Hashable, str] = field(default_factory=dict)
    measured: dict[Hashable, dict[str, float]] = field(default_factory=dict)
    force: str | None = None
    _warned: set[str] = field(default_factory=set)

    def run(self, key: Hashable, candidates: Mapping[str, Candidate], ends: torch.Tensor) -> torch.Tensor:
        """Return the result of the fastest candidate. The first call with `key` measures all candidates.

        Args:
            key: value that identifies the kind, the shapes and the dtype of the layer.
            candidates: implementations by name, each of which returns [B, T, H]. The first one is the reference. It is
                used for a new `key` while a CUDA graph is captured.
            ends: number of valid time steps in each example, [B]. Only these are compared with the reference.
        """
        first = next(iter(candidates))
        if self.force is not None or len(candidates) == 1:
            return candidates.get(self.force or first, candidates[first])()
        if key not in self.chosen:
            if _is_capturing():
                return candidates[first]()
            self.chosen[key] = self._measure(key, candidates, ends)
        return candidates.get(self.chosen[key], candidates[first])()

    def _measure(self, key: Hashable, candidates: Mapping[str, Candidate], ends: torch.Tensor) -> str:
        """Return the name of the fastest candidate that matches the reference."""
        first, *others = candidates
        reference = candidates[first]()
        beyond = torch.arange(reference.shape[1], device=reference.device) >= ends[:, None]
        expected = reference.float().masked_fill(beyond[..., None], 0)
        bound = TOLERANCES[reference.dtype] * float(expected.abs().max())
        seconds = {first: self.benchmark(candidates[first])}
        for name in others:
            try:
                result = candidates[name]().float().masked_fill(beyond[..., None], 0)
                error = float((result - expected).abs().max())
                if error <= bound:
                    seconds[name] = self.benchmark(candidates[name])
                    continue
                reason = f"differs from the reference by {error:.3g}, more than {bound:.3g}"
            except Exception as failure:  # compilers and drivers may raise anything
                reason = f"fails ({type(failure).__name__}: {shorten(failure)})"
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("GPU kernel %r %s for %s; another kernel is used instead.", name, reason, key)
        self.measured[key] = seconds
        return min(seconds, key=lambda name: seconds[name])


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def gpu_seconds(candidate: Candidate, repeats: int = 5, rounds: int = 3) -> float:
    """Return the run time of a candidate on the GPU in seconds, the shortest of several measurements.

    A fast candidate is timed in a CUDA graph if possible, so that launch overhead is not included.

    Args:
        candidate: function to measure.
        repeats: number of runs in the CUDA graph.
        rounds: number of measurements.
    """

    def fastest(run: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(rounds):
            begin, end = (_CUDA.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        return best

    candidate()
    alone = fastest(candidate)
    if alone > LONG_RUN:
        return alone
    try:
        return fastest(_captured(candidate, repeats)) / repeats
    except RuntimeError:  # not capturable in a CUDA graph, so the launch overhead also occurs in normal use
        return alone


def _captured(candidate: Candidate, repeats: int) -> Callable[[], object]:
    graph, stream = _CUDA.CUDAGraph(), _CUDA.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(repeats):
                candidate()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    replay: Callable[[], object] = graph.replay
    return replay
