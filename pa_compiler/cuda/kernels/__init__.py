"""TensorIR with explicit threads: what a GPU computes. No schedule follows."""
