"""Where checkpoints come from: the package itself, a file, or the Hugging Face Hub."""

import contextlib
import gc
import logging
import os
import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from nemo_lfr.errors import CheckpointError, MissingExtraError, NemoLfrError, clip
from nemo_lfr.locate import MODEL_SUFFIXES, locate_checkpoint, looks_local
from nemo_lfr.onnx import DECODER, ENCODER

if TYPE_CHECKING:
    import torch

    from nemo_lfr.codec.codec import Codec
    from nemo_lfr.onnx.codec import OnnxCodec

logger = logging.getLogger(__name__)

LFR = "nvidia/low-frame-rate-speech-codec-22khz"
# Names that a card or a tutorial uses, and the Hub repository each stands for.
ALIASES = {"audio_codec_low_frame_rate_22khz": LFR}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)
LICENCES = {LFR: "NVIDIA's NSCLv1 (research and other non-commercial use only)"}


def embedded_checkpoint() -> Path:
    """The small codec inside the package."""
    return Path(str(files("nemo_lfr") / "weights" / "default.nemo"))


def find_checkpoint(source: str | os.PathLike[str] | None, refresh: bool = False) -> Path:
    """A local `.nemo` for a path, a Hub id or a known name; `None` is the embedded codec.

    Args:
        source: what to look for; see `locate_checkpoint` for paths.
        refresh: download again what the Hub's cache already has.

    Raises:
        CheckpointError: if it is neither a file nor a repository that can be reached or is cached.
    """
    if source is None:
        return embedded_checkpoint()
    text = os.fspath(source)
    repository = ALIASES.get(text, text)
    path = os.path.expanduser(text)
    if os.path.lexists(path):
        return locate_checkpoint(path)
    if os.path.splitext(path)[1].lower() in MODEL_SUFFIXES or not HUB_ID.fullmatch(repository):
        raise CheckpointError(f"{clip(text, 300) or repr(text)}: no such file, and not a Hub id such as {LFR}.")
    if repository not in LICENCES and looks_local(text):
        # A repository may be used beside a folder that has its owner's name, once it is in the cache.
        if (cached := _cached(repository)) is not None and not refresh:
            return cached
        first = text.partition("/")[0]
        raise CheckpointError(
            f"{text}: no such file in the folder {first!r}; if a Hub repository is meant, run from another folder, "
            f"or download it first: hf download {text}"
        )
    return _download(repository, refresh)


def _cached(repository: str) -> Path | None:
    """Find the repository's `.nemo` in the Hub's cache; None if it is not there, or one of several."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):
        return Path(hf_hub_download(repository, _usual_name(repository), local_files_only=True))
    with contextlib.suppress(LocalEntryNotFoundError):
        found = sorted(Path(snapshot_download(repository, local_files_only=True)).rglob("*.nemo"))
        if len(found) == 1:
            return found[0]
    return None


def _usual_name(repository: str) -> str:
    """Name a repository's `.nemo` by NVIDIA's habit, as NeMo's `from_pretrained` does."""
    return repository.partition("/")[2] + ".nemo"


def _download(repository: str, refresh: bool) -> Path:
    """The repository's `.nemo`, from the Hub's cache if it is there."""
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        if not refresh and (cached := _cached(repository)) is not None:
            return cached
        if repository in LICENCES:
            logger.warning("%s: these weights are under %s.", repository, LICENCES[repository])
        try:
            return Path(hf_hub_download(repository, _usual_name(repository), force_download=refresh))
        except LocalEntryNotFoundError:  # the network is not there; it is a kind of EntryNotFoundError
            raise
        except EntryNotFoundError:
            found = [file for file in list_repo_files(repository) if file.endswith(".nemo")]
            if len(found) != 1:
                raise CheckpointError(
                    f"{repository}: holds {len(found)} .nemo files, expected one: {found}."
                ) from None
            return Path(hf_hub_download(repository, found[0], force_download=refresh))
    except CheckpointError:
        raise
    except Exception as error:  # whatever the Hub's transport raises: requests, httpx, ... by version
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{repository}: cannot be had from the Hub and is not in its cache ({reason}); check the name and the "
            "network, or give the path of a downloaded .nemo."
        ) from error


