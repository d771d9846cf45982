"""The page that shows a module, as one HTML file: what the parts of it are, which Jinja2 puts together."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pa_compiler import backend, backends, installation
from pa_compiler.backend import Inside, Limits
from pa_compiler.cli import text
from pa_compiler.interface import AttendItem, WorkItem
from pa_compiler.prediction import calls
from pa_compiler.report import columns, mca, pictures
from pa_compiler.report.pictures import Point
from pa_compiler.report.schedule import schedule
from pa_compiler.report.units import STAGES, Units
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.words import counted

_MOST_BYTES = 2_000_000
_TEMPLATES = "report/"
_WORK = ("work", "roofline", "time")
"""The decisions' labels that say how much is computed and read, and what that takes."""


class Call(NamedTuple):
    """A call that a page shows the plan of.

    Attributes:
        context_lens: Tokens of each sequence.
        query_lens: Query tokens of each; None for a call of decode.
        items: The work items, in the order in which they are dealt to threads.
        threads: Threads that share them.
    """

    context_lens: tuple[int, ...]
    query_lens: tuple[int, ...] | None
    items: Sequence[WorkItem | AttendItem]
    threads: int


class Measured(NamedTuple):
    """What a call took on one thread, and what was predicted.

    Attributes:
        found: The times and the rates.
        flops: Of the call.
        kv_bytes: Bytes of keys and values that it reads.
        reason: Why it is not predicted; "" where it is.
    """

    found: calls.Measured
    flops: int
    kv_bytes: int
    reason: str


class Subject(NamedTuple):
    """The module that a page is of.

    Attributes:
        spec: What it computes.
        manifest: What the library says of itself, as labels and values.
        target: The TVM target dict that it is compiled for.
        features: The instruction sets that it uses.
        pipeline: "fused" or "staged".
        sources: The text of each stage; empty for a module that was loaded.
        links: What backend.links reads; "" where nothing is known.
        call: The call whose plan is shown.
        limits: Of the machine that times are predicted for.
        measured: What that call took, where it was measured.
        command: What makes the page again.
    """

    spec: PagedAttentionSpec
    manifest: Sequence[tuple[str, str]]
    target: Mapping[str, Any]
    features: Sequence[str]
    pipeline: str
    sources: Mapping[str, str]
    links: str
    call: Call | None
    limits: Limits
    measured: Measured | None
    command: str


def page(subject: Subject) -> str:
    """The HTML of a module's page, which needs no other file.

    Raises:
        ImportError: there is no Jinja2 or no Pygments.
        RuntimeError: the page is larger than 2 MB.
    """
    import jinja2

    target = dict(subject.target)
    inside = backends.of(target).inside(
        subject.spec, target, subject.features, subject.pipeline, subject.sources, subject.limits
    )
    units = Units(dict(subject.sources), backend.links(subject.links))
    texts = installation.templates()
    files = {name.removeprefix(_TEMPLATES): each for name, each in texts.items() if name.startswith(_TEMPLATES)}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(files), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    made = environment.get_template("page.html.j2").render(
        title=_title(subject.spec),
        subject=subject,
        spec_rows=[*text.spec_rows(subject.spec), ("target", text.target_text(subject.target))],
        inside=inside,
        work=[row for row in inside.facts if row[0] in _WORK],
        why=[row for row in inside.facts if row[0] not in _WORK],
        loops=_loops(inside, units, target),
        stages=_stages(units),
        data=columns.packed({"columns": columns.columns(subject.sources, units), "units": units.all}),
        names=[columns.TITLES[stage][0] for stage in columns.TITLES if stage in subject.sources],
        function=_first_function(units, subject.pipeline),
        links_of=_LINKS_OF["sass" if "ptx" in subject.sources else "asm"],
        roofline=_roofline(subject, inside),
        plan=_plan(subject),
        unpredicted=_unpredicted(subject),
        measured=_measured(subject, inside),
        conventions=CONVENTIONS,
    )
    if len(made.encode()) > _MOST_BYTES:
        raise RuntimeError(f"path: expected a page of at most {_MOST_BYTES:,} bytes, got {len(made.encode()):,}")
    return made


CONVENTIONS = (
    ("NHD", "caches are [num_blocks, block_size, num_kv_heads, head_dim], as they are given"),
    ("packed", "keys of 16 tokens lie element by element beside each other; docs/reference.md has the layout"),
    ("plan", "a thread takes the next work item when it is free; time goes by FLOPs in the picture"),
    ("merge", "the thread that computes the last partial result of a sequence merges all of them"),
    ("links", "an instruction is of the sblock that LLVM's debug locations name, on a GPU of nvcc's line numbers"),
    ("loops", "are of the stage that most of their instructions are of"),
    (
        "cycles",
        f"the least for one pass; llvm-mca's are of {mca.PASSES} passes, with all data in the first-level cache",
    ),
)
"""What a reader of a page has to know, each with its label."""


_LINKS_OF = {
    "asm": "The links are LLVM's debug locations.",
    "sass": "The links are the places in the kernels' scripts, and nvcc's line numbers from CUDA C on.",
}
"""What links are made of, by the stage of the machine code."""


def _title(spec: PagedAttentionSpec) -> str:
    values = "" if spec.result_dim == spec.head_dim else f"/{spec.result_dim}"
    return f"{spec.num_heads}/{spec.num_kv_heads} heads of {spec.head_dim}{values}, {spec.dtype}, {spec.kv_layout}"


def _stages(units: Units) -> list[tuple[str, int]]:
    """The stages of the algorithm that the module has, each with its number among all."""
    there = {unit.stage for unit in units.all}
    return [(stage, number) for number, stage in enumerate(STAGES) if stage in there]


