"""ONNX: `export` writes an encoder file, a decoder file and a manifest; `backend` runs the files in ONNX Runtime."""

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
MANIFEST = "codec.json"
METADATA = "nemo_lfr"  # key in the metadata of both files; its value describes the tokens
VERSION = 2
