"""Files, memory, processes and compiled kernels. Knows nothing of quantization."""
