"""The network in plain PyTorch: encoder, FSQ, decoder, and how they are put together."""
