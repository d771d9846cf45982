"""pa-compiler explain and bench: what they print is what the assembly and the calls are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from click.testing import CliRunner

from pa_compiler import PagedAttentionSpec
from pa_compiler.cli import main as cli
from pa_compiler.cpu import assembly, backend
from pa_compiler.verification import cases
from pa_compiler.verification.comparison import Errors

OPTIONS = {
    "heads_in_lanes": "--num-heads 32 --head-tile 32 --dtype float32",
    "head_dim_in_lanes": "--num-heads 32 --num-kv-heads 8 --block-size 8",  # tile registers take no blocks of 8
    "tokens_in_lanes": "--num-heads 32 --num-kv-heads 8 --kv-layout packed --dtype float32",
}
REASONS = {
    "heads_in_lanes": "32 query heads in a tile: whole vectors of 16",
    "head_dim_in_lanes": "4 query heads in a tile: heads lie in lanes from 32 on",
    "tokens_in_lanes": "kv_layout packed",
}


@pytest.fixture
def emitted(monkeypatch):
    """The text of each stage that the command gets from the compiler."""
    texts = {}
    emit = backend.emit

    def emit_and_keep(*arguments):
        texts.update(emit(*arguments))
        return texts

    monkeypatch.setattr(backend, "emit", emit_and_keep)
    return texts


def invoke(*words):
    result = CliRunner().invoke(cli.main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def printed_loops(text):
    """{line of the assembly: the numbers beside it}, from the table that explain prints."""
    rows = (re.fullmatch(r"\s*(\d+(?:\s+\d+){11})", line) for line in text.splitlines())
    numbers = [list(map(int, row[1].split())) for row in rows if row]
    return {line: rest for line, *rest in numbers}


@pytest.mark.parametrize("strategy", OPTIONS)
@pytest.mark.parametrize("where", [(), ("--target", "x86-64-v4")], ids=["native", "v4"])
def test_explain_counts_what_is_in_the_assembly(emitted, strategy, where):
    text = invoke("explain", *OPTIONS[strategy].split(), *where)
    flat = " ".join(text.split())
    assert f"strategy {strategy}. " in flat
    if where:
        assert REASONS[strategy] in flat
        assert "32 registers of 16 float32 lanes" in flat
        told = {int(sums) for sums in re.findall(r"in (\d+) of 32 registers", flat)}
        assert told <= set(accumulators(emitted["asm"]))
    loops = printed_loops(text)
    assert len(loops) >= 5
    lines = emitted["asm"].splitlines()
    begin, end = (
        next(at for at, text in enumerate(lines) if text.startswith(of_decode))
        for of_decode in ("__tvm_ffi_fused_decode:", "\t.size\t__tvm_ffi_fused_decode,")
    )
    innermost = loops.keys() & {loop.line for loop in assembly.inner_loops(emitted["asm"])} & {*range(begin, end)}
    line = max(innermost, key=lambda at: loops[at][2] + loops[at][3])  # the most FMAs, or dot products of pairs
    label = next(name for name in map(str.strip, reversed(lines[: line - 1])) if name.startswith(".LBB"))
    label = label.partition(":")[0]
    ends = (at for at, code in enumerate(lines) if at >= line and re.search(rf"\bj\w+\s+{re.escape(label)}$", code))
    code = [each for each in lines[line - 1 : next(ends) + 1] if re.match(r"\t[a-z]", each)]
    expected = [
        len(code),
        sum(re.search(r"vfn?m(add|sub)", each) is not None for each in code),
        sum("vdpbf16ps" in each for each in code),
        sum("broadcast" in each for each in code),
        sum("{1to16}" in each for each in code),
        sum("prefetch" in each for each in code),
        sum(
            "pslld\t$16" in each or "pblendw\t$170" in each or "pand" in each or "andps" in each or "2w\t" in each
            for each in code
        ),
        sum("mm" in each and each.endswith("(%rsp)") for each in code),
    ]
    _, instructions, fmas, dots, _, _, broadcasts, embedded, conversions, prefetches, stores = loops[line]
    assert [instructions, fmas, dots, broadcasts, embedded, prefetches, conversions] == expected[:-1]
    assert stores >= expected[-1]
    assert fmas + dots >= 8


def test_explain_tile_registers():
    text = invoke("explain", *"--num-heads 32 --num-kv-heads 8 --kv-layout packed --target sapphirerapids".split())
    flat = " ".join(text.split())
    assert "strategy tokens_in_tiles. AMX multiplies packed bfloat16 as it lies in the caches." in flat
    assert "4 rows x 64 tokens, in 4 of 8 tile registers" in flat
    assert "4 rows x 64 elements of a value, in 4 of 8 tile registers" in flat


def test_explain_rows_in_tile_registers():
    text = invoke("explain", *"--num-heads 16 --num-kv-heads 1 --kv-layout HND --target sapphirerapids".split())
    flat = " ".join(text.split())
    assert "strategy rows_in_tiles. AMX multiplies rows of bfloat16 as they lie in the caches." in flat
    assert "read in place and multiplied by AMX" in flat
    assert "16 rows x 64 tokens, in 4 of 8 tile registers" in flat
    assert "16 rows x 64 elements of a value, in 4 of 8 tile registers" in flat


def accumulators(asm):
    """Of the loops that fetch or broadcast, in how many zmm registers their FMAs end."""
    for loop in assembly.inner_loops(asm):
        if any(re.search(r"prefetch|\{1to16\}|vbroadcastss", line) for line in loop.code):
            yield len({line.split()[-1] for line in loop.code if re.match(r"vfmadd\d+ps.*%zmm\d+$", line)})


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("vfmadd231ps\t(%rax){1to16}, %zmm1, %zmm0", "fmas embedded"),
        ("vdpbf16ps\t(%rax){1to16}, %zmm1, %zmm0", "dots embedded"),
        ("vfnmadd213ss\t8(%rsp), %xmm1, %xmm0", "fmas loads"),
        ("mulps\t(%rax,%rcx,4), %xmm0", "arithmetic loads"),
        ("vmaxss\t%xmm1, %xmm2, %xmm3", "arithmetic"),
        ("vmovups\t.LCPI2_7(%rip), %ymm1", "loads"),
        ("vgatherdps\t(%rdi,%ymm1,4), %zmm0 {%k1}", "loads"),
        ("vcmpltps\t(%rdi), %zmm0, %k1", "loads"),
        ("vbroadcastss\t4(%rax), %ymm1", "broadcasts"),
        ("vpbroadcastd\t%xmm1, %ymm1", "broadcasts"),
        ("vcvtph2ps\t(%rax), %ymm1", "conversions loads"),
        ("vpslld\t$16, %ymm1, %ymm2", "conversions"),
        ("vpslld\t$23, %ymm1, %ymm2", ""),
        ("vpandd\t%zmm1, %zmm2, %zmm3", "conversions"),
        ("vpermt2w\t%zmm1, %zmm2, %zmm3", "conversions"),
        ("prefetcht1\t64(%rsp,%rax)", "prefetches"),
        ("vmovups\t%zmm1, 64(%rsp) {%k1}", "stack_stores"),
        ("movq\t%rax, -8(%rsp,%rcx,8)", "stack_stores"),
        ("vmovaps\t%ymm1, 64(%rax) {%k1}", ""),
        ("movq\t8(%rsp), %rax", ""),
        ("cmpq\t%rax, 8(%rsp)", ""),
        ("leaq\t8(%rsp), %rax", ""),
        ("callq\t*8(%rsp)", ""),
    ],
)
def test_what_an_instruction_counts_as(line, field):
    counts = assembly.count([line])._asdict()
    assert counts == {name: int(name == "instructions" or name in field.split()) for name in counts}


def test_loops_around_others_are_found_where_they_compute_and_counted_by_their_own():
    asm = """f:
.LBB0_1:
\tmovq %rax, %rbx
.LBB0_2:
\taddq $1, %rax
\tje .LBB0_3
\tsubq $1, %rbx
.LBB0_3:
\tjne .LBB0_2
\tjmp .LBB0_1
\tjmp .LBB0_4
.LBB0_4:
\tretq
"""
    code = ("addq $1, %rax", "je .LBB0_3", "subq $1, %rbx", "jne .LBB0_2")
    inner = assembly.Loop("f", (5, 6, 7, 9), code, innermost=True)
    assert assembly.inner_loops(asm) == assembly.loops(asm) == [inner]
    products = asm.replace("\tmovq %rax, %rbx\n", "\ttdpbf16ps %tmm4, %tmm5, %tmm0\n")
    own = ("tdpbf16ps %tmm4, %tmm5, %tmm0", "jmp .LBB0_1")
    assert assembly.loops(products) == [inner, assembly.Loop("f", (3, 10), own, innermost=False)]
    assert assembly.inner_loops(products) == [inner]


def test_a_loop_of_fetches_is_a_part_of_the_loop_of_products_around_it():
    """As products of tiles are made, with a few lines fetched after each; alone it is a loop of its own."""
    fetches = ".LBB0_2:\n\tprefetcht1\t(%rax,%rcx)\n\taddq\t$64, %rcx\n\tjne\t.LBB0_2\n"
    asm = f"f:\n.LBB0_1:\n\ttdpbf16ps\t%tmm4, %tmm5, %tmm0\n{fetches}\tdecq\t%rbx\n\tjne\t.LBB0_1\n\tretq\n"
    (loop,) = assembly.inner_loops(asm)
    assert (loop.line, len(loop.code)) == (3, 6)
    counts = assembly.count(loop.code)
    assert (counts.dots, counts.prefetches) == (1, 1)
    (alone,) = assembly.inner_loops(f"f:\n{fetches}\tretq\n")
    assert alone.code[0] == "prefetcht1\t(%rax,%rcx)"
    stores = asm.replace("\taddq\t$64, %rcx\n", "\tvmovups\t%ymm0, (%rdi,%rcx)\n\taddq\t$64, %rcx\n")
    assert [loop.line for loop in assembly.inner_loops(stores)] == [5]  # what writes is a loop of its own


def test_the_roofline_is_the_lower_of_two(monkeypatch):
    monkeypatch.setattr(backend, "emit", lambda *_: {"asm": ""})
    words = ["explain", "--num-heads", "16", "--dtype", "float32"]
    text = invoke(*words)
    assert "8,192 FLOPs and 1,024 bytes a token of context: 8 FLOPs a byte" in text
    assert "--flops and --bandwidth" in text
    assert "us for" not in text
    text = invoke(*words, "--flops", "40", "--bandwidth", "10")
    assert "40 GFLOP/s, min(40, 10 x 8): bound by arithmetic" in text
    assert "204.80 us for 1,000 tokens" in text
    text = invoke(*words, "--flops", "40", "--bandwidth", "4")
    assert "32 GFLOP/s, min(40, 4 x 8): bound by memory" in text
    assert "256.00 us for 1,000 tokens" in text


@pytest.mark.parametrize(
    ("options", "values"), [("--num-heads 16", "values paired in scratch"), ("--num-heads 4", "values too")]
)
def test_dot_products_of_pairs_are_told(monkeypatch, options, values):
    monkeypatch.setattr(backend, "emit", lambda *_: {"asm": ""})
    words = "explain --target znver4 --head-dim 128 --flops 100 --bandwidth 1000".split()
    text = " ".join(invoke(*words, *options.split()).split())
    assert f"keys read in place and multiplied as pairs of bfloat16, {values}" in text
    assert "200 GFLOP/s, min(200, 1000 x" in text


@pytest.mark.parametrize("layout", ["NHD", "packed"])
def test_bench_passes(build_cache, layout):
    words = "--case CaseVarSeq4 --repeat 3 --threads 1 --kv-layout".split()
    text = invoke("bench", *words, layout)
    for expected in (f"{layout}, blocks of 16 tokens", "median of 3; 10 % to 90 %", "GFLOP/s", "GB/s", "PASS"):
        assert expected in text


def test_bench_notices_a_wrong_result(build_cache, monkeypatch):
    monkeypatch.setattr(cases, "compare", lambda *_: Errors(1.0, 1.01))
    words = "bench --case CaseVarSeq4 --repeat 2".split()
    result = CliRunner().invoke(cli.main, words, catch_exceptions=False)
    assert (result.exit_code, "FAIL" in result.stdout) == (1, True)


def test_every_block_is_used_once():
    case = cases.Case(PagedAttentionSpec(2, 2, 16, 16, "float32"), 4, (40, 0, 16, 1), 64)
    table = cases.distinct_blocks(case)
    assert table.shape == (4, 4)
    assert list((table >= 0).sum(axis=1)) == [3, 0, 1, 1]
    assert sorted(table[table >= 0]) == list(range(case.num_blocks))
    keys, values = (np.full((case.num_blocks, 16, 2, 16), np.nan, np.float32) for _ in range(2))
    inputs = cases.make_inputs(case, caches=(keys, values))
    assert inputs.key_cache is keys
    assert inputs.value_cache is values
    for array, other in zip(inputs, cases.make_inputs(case), strict=True):
        assert np.array_equal(array, other)
