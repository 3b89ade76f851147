"""The codec's modules in plain PyTorch: encoder, quantizer (FSQ), decoder and their layers."""
