"""The state of the floating-point unit: nothing here changes it, and results do not depend on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from floating_point import (
    ALL_EXCEPTIONS,
    DENORMALS_ARE_ZERO,
    DOWNWARD,
    FLUSH_TO_ZERO,
    TOWARDZERO,
    UPWARD,
    control,
    mxcsr,
)
from inputs import make_inputs
from specs import every_spec
from tolerances import assert_same_bits

IN_A_NEW_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from floating_point import control, mxcsr
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
    support = str(Path(__file__).parent / "support")
    run = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, support], capture_output=True, text=True, check=True)
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
