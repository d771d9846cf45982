"""What is linked on a page: the sblocks of TensorIR, in which stage of the algorithm each is, and their lines.

A text of TensorIR says where its sblocks are. What scheduling makes of one keeps its name, with endings that TVM adds.
Kernels with threads have no sblocks: what is linked are the functions that their scripts inline, which links say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pa_compiler.backend import Links, Place

STAGES = {
    "append_kv": ("token", "cuda_append_kv"),
    "load_query": ("load_query",),
    "fetches": ("next_keys", "next_values", "early_keys", "copy_tile"),
    "load_kv": ("load_keys", "load_values", "token_offsets", "pairs", "look_up"),
    "qk_matmul": ("qk_matmul", "few_qk_matmul"),
    "scores": ("scaled", "full_scores", "full_scaled", "seen_scores", "hidden_scores", "load_slopes"),
    "softmax": ("softmax", "softmax_prepare", "pair_probs"),
    "pv_matmul": ("pv_matmul", "pv_update", "few_pv_update"),
    "online_update": ("rescale", "online_update", "range_rescale", "range_state", "find_infinite", "start"),
    "normalize": ("normalize", "result"),
    "partials": ("store_partial", "partial", "store_warp", "join_warps", "merge_ranges", "_merge"),
}
"""The stages of the algorithm, in its order, and the sblocks that each of them begins with."""

_STAGE_OF = {name: stage for stage, names in STAGES.items() for name in names}
_ENDING = re.compile(r"[._](init|update|o|rf|global|\d+)$")
_FUNCTION = re.compile(r" {4}def (\w+)\(")
_SBLOCK = re.compile(r'( *)(# )?with T\.sblock\("([\w.]+)"\):')
_PREFETCH = re.compile(r'"llvm\.prefetch", T\.address_of\((\w+)\[')
_FETCHES = {"fetch of key_cache": ("next_keys", "early_keys"), "fetch of value_cache": ("next_values",)}


class Unit(NamedTuple):
    """An sblock of a function before scheduling, or what a script inlines.

    Attributes:
        function: The PrimFunc.
        name: Of the sblock, or the function that is inlined.
        parent: The number of the unit around it; -1 where there is none.
        stage: The stage of the algorithm that it is in; "" of what is around stages.
    """

    function: str
    name: str
    parent: int
    stage: str


class Section(NamedTuple):
    """The lines of one function in a text: line `begin`, counted from 0, to the one before `end`."""

    function: str
    begin: int
    end: int


def sections(text: str) -> list[Section]:
    """The functions of a text of TensorIR, with their decorators."""
    lines = text.splitlines()
    begins = [at for at, line in enumerate(lines) if line.startswith("    @T.prim_func")]
    found = []
    for begin, end in zip(begins, [*begins[1:], len(lines)], strict=True):
        named = next((name for line in lines[begin:end] if (name := _FUNCTION.match(line))), None)
        if named is None:
            raise RuntimeError(f"tensorir: expected a function below line {begin + 1}, got none")
        found.append(Section(named[1], begin, end))
    return found


def sblocks(text: str, section: Section) -> tuple[list[Place], list[int]]:
    """The sblocks and prefetches of a function, in the order of the text, and the innermost of each of its lines."""
    places: list[Place] = []
    of_lines, open_ones = [], [(-1, -1)]  # how far sblocks are indented, and their numbers
    for line in text.splitlines()[section.begin : section.end]:
        indent = len(line) - len(line.lstrip())
        while line.strip() and indent <= open_ones[-1][0]:
            open_ones.pop()
        if sblock := _SBLOCK.match(line):
            places.append(Place(section.function, sblock[3], open_ones[-1][1]))
            is_root = sblock[2] is not None
            open_ones.append((indent - 1 if is_root else indent, len(places) - 1))
        of_lines.append(open_ones[-1][1])
        if fetch := _PREFETCH.search(line):
            places.append(Place(section.function, f"fetch of {fetch[1]}", open_ones[-1][1]))
            of_lines[-1] = len(places) - 1
    return places, of_lines


class Units:
    """The units of a module, and which of them the lines of each text belong to.

    Attributes:
        all: The units, by their numbers.
        of_lines: By stage of the compiler, the unit of each line; -1 where it is of none.
        sections: By stage of the compiler, the functions of its text, for those of TensorIR.
    """

    def __init__(self, sources: dict[str, str], links: Links) -> None:
        self.all: list[Unit] = []
        self.of_lines: dict[str, list[int]] = {}
        self.sections = {stage: sections(sources[stage]) for stage in ("tensorir", "scheduled") if stage in sources}
        self._add_tensorir(sources.get("tensorir", ""))
        of_places = self._add_inlines(links)
        if "scheduled" in sources:
            of_places |= self._add_scheduled(sources["scheduled"], links)
        for stage in links.lines:
            of_lines = [of_places.get(place, -1) for place in links.of_lines(stage)]
            before = self.of_lines.get(stage, [-1] * len(of_lines))
            self.of_lines[stage] = [max(of_sblock, of) for of_sblock, of in zip(before, of_lines, strict=True)]

    def _add_tensorir(self, text: str) -> None:
        of_lines = [-1] * len(text.splitlines())
        for section in self.sections.get("tensorir", ()):
            places, lines = sblocks(text, section)
            first = len(self.all)
            for place in places:
                self._add(place, place.parent + first if place.parent >= 0 else -1)
            of_lines[section.begin : section.end] = [at + first if at >= 0 else -1 for at in lines]
        self.of_lines["tensorir"] = of_lines

    def _add_inlines(self, links: Links) -> dict[int, int]:
        """The units of places in functions that have no sblocks, by the numbers of the places."""
        scheduled = {unit.function for unit in self.all}
        of_places: dict[int, int] = {}
        for number, place in enumerate(links.places):
            if place.function not in scheduled:
                of_places[number] = self._add(place, of_places.get(place.parent, -1))
        return of_places

    def _add(self, place: Place, parent: int) -> int:
        around = self.all[parent].stage if parent >= 0 else ""
        self.all.append(Unit(place.function, place.name, parent, _STAGE_OF.get(place.name, around)))
        return len(self.all) - 1

    def _add_scheduled(self, text: str, links: Links) -> dict[int, int]:
        """The units of the scheduled text's lines, and of the places of its sblocks, by their numbers."""
        of_lines = [-1] * len(text.splitlines())
        of_places: dict[int, int] = {}
        for section in self.sections["scheduled"]:
            places, lines = sblocks(text, section)
            if not places:
                continue
            units: list[int] = []
            for place in places:
                units.append(self._unit(place, units[place.parent] if place.parent >= 0 else -1))
            numbers = [at for at, place in enumerate(links.places) if place.function == section.function]
            names = [links.places[at].name for at in numbers]
            if links.places and names != [place.name for place in places]:
                raise RuntimeError(f"links: expected the sblocks of {section.function}, got {', '.join(names)}")
            of_places.update(zip(numbers, units, strict=False))
            of_lines[section.begin : section.end] = [units[at] if at >= 0 else -1 for at in lines]
        self.of_lines["scheduled"] = of_lines
        return of_places

    def _unit(self, place: Place, around: int) -> int:
        """The unit that a scheduled sblock is of: of its name, below that of the sblock around it, or else that one."""
        names = _FETCHES.get(place.name, tuple(_names(place.name)))
        for above in (around, *self.above(around)):
            for name in names:
                for at, unit in enumerate(self.all):
                    if unit.function == place.function and unit.name == name and above in (at, *self.above(at), -1):
                        return at
        return around

    def above(self, unit: int) -> Iterator[int]:
        """The units around one, from the innermost on."""
        while unit >= 0 and (unit := self.all[unit].parent) >= 0:
            yield unit


def _names(name: str) -> Sequence[str]:
    """A scheduled sblock's name, and what it may have been before scheduling: the longest first."""
    names = [name]
    while (shorter := _ENDING.sub("", names[-1])) != names[-1]:
        names.append(shorter)
    return names
