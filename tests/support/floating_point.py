"""The control words of the floating-point unit: read, and changed for a while."""

from __future__ import annotations

import contextlib
import ctypes

LIBM = ctypes.CDLL("libm.so.6")
FLAGS = 0x3F
"""The bits of MXCSR that say what has happened; the others say what is to happen."""
DOWNWARD, UPWARD, TOWARDZERO = 1 << 13, 2 << 13, 3 << 13
ALL_EXCEPTIONS = FLAGS << 7
"""Masked unless these are changed: the process then ends at the first inexact result."""
FLUSH_TO_ZERO, DENORMALS_ARE_ZERO = 1 << 15, 1 << 6


def environment():
    """C's fenv_t: the x87 environment of 28 bytes, its control word first, then MXCSR."""
    env = (ctypes.c_uint32 * 8)()
    assert LIBM.fegetenv(env) == 0
    return env


def control():
    """x87's control word, and that of SSE and AVX."""
    env = environment()
    return env[0] & 0xFFFF, env[7] & ~FLAGS


@contextlib.contextmanager
def mxcsr(bits):
    """Change bits of MXCSR, for this thread."""
    before, env = environment(), environment()
    env[7] ^= bits
    assert LIBM.fesetenv(env) == 0
    try:
        yield
    finally:
        assert LIBM.fesetenv(before) == 0