def choose_device(device: "str | torch.device | None") -> "torch.device":
    """The device asked for, or a GPU if there is one.

    Raises:
        NemoLfrError: if the device is unknown or not there.
    """
    import torch

    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch goes on with all that it was built with
        raise NemoLfrError(f"device {str(device)!r} cannot be used here: {reason}") from error
    if chosen.type == "meta":
        raise NemoLfrError("device 'meta' holds no numbers to compute with; use 'cpu' or 'cuda'.")
    return chosen


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Importing PyTorch makes objects that stay; to look for dead ones among them takes a seventh of the time."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            # Into the oldest generation, unseen: the next collection would go through all of them.
            gc.freeze()
            gc.unfreeze()
        gc.enable()


def is_exported(source: str | os.PathLike[str] | None) -> bool:
    """Whether `source` is a folder of ONNX files."""
    if source is None:
        return False
    folder = os.path.expanduser(source)
    return any(os.path.isfile(os.path.join(folder, name)) for name in (ENCODER, DECODER))


@overload
def load(
    source: str | os.PathLike[str] | None = ...,
    device: "str | torch.device | None" = ...,
    precision: str = ...,
    *,
    backend: Literal["torch"] | None = ...,
) -> "Codec": ...


@overload
def load(
    source: str | os.PathLike[str] | None = ...,
    device: "str | torch.device | None" = ...,
    precision: str = ...,
    *,
    backend: Literal["onnx"],
) -> "OnnxCodec": ...


def load(
    source: str | os.PathLike[str] | None = None,
    device: "str | torch.device | None" = None,
    precision: str = "fp32",
    *,
    backend: str | None = None,
) -> "Codec | OnnxCodec":
    """Load a codec for inference.

    The checkpoint's keys and shapes are judged at once; the numbers of the encoder and of the decoder are read when
    each is first needed, and raise CheckpointError then if they are damaged.

    Args:
        source: path of a `.nemo`, of Lightning's `.ckpt` or of a folder of `nemo-lfr export onnx`, a Hub id, or None
            for the small codec inside the package.
        device: where to run; a GPU if there is one, else the CPU.
        precision: "fp32", "tf32", "bf16" or "fp16"; see `Codec`.
        backend: "torch" or "onnx"; what `source` is for, if not given. With "onnx", torch is not imported.

    Raises:
        CheckpointError: if the checkpoint cannot be found or read.
        NemoLfrError: for an unknown device, precision or backend.
        MissingExtraError: where PyTorch, or for ONNX files ONNX Runtime, is not installed.
    """
    exported = is_exported(source)
    if backend not in (None, "torch", "onnx"):
        raise NemoLfrError(f"backend {backend!r} is unknown; use 'torch' or 'onnx'.")
    if backend == "onnx" and not exported:
        raise NemoLfrError(
            f"backend 'onnx' runs a folder with {ENCODER} and {DECODER}, which {source} is not; write one with "
            "nemo-lfr export onnx --out FOLDER."
        )
    if backend == "torch" and exported:
        raise NemoLfrError(f"{source}: a folder of ONNX files; backend 'torch' needs the checkpoint they are from.")
    if exported:
        from nemo_lfr.onnx.codec import OnnxCodec

        assert source is not None
        if precision != "fp32":
            raise NemoLfrError(f"precision {precision!r}: ONNX files run in fp32.")
        return OnnxCodec(os.path.expanduser(source), None if device is None else str(device))
    with _collector_at_rest():
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError(
                "checkpoints run in PyTorch, which is not installed: pip install torch. Without it only folders of "
                "`nemo-lfr export onnx` can be used."
            ) from error
        from nemo_lfr.checkpoint import Checkpoint
        from nemo_lfr.codec.ambient import building_state
        from nemo_lfr.codec.codec import PRECISIONS, Codec

    if precision not in PRECISIONS:
        raise NemoLfrError(f"precision {precision!r} is unknown; use one of {list(PRECISIONS)}.")
    chosen = choose_device(device)
    with building_state(torch.device("cpu")):
        checkpoint = Checkpoint(find_checkpoint(source))
        parts = checkpoint.parts
        return Codec(
            parts.encoder,
            parts.quantizer.to(chosen),
            parts.decoder,
            parts.sample_rate,
            precision=precision,
            name="the embedded codec" if source is None else os.fspath(source),
            device=chosen,
            checkpoint=checkpoint,
        )
