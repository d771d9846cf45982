"""What stands for the functions of a library that is for another architecture than this machine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import tvm_ffi


class Elsewhere:
    """Functions by name, as tvm_ffi.Module has them, each of which says why it cannot be called here.

    All but cpu_set, with which a module is made and whose number only calls take.
    """

    def __init__(self, why: str) -> None:
        self._why = why

    def implements_function(self, name: str) -> bool:
        """True: which ones a library has is not known before it is loaded."""
        return True

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name == "cpu_set":
            return _no_cpu_set
        return self._refuse

    def _refuse(self, *arguments: object) -> NoReturn:
        raise RuntimeError(self._why)


def _no_cpu_set(cpus: object) -> int:
    return 0


Functions: TypeAlias = tvm_ffi.Module | Elsewhere
"""Those of a library, by name."""
