"""CUDA backend: folded layers, fused Triton kernels, an autotuner and CUDA graphs."""
