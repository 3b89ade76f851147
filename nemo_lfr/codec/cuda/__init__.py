"""Fast inference on NVIDIA GPUs for the PyTorch backend.

`folded` prepares the weights, `kernels` and `triton_kernels` have fused kernels, `autotuner` chooses the fastest
kernel for each layer, `plan` runs the layers, and `graphs` captures CUDA graphs.
"""
