"""Prefetch instructions, put into scheduled kernels at the loops that a schedule has marked.

The kernels say which tile of tokens is read next (kernels/ahead.py). A schedule says over which loops the lines of that
tile are spread (schedules/fetch.py). Here they become instructions that ask for the lines, into the second-level cache.
They stand between inner loops: within one, every sum would be stored at each step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.statements import mapped, sblocks, with_loops
from pa_compiler.tiles import Tiling, divisors

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.ir import Expr
    from tvm.tirx import For, PrimFunc, Stmt

    from pa_compiler.kernels.ahead import Announced
    from pa_compiler.kernels.caches import Cache, CacheAccess


def insert(mod: IRModule, spec: PagedAttentionSpec, tilings: Mapping[str, Tiling]) -> IRModule:
    """A scheduled module with prefetch instructions in kernels that have tilings, by their names.

    What these and their schedules have said for the instructions is not there any more.

    Raises:
        ValueError: a kernel says what is fetched, and no loop is marked for it.
    """
    from tvm import IRModule

    def inserted(name: str, function: PrimFunc) -> PrimFunc:
        fetches = name in tilings and tilings[name].prefetches
        return _inserted(function, spec, tilings[name]) if fetches else function

    functions = {variable: inserted(variable.name_hint, function) for variable, function in mod.functions.items()}
    return IRModule(functions, attrs=mod.attrs)


def _inserted(function: PrimFunc, spec: PagedAttentionSpec, tiling: Tiling) -> PrimFunc:
    from tvm.s_tir import SBlockRealize
    from tvm.tirx import For, SeqStmt

    from pa_compiler.kernels import ahead
    from pa_compiler.kernels.caches import key_access, value_access
    from pa_compiler.schedules.fetch import HERE

    accesses = {ahead.KEYS: key_access(spec, tiling), ahead.VALUES: value_access(spec, tiling)}
    accesses[ahead.EARLY_KEYS] = accesses[ahead.KEYS]
    said = {
        sblock.name_hint: ahead.announced(sblock.body)
        for sblock in sblocks(function.body)
        if sblock.name_hint in accesses
    }
    fetched: set[str] = set()

    def visit(statement: Stmt, loops: tuple[For, ...] = ()) -> Stmt:
        match statement:
            case SeqStmt(seq=seq):
                rest = [each for each in seq if not (isinstance(each, SBlockRealize) and each.block.name_hint in said)]
                return SeqStmt([visit(each, loops) for each in rest])
            case SBlockRealize():
                loops = ()  # a schedule marks loops around sblocks of one
            case For():
                loops = (*loops, statement)
                body, statement = visit(statement.body, loops), _unmarked(statement)
                if (name := loops[-1].annotations.get(HERE)) in said:
                    fetched.add(name)
                    marked = [loop for loop in loops if name in [*loop.annotations.values()]]
                    instructions = _fetch(marked, said[name], accesses[name], tiling.token_group)
                    body = SeqStmt([instructions, *(body.seq if isinstance(body, SeqStmt) else [body])])
                return with_loops([statement], body)
        return mapped(statement, lambda each: visit(each, loops))

    body = visit(function.body)
    if missing := [name for name in said if name not in fetched]:
        raise ValueError(f"{missing[0]}: expected a schedule that marks the loops in which it is fetched, got none")
    return function.with_body(body)


def fetching_passes(passes: int, group: int, lines: int) -> int:
    """The most passes over a tile of tokens, of those that there are, on which its lines divide evenly.

    In each pass a group of tokens is the time to fetch some whole tokens of `lines` lines, or an equal part of one: so
    that no line's address takes a division at run time.
    """
    return max(count for count in divisors(group) + [group * part for part in divisors(lines)] if count <= passes)


def _fetch(marked: list[For], announced: Announced, access: CacheAccess, token_group: int) -> Stmt:
    """The instructions of one cache, in loops that are marked for it, from the outermost to the innermost."""
    from pa_compiler.schedules.fetch import AT_ONCE, GROUP, PASS, SHARE

    passes, groups, shares = ([loop for loop in marked if mark in loop.annotations] for mark in (PASS, GROUP, SHARE))
    token_group *= int(groups[0].annotations.get(AT_ONCE, 1))
    return _instructions(announced, access, token_group, passes, groups, shares)


def _unmarked(loop: For) -> For:
    """A loop without marks."""
    from tvm.tirx import For

    from pa_compiler.schedules.fetch import MARKS

    rest = {key: value for key, value in loop.annotations.items() if key not in MARKS}
    return For(loop.loop_var, loop.min, loop.extent, loop.kind, loop.body, loop.thread_binding, rest)


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
