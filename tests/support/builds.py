"""Libraries built with tiles, targets or code of a test's own."""

from __future__ import annotations

from pa_compiler import artifact
from pa_compiler.backend import NO_EXTRAS
from pa_compiler.cpu import backend


def build_library(spec, cpu, tiles, pipeline, directory, of_attend=None, extras=NO_EXTRAS):
    """Leave pa.so and the texts of the stages in an empty directory, for a resolved target and these tiles.

    It has attend where there are tiles of it.
    """

    def build(scratch):
        return backend.build_with_tiles(spec, cpu, tiles, pipeline, scratch, of_attend, extras)

    artifact.build_into(directory, spec, pipeline, build)