def _first_function(units: Units, pipeline: str) -> str:
    """The function that a page shows first: that of decode, or the largest."""
    names = [section.function for section in units.sections.get("tensorir", ())]
    wanted = ("fused_decode", "qk_matmul", "cuda_decode")
    return next((name for name in wanted if name in names), names[0] if names else columns.REST)


def _loops(inside: Inside, units: Units, target: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is said of each inner loop."""
    analysed = mca.cycles(inside.loops, str(target.get("mcpu", "")), str(target.get("mtriple", platform.machine())))
    of_lines = units.of_lines.get("asm", [])  # a GPU's kernels are of no one stage
    rows = []
    for at, loop in enumerate(inside.loops):
        found = [of_lines[line - 1] for line in loop.at] if of_lines else []
        stage, unit = _most(found, units)
        rows.append(
            {
                "function": loop.function,
                "line": loop.lines[0],
                "count": len(loop.lines),
                "stage": stage,
                "unit": unit,
                "instructions": loop.instructions,
                "bar": pictures.bar(loop.mix, loop.instructions, inside.legend),
                "cycles": loop.cycles,
                "bound": loop.bound,
                "mca": analysed[at] if analysed else None,
                "registers": loop.registers,
            }
        )
    return rows


def _most(found: Sequence[int], units: Units) -> tuple[str, int]:
    """The unit that most lines of a loop are of, and its stage or its name."""
    known = [unit for unit in found if unit >= 0]
    if not known:
        return "", -1
    unit = max(set(known), key=known.count)
    return units.all[unit].stage or units.all[unit].name, unit


def _roofline(subject: Subject, inside: Inside) -> str:
    """The plot, where the machine's limits are known."""
    spec, limits = subject.spec, subject.limits
    if inside.flops is None or limits.bandwidth is None:
        return ""
    intensity = spec.token_flops / spec.token_bytes
    points = [Point("the bound", min(inside.flops, limits.bandwidth * intensity), "bound")]
    if (measured := subject.measured) is not None:
        if measured.found.predicted is not None:
            points.append(Point("predicted", measured.flops / measured.found.predicted.whole / 1e9, "predicted"))
        points.append(Point("measured", measured.flops / measured.found.seconds / 1e9, "measured"))
    return pictures.roofline(intensity, inside.flops, limits.bandwidth, points)


def _unpredicted(subject: Subject) -> str:
    """What is said of a picture whose only point that is not measured is the bound."""
    bound = "The bound is what the limits of the core allow at most, and not a prediction"
    if subject.measured is None:
        return f"{bound}: --measure predicts a call of decode."
    return f"{bound}: {subject.measured.reason}." if subject.measured.reason else ""


def _measured(subject: Subject, inside: Inside) -> list[tuple[str, str]]:
    """The bound of a call, what was predicted, what it took, and their ratios."""
    if subject.measured is None:
        return []
    found, flops, kv_bytes, reason = subject.measured
    rows, ratios = [], []
    if inside.flops is not None and (bandwidth := subject.limits.bandwidth) is not None:
        least = max(flops / inside.flops, kv_bytes / bandwidth) / 1e9
        rows.append(("bound", f"{_us(least)} at the least, by {inside.flops:.4g} GFLOP/s and {bandwidth:.4g} GB/s"))
        ratios.append(f"the bound is {least / found.seconds:.2f} of it")
    if found.predicted is not None:
        near, memory, whole = found.predicted
        parts = f"{_us(near)} with keys and values in the second-level cache, {_us(memory)} to read lines in that order"
        both = near + memory - whole
        overlap = f"of which {_us(both)} overlap" if both > 0 else "which do not overlap"
        rows.append(("predicted", f"{_us(whole)}: {parts} from memory, {overlap}"))
        ratios.insert(0, f"predicted is {whole / found.seconds:.2f} of measured")
    else:
        rows.append(("predicted", f"no: {reason}"))
    of = f"median of {found.times} calls on one thread that read keys and values from memory"
    rate = f"{flops / found.seconds / 1e9:.1f} GFLOP/s, {kv_bytes / found.seconds / 1e9:.2f} GB/s"
    rows += [("measured", f"{_us(found.seconds)}, {of}"), ("rate", rate)]
    return [*rows, ("ratio", "; ".join(ratios))] if ratios else rows


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us"


def _plan(subject: Subject) -> dict[str, Any] | None:
    """The pictures of the plan, and what the call is."""
    call = subject.call
    if call is None:
        return None
    runs, merges = schedule(call.items, call.threads, subject.spec)
    of = "decode" if call.query_lens is None else "attend"
    queries = "" if call.query_lens is None else f", {counted(sum(call.query_lens), 'query token')}"
    said = (
        f"{of} of {counted(len(call.context_lens), 'sequence')} of {counted(sum(call.context_lens), 'token')} in all"
        f"{queries}: {counted(len(call.items), 'work item')} on {counted(call.threads, 'thread')}, "
        f"{counted(len(merges), 'merge')}"
    )
    return {"said": said, "gantt": pictures.gantt(runs, merges, call.threads), "blocks": pictures.blocks(runs)}


def manifest_rows(about: Any, checksum: str) -> list[tuple[str, str]]:
    """A library's manifest as labels and values."""
    return [
        ("pipeline", about.pipeline),
        ("lse", about.lse),
        ("empty", about.empty_rows),
        (
            "target",
            json.dumps(about.target, sort_keys=True) if len(about.target) < 3 else text.target_text(about.target),
        ),
        ("machine", about.machine),
        ("features", " ".join(about.features) or "none"),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(about.versions.items()))),
        ("kernels", f"SHA-256 {about.kernels}"),
        ("library", f"SHA-256 {checksum}"),
    ]
