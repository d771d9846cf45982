"""Libraries built with tiles, targets or code of a test's own."""

from __future__ import annotations

from pa_compiler import artifact
from pa_compiler.cpu import backend


def build_library(spec, cpu, tiles, pipeline, directory):
    """Leave pa.so and the texts of the stages in an empty directory, for a resolved target and these tiles."""
    artifact.build_into(
        directory, spec, pipeline, lambda scratch: backend.build_with_tiles(spec, cpu, tiles, pipeline, scratch)
    )
