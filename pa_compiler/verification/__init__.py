"""Comparing results with the float64 reference: cases, draws, tolerances."""
