"""Every line of a GPU's texts says which function of a kernel's script it comes from, down to the machine code."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import zlib
from collections import Counter

import pytest
from linked import units

import pa_compiler
from pa_compiler import generate
from pa_compiler.backend import links
from pa_compiler.cuda import backend, lines, places, tiling
from pa_compiler.cuda import build as cuda_build
from pa_compiler.cuda.kernels import launches
from pa_compiler.cuda.target import CudaTarget
from pa_compiler.report.units import Units

ENTRIES = {name: entry for name, entry in generate.ENTRIES.items() if entry.config["kind"] == "cuda"}
ARITHMETIC = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?((?:HMMA|FFMA|FADD|FMUL|FMNMX|MUFU)\S*)")
_LABEL, _BRANCH = re.compile(r"(\.L_x_\d+):"), re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_STAGES = {
    r"HMMA": {"qk_matmul", "pv_matmul"},
    r"LDGSTS": {"fetches"},
    r"LDSM\.16\.M88\.4": {"qk_matmul"},
    r"LDSM\.16\.MT88\.4": {"pv_matmul"},
    r"MUFU\.EX2": {"softmax", "online_update", "partials", "normalize"},
}
"""Instructions that few stages have, and which those are."""


@pytest.fixture(scope="module", params=ENTRIES)
def module(request, build_cache):
    for name in ("nvcc", "nvdisasm"):
        if cuda_build.find_tool(name) is None:
            pytest.skip(f"there is no {name}: make cuda-tools")
    entry = ENTRIES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PA_CACHE_DIR", str(build_cache))
        return pa_compiler.compile(entry.spec, entry.config, entry.pipeline, **entry.extras._asdict())


def stages(module, found, stage):
    """(line, its stage of the algorithm) of a text."""
    text = module.sources[stage].splitlines()
    of_lines = found.of_lines[stage]
    assert len(text) == len(of_lines)
    return [(line, found.all[unit].stage if unit >= 0 else "") for line, unit in zip(text, of_lines, strict=True)]


def wrong(pairs):
    """The instructions whose stage has none of their kind."""
    return [
        (line.strip(), stage)
        for line, stage in pairs
        for pattern, of in _STAGES.items()
        if re.search(rf"\*/\s+(?:@!?U?P\w+\s+)?{pattern}", line) and stage not in of
    ]


def in_loops(text):
    """Whether each line of SASS is in an innermost loop: from a label to a jump back to it, with no such in between."""
    text, labels, loops = text.splitlines(), {}, []
    for at, line in enumerate(text):
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = at
        elif (jump := _BRANCH.search(line)) and jump[1] in labels:
            loops.append((labels[jump[1]], at))
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    within = {at for begin, end in inner for at in range(begin, end + 1)}
    return [at in within for at in range(len(text))]


def test_arithmetic_of_inner_loops_is_linked(module):
    found = units(module)
    loops = in_loops(module.sources["sass"])
    of = [
        stage
        for (line, stage), inside in zip(stages(module, found, "sass"), loops, strict=True)
        if inside and ARITHMETIC.match(line)
    ]
    assert len(of) > 100
    assert sum(stage != "" for stage in of) >= 0.9 * len(of)
    everywhere = [stage for line, stage in stages(module, found, "sass") if ARITHMETIC.match(line)]
    assert sum(stage != "" for stage in everywhere) >= 0.9 * len(everywhere)


def test_no_link_is_wrong(module):
    """All products of fragments that decode's kernel has are of the matmul that they are for."""
    found = units(module)
    pairs = stages(module, found, "sass")
    assert wrong(pairs) == []
    begin = next(at for at, (line, _) in enumerate(pairs) if ".section" in line and "cuda_decode_kernel" in line)
    end = next(at for at in range(begin + 1, len(pairs)) if ".section\t.text" in pairs[at][0] or at == len(pairs) - 1)
    products = Counter(stage for line, stage in pairs[begin:end] if "HMMA" in line)
    assert products == {"qk_matmul": 8, "pv_matmul": 9}  # 128 / 16 each, and the sum of the weights


@pytest.mark.parametrize("step", [-1, 1])
def test_a_seeded_wrong_link_is_caught(module, step):
    read = json.loads(module._links)
    read["lines"]["sass"] = [(max(place + step, -1), count) for place, count in read["lines"]["sass"]]
    assert wrong(stages(module, Units(dict(module.sources), links(json.dumps(read))), "sass"))


