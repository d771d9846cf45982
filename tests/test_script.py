"""TVMScript as kernels/script.py reads it is what TVM's own parser makes of it."""

from __future__ import annotations

import re

import pytest
import tvm
from tvm.error import DiagnosticError
from tvm.script import tirx as T

from pa_compiler import tvmscript as script


def kernel(reader, masked):
    """What the kernels use of TVMScript, read by T or by script."""
    rows, shift = 4, 3

    def shifted(x):
        return T.Select(x >= T.float32(0), x + T.float32(shift), x)

    @reader.inline
    def fill(buffer, index, value):
        with T.sblock("fill"):
            twice: T.let = value + value
            buffer[index] = twice
            buffer[index] += T.float32(1)

    @reader.prim_func(s_tir=True)
    def kernel(a_handle: T.handle, b_handle: T.handle, limit: T.int32):
        reader.__name__  # noqa: B018  (the parser reads the decorator again, where it knows what the body names)
        n, stride = T.int64(), T.int64()
        a = T.match_buffer(a_handle, (n, rows), "float32", strides=[stride, T.int64(1)], align=4)
        b = T.match_buffer(b_handle, (rows,), "float32")
        for i, j in T.grid(limit, rows):
            with T.sblock("each"):
                vi, vj = T.axis.remap("SS", [i, j])
                T.reads(a[vi, 0:rows])
                T.writes(b[0:rows])
                last = T.meta_var(sum([limit - k for k in range(2)]))
                if vi == last:
                    fill(b, vj, shifted(a[vi, vj]))
                if masked:
                    b[vj] = T.if_then_else(vj < rows - 1, a[vi, vj], T.float32(0))
                else:
                    fill(b, vj, a[vi, vj])

    return kernel


@pytest.mark.parametrize("masked", [True, False])
def test_a_script_reads_as_tvm_reads_it(masked):
    tvm.ir.assert_structural_equal(kernel(script, masked), kernel(T, masked))


def test_a_mistake_is_reported_with_its_statement():
    @script.inline
    def body(buffer):
        buffer[0] = nowhere + 1  # noqa: F821

    with pytest.raises(DiagnosticError, match=re.escape("name 'nowhere' is not defined")) as caught:

        @script.prim_func(s_tir=True)
        def mistaken(handle: T.handle):
            buffer = T.match_buffer(handle, (1,), "float32")
            body(buffer)

    line = body.__closure__[0].cell_contents().func.__code__.co_firstlineno + 2
    assert f"{__file__}:{line}:9" in str(caught.value)
    assert "buffer[0] = nowhere + 1" in str(caught.value)
