"""Prefetch instructions, put into scheduled kernels at the loops that a schedule has marked.

The kernels say which tile of tokens is read next (kernels/ahead.py). A schedule says over which loops the lines of that
tile are spread (schedules/fetch.py). Here they become instructions that ask for the lines, into the second-level cache.
They stand between inner loops: within one, every sum would be stored at each step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pa_compiler.cpu.sblocks import replace_body, sblocks
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.tiles import Tiling, divisors

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import LoopRV, SBlockRV
    from tvm.tirx import For, Stmt, Var

    from pa_compiler.kernels.ahead import Announced
    from pa_compiler.kernels.caches import Cache, CacheAccess


def insert(sch: Schedule, spec: PagedAttentionSpec, tiling: Tiling, function: str) -> None:
    """Put prefetch instructions into a scheduled kernel, and take out what these and schedules have said for them."""
    if not tiling.prefetches:
        return
    from pa_compiler.kernels import ahead
    from pa_compiler.kernels.caches import key_access, value_access

    sch.work_on(function)
    accesses = {ahead.KEYS: key_access(spec, tiling), ahead.VALUES: value_access(spec, tiling)}
    accesses[ahead.EARLY_KEYS] = accesses[ahead.KEYS]
    said = [sblock for sblock in sblocks(sch) if sch.get(sblock).name_hint in accesses]
    for sblock in said:
        name = sch.get(sblock).name_hint
        announced = ahead.announced(sch.get(sblock).body)
        _remove(sch, sblock)
        nests = _marked(sch, name)
        for marked in nests:
            _fetch(sch, marked, announced, accesses[name], tiling.token_group)


def fetching_passes(passes: int, group: int, lines: int) -> int:
    """The most passes over a tile of tokens, of those that there are, on which its lines divide evenly.

    In each pass a group of tokens is the time to fetch some whole tokens of `lines` lines, or an equal part of one: so
    that no line's address takes a division at run time.
    """
    return max(count for count in divisors(group) + [group * part for part in divisors(lines)] if count <= passes)


def _fetch(sch: Schedule, marked: list[LoopRV], announced: Announced, access: CacheAccess, token_group: int) -> None:
    """Put the instructions of one cache into its marked loops, and take the marks off."""
    from tvm.tirx import SeqStmt

    from pa_compiler.schedules.fetch import AT_ONCE, GROUP, HERE, PASS, SHARE

    passes, groups, shares, here = (
        [loop for loop in marked if mark in sch.get(loop).annotations] for mark in (PASS, GROUP, SHARE, HERE)
    )
    token_group *= int(sch.get(groups[0]).annotations.get(AT_ONCE, 1))
    instructions = _instructions(
        announced, access, token_group, *([sch.get(loop) for loop in loops] for loops in (passes, groups, shares))
    )
    for loop in marked:
        for mark in (PASS, GROUP, SHARE, HERE, AT_ONCE):
            if mark in sch.get(loop).annotations:
                sch.unannotate(loop, mark)
    old = sch.get(here[0])
    body = SeqStmt([instructions, *(old.body.seq if isinstance(old.body, SeqStmt) else [old.body])])
    _replace(sch, here[0], old, body)


def _instructions(
    announced: Announced,
    access: CacheAccess,
    token_group: int,
    passes: list[For],
    groups: list[For],
    shares: list[For],
) -> Stmt:
    """What is fetched in one iteration of all of the marked loops."""
    from tvm.script import tirx as T
    from tvm.tirx import Evaluate, For, ForKind, IfThenElse, IntImm, Var

    (group,) = groups
    of_group = in_all = token_group * access.num_lines
    first, number, condition = announced.first + group.loop_var * token_group, 0, announced.wanted
    if announced.wanted is not None:
        first, number = announced.first, group.loop_var * of_group
    if passes:
        count = _count(passes)
        fetching = fetching_passes(count, token_group, access.num_lines)
        in_all, every = of_group // fetching, count // fetching
        first = announced.first
        number = (T.floordiv(_index(passes), every) * group.extent + group.loop_var) * in_all
        if every > 1 or fetching < count:
            chosen = T.And(T.floormod(_index(passes), every) == 0, _index(passes) < every * fetching)
            condition = chosen if condition is None else T.And(condition, chosen)
    each_share = -(-in_all // _count(shares))
    line = Var("line", "int32")
    in_share = _index(shares) * each_share + line
    offset = _offset(announced, access, first, number + in_share, group.extent * of_group)
    body = Evaluate(_prefetch(announced.cache, offset))
    if in_all % each_share:
        body = IfThenElse(in_share < in_all, body, None)
    loop = For(line, IntImm("int32", 0), IntImm("int32", each_share), ForKind.SERIAL, body)
    return loop if condition is None else IfThenElse(condition, loop, None)


def _offset(announced: Announced, access: CacheAccess, first: Expr, number: Expr, of_tile: Expr) -> Expr:
    """Where line `number` is of those that are fetched, of_tile of them in one head, from the token in column first on.

    With all heads of a token before the next token, each head's turn fetches an equal share of the tokens.
    """
    from tvm.script import tirx as T

    if announced.heads is None:
        return access.line(announced.cache, first, number, announced.head_offset)
    number = announced.share * of_tile + number
    of_head, line = T.floordiv(number, access.num_lines), T.floormod(number, access.num_lines)
    head = T.Cast("int64", T.truncmod(of_head, announced.heads)) * announced.cache.head
    nth = T.truncdiv(of_head, announced.heads) * access.num_lines + line
    return access.line(announced.cache, first, nth, announced.head_offset + head)


def _prefetch(cache: Cache, offset: Expr) -> Expr:
    """Ask for the line of a word, to be read soon: into the second-level cache.

    Not tirx.prefetch, which becomes the same, but whose text TVM's parser does not read back.
    """
    from tvm.script import tirx as T

    read, second_level, data = 0, 2, 1
    address = T.address_of(cache.memory[offset])
    return T.call_llvm_intrin("void", "llvm.prefetch", address, read, second_level, data)


def _count(loops: list[For]) -> int:
    """Iterations of a nest of loops."""
    return math.prod(int(loop.extent) for loop in loops)


def _index(loops: list[For]) -> Expr | int:
    """Which of the iterations of a nest of loops is running."""
    index: Expr | int = 0
    for loop in loops:
        index = index * int(loop.extent) + loop.loop_var
    return index


def _marked(sch: Schedule, name: str) -> list[list[LoopRV]]:
    """The loops that a schedule has marked for a cache, nest by nest, from the outermost to the innermost."""
    from pa_compiler.schedules.fetch import HERE

    nests: dict[Var, list[LoopRV]] = {}
    for sblock in sblocks(sch):
        loops = sch.get_loops(sblock)
        marked = [loop for loop in loops if name in [*sch.get(loop).annotations.values()]]
        for loop in marked:
            if HERE in sch.get(loop).annotations:
                nests.setdefault(sch.get(loop).loop_var, marked)
    if nests:
        return [*nests.values()]
    raise ValueError(f"{name}: expected a schedule that marks the loops in which it is fetched, got none")


def _remove(sch: Schedule, sblock: SBlockRV) -> None:
    """Take an sblock out of the one around it."""
    from tvm.tirx import SeqStmt

    around, gone = sch.get_sref(sblock).parent, sch.get(sblock)
    rest = [stmt for stmt in around.stmt.body.seq if not gone.same_as(getattr(stmt, "block", None))]
    replace_body(sch, around, SeqStmt(rest))


def _replace(sch: Schedule, loop: LoopRV, old: For, body: Stmt) -> None:
    """Give a loop another body."""
    from tvm.tirx import For

    new = For(old.loop_var, old.min, old.extent, old.kind, body, old.thread_binding, old.annotations)
    sch.state.replace(sch.get_sref(loop), new, {})
