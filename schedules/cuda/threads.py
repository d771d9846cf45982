"""CUDA strategy of the staged pipeline: a thread block for a sequence, a thread for a score, a row or an element.

The PrimFuncs are the CPU's. Nothing is tuned: what counts is that no line is shared with the kernels on which this is
the second opinion.

    token_offsets           a thread for a token, into shared memory
    qk_matmul               a thread for a token and a row
    softmax, rescale        a thread for a row
    pv_matmul, fold, out    a thread for a row and an element of a value
"""

from collections.abc import Callable

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from pa_compiler.tiles import Tiling

STAGED_THREADS = 128
"""Threads of a block of the staged pipeline's kernels."""


def load_query(sch: Schedule, tiling: Tiling) -> None:
    """The query in shared memory."""
    sch.set_scope("q_tile", 0, "shared")
    _threads(sch, *sch.get_loops("q_tile")[-2:])


def token_offsets(sch: Schedule, tiling: Tiling) -> None:
    """The table in shared memory."""
    sch.set_scope("offset", 0, "shared")
    _threads(sch, sch.get_loops("offset")[-1])


def qk_matmul(sch: Schedule, tiling: Tiling) -> None:
    """A score in a register."""
    scores = sch.get_sblock("scores")
    sums = sch.cache_write(scores, 0, "local")
    *_, group, token, row, dim = sch.get_loops(scores)
    thread = _threads(sch, group, token, row)
    sch.reverse_compute_at(sums, thread, preserve_unit_loops=True)
    sch.decompose_reduction(scores, dim)


def columns(sch: Schedule, tiling: Tiling) -> None:
    """What goes by no head: a column in a thread."""
    for each in sch.get_child_blocks(sch.get_sblock("columns")):
        sch.set_scope(each, 0, "shared")
        _threads(sch, *sch.get_loops(each)[-2:])


def visible_rows(sch: Schedule, tiling: Tiling) -> None:
    """What a mask shows each row: a row, and then a row and a column in a thread."""
    for each in sch.get_child_blocks(sch.get_sblock("visible_rows")):
        sch.set_scope(each, 0, "shared")
        _threads(sch, *sch.get_loops(each)[-3 if _name(sch, each) == "visible" else -1 :])


def softmax_prepare(sch: Schedule, tiling: Tiling) -> None:
    """A row in a thread."""
    for each in sch.get_child_blocks(sch.get_sblock("softmax_prepare")):
        if _name(sch, each) == "slope" or _name(sch, each).startswith("row_"):
            sch.set_scope(each, 0, "local")
            _threads(sch, sch.get_loops(each)[-1])
    for name in ("scaled", "peak"):
        sch.set_scope(name, 0, "local")
    for name in ("scaled", "peak", "probs", "tile_sum"):
        row, group, _ = sch.get_loops(name)[-3:]
        _threads(sch, row)
        if name in ("peak", "tile_sum"):
            sch.decompose_reduction(name, group)
    _threads(sch, sch.get_loops("tile_max")[-1])


def pv_matmul(sch: Schedule, tiling: Tiling) -> None:
    """A sum in a register."""
    sch.set_scope("full_groups", 0, "local")
    outer = []
    for name in ("full_groups", "tile_acc"):
        _, *tokens, row, dim = sch.get_loops(name)
        sch.reorder(row, dim, *tokens)
        _threads(sch, row, dim)
        outer.append(sch.get_loops(name)[1])
        sch.decompose_reduction(name, tokens[0])
    sch.merge(*outer)


def rescale(sch: Schedule, tiling: Tiling) -> None:
    """A row in a thread; the factors are for all threads."""
    for scope, name, buffer in (("shared", "factors", 1), ("shared", "factors", 2), ("local", "factors", 0)):
        sch.set_scope(name, buffer, scope)
    sch.set_scope("new_sum", 0, "local")
    for name in ("factors", "new_sum", "row"):
        _threads(sch, sch.get_loops(name)[-1])


def fold(sch: Schedule, tiling: Tiling) -> None:
    """An element in a thread."""
    _threads(sch, *sch.get_loops("acc")[-2:])


def normalize(sch: Schedule, tiling: Tiling) -> None:
    """An element of out in a thread, and before it a row and its sink; what becomes of a row is for all threads."""
    if any(_name(sch, each) == "sink" for each in sch.get_child_blocks(sch.get_sblock("normalize"))):
        for name, buffers in (("sink", 3), ("sum_with_sink", 1)):
            for buffer in range(buffers):
                sch.set_scope(name, buffer, "shared")
            _threads(sch, sch.get_loops(name)[-1])
    sch.set_scope("factor", 0, "shared")
    _threads(sch, sch.get_loops("factor")[-1])
    _threads(sch, *sch.get_loops("out")[-2:])
    _threads(sch, sch.get_loops("lse")[-1])


def sequence(sch: Schedule, tiling: Tiling) -> None:
    """A sequence in a thread block."""
    (loop,) = sch.get_loops("sequence")
    sch.bind(loop, "blockIdx.x")


STAGES: dict[str, Callable[[Schedule, Tiling], None]] = {
    "load_query": load_query,
    "token_offsets": token_offsets,
    "qk_matmul": qk_matmul,
    "columns": columns,
    "visible_rows": visible_rows,
    "softmax_prepare": softmax_prepare,
    "pv_matmul": pv_matmul,
    "rescale": rescale,
    "fold": fold,
    "normalize": normalize,
    "sequence": sequence,
}
"""How each stage is scheduled, by the name of its sblock."""

SCALAR = {"online_update": "the stages rescale and fold, one after the other"}
"""The sblocks that are not scheduled themselves, and why."""


def _name(sch: Schedule, sblock: SBlockRV) -> str:
    return str(sch.get(sblock).name_hint)


def _threads(sch: Schedule, *loops: LoopRV) -> LoopRV:
    """Deal the iterations of some loops out to the threads of a block; the loop of one thread's."""
    _, thread = sch.split(sch.fuse(*loops) if len(loops) > 1 else loops[0], [None, STAGED_THREADS])
    sch.bind(thread, "threadIdx.x")
    return thread
