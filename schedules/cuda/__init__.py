"""Schedules of the CUDA target."""
