"""ONNX: `export` writes two files and a manifest, `backend` runs them in ONNX Runtime."""

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
MANIFEST = "codec.json"
METADATA = "nemo_lfr"  # metadata key in both files for the description of the tokens
VERSION = 2
