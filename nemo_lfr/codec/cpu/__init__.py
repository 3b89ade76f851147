"""Fast inference on CPUs for the PyTorch backend."""
