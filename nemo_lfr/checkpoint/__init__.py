"""Read and write `.nemo` checkpoints safely: in place, and without executing anything in them.

A `.nemo` is a tar of `model_config.yaml` and `model_weights.ckpt`. The latter is a zip with a pickle of names and one
record of raw values per tensor. Files are untrusted, so each layer validates its input:

    archive.py   find the two members of the tar
    config.py    parse the YAML config and build modules of an allow-list
    tensors.py   read tensors from the zip, without calling anything in the pickle
    lightning.py read the config of a training checkpoint (`.ckpt`), which is the zip alone
    names.py     normalize weight names: wrappers, spellings of weight norm
    safetensors.py  read tensors from a safetensors file
    folder.py    write a folder of `config.json` and `model.safetensors`
    reader.py    load modules; validates every key, shape and value
    writer.py    write modules to a `.nemo`
"""

from nemo_lfr.checkpoint.config import (
    NEMO_CLASSES,
    NEMO_MODEL,
    PARTS,
    CodecModules,
    build_part,
    build_parts,
    codec_values,
    is_from_file,
    mark_from_file,
    nemo_config,
    sections_from_file,
)
from nemo_lfr.checkpoint.reader import Checkpoint, load_parts, read_checkpoint, read_config
from nemo_lfr.checkpoint.writer import split_weight_norm, write_checkpoint

__all__ = [
    "NEMO_CLASSES",
    "NEMO_MODEL",
    "PARTS",
    "Checkpoint",
    "CodecModules",
    "build_part",
    "build_parts",
    "codec_values",
    "is_from_file",
    "load_parts",
    "mark_from_file",
    "nemo_config",
    "read_checkpoint",
    "read_config",
    "sections_from_file",
    "split_weight_norm",
    "write_checkpoint",
]
