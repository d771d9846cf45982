"""What is different in two modules: what they say of themselves, their machine code in numbers, and their texts."""

from __future__ import annotations

import difflib
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from pa_compiler import artifact, backends, compiler, store
from pa_compiler.backend import Limits
from pa_compiler.cli import text as words_of
from pa_compiler.cli.options import Command, replace, spec_options
from pa_compiler.runtime import manifest
from pa_compiler.spec import PagedAttentionSpec

STAGES = tuple(artifact.STAGE_FILES)
_CONTEXT = 2


class Side(NamedTuple):
    """One of the two: its name in what is printed, what it says of itself, and the texts that are known of it.

    Attributes:
        name: "A" or "B", as it is called in what is printed.
        rows: Labels and what is said.
        sources: The text of each stage; none of a library whose texts are not in the cache.
        loops: Sums over its inner loops, by what instructions do.
    """

    name: str
    rows: dict[str, str]
    sources: Mapping[str, str]
    loops: dict[str, int]


def side(
    name: str, words: str, common: PagedAttentionSpec, target: Any, pipeline: str, extras: Mapping[str, bool]
) -> Side:
    """What A or B of the command, its first or second argument, is: a library, a target, or options of a spec.

    Raises:
        ValueError: it is none of them.
    """
    path = Path(words)
    if path.is_file():
        library = path.read_bytes()
        about = manifest.read(library, path)
        entry = store.with_library(library) or {}
        sources = {stage: entry[file].decode() for stage, file in artifact.STAGE_FILES.items() if file in entry}
        return _side(name, about.spec, about.target, about.features, about.pipeline, sources, words)
    spec = common
    if words.startswith("-"):
        spec, target, pipeline = _options(words, common, target, pipeline)
    elif words.endswith(".so"):
        raise ValueError(f"{name}: expected a library, a target or options of a spec, got {words!r}")
    else:
        target = backends.named(words)
    module = compiler.compile_to_save(spec, target, pipeline, **extras)
    about = module.manifest
    return _side(name, spec, about.target, about.features, about.pipeline, module.sources, words)


def _options(words: str, common: PagedAttentionSpec, target: Any, pipeline: str) -> tuple[PagedAttentionSpec, Any, str]:
    """The spec, target and pipeline that options in one word give, and for the rest what both have in common."""

    @spec_options
    def found(**given: Any) -> tuple[PagedAttentionSpec, Any, str]:
        ctx = click.get_current_context()
        known = {
            key: value
            for key, value in (("target", target), ("pipeline", pipeline))
            if ctx.get_parameter_source(key) == click.core.ParameterSource.DEFAULT
        }
        chosen = given | known
        return replace(common), chosen["target"], chosen["pipeline"]

    command = click.command(cls=Command, add_help_option=False)(found)
    with command.make_context("diff", shlex.split(words)) as ctx:
        return command.invoke(ctx)


def _side(
    name: str,
    spec: PagedAttentionSpec,
    target: Mapping[str, Any],
    features: tuple[str, ...],
    pipeline: str,
    sources: Mapping[str, str],
    words: str,
) -> Side:
    rows = {"is": words} | dict(words_of.spec_rows(spec))
    rows |= {"target": words_of.target_text(target), "pipeline": pipeline}
    inside = backends.of(dict(target)).inside(spec, target, features, pipeline, sources, Limits())
    rows |= dict(inside.facts)
    sums: Counter[str] = Counter()
    for loop in inside.loops:
        sums["loops"] += len(loop.lines)
        sums["all"] += loop.instructions * len(loop.lines)
        sums.update({kind: count * len(loop.lines) for kind, count in loop.mix.items()})
    return Side({"first": "A", "second": "B"}[name], rows, sources, dict(sums))


def counts(first: Side, second: Side, width: int) -> str:
    """What they say of themselves where they differ, then sizes of texts, then instructions of inner loops."""
    said = [
        (label, f"{side.name}: {side.rows.get(label, 'nothing')}")
        for label in dict.fromkeys([*first.rows, *second.rows])
        if first.rows.get(label) != second.rows.get(label)
        for side in (first, second)
    ]
    lines = [words_of.facts(said, width) if said else "A and B say the same of themselves.", ""]
    stages = [stage for stage in STAGES if stage in first.sources or stage in second.sources]
    rows = [[stage, *_lines(first.sources.get(stage, ""), second.sources.get(stage, ""))] for stage in stages]
    if rows:
        lines += [words_of.table(("stage", "lines A", "lines B", "in A alone", "in B alone"), rows, gap=2), ""]
    else:
        lines += ["The texts of these libraries are not in the cache: compile their specs to compare them.", ""]
    kinds = list(dict.fromkeys([*first.loops, *second.loops]))
    if kinds:
        of_loops = [
            (kind, f"{first.loops.get(kind, 0):,}", f"{second.loops.get(kind, 0):,}", _change(first, second, kind))
            for kind in kinds
        ]
        lines += ["One pass through each inner loop that computes:", ""]
        lines += [words_of.table(("instructions", "A", "B", "B - A"), of_loops, gap=2), ""]
    return "\n".join(lines)


def _change(first: Side, second: Side, kind: str) -> str:
    return f"{second.loops.get(kind, 0) - first.loops.get(kind, 0):+,}"


def _lines(first: str, second: str) -> list[str]:
    """Lines of two texts, and how many each has that the other has not, in whatever order they are."""
    a, b = Counter(first.splitlines()), Counter(second.splitlines())
    return [f"{number:,}" for number in (a.total(), b.total(), (a - b).total(), (b - a).total())]


def text(first: Side, second: Side, stage: str) -> str:
    """A unified diff of one stage; "" where neither has it or both have the same."""
    a, b = (side.sources.get(stage, "").splitlines(keepends=True) for side in (first, second))
    names = (f"A/{artifact.STAGE_FILES[stage]}", f"B/{artifact.STAGE_FILES[stage]}")
    return "".join(difflib.unified_diff(a, b, *names, n=_CONTEXT))
