"""Schedules of the CPU target: one file per strategy."""
