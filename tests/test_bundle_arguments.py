"""bundle() and its command refuse by name, and leave a whole directory or none."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from specs import BASE

import pa_compiler
from pa_compiler import naming
from pa_compiler.cli import main as cli
from pa_compiler.cpu.target import CpuTarget
from pa_compiler.cpu.tiles import choose

SUPPORT = Path(__file__).parent / "support"
V3 = "x86-64-v3"


@pytest.mark.parametrize(
    ("specs", "targets", "error", "says"),
    [
        ([], [V3], ValueError, r"^specs: expected one at least, got none"),
        (BASE, [V3], TypeError, r"^specs: expected several PagedAttentionSpecs"),
        (["x"], [V3], TypeError, r"^specs: expected PagedAttentionSpecs, got str"),
        ([BASE, BASE], [V3], ValueError, r"^specs: expected specs that differ, got f32_nhd_h6x2_d24_b5 more than once"),
        ([BASE], [], ValueError, r"^targets: expected one CPU at least, got none"),
        ([BASE], V3, TypeError, r"^targets: expected several CPUs, such as a list of names, got 'x86-64-v3'"),
        ([BASE], ["cuda"], ValueError, r"^targets: expected CPUs, got 'cuda'"),
        ([BASE], [V3, V3], ValueError, r"^targets: expected CPUs that differ, got .*x86-64-v3.* more than once"),
        ([BASE], [{"kind": "llvm", "cpu": "x"}], ValueError, r"^target: expected the keys"),
    ],
)
def test_bad_arguments(tmp_path, specs, targets, error, says):
    with pytest.raises(error, match=says):
        pa_compiler.bundle(specs, targets, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("processes", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_processes(tmp_path, processes, error):
    with pytest.raises(error, match=r"^processes: expected"):
        pa_compiler.bundle([BASE], [V3], tmp_path / "made", processes=processes)


def test_a_cpu_that_llvm_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"^targets: expected an mcpu that LLVM knows, .* got 'x86-64-v9'"):
        pa_compiler.bundle([BASE], [V3, "x86-64-v9"], tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("targets", "machines"),
    [
        ([V3, "neoverse-n1"], "x86_64, aarch64"),
        (["neoverse-v2", {"kind": "llvm", "mcpu": "znver4"}, "neoverse-n1"], "aarch64, x86_64"),
    ],
)
def test_other_architectures_are_refused_together(tmp_path, targets, machines):
    with pytest.raises(ValueError, match=rf"^targets: expected CPUs of one architecture, got {machines}$"):
        pa_compiler.bundle([BASE], targets, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("begun", ["*/.scratch/0.0", "*/.scratch/0.0/host.cc"], ids=["a_task", "a_host"])
def test_ctrl_c_leaves_nothing(tmp_path, begun):
    """Neither files nor processes that compile, as soon as there is what shows that one of them has begun."""
    root = tmp_path / "root"
    root.mkdir()
    script = (
        "import signal, sys, pa_compiler\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which the shell may have had ignored
        "specs = [pa_compiler.PagedAttentionSpec(heads, 2, 24, 5, 'float32') for heads in (6, 8)]\n"
        "try:\n    pa_compiler.bundle(specs, ['x86-64-v3'], sys.argv[1], processes=2)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    command = [sys.executable, "-c", script, str(root / "made")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not [*root.glob(begun)] and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=120)[0] == "interrupted\n"
    assert list(root.iterdir()) == []
    of_others = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    assert not [words for words in of_others if os.fsencode(root) in words]


def test_what_is_there_stays(tmp_path):
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        make(tmp_path / "made")
        with pytest.raises(FileExistsError, match=r"^directory: expected one that is not there yet, got .*made"):
            pa_compiler.bundle([BASE], [V3], tmp_path / "made")
        assert [path.name for path in tmp_path.iterdir()] == ["made"]
        (tmp_path / "made").rmdir() if (tmp_path / "made").is_dir() else (tmp_path / "made").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^directory: expected a folder that it can be made in, got none: .*no"
    ):
        pa_compiler.bundle([BASE], [V3], tmp_path / "no" / "made")


@pytest.mark.parametrize("variable", ["OBJCOPY", "AR", "CXX"])
def test_a_tool_that_is_missing(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "no-such-program")
    with pytest.raises(RuntimeError, match=r"'no-such-program' is not on PATH"):
        pa_compiler.bundle([BASE], [V3], tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nth", [4, 60])
def test_a_full_disk(tmp_path, nth):
    """From some file operation on, the compilers' too, the disk of the directory is full."""
    root = tmp_path / "root"
    root.mkdir()
    library, faults = tmp_path / "file_faults.so", tmp_path / "faults"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, SUPPORT / "file_faults.cc", "-ldl"]
    subprocess.run(list(map(str, command)), check=True)
    faults.write_bytes(struct.pack("=qqiiii1024s1024s", 0, nth, errno.ENOSPC, 0, 1, 0, os.fsencode(root), b""))
    script = (
        "import sys, pa_compiler\n"
        "spec = pa_compiler.PagedAttentionSpec(6, 2, 24, 5, 'float32')\n"
        "try:\n    pa_compiler.bundle([spec], ['x86-64-v3'], sys.argv[1])\n"
        "except (OSError, RuntimeError) as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(root / "made")],
        env=os.environ | {"LD_PRELOAD": str(library), "FAULTS": str(faults)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "No space left on device" in done.stdout
    assert list(root.iterdir()) == []


def test_the_command_refuses(tmp_path):
    def said(*words):
        done = CliRunner().invoke(cli.main, ["bundle", *words], catch_exceptions=False)
        assert done.exit_code
        return done.output

    good = ["--targets", V3, "-o", str(tmp_path / "made")]
    assert "expected a multiple of num_kv_heads = 2, got 7" in said("--spec", "--num-heads 7 --num-kv-heads 2", *good)
    assert "No such option '--num-hads'" in said("--spec", "--num-hads 7", *good)
    assert "No closing quotation" in said("--spec", "'", *good)
    assert "Missing option '--spec'" in said(*good)
    assert "Invalid value for '--targets': expected CPUs, got 'cuda'" in said(
        "--spec", "", "--targets", "cuda", *good[2:]
    )
    assert "directory: expected one that is not there yet" in said("--spec", "", *good[:3], str(tmp_path))


def test_names_tell_specs_apart():
    """Each field that a spec can have changes its name, and names are identifiers."""
    fields = {
        "num_heads": 12, "num_kv_heads": 1, "head_dim": 32, "block_size": 16, "dtype": "bfloat16",
        "out_dtype": "float16", "kv_layout": "HND", "head_tile": 4, "batch_chunk": 3, "value_dim": 16, "window": 7,
        "softcap": 1e-3, "alibi": True, "sinks": True, "invariant": True, "kv_dtype": "int8", "shared_kv": True,
        "score_mod": lambda score, batch, head, query_pos, key_pos: score * 2,
        "mask_mod": lambda batch, head, query_pos, key_pos: key_pos > 3,
    }  # fmt: skip
    import dataclasses

    of_codes = {"kv_scale", "kv_rotation", "kv_dots"}
    assert fields.keys() | {"inputs"} | of_codes == {field.name for field in dataclasses.fields(BASE)}
    specs = [BASE, *(dataclasses.replace(BASE, **{name: value}) for name, value in fields.items())]
    specs += [dataclasses.replace(BASE, kv_dtype="float8_e5m2", kv_scale=scale) for scale in ("tensor", "head")]
    specs += [
        dataclasses.replace(BASE, head_dim=32, kv_dtype=dtype, kv_rotation=rotation)
        for dtype, rotation in (("int8", "hadamard"), ("int4", "hadamard"), ("int4", "none"))
    ]
    specs.append(dataclasses.replace(BASE, head_dim=32, kv_dtype="int4", kv_dots="int8"))
    names = [naming.spec_name(spec) for spec in specs]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    tiles = choose(BASE, CpuTarget('{"kind": "llvm"}', frozenset({"avx", "fma"})), "fused")
    assert naming.kernel_name(names[0], tiles, V3, "fused_decode").isidentifier()
