"""The state of the floating-point unit: nothing here changes it, and results do not depend on it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import make_inputs
from specs import every_spec
from tolerances import assert_same_bits

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


IN_A_NEW_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from test_floating_point_state import control, mxcsr
states = [control()]
import pa_compiler
states.append(control())
spec = pa_compiler.PagedAttentionSpec(6, 2, 24, 5, "float32")
module = pa_compiler.compile(spec, cache=False)
assert "tvm" in sys.modules
states.append(control())
module.num_threads = 2
caches = module.empty_cache(2000)
block_table = np.arange(2000, dtype=np.int32).reshape(1, -1)
module.decode(np.ones((1, 6, 24), np.float32), *caches, block_table, np.array([10000], np.int32))
states.append(control())
print(json.dumps(states))
"""


@pytest.mark.scorecard(8)
def test_import_compile_and_call_leave_it_alone(own_cache, figure):
    """Libraries that are linked with -ffast-math turn off subnormal numbers for whoever loads them."""
    tests = str(Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, tests], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [[0x37F, 0x1F80]] * 4
    figure("states compared", 4)


STATES = {
    "downward": DOWNWARD,
    "upward": UPWARD,
    "towardzero": TOWARDZERO,
    "flush": FLUSH_TO_ZERO | DENORMALS_ARE_ZERO,
    "traps": ALL_EXCEPTIONS,
}


@every_spec
@pytest.mark.scorecard(8)
@pytest.mark.parametrize("bits", STATES.values(), ids=STATES)
def test_calls_keep_the_callers_state_and_give_the_same_bits(compiled, spec, pipeline, bits, figure):
    """Whatever the caller has set, and whichever thread computes."""
    module, inputs = compiled(spec, pipeline), make_inputs(spec, [5000, 0, 1, 17, 2048, 33, 3000, 4000])
    inputs.value_cache[...] *= np.array(2.0**-8 if spec.dtype == "float16" else 2.0**-120, spec.dtype)
    expected = module.decode(*inputs.arguments, return_lse=True)
    for num_threads in (1, 3):
        module.num_threads = num_threads
        out, lse = inputs.out, inputs.lse
        with mxcsr(bits):
            state = control()
            module.decode(*inputs.arguments, out=out, lse=lse)
            assert control() == state
        assert_same_bits(out, expected[0])
        assert_same_bits(lse, expected[1])
        figure("states compared", 1)
