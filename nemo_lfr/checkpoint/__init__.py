"""`.nemo` files in and out: NeMo's names and our classes, read in place, never executed.

A `.nemo` is a tar of `model_config.yaml` and `model_weights.ckpt`; the latter is a zip that holds a pickle of names
and one record of raw numbers per tensor. A stranger may have written it, so every layer has its own guard:

    archive.py   tar -> the two members, where they lie
    config.py    YAML -> plain values -> our modules; nothing else is ever built
    tensors.py   zip and pickle -> tensors; nothing in the pickle is called
    lightning.py the config of a training checkpoint (`.ckpt`), which is the zip alone
    names.py     wrappers in the names of weights, spellings of weight norm
    reader.py    tensors -> modules; every key, shape and number is judged
    writer.py    the way back
"""

from nemo_lfr.checkpoint.config import (
    NEMO_CLASSES,
    NEMO_MODEL,
    PARTS,
    Parts,
    build_part,
    build_parts,
    codec_values,
    nemo_config,
)
from nemo_lfr.checkpoint.reader import Checkpoint, load_parts, read_checkpoint, read_config
from nemo_lfr.checkpoint.writer import split_weight_norm, write_checkpoint

__all__ = [
    "NEMO_CLASSES",
    "NEMO_MODEL",
    "PARTS",
    "Checkpoint",
    "Parts",
    "build_part",
    "build_parts",
    "codec_values",
    "load_parts",
    "nemo_config",
    "read_checkpoint",
    "read_config",
    "split_weight_norm",
    "write_checkpoint",
]
