"""CUDA graphs for small batches, whose run time is dominated by kernel launches.

A graph is captured when a shape occurs for the second time. It can be replayed for all later batches of this shape,
whatever the lengths of the clips in them. Graphs are dropped when the weights of their network change or move to
another device.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nemo_lfr.codec.ambient import convolutions, reference_state
from nemo_lfr.codec.cuda.plan import PRECISIONS, Plan, find_kernels
from nemo_lfr.errors import shorten
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.finite import quantize
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from nemo_lfr.modules.weights import DerivedForms

logger = logging.getLogger("nemo_lfr")

Quantizer = FiniteScalarQuantizer | GroupFiniteScalarQuantizer
Function = Callable[..., torch.Tensor]
_CUDA: Any = torch.cuda

# Largest number of frames in a batch that runs as a graph. In larger batches, kernels take longer than their launches.
GRAPH_FRAMES = 2048
# Maximum number of shapes, and thus of graphs, per network; the least recently used one is dropped first.
MAX_GRAPHS = 32


@dataclass
class Captured:
    """CUDA graph with its input and output tensors.

    Attributes:
        inputs: tensors that the graph reads.
        output: tensor that the graph writes.
        replay: function that runs the graph.
    """

    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor
    replay: Callable[[], None]


Capture = Callable[[Function, tuple[torch.Tensor, ...]], Captured]


class CudaCapture:
    """Callable object that captures function calls as CUDA graphs. The graphs share one memory pool.

    Sharing is safe because only one graph runs at a time, and its output is copied before the next graph runs.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, function: Function, inputs: tuple[torch.Tensor, ...]) -> Captured:
        """Capture a call of `function` on the current device."""
        if self._stream is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), _CUDA.Stream()
        held = tuple(value.clone() for value in inputs)
        # Warm up on a side stream first: libraries allocate memory and choose kernels in their first run.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function(*held)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = function(*held)
        return Captured(held, output, graph.replay)


class GraphCache:
    """Cache of CUDA graphs, one for each function and shape of the inputs.

    The first call of a function with a shape runs without a graph. The second call captures a graph, which later calls
    replay.

    Args:
        capture: function that captures a call of a function as a graph.
        capacity: maximum number of entries. The least recently used entry is dropped first.
    """

    def __init__(self, capture: Capture, capacity: int = MAX_GRAPHS) -> None:
        self._capture = capture
        self._capacity = capacity
        self._graphs: OrderedDict[Hashable, Captured | None] = OrderedDict()  # None: seen once
        self._failed = False

    def __len__(self) -> int:
        """Return the number of graphs."""
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, key: Hashable, function: Function, *inputs: torch.Tensor) -> torch.Tensor:
        """Return `function(*inputs)` as a new tensor.

        Args:
            key: value that identifies the function. The key and the shapes and dtypes of the inputs select the graph.
            function: function that only uses tensors on the GPU.
            inputs: tensors on the GPU.
        """
        if self._failed:
            return function(*inputs)
        key = (key, *((value.shape, value.dtype) for value in inputs))
        if key not in self._graphs:
            self._keep(key, None)
            return function(*inputs)
        graph = self._graphs[key]
        if graph is None:
            try:
                graph = self._capture(function, inputs)
            except RuntimeError as reason:  # out of memory, or an operation that cannot be captured
                self._failed = True
                self._graphs.clear()
                logger.warning(
                    "CUDA graphs cannot be used (%s); kernels are launched one by one, which is slower for small "
                    "batches.",
                    shorten(reason),
                )
                return function(*inputs)
        self._keep(key, graph)
        for held, value in zip(graph.inputs, inputs, strict=True):
            held.copy_(value)
        graph.replay()
        return graph.output.clone()

    def _keep(self, key: Hashable, graph: Captured | None) -> None:
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        while len(self._graphs) > self._capacity:
            self._graphs.popitem(last=False)


class CudaModule:
    """Encoder or decoder with its quantizer, prepared for one precision and one device.

    Args:
        network: encoder or decoder. The weights of its convolutions are copied.
        quantizer: the quantizer, which is not copied.
        precision: one of `PRECISIONS`.
        device: device of the network and the quantizer.
        capture: function that captures graphs; default: a new `CudaCapture`.
    """

    def __init__(
        self,
        network: HiFiGANEncoder | HiFiGANDecoder,
        quantizer: Quantizer,
        precision: str,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self.plan = Plan(network, PRECISIONS[precision], find_kernels(device))
        self.quantizer = quantizer
        self.graphs = GraphCache(capture or CudaCapture())
        self._min_frames = network.min_frames
        self._encodes = isinstance(network, HiFiGANEncoder)
        self._lock = threading.Lock()
        self._finished: torch.cuda.Event | None = None

    def __call__(self, inputs: torch.Tensor, num_frames: list[int], width: int) -> torch.Tensor:
        """Encode or decode a batch.

        Args:
            inputs: audio [B, width * samples_per_frame], or tokens [B, C, width].
            num_frames: valid frames in each example, at least 1.
            width: padded width in frames, at least `min_frames`.

        Returns:
            Tokens [B, C, width], or audio [B, width * samples_per_frame].
        """
        state = reference_state(inputs.device)
        with self._lock, self._turn(inputs.device), state, convolutions(self.plan.precision.tf32):
            frames = torch.tensor(num_frames, device=inputs.device)
            function = self._encode if self._encodes else self._decode
            if len(num_frames) * width > GRAPH_FRAMES:
                return function(inputs, frames)
            return self.graphs.run(width, function, inputs, frames)

    @contextmanager
    def _turn(self, device: torch.device) -> Iterator[None]:
        """Make the current CUDA stream wait for the previous call, which may have used another stream.

        Calls must not overlap on the GPU, because graphs share memory.
        """
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._finished is not None:
                stream.wait_event(self._finished)
            yield
            self._finished = stream.record_event()

    def _encode(self, audio: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        encoded = self.plan(audio.unsqueeze(2), num_frames.clamp(min=self._min_frames))
        return quantize(self.quantizer, encoded.transpose(1, 2))

    def _decode(self, tokens: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        codes = self.quantizer.decode_unchecked(tokens.transpose(0, 1))
        silent = torch.arange(tokens.shape[2], device=tokens.device) >= num_frames[:, None]
        codes = codes.masked_fill(silent[:, None], 0)
        return self.plan(codes.transpose(1, 2), num_frames.clamp(min=self._min_frames)).squeeze(2)


_MODULES: DerivedForms[CudaModule] = DerivedForms()


def cuda_module(
    network: HiFiGANEncoder | HiFiGANDecoder, quantizer: Quantizer, precision: str, device: torch.device
) -> CudaModule:
    """Return the `CudaModule` of a network; a new one is built if the network's weights have changed.

    The arguments are those of `CudaModule`.
    """
    return _MODULES.get(network, precision, lambda: CudaModule(network, quantizer, precision, device), quantizer)
