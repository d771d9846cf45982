"""What functions of scores compute beside a score, with columns in lanes: for a column, a row, or as its steps."""

from tvm.s_tir import Schedule

from pa_compiler.tiles import VectorTiling


def columns(sch: Schedule, tiling: VectorTiling) -> None:
    """What goes by no head: columns in lanes."""
    for each in sch.get_child_blocks(sch.get_sblock("columns")):
        sch.vectorize(sch.get_loops(each)[-1])


def visible_rows(sch: Schedule, tiling: VectorTiling) -> None:
    """What a mask shows each row: columns in lanes."""
    for name in visible_steps(sch, tiling):
        sch.vectorize(sch.get_loops(name)[-1])


def visible_steps(sch: Schedule, tiling: VectorTiling) -> list[str]:
    """The sblocks of visible_rows for each key of each row."""
    pairs = ("visible_pairs",) if tiling.values.terms == 2 else ()
    return [*_steps(sch, "visible_rows", "mask_step"), "visible", *pairs]


def score_steps(sch: Schedule, tiling: VectorTiling) -> list[str]:
    """The sblocks that compute steps of score_mod."""
    return _steps(sch, "seen_scores" if tiling.many_tokens else "softmax_prepare", "score_step")


def _steps(sch: Schedule, stage: str, prefix: str) -> list[str]:
    """The sblocks of a stage that compute steps of a function for each score."""
    names = [sch.get(each).name_hint for each in sch.get_child_blocks(sch.get_sblock(stage))]
    return [name for name in names if name.startswith(prefix)]
