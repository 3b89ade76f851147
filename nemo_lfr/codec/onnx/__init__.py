"""The codec without PyTorch: `export` writes two ONNX files and a manifest, `backend` runs them with ONNX Runtime."""

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
MANIFEST = "codec.json"
METADATA = "nemo_lfr"  # the key under which both files carry what the tokens mean
VERSION = 2
