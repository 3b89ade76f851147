"""Autotuner: benchmarks candidate kernels per shape and keeps the fastest one that matches the reference."""

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch

from nemo_lfr.errors import shorten

logger = logging.getLogger("nemo_lfr")

Candidate = Callable[[], torch.Tensor]

# Seconds of work beside which the time to launch it is nothing.
LONG = 2e-3
# How far a candidate may be from the first, relative to the largest result: a few roundings of its type.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 4e-3}


@dataclass
class Autotuner:
    """The candidates chosen so far, by what was to be computed.

    Attributes:
        benchmark: returns the seconds that a candidate takes.
        chosen: name of the candidate for each key.
        measured: seconds of each candidate that agreed, by key; for reports.
        force: use the candidate of this name wherever there is one, unmeasured; for benchmarks and tests.
    """

    benchmark: Callable[[Candidate], float]
    chosen: dict[Hashable, str] = field(default_factory=dict)
    measured: dict[Hashable, dict[str, float]] = field(default_factory=dict)
    force: str | None = None
    _warned: set[str] = field(default_factory=set)

    def run(self, key: Hashable, candidates: Mapping[str, Candidate], ends: torch.Tensor) -> torch.Tensor:
        """Return the result of the chosen candidate.

        Args:
            key: kind, shapes and type of what is computed.
            candidates: by name, each returning [B, T, H]; the first is the reference, and serves where nothing can be
                measured.
            ends: items of each example that the candidates must agree on, [B].
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
        """Return the name of the fastest candidate that agrees with the first."""
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
                reason = f"is off by {error:.3g}, more than {bound:.3g}"
            except Exception as failure:  # compilers and drivers raise what they like
                reason = f"fails ({type(failure).__name__}: {shorten(failure)})"
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("%s %s for %s; it is not used there.", name, reason, key)
        self.measured[key] = seconds
        return min(seconds, key=lambda name: seconds[name])


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def gpu_seconds(candidate: Candidate, repeats: int = 5, rounds: int = 3) -> float:
    """Return a candidate's seconds on the GPU; short ones in a captured graph, so that launching does not count."""

    def fastest(run: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        return best

    candidate()
    alone = fastest(candidate)
    if alone > LONG:
        return alone
    try:
        return fastest(_captured(candidate, repeats)) / repeats
    except RuntimeError:  # it cannot be captured, and then it will not be
        return alone


def _captured(candidate: Candidate, repeats: int) -> Callable[[], object]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
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
    return graph.replay
