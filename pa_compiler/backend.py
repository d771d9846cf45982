"""What is asked of a target: each kind of target has one Backend, and backends.py the table of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pa_compiler.spec import PagedAttentionSpec


class Place(NamedTuple):
    """What instructions come from: an sblock of a scheduled function, or a prefetch in one.

    In a function with threads it is a function that the script inlines.

    Attributes:
        function: The PrimFunc.
        name: Of the sblock, or the inlined function.
        parent: The number of the place around it, -1 where there is none.
    """

    function: str
    name: str
    parent: int


class Links(NamedTuple):
    """Which place each line of a text comes from.

    Attributes:
        places: Sblocks are in the order of the scheduled text of their function.
        lines: By stage, for the lines of its text in order: (number of a place, how many lines). -1 is no place.
    """

    places: tuple[Place, ...] = ()
    lines: Mapping[str, tuple[tuple[int, int], ...]] = {}

    @classmethod
    def made(cls, places: Iterable[Place], lines: Mapping[str, Iterable[int]]) -> Links:
        """Of places, and by stage the number of each line's, with equal neighbours in one entry."""
        return cls(tuple(places)).with_lines(lines)

    def with_lines(self, lines: Mapping[str, Iterable[int]]) -> Links:
        """With the places of the lines of more stages."""
        runs = {
            stage: tuple((place, len(list(run))) for place, run in itertools.groupby(of)) for stage, of in lines.items()
        }
        return self._replace(lines={**self.lines, **runs})

    def as_json(self) -> str:
        """As a text, which links() reads."""
        return json.dumps({"places": self.places, "lines": self.lines}, separators=(",", ":"))

    def of_lines(self, stage: str) -> list[int]:
        """The place of each line of a stage's text; of no line where the stage has none."""
        return [place for place, count in self.lines.get(stage, ()) for _ in range(count)]


def links(text: str) -> Links:
    """What Links.as_json has written; none of an empty text."""
    if not text:
        return Links()
    read = json.loads(text)
    lines = {stage: tuple((place, count) for place, count in runs) for stage, runs in read["lines"].items()}
    return Links(tuple(Place(*place) for place in read["places"]), lines)


class Built(NamedTuple):
    """A library that was built, and what is to be known of it.

    Attributes:
        library: The ELF file, as yet without a manifest, in the directory that the build was given.
        texts: The text of each stage, by the names of Module.sources.
        target: The TVM target dict that the code was made for, with all that was found out about it.
        features: LLVM's names of the instruction sets that a CPU must have to run it, sorted.
        kernels: The machine code of the kernels, as text.
        machine: The architecture that the host is for, as platform.machine() names it.
        links: Which place the lines of the texts come from.
    """

    library: Path
    texts: Mapping[str, str]
    target: dict[str, Any]
    features: tuple[str, ...]
    kernels: str
    machine: str
    links: Links = Links()


class Limits(NamedTuple):
    """Of the machine that an explanation predicts a time for; None where a user has not said.

    Attributes:
        flops: GFLOP/s of float32 of one core.
        bandwidth: GB/s that one core reads.
        gpu: A name in cuda.gpus.GPUS.
    """

    flops: float | None = None
    bandwidth: float | None = None
    gpu: str | None = None


LEAST_LIMIT, MOST_LIMIT = 1e-6, 1e12
"""Between these flops and bandwidth are: a roofline of both has a few tens of powers of ten, and nothing overflows."""


def checked_limits(flops: float | None, bandwidth: float | None, gpu: str | None = None) -> Limits:
    """Limits that a user gave.

    Raises:
        ValueError: flops or bandwidth is out of range.
    """
    for name, value in (("flops", flops), ("bandwidth", bandwidth)):
        if value is not None and not LEAST_LIMIT <= value <= MOST_LIMIT:
            raise ValueError(f"{name}: expected a number from {LEAST_LIMIT:g} to {MOST_LIMIT:g}, got {value!r}")
    return Limits(flops, bandwidth, gpu)


class Explanation(NamedTuple):
    """What a target decides for a spec and why, and what the machine code consists of, each in the target's own words.

    Attributes:
        target: The TVM target dict, with all that was found out about it.
        facts: The decisions, each with its label.
        heads: Of the columns of code.
        code: Rows of numbers, as text; a row that is one text is a heading.
        legend: What the heads mean.
        remark: What else is to be said of the code, or "".
    """

    target: Mapping[str, Any]
    facts: Sequence[tuple[str, str]]
    heads: Sequence[str]
    code: Sequence[Sequence[str] | str]
    legend: Sequence[tuple[str, str]]
    remark: str


