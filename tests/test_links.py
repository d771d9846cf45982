"""Every line of machine code says which sblock it comes from, and the code is the same as if it did not."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from linked import FETCH, PRODUCTS, coverage, stages_of_lines, units, wrong

from pa_compiler import backends, generate, locations, turns
from pa_compiler.backend import Links, Place, links
from pa_compiler.cpu import backend, build, instructions, places
from pa_compiler.cpu import target as cpu_target
from pa_compiler.cpu import tiles as tiling
from pa_compiler.cpu.assembly import loops
from pa_compiler.report.units import STAGES, Units, sblocks, sections

ENTRIES = {name: entry for name, entry in generate.ENTRIES.items() if backends.of(entry.config).takes_numpy}
every_entry = pytest.mark.parametrize("name", ENTRIES)


@pytest.fixture
def module(compiled):
    """module(name) -> the module of an entry of generated/."""
    return lambda name: compiled(
        ENTRIES[name].spec, ENTRIES[name].pipeline, ENTRIES[name].config, **ENTRIES[name].extras._asdict()
    )


@every_entry
def test_arithmetic_of_loops_is_linked(module, name):
    arithmetic, linked = coverage(module(name))
    assert arithmetic > 100
    assert linked >= 0.9 * arithmetic


@every_entry
def test_every_product_is_of_one_row(module, name):
    """Also those between loops, as MLA's products of values are."""
    code = [line.strip() for line in module(name).sources["asm"].splitlines()]
    rows = [line for loop in loops(module(name).sources["asm"]) for line in loop.code]
    assert Counter(filter(PRODUCTS.match, rows)) == Counter(filter(PRODUCTS.match, code)) != Counter()


@every_entry
def test_no_link_is_wrong(module, name):
    stages = stages_of_lines(module(name))
    assert wrong(stages) == []
    there = {stage for _, stage in stages}
    assert {"append_kv", "load_query", "qk_matmul", "scores", "softmax", "pv_matmul", "online_update"} <= there
    assert ("fetches" in there) == any(FETCH.match(line) for line, _ in stages)


def test_stages_have_the_instructions_of_their_work(module):
    """DeepSeek's shape on AMX: QK and PV multiply tiles of pairs, and nothing else does; exp is of the softmax."""
    counts = Counter((line.split()[0], stage) for line, stage in stages_of_lines(module("mla_fused")) if line.strip())
    assert {stage for kind, stage in counts if kind == "tdpbf16ps"} == {"qk_matmul", "pv_matmul"}
    assert (counts["tdpbf16ps", "qk_matmul"], counts["tdpbf16ps", "pv_matmul"]) == (4, 32)
    assert not [kind for kind, stage in counts if stage == "qk_matmul" and re.match("vmax|vmin|vdiv|vcvt", kind)]
    assert counts["vmaxps", "softmax"] >= 16


@pytest.mark.parametrize("seeded", ["the sblock before", "the sblock behind", "two stages for each other"])
def test_a_seeded_wrong_link_is_caught(module, seeded):
    real = module("mla_fused")
    read = json.loads(real._links)
    step = {"the sblock before": -1, "the sblock behind": 1}.get(seeded, 0)
    read["lines"]["asm"] = [(place + step if place > 0 else place, count) for place, count in read["lines"]["asm"]]
    found = Units(dict(real.sources), links(json.dumps(read)))
    swapped = {"qk_matmul": "scores", "scores": "qk_matmul"} if not step else {}
    stages = [
        (line, swapped.get(stage, stage))
        for line, unit in zip(real.sources["asm"].splitlines(), found.of_lines["asm"], strict=True)
        for stage in [found.all[unit].stage if unit >= 0 else ""]
    ]
    assert wrong(stages)


