"""Every buffer ends, and begins, at a page that may not be touched: a read or write beyond it ends the process."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
from inputs import make_inputs
from specs import SPECS, parametrize
from tolerances import assert_same_bits

from pa_compiler import PagedAttentionSpec

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)

LENGTHS = [1, 0, 4, 5, 6, 16, 17, 127, 128, 129, 3]


def fenced(array: np.ndarray, side: str, protection: int = PROT_READ | PROT_WRITE) -> np.ndarray:
    """A copy of array whose first ("start") or last ("end") byte is next to a PROT_NONE page."""
    pages = -(-array.nbytes // PAGE)
    region = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    offset = PAGE if side == "start" else (pages + 1) * PAGE - array.nbytes
    copy = np.frombuffer(region, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    for start, length, allowed in ((0, 1, PROT_NONE), (pages + 1, 1, PROT_NONE), (1, pages, protection)):
        if length and LIBC.mprotect(ctypes.c_void_p(address + start * PAGE), length * PAGE, allowed):
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy


@pytest.mark.parametrize("side", ["start", "end"])
@parametrize({**SPECS, "blocks_of_1": PagedAttentionSpec(4, 2, 16, 1, "float32")})
def test_stays_inside_every_buffer(compiled, spec, pipeline, side):
    """The inputs lie in read-only pages too. No block is spare: each placement ends the cache with another one."""
    module = compiled(spec, pipeline)
    for placement in range(5):
        inputs = make_inputs(spec, LENGTHS, placement=placement, spare_blocks=0, surplus=0)
        expected, expected_lse = module.decode(*inputs.arguments, return_lse=True)
        guarded = [fenced(array, side, PROT_READ) for array in inputs.arguments]
        out, lse = fenced(inputs.out, side), fenced(inputs.lse, side)
        module.decode(*guarded, out=out, lse=lse)
        assert_same_bits(out, expected)
        assert_same_bits(lse, expected_lse)
