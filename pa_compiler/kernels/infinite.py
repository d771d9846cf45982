"""Whether a matrix unit would multiply an infinity or a NaN: it cannot leave a value out."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from pa_compiler.kernels.elements import INFINITE
from pa_compiler.tvmscript import inline


def find_any(lanes: int) -> Callable[..., None]:
    """infinite[0] = 1 where one of largest[0:lanes], exponents in their places, is of an infinity or a NaN, else 0.

    In the caller's sblock.
    """

    @inline
    def stage(largest, infinite):
        for lane in range(lanes):
            with T.sblock("infinite"):
                vlane = T.axis.reduce(lanes, lane)
                with T.init():
                    infinite[0] = 0
                infinite[0] = T.Select(largest[vlane] == INFINITE, 1, infinite[0])

    return stage
