"""Which of several ways to compute the same thing is fastest here: measured once, and only among those that agree."""

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch

from nemo_lfr.errors import clip

logger = logging.getLogger("nemo_lfr")

Way = Callable[[], torch.Tensor]

# Seconds of work beside which the time to launch it is nothing.
LONG = 2e-3
# How far a way may be from the first, relative to the largest result: a few roundings of its type.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 4e-3}


@dataclass
class Choices:
    """The ways chosen so far, by what was to be computed.

    Attributes:
        seconds: measures a way.
        chosen: name of the way for each key.
        measured: seconds of each way that agreed, by key; for reports.
        only: use this way wherever it is offered, unmeasured; for benchmarks and tests.
    """

    seconds: Callable[[Way], float]
    chosen: dict[Hashable, str] = field(default_factory=dict)
    measured: dict[Hashable, dict[str, float]] = field(default_factory=dict)
    only: str | None = None
    _warned: set[str] = field(default_factory=set)

    def run(self, key: Hashable, ways: Mapping[str, Way], ends: torch.Tensor) -> torch.Tensor:
        """What the chosen way gives.

        Args:
            key: kind, shapes and type of what is computed.
            ways: to [B, T, H], by name; the first is the reference, and serves where nothing can be measured.
            ends: items of each example that the ways must agree on, [B].
        """
        first = next(iter(ways))
        if self.only is not None or len(ways) == 1:
            return ways.get(self.only or first, ways[first])()
        if key not in self.chosen:
            if _is_capturing():
                return ways[first]()
            self.chosen[key] = self._measure(key, ways, ends)
        return ways.get(self.chosen[key], ways[first])()

    def _measure(self, key: Hashable, ways: Mapping[str, Way], ends: torch.Tensor) -> str:
        first, *others = ways
        reference = ways[first]()
        beyond = torch.arange(reference.shape[1], device=reference.device) >= ends[:, None]
        expected = reference.float().masked_fill(beyond[..., None], 0)
        bound = TOLERANCES[reference.dtype] * float(expected.abs().max())
        took = {first: self.seconds(ways[first])}
        for name in others:
            try:
                found = ways[name]().float().masked_fill(beyond[..., None], 0)
                error = float((found - expected).abs().max())
                if error <= bound:
                    took[name] = self.seconds(ways[name])
                    continue
                reason = f"is off by {error:.3g}, more than {bound:.3g}"
            except Exception as failure:  # compilers and drivers raise what they like
                reason = f"fails ({type(failure).__name__}: {clip(failure)})"
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("%s %s for %s; it is not used there.", name, reason, key)
        self.measured[key] = took
        return min(took, key=lambda name: took[name])


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def gpu_seconds(way: Way, repeats: int = 5, rounds: int = 3) -> float:
    """Seconds of a way on the GPU alone: short ones from a captured graph, so that launching does not count."""

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

    way()
    alone = fastest(way)
    if alone > LONG:
        return alone
    try:
        return fastest(_captured(way, repeats)) / repeats
    except RuntimeError:  # it cannot be captured, and then it will not be
        return alone


def _captured(way: Way, repeats: int) -> Callable[[], object]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(repeats):
                way()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    return graph.replay
