"""The page that shows a module, and what it is made of: texts, pictures, plans, and the command that makes it again."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
import subprocess
import sys
import zlib
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from pages import words

import pa_compiler
from pa_compiler import AttendItem, PagedAttentionSpec, WorkItem, generate
from pa_compiler.backend import InnerLoop, Limits
from pa_compiler.cli import main as cli
from pa_compiler.cpu import explain, inside
from pa_compiler.cpu import target as cpu_target
from pa_compiler.report import columns, mca, pictures, schedule

_ENTRY = generate.ENTRIES["case1_fused"]


@pytest.fixture(scope="module")
def module(compiled):
    return compiled(_ENTRY.spec, _ENTRY.pipeline, _ENTRY.config)


@pytest.fixture
def made(module, tmp_path):
    """made(**arguments) -> the text of the module's page."""

    def make(of=module, **arguments):
        of.report(tmp_path / "report.html", **arguments)
        return (tmp_path / "report.html").read_text()

    return make


def unpacked(page):
    data = re.search(r'<script type="text/plain" id="data">(.*?)</script>', page)[1]
    return json.loads(zlib.decompress(base64.b64decode(data)))


def test_the_texts_are_in_the_page_as_they_are(module, made):
    data = unpacked(made())
    assert [column["stage"] for column in data["columns"]] == ["tensorir", "scheduled", "llvm", "asm", "host"]
    for column in data["columns"]:
        text = module.sources[column["stage"]]
        lines = text.splitlines()
        pieces = [piece for pieces in column["functions"].values() for piece in pieces]
        for piece in pieces:
            shown = html.unescape(re.sub(r"<[^>]*>", "", piece["lines"])).split("\n")
            assert shown == lines[piece["first"] - 1 :][: len(shown)], column["stage"]
            assert sum(count for _, count in piece["units"]) == len(shown)
        covered = {
            at for piece in pieces for at in range(piece["first"], piece["first"] + piece["lines"].count("\n") + 1)
        }
        assert all(not lines[at - 1].strip() for at in set(range(1, len(lines) + 1)) - covered)
        if column["stage"] != "host":
            assert {"append_row", "fused_decode", "merge_partials"} <= column["functions"].keys()


def test_what_a_page_says(module, made):
    said = words(made(context_lens=[300, 7], flops=90, bandwidth=12))
    for part in (
        "16 query heads on 1 kv head of 128, bfloat16 in, float32 out",
        "decode of 2 sequences of 307 tokens in all: ",
        "heads_in_lanes no 16 query heads in a tile: heads lie in lanes from 32 on.",
        "tokens_in_lanes no kv_layout NHD has the elements of a row side by side.",
        f"library SHA-256 {module.checksum}",
        "pa-compiler report --target",
        "natural logarithm",
        "the bound: 90 GFLOP/s",
        "not a prediction: --measure predicts a call of decode.",
    ):
        assert part in said, part


def test_decisions_are_those_of_explain(module):
    cpu = cpu_target.resolve(_ENTRY.config)
    of_manifest = inside.inside(
        module.spec, module.target, module.manifest.features, module.pipeline, module.sources, Limits(90, 12)
    )
    assert of_manifest.facts == explain.decisions(module.spec, cpu, module.pipeline, Limits(90, 12))
    assert [option.name for option in of_manifest.options if option.taken] == ["head_dim_in_lanes"]
    assert {loop.function for loop in of_manifest.loops} == {"fused_decode", "merge_partials"}


def test_cycles_are_the_least_by_what_is_scarcest():
    asm = "f:\n.LBB0_1:\n" + "\tvfmadd231ps\t%zmm1, %zmm2, %zmm3\n" * 8 + "\tdecq\t%rax\n\tjne\t.LBB0_1\n"
    (loop,) = inside.loops(asm, inside.Core())
    assert (loop.cycles, loop.bound, loop.instructions) == (4, "arithmetic", 10)
    asm = asm.replace("%zmm1,", "(%rdi),").replace("\tdecq", "\tvmovups\t(%rsi), %zmm4\n\tdecq")
    (loop,) = inside.loops(asm, inside.Core())
    assert (loop.cycles, loop.bound) == (4.5, "loads")
    asm = asm.replace("\tdecq", "\tincq\t%rcx\n" * 30 + "\tdecq")
    (loop,) = inside.loops(asm, inside.Core())
    assert (loop.cycles, loop.bound, loop.lines) == (41 / 6, "instructions", (3,))


