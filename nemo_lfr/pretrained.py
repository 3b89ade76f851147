"""`load()`: open the bundled codec, a local checkpoint, or a repository on the Hugging Face Hub."""

import logging
import multiprocessing
import os
from typing import TYPE_CHECKING, Any, Literal, overload

from nemo_lfr.bundled import LFR, bundled_checkpoint, bundled_quality
from nemo_lfr.codec.backends import open_backend
from nemo_lfr.codec.codec import Codec
from nemo_lfr.io.hub import find_checkpoint as find_checkpoint  # earlier versions had this function here

if TYPE_CHECKING:
    import numpy as np
    import torch

logger = logging.getLogger(__name__)

embedded_checkpoint = bundled_checkpoint  # name of this function in earlier versions


@overload
def load(
    source: str | os.PathLike[str] | None = ...,
    device: "str | torch.device | None" = ...,
    precision: str = ...,
    *,
    backend: Literal["torch"] | None = ...,
) -> "Codec[torch.Tensor]": ...


@overload
def load(
    source: str | os.PathLike[str] | None = ...,
    device: "str | torch.device | None" = ...,
    precision: str = ...,
    *,
    backend: Literal["onnx"],
) -> "Codec[np.ndarray]": ...


@overload
def load(
    source: str | os.PathLike[str] | None = ...,
    device: "str | torch.device | None" = ...,
    precision: str = ...,
    *,
    backend: str,
) -> Codec[Any]: ...


def load(
    source: str | os.PathLike[str] | None = None,
    device: "str | torch.device | None" = None,
    precision: str = "fp32",
    *,
    backend: str | None = None,
) -> Codec[Any]:
    """Load a codec for inference.

    The keys and shapes of a checkpoint are validated immediately. The weights of the encoder and the decoder are
    loaded on first use; if they are damaged, CheckpointError is raised then. If the bundled codec is loaded, a message
    at level WARNING is logged with its measured quality.

    Args:
        source: local path, or name of a repository on the Hugging Face Hub; None for the bundled codec. A path may
            refer to a `.nemo` file, a Lightning `.ckpt` file, a folder with `config.json` and `model.safetensors`, or
            a folder that `nemo-lfr export onnx` wrote.
        device: device to run on, such as "cpu" or "cuda"; default: a GPU if there is one, else the CPU.
        precision: "fp32", "tf32", "bf16" or "fp16"; see `nemo_lfr.codec.torch_backend.TorchBackend`.
        backend: "torch", "onnx", or the name of another registered backend (`nemo_lfr.codec.backends`). Default: the
            backend that accepts `source`, else "torch". With "onnx", torch is not imported.

    Returns:
        The codec, ready to encode and decode.

    Raises:
        CheckpointError: if the checkpoint cannot be found or read.
        NemoLfrError: for an unknown device, precision or backend, or a backend that cannot open `source`.
        MissingExtraError: if PyTorch, or ONNX Runtime for ONNX files, is not installed.
    """
    codec = Codec(open_backend(source, device, precision, backend))
    # Not in worker processes, which would repeat the message of the main process.
    if source is None and multiprocessing.parent_process() is None:
        text = "using the bundled codec (%s); for NVIDIA's codec, whose license is non-commercial, load %s"
        logger.warning(text, bundled_quality(), LFR)
    return codec