def test_every_stage_is_in_all_texts(module):
    found = units(module)
    of = {
        stage: {found.all[unit].stage for unit in of_lines if unit >= 0} - {""}
        for stage, of_lines in found.of_lines.items()
    }
    assert list(of) == ["tensorir", "cuda", "ptx", "sass"]
    assert {"append_kv", "load_query", "fetches", "qk_matmul", "softmax", "pv_matmul", "partials"} <= of["tensorir"]
    assert of["tensorir"] == of["cuda"] == of["ptx"] == of["sass"]


def test_the_texts_are_the_same_without_places(module, tmp_path):
    """CUDA C of kernels that are not marked, and PTX and SASS of nvcc without line numbers."""
    entry = next(iter(ENTRIES.values()))
    tiles, attend = tiling.choose(entry.spec, "sm_90"), tiling.choose_attend(entry.spec, "sm_90")
    mod = launches.build(entry.spec, tiles, attend)
    assert cuda_build.emit(mod, "sm_90") == module.sources["cuda"]
    (tmp_path / "kernels.cu").write_text(module.sources["cuda"])
    plain = [flag for flag in cuda_build._FLAGS if flag != "-lineinfo"]
    command = [*cuda_build.nvcc(), *plain, "-arch=compute_90", "-ptx", "kernels.cu", "-o", "kernels.ptx"]
    cuda_build._run(command, tmp_path / "kernels.ptx")
    assert (tmp_path / "kernels.ptx").read_text().strip() == module.sources["ptx"].strip()


def test_its_page(module, tmp_path):
    """Made of what the cache has, with links in all columns but the host's."""
    module.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert len(page.encode()) < 2_000_000
    data = re.search(r'<script type="text/plain" id="data">(.*?)</script>', page)[1]
    columns = json.loads(zlib.decompress(base64.b64decode(data)))["columns"]
    assert {column["stage"]: column["linked"] for column in columns} == {
        "tensorir": True, "cuda": True, "ptx": True, "sass": True, "host": False,
    }  # fmt: skip
    assert "nvcc's line numbers" in html.unescape(page)


def test_places_of_a_text_are_those_of_its_lines():
    """Without nvcc: a line of TensorIR that multiplies fragments is of a matmul, and so is its line of CUDA C."""
    entry = next(iter(ENTRIES.values()))
    lowered = backend.lower(entry.spec, CudaTarget("sm_90"))
    names = {
        stage: [lowered.links.places[place].name if place >= 0 else "" for place in lowered.links.of_lines(stage)]
        for stage in ("tensorir", "cuda")
    }
    for stage, product in (("tensorir", "T.ptx.mma"), ("cuda", "tvm_builtin_ptx_mma")):
        kernel = False
        for line, name in zip(lowered.texts[stage].splitlines(), names[stage], strict=True):
            kernel = kernel or "def cuda" in line or "__global__" in line
            if kernel and product in line:
                assert name in ("qk_matmul", "pv_matmul")
    assert places.apart("a\n    pa_place(3);\n    b\n    }\n  pa_place(-1);\nc\n") == (
        "a\n    b\n    }\nc\n",
        [-1, 3, -1, -1],
    )


def test_what_is_inlined_comes_from_where_it_is_called():
    given = (
        "\t.loc\t1 30 5\n\tadd.s32 \t%r1;\n\t.loc\t2 7 3, function_name $L__x, inlined_at 1 31 2\n\tmul.f32 \t%f1;\n"
        "\t.loc\t2 9 1, function_name $L__x, inlined_at 2 7 3\n\tmov.b32 \t%r2;\n$L__BB0_1:\n\tret;\n}\n"
        '\t.file\t1 "/tmp/kernels.cu"\n\t.file\t2 "/usr/x.hpp"\n\t.section\t.debug_str\n\t{\n$L__x:\n\t}\n'
    )
    text, numbers = lines.of_ptx(lines.outermost(given))
    assert list(zip(text.splitlines(), numbers, strict=True)) == [
        ("\tadd.s32 \t%r1;", 30),
        ("\tmul.f32 \t%f1;", 31),
        ("\tmov.b32 \t%r2;", 31),
        ("$L__BB0_1:", 0),
        ("\tret;", 31),
        ("}", 0),
    ]


def test_lines_of_machine_code():
    given = (
        '\t//## File "/tmp/kernels.cu", line 12\n        /*0000*/                   LDC R1, c[0x0][0x28] ;\n.L_x_1:\n'
        '        /*0010*/                   EXIT ;\n\t//## File "/usr/x.hpp", line 3\n        /*0020*/   NOP ;\n'
    )
    text, numbers = lines.of_sass(given)
    assert numbers == [12, 0, 12, 0]
    assert list(itertools.islice(text.splitlines(), 1, 2)) == [".L_x_1:"]