def test_a_loaded_module_has_no_texts_but_all_else(compiled, made, tmp_path):
    module = compiled(_ENTRY.spec)
    module.save(tmp_path / "pa.so")
    said = words(made(pa_compiler.load(tmp_path / "pa.so")))
    assert "This module was loaded from a library, which holds no texts of stages." in said
    assert re.search("(heads_in_lanes|head_dim_in_lanes|rows_in_tiles) yes", said)
    assert f"library SHA-256 {module.checksum}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_lens": [1]}, r"^query_lens: expected context_lens beside them, got None"),
        ({"context_lens": [4, 5], "query_lens": [1]}, r"^query_lens: expected 2 numbers, one for each sequence, got 1"),
        ({"context_lens": [4], "query_lens": [5]}, r"^query_lens: expected at most the 4 tokens of sequence 0, got 5"),
        ({"context_lens": [0], "measure": True}, r"^context_lens: expected tokens that can be measured, got none"),
        ({"flops": 0.0}, r"^flops: expected a number from 1e-06 to 1e\+12, got 0.0"),
        ({"flops": 1e300, "bandwidth": 1e-300}, r"^flops: expected a number from 1e-06 to 1e\+12, got 1e\+300"),
        ({"bandwidth": float("nan")}, r"^bandwidth: expected a number from 1e-06 to 1e\+12, got nan"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_write_nothing(module, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        module.report(tmp_path / "report.html", **arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("flops", "bandwidth"), [(1e12, 1e-6), (1e-6, 1e12), (1e-6, 1e-6), (1e12, 1e12)])
def test_any_limits_make_a_page(module, tmp_path, flops, bandwidth):
    module.report(tmp_path / "report.html", flops=flops, bandwidth=bandwidth)
    page = (tmp_path / "report.html").read_text()
    assert f"{flops:,.4g} GFLOP/s" in page
    assert '="nan' not in page


@pytest.mark.parametrize("words", ["report -o report.html", "explain"])
def test_the_commands_refuse_other_limits(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    words = [*words.split(), "--flops", "40", "--bandwidth", "1e-300"]
    result = CliRunner().invoke(cli.main, words, catch_exceptions=False)
    assert result.exit_code == 2
    assert "'--bandwidth': expected a number from 1e-06 to 1e+12, got 1e-300" in result.stderr
    assert not any(tmp_path.iterdir())


def test_attend_needs_a_module_with_it(module, tmp_path):
    with pytest.raises(NotImplementedError, match="attend: expected a module compiled with attend=True"):
        module.report(tmp_path / "report.html", context_lens=[9], query_lens=[4])


@pytest.mark.parametrize("name", ["case1_fused", "gqa_packed_fused", "mla_fused"])
def test_a_page_of_a_module_from_the_cache_needs_no_tvm(compiled, build_cache, tmp_path, name):
    """Of the specs whose pages make docs writes; one for a GPU is in test_cuda_links.py."""
    entry = generate.ENTRIES[name]
    compiled(entry.spec, entry.pipeline, entry.config, **entry.extras._asdict())
    code = f"""
import sys
from pa_compiler import compiler, generate
entry = generate.ENTRIES[{name!r}]
module = compiler.compile_to_save(entry.spec, entry.config, entry.pipeline, **entry.extras._asdict())
module.report({str(tmp_path / "report.html")!r})
assert "tvm" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    page = (tmp_path / "report.html").read_text()
    assert len(page.encode()) < 2_000_000
    assert len(unpacked(page)["columns"]) == 5


def test_the_command_and_the_command_that_a_page_names(build_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = "--num-heads 4 --num-kv-heads 2 --head-dim 16 --block-size 8 --dtype float32 --no-attend --seq-len 40,3"
    command = ["report", "-o", "a page.html", *given.split(), "--query-len", "1", "--threads", "3"]
    refused = CliRunner().invoke(cli.main, command)
    assert refused.exit_code != 0
    command = [word for word in command if word not in ("--query-len", "1")]
    result = CliRunner().invoke(cli.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "a page.html").read_text()
    assert result.stdout == f"a page.html: {len(page.encode()):,} bytes\n"
    assert "decode of 2 sequences of 43 tokens in all" in words(page)
    again = html.unescape(re.search(r'<pre class="command"[^>]*>(.*?)</pre>', page)[1])
    (tmp_path / "a page.html").unlink()
    result = CliRunner().invoke(cli.main, shlex.split(again)[1:], catch_exceptions=False)
    assert result.exit_code == 0, again
    assert (tmp_path / "a page.html").read_text() == page


def test_the_command_of_a_module_makes_its_page(build_cache, compiled, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of = compiled(PagedAttentionSpec(4, 2, 16, 8, "float32", kv_layout="HND", window=9, softcap=3.5))
    page = made(of, context_lens=[40, 3])
    again = html.unescape(re.search(r'<pre class="command"[^>]*>(.*?)</pre>', page)[1])
    monkeypatch.setenv("PA_NUM_THREADS", "2")
    result = CliRunner().invoke(cli.main, shlex.split(again)[1:], catch_exceptions=False)
    assert result.exit_code == 0, again

    library = re.compile(
        "library SHA-256 [0-9a-f]+|pa-compiler report .* -o report.html|pa-compiler report .* --threads 2"
    )  # whose texts have addresses
    assert library.sub("", words((tmp_path / "report.html").read_text())) == library.sub("", words(page))


def test_threads_take_the_next_item_when_they_are_free():
    items = [WorkItem(0, 1, 0, 4, 64), WorkItem(0, 1, 4, 6, 32), WorkItem(1, 1, 0, 2, 32), WorkItem(2, 3, 0, 1, 10)]
    spec = PagedAttentionSpec(4, 2, 16, 16, "float32")
    runs, merges = schedule.schedule(items, 2, spec)
    of = spec.token_flops
    assert [(run.thread, run.begin / of, run.end / of) for run in runs] == [
        (0, 0, 64),
        (1, 0, 32),
        (1, 32, 64),
        (0, 64, 74),
    ]
    assert runs[1].said == "item 1 on thread 1: sequence 0, blocks 4 to 5, positions 64 to 95, 32 tokens"
    assert runs[3].said == "item 3 on thread 0: sequences 2 to 4, blocks 0 to 0, positions 0 to 15, 10 tokens"
    assert [(merge.thread, merge.time / of, merge.said) for merge in merges] == [
        (0, 64, "sequence 0: 2 partial results merged by thread 0")
    ]


def test_items_of_several_query_tokens():
    items = [AttendItem(3, 5, 2, 30, 0, 2, 0, 2, 900), AttendItem(3, 5, 2, 30, 0, 2, 2, 4, 900)]
    runs, merges = schedule.schedule(items, 1, PagedAttentionSpec(4, 2, 16, 16, "float32"))
    assert [(run.begin, run.end) for run in runs] == [(0, 900), (900, 1800)]
    assert runs[0].said == (
        "item 0 on thread 0: sequence 3, 2 query tokens from position 30 on, kv heads 0 to 1, blocks 0 to 1, "
        "positions 0 to 31"
    )
    assert len(merges) == 1


def test_pictures_are_pictures():
    items = [WorkItem(at, 1, 0, 4, 64) for at in range(9)]
    runs, merges = schedule.schedule(items, 3, PagedAttentionSpec(4, 2, 16, 16, "float32"))
    points = [pictures.Point("the <bound>", 48, "bound"), pictures.Point("measured", 20, "measured")]
    for picture in (
        pictures.gantt(runs, merges, 3),
        pictures.gantt([], [], 2),
        pictures.blocks(runs, most=4),
        pictures.blocks([]),
        pictures.roofline(4, 90, 12, points),
        pictures.bar({"FMA": 3, "load": 2}, 4, {"FMA": 'a "word" & <another>'}),
    ):
        root = ElementTree.fromstring(picture)
        box = [float(number) for number in root.get("viewBox").split()]
        for each in root.iter("rect"):
            assert float(each.get("x", 0)) + float(each.get("width")) <= box[2] + 0.5
            assert float(each.get("y", 0)) + float(each.get("height")) <= box[3] + 0.5
        for each in root.iter("circle"):
            assert 0 < float(each.get("cx")) < box[2]
            assert 0 < float(each.get("cy")) < box[3]


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", 'def f(a):\n    with T.sblock("x"):  # a & b\n        a[0] = T.float32(-3.4e38) < 2\n'),
        ("llvm", 'define void @f() {\n  %1 = fadd <4 x float> %0, c"; \\00" ; a comment\n}\n'),
        ("gas", "f:\n\tvmovups\t(%rdi), %zmm1 # a comment\n.L1:\n"),
        ("cpp", "/* one\n two */ int x = 1 < 2;\n"),
    ],
)
def test_colours_leave_the_text(language, text):
    lines = columns.coloured(text, language)
    assert [html.unescape(re.sub(r"<[^>]*>", "", line)) for line in lines][: text.count("\n")] == text.splitlines()
    assert any("<i class=" in line for line in lines)
    assert all(line.count("<i ") == line.count("</i>") for line in lines)


def test_llvm_mca_is_asked_where_it_knows_the_core(tmp_path, monkeypatch):
    loop = InnerLoop("f", (3,), {}, 2, 1.0, "loads", "", ("vmovups\t(%rdi), %ymm1", "jne\t.L1"))
    program = tmp_path / "llvm-mca"
    answer = {
        "CodeRegions": [
            {"Name": "l0", "SummaryView": {"TotalCycles": 50}},
            {"Name": "l1", "SummaryView": {"TotalCycles": 20}},
        ]
    }
    program.write_text(f"#!/bin/sh\ncat > {tmp_path / 'given'}\necho '{json.dumps(answer)}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert mca.cycles([loop, loop], "znver4") == [50 / mca.PASSES, 20 / mca.PASSES]
    assert "jne" not in (tmp_path / "given").read_text()
    assert mca.cycles([loop, loop], "x86-64-v4") is None
    assert mca.cycles([loop], "znver4") is None  # of which it says another number of loops
    program.write_text("#!/bin/sh\necho no such core >&2\nexit 1\n")
    assert mca.cycles([loop], "znver4") is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert mca.cycles([loop], "znver4") is None
