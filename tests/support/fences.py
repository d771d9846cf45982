"""Arrays next to pages that may not be touched, and a child process to touch them in."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import traceback
import warnings

import numpy as np

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
SIDES = ("start", "end")


def fenced(array: np.ndarray, side: str, protection: int = PROT_READ | PROT_WRITE, unread: int = 0) -> np.ndarray:
    """A copy of array whose first ("start") or last ("end") byte is next to a PROT_NONE page.

    There is one past its other end too, after what remains of the last page. The memory of array's own pages may be
    used as protection says; at the end, a number of elements that are not to be read may lie beyond the fence.
    """
    kept = array.nbytes - unread * array.itemsize
    inner, beyond = -(-kept // PAGE), 1 + unread * array.itemsize // PAGE
    region = mmap.mmap(-1, (1 + inner + beyond) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    offset = PAGE if side == "start" else (1 + inner) * PAGE - kept
    copy = np.frombuffer(region, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    for start, pages, allowed in ((0, 1, PROT_NONE), (1, inner, protection), (1 + inner, beyond, PROT_NONE)):
        if pages and LIBC.mprotect(ctypes.c_void_p(address + start * PAGE), pages * PAGE, allowed):
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy


def run_in_child(cases) -> int:
    """Run functions, an iterable of (name, function), in a child of fork(): a fault ends the child alone.

    Returns how many there were. Raises AssertionError with what a case raised, or the signal that it ended by.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a library may have threads; it allows for it
        child = os.fork()
    if child == 0:
        _run(cases, writer)
    os.close(writer)
    with open(reader, errors="replace") as pipe:
        *passed, last = pipe.read().split("\0")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        raise AssertionError(f"{last}: ended by {signal.Signals(os.WTERMSIG(status)).name} after {len(passed)} cases")
    if os.WEXITSTATUS(status):
        raise AssertionError(f"after {len(passed)} cases: {last}")
    return len(passed)


def _run(cases, writer):
    """Run them and exit; each name is written before its case runs, and a zero byte after it."""
    faulthandler.disable()  # the parent says what happened
    try:
        for name, function in cases:
            os.write(writer, str(name).encode())
            function()
            os.write(writer, b"\0")
        os._exit(0)
    except BaseException:
        os.write(writer, f": {traceback.format_exc()}".encode())
        os._exit(1)
