"""The CUDA target: its tiles, kernels with explicit threads, machine code, host and modules."""
