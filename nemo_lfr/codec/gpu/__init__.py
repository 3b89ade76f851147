"""The network on a GPU: folded layers -> fused kernels -> the way measured fastest -> CUDA graphs."""