@every_entry
def test_the_code_is_the_same_without_locations(module, name, tmp_path):
    """Byte for byte, as of kernels whose statements have no marks and whose LLVM has no debug locations."""
    entry, real = ENTRIES[name], module(name)
    cpu = cpu_target.resolve(entry.config)
    tiles = tiling.choose(entry.spec, cpu, entry.pipeline)
    of_attend = tiling.choose_attend(entry.spec, cpu, entry.pipeline) if entry.extras.attend else None
    with turns.using_tvm():
        kernels = backend.build_kernels(entry.spec, tiles, entry.pipeline, of_attend)
        mod = instructions.select(backend.lower(kernels, entry.spec, tiles, of_attend).mod, cpu, tiles)
        emitted = [build.emit(kernel, cpu, number) for number, kernel in build.apart(mod).items()]
        texts = [build._without_debug_info(each) for each in emitted]
        read = [build._read(text, tmp_path / "plain.ll").inspect_source("asm") for text in texts]
        plain = "".join(build.numbered(asm, number) for number, asm in enumerate(read))
    labels = re.findall(r"^(\.L\w+):", plain, re.MULTILINE)
    assert len(set(labels)) == len(labels) > 100
    assert real.sources["asm"] == plain
    assert not re.search(r"\.loc|\.file\s+\d|Ltmp", plain)
    assert "!dbg" not in real.sources["llvm"]


@every_entry
@pytest.mark.parametrize("stage", ["tensorir", "scheduled"])
def test_sblocks_of_a_text(module, name, stage):
    """Each line belongs to the sblock that it is indented below, and all sblocks are found."""
    text = module(name).sources[stage]
    found = sections(text)
    assert [section.function for section in found] == re.findall(r"^    def (\w+)\(", text, re.MULTILINE)
    named = [place.name for section in found for place in sblocks(text, section)[0]]
    said = re.findall(r'with T\.sblock\("([\w.]+)"\)', text)
    assert [name for name in named if not name.startswith(locations.FETCH)] == said


@every_entry
def test_every_stage_in_tensorir_is_in_the_machine_code(module, name):
    found = units(module(name))
    of = {
        stage: {found.all[unit].stage for unit in lines if unit >= 0} - {""} for stage, lines in found.of_lines.items()
    }
    assert of["tensorir"] <= set(STAGES)
    assert of["tensorir"] == of["scheduled"] == of["llvm"] == of["asm"]


def test_links_are_text_and_back():
    given = Links((Place("f", "root", -1), Place("f", "a", 0)), {"asm": ((-1, 3), (1, 2), (0, 1))})
    assert links(given.as_json()) == given
    assert given.of_lines("asm") == [-1, -1, -1, 1, 1, 0]
    assert given.of_lines("llvm") == []
    assert links("") == Links()


def test_links_of_another_text_are_refused(module):
    real = module("case1_fused")
    other = real.sources["scheduled"].replace('T.sblock("qk_matmul")', 'T.sblock("kq_matmul")')
    with pytest.raises(RuntimeError, match="links: expected the sblocks of fused_decode, got "):
        Units({**real.sources, "scheduled": other}, links(real._links))


def test_a_function_that_may_throw_keeps_how_it_is_unwound():
    """Both kinds of functions have such lines with locations, and one without."""
    located = (
        "\t.text\n\t.cfi_sections .debug_frame\nsafe:\n.Lfunc_begin0:\n\t.loc\t1 0 0\n\t.cfi_startproc\n\tpushq\t%rbp\n"
        "\t.loc\t1 4 1\n\tmulps\t%xmm0, %xmm1\n\t.cfi_endproc\n.Lfunc_end0:\n"
        "other:\n.Lfunc_begin1:\n\t.cfi_startproc\n\t.loc\t1 2 1\n.Ltmp3:\n\tretq\n\t.cfi_endproc\n.Lfunc_end1:\n"
    )
    llvm = (
        "define i32 @safe(ptr %a) local_unnamed_addr #0 {\n}\ndefine i32 @other(ptr %a) #1 {\n}\n"
        'attributes #0 = { nounwind "x"="y" }\nattributes #1 = { "x"="y" }\n'
    )
    text, of_lines = places.apart(located, llvm)
    assert text == (
        "\t.text\nsafe:\n\tpushq\t%rbp\n\tmulps\t%xmm0, %xmm1\n.Lfunc_end0:\n"
        "other:\n\t.cfi_startproc\n\tretq\n\t.cfi_endproc\n.Lfunc_end1:\n"
    )
    assert of_lines == [-1, -1, -1, 3, -1, -1, -1, 1, -1, -1]
