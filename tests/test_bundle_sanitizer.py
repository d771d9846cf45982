"""A bundle under AddressSanitizer and UndefinedBehaviorSanitizer, but for its kernels, in a C program that is too."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
import sanitizer
from bundles import C, program
from c_calls import read_result, write_case
from inputs import make_inputs
from specs import BASE
from test_bundle_programs import cases

import pa_compiler
from pa_compiler import naming

GXX = """#!/bin/sh
case " $* " in *" -shared "*) libraries="-lasan -lubsan";; esac
exec g++ "$@" -O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 $libraries
"""
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.mark.skipif(sanitizer.missing_runtime() is not None, reason=str(sanitizer.missing_runtime()))
def test_calls_are_clean(tmp_path, monkeypatch):
    """Good calls and bad ones, on the library's threads and the caller's: no report, and no memory that is lost."""
    gxx = tmp_path / "g++"
    gxx.write_text(GXX)
    gxx.chmod(0o755)
    monkeypatch.setenv("CXX", str(gxx))
    folder, name = tmp_path / "bundle", naming.spec_name(BASE)
    pa_compiler.bundle([BASE], ["x86-64-v3"], folder)
    driver = program(folder, C / "driver.c", tmp_path / "driver", *FLAGS, static=True)
    assert b"__asan_" in (folder / "lib" / "libpa.a").read_bytes()
    words, bad = [], []
    for call, arrays in cases(BASE):
        for manner in ("default", "workspace", "caller"):
            words += [tmp_path / f"{call}.{manner}", tmp_path / f"{call}.{manner}.result"]
            write_case(words[-2], call, name, arrays, manner=manner)
    inputs = make_inputs(BASE, [3, 700])
    arrays = {"query": inputs.query, "key_cache": inputs.key_cache, "value_cache": inputs.value_cache}
    arrays |= {"block_table": inputs.block_table, "context_lens": inputs.context_lens, "out": inputs.out}
    spoilt = {
        "query": inputs.query[..., :5],
        "value_cache": None,
        "block_table": np.full_like(inputs.block_table, 9999),
        "context_lens": inputs.context_lens.astype(np.int64) * -1,
        "out": inputs.out.astype(np.float16),
        "lse": np.zeros((3, 3, 3), np.float32),
        "sinks": np.zeros(6, np.float32),
    }
    for which, array in spoilt.items():
        bad += [tmp_path / f"bad.{which}", tmp_path / f"bad.{which}.result"]
        write_case(bad[-2], "decode", name, arrays | {which: array}, manner="default")
    ran = subprocess.run(
        [str(word) for word in (driver, *words, *bad)],
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "x86-64-v3\n", "")
    for which, path in zip(spoilt, bad[1::2], strict=True):
        status, message, _ = read_result(path, [])
        assert status
        assert message.startswith(f"{which}: expected ")
