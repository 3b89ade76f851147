"""The codec without PyTorch: `export` writes it as two ONNX files, `codec` runs them with ONNX Runtime."""

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
METADATA = "nemo_lfr"  # the key under which both files carry what the tokens mean
VERSION = 1
