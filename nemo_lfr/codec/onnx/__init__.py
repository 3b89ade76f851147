"""ONNX: `export` writes an encoder file, a decoder file and a manifest; `backend` runs the files in ONNX Runtime."""

from nemo_lfr.io.locate import ONNX_DECODER as DECODER
from nemo_lfr.io.locate import ONNX_ENCODER as ENCODER
from nemo_lfr.io.locate import ONNX_MANIFEST as MANIFEST

__all__ = ["DECODER", "ENCODER", "MANIFEST", "METADATA", "VERSION"]

METADATA = "nemo_lfr"  # key in the metadata of both files; its value describes the tokens
VERSION = 2
