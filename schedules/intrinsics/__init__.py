"""Tensor intrinsics that schedules put in: what TVM has no primitive for."""
