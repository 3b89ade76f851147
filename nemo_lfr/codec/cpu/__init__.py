"""The CPU kernels of the PyTorch backend."""
