"""Bundles: one library with a C interface, for several specs and CPUs."""
