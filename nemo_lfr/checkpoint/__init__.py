"""Read and write `.nemo` checkpoints without extracting them or executing code from them.

A `.nemo` file is a tar archive of `model_config.yaml` and `model_weights.ckpt`. The weights file is itself a zip
archive: a pickle in it describes the tensors, and one record per tensor contains the raw values. Checkpoints are
untrusted files, so everything that is read from them is validated. This package has these modules:

    source.py           read bytes of a checkpoint from a file or from memory
    archive.py          find the config and the weights in the tar archive
    config.py           parse the YAML config and build modules from an allow-list of classes
    interpolations.py   limit the work that the interpolations of a config cause
    resolvers.py        implement NeMo's OmegaConf resolvers without NeMo
    tensors.py          read tensors from the zip archive without calling anything that the pickle names
    lightning.py        read the config of a training checkpoint (`.ckpt`), which is a zip archive, not a tar archive
    names.py            remove wrapper prefixes from weight names, and convert names that weight norm changes
    rebuilt.py          compare a model with one that was rebuilt from its config
    copying.py          copy and pickle the models that wrap the codec for NeMo and for `transformers`
    safetensors.py      read and write safetensors files
    pair.py             check that `config.json` and the safetensors files in a folder belong together
    folder.py           write a folder with `config.json` and `model.safetensors`
    reader.py           load modules, and validate their keys, shapes and values
    writer.py           write modules to a `.nemo` file
"""

from nemo_lfr.checkpoint.config import (
    NEMO_CLASSES,
    NEMO_MODEL,
    PARTS,
    CodecModules,
    build_part,
    build_parts,
    codec_values,
    is_from_checkpoint,
    mark_from_checkpoint,
    nemo_config,
    sections_from_checkpoint,
)
from nemo_lfr.checkpoint.interpolations import check_interpolations
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
    "check_interpolations",
    "codec_values",
    "is_from_checkpoint",
    "load_parts",
    "mark_from_checkpoint",
    "nemo_config",
    "read_checkpoint",
    "read_config",
    "sections_from_checkpoint",
    "split_weight_norm",
    "write_checkpoint",
]