class Option(NamedTuple):
    """A strategy that was asked about for a spec.

    Attributes:
        name: The strategy.
        taken: Whether it is the one.
        reason: Why, or why not, in a sentence.
        cost: What its tiles would cost, in words; "" where it has none for the spec.
    """

    name: str
    taken: bool
    reason: str
    cost: str


class InnerLoop(NamedTuple):
    """Loops of machine code that consist of the same instructions, without what loops inside of them have.

    Of a GPU, a kernel as a whole.

    Attributes:
        function: The PrimFunc that they are in.
        lines: Of the text of the machine code, counted from 1, at which they begin.
        mix: How many instructions of one pass do what, by a word for it; one that does two things is in both.
        instructions: All of them.
        cycles: The least for one pass through one of the loops on a core as `cycles_of` describes it; None of a GPU.
        bound: What takes as many: "arithmetic", "loads" or "instructions"; "" of a GPU.
        registers: Registers that they use, in words.
        code: The instructions of the first.
        at: The lines of these in the text, counted from 1; none of a GPU.
    """

    function: str
    lines: tuple[int, ...]
    mix: Mapping[str, int]
    instructions: int
    cycles: float | None
    bound: str
    registers: str
    code: tuple[str, ...]
    at: tuple[int, ...] = ()


class Inside(NamedTuple):
    """What a page shows of a module beside its texts, found without compiling anything.

    Attributes:
        facts: The decisions, each with its label.
        options: The strategies that were asked about, in the order in which they were.
        loops: The inner loops that compute, function by function; none where there is no text to read them in.
        legend: What the words of their mixes mean.
        cycles_of: The core that cycles are counted for, in words.
        flops: GFLOP/s of one core at most with the instructions that the kernels use, where limits say the machine's.
    """

    facts: Sequence[tuple[str, str]]
    options: Sequence[Option]
    loops: Sequence[InnerLoop]
    legend: Mapping[str, str]
    cycles_of: str
    flops: float | None


class Extras(NamedTuple):
    """The entry points that a library has only where it is to, by compile's words for them."""

    attend: bool = False
    merge_states: bool = False
    shared_prefix: bool = False


NO_EXTRAS = Extras()


class Backend(NamedTuple):
    """A kind of target. config is what normalize returned.

    Attributes:
        normalize: (target dict of this kind) -> config, checked, without importing TVM.
        check: (spec, pipeline): refuses by ValueError what the target has no kernel for.
        fingerprint: (config) -> what tells two targets apart in a cache key.
        machine: (config) -> the architecture that the host is for, as platform.machine() names it.
        names_no_cpu: (config) -> whether it is this machine's CPU, so that a record of tuning is taken up.
        tools: () -> the programs and variables that a build depends on beside those of the C++ compiler. A RuntimeError
            names a program that is missing.
        attends: (pipeline) -> whether its libraries can have attend.
        without_prefix: (spec, pipeline) -> what keeps a library from having attend_shared_prefix; "" where it can.
        emit: (spec, config, pipeline, extras, empty directory) -> the text of every stage.
        emit_portable: As emit, without the stages that programs of the machine make, which differ by their versions.
        build: (spec, config, pipeline, extras, empty directory) -> Built.
        explain: (spec, config, pipeline, limits, empty directory) -> Explanation. Like the three above, it imports TVM.
        inside: (spec, a library's target, its features, pipeline, texts of stages, limits) -> Inside, without TVM.
        origins: The stages of emit_portable that generated/ shows, each with the files that its text comes from.
        takes_numpy: Whether modules take NumPy arrays.
    """

    normalize: Callable[[Mapping[str, Any]], dict[str, Any]]
    check: Callable[[PagedAttentionSpec, str], None]
    fingerprint: Callable[[dict[str, Any]], dict[str, Any]]
    machine: Callable[[dict[str, Any]], str]
    names_no_cpu: Callable[[dict[str, Any]], bool]
    tools: Callable[[], dict[str, object]]
    attends: Callable[[str], bool]
    without_prefix: Callable[[PagedAttentionSpec, str], str]
    emit: Callable[[PagedAttentionSpec, dict[str, Any], str, Extras, Path], dict[str, str]]
    emit_portable: Callable[[PagedAttentionSpec, dict[str, Any], str, Extras, Path], dict[str, str]]
    build: Callable[[PagedAttentionSpec, dict[str, Any], str, Extras, Path], Built]
    explain: Callable[[PagedAttentionSpec, dict[str, Any], str, Limits, Path], Explanation]
    inside: Callable[[PagedAttentionSpec, Mapping[str, Any], Sequence[str], str, Mapping[str, str], Limits], Inside]
    origins: Mapping[str, str]
    takes_numpy: bool
