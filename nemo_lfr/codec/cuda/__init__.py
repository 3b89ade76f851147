"""The network on a GPU: folded layers -> fused kernels -> the candidate measured fastest -> CUDA graphs."""
