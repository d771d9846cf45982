"""The faults of seeded_bugs.py that are in the kernels for GPUs."""

from __future__ import annotations

from seeded_bug import Fault

_CUDA = "pa_compiler/cuda/kernels/"

GPU_FAULTS = {
    "a window's ranges end too early on a GPU": Fault(
        f"{_CUDA}plan.py",
        "T.shift_left(nth + 1, places)",
        "T.shift_left(found[RANGE] + 1, places)",
        "test_cuda_scores.py::test_windows",
    ),
    "the slope of another kv head's rows on a GPU": Fault(
        f"{_CUDA}scores.py",
        'alibi_slopes[T.Cast("int64", rows.at(row)[1])',
        'alibi_slopes[T.Cast("int64", row)',
        "test_cuda_scores.py::test_each_alone",
    ),
    "a sink without the sequence's headroom on a GPU": Fault(
        f"{_CUDA}state.py",
        'exponent(spec, sink - shift_of(peak), T.Cast("float32", headroom))',
        "exponent(spec, sink - shift_of(peak), T.float32(0))",
        "test_cuda_scores.py::test_sinks",
    ),
    "what a mask hides copied on a GPU": Fault(
        f"{_CUDA}ring.py",
        "T.meta_var(shown if functions.hides_tokens else token < range_end)",
        "T.meta_var(token < range_end)",
        "test_cuda_functions.py::test_masks",
    ),
    "a value that other heads see multiplied by 0 on a GPU": Fault(
        f"{_CUDA}fma.py",
        "scores[t * rows + r] * _shown(numbers[i], shown, r, t)",
        "scores[t * rows + r] * numbers[i]",
        "test_cuda_functions.py::test_what_one_head_does_not_see_another_may",
    ),
}
