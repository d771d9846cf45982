"""A program that builds one spec again and again, each time in a child that file_faults.cc makes fail or kills.

It reads jobs as JSON, one a line, and answers each with a line of JSON; see build(). Its environment preloads the
library of file_faults.cc and names in FAULTS the file that it maps. TVM lowers and compiles the spec once, before the
first child: that touches no file but the LLVM text, which every child writes and reads back. All else, the C++ compiler
and its files too, each child does in full.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

from inputs import make_inputs
from tolerances import assert_close_to_oracle

import pa_compiler
from pa_compiler import PagedAttentionSpec, compiler
from pa_compiler.cpu import backend
from pa_compiler.cpu import build as cpu_build

SPEC = PagedAttentionSpec(3, 1, 4, 2, "float32")
PATIENCE = 300
"""Seconds after which a build counts as hung: a hundred times what it takes."""

FAULTS = struct.Struct("<qqiiii1024s1024s")
"""struct Faults of file_faults.cc."""


def build(job, faults):
    """Build in a child and say what became of it.

    Args:
        job: cache and tmp, the directories to use, inside root, of which the operations count; nth, the operation at
            which to fail with error, an errno, or to be killed where that is 0 (nth 0: none); stays, as on a full disk;
            after, the seconds after which to be killed in any case, or None; group, whether the kill takes the C++
            compiler too. All optional but root.
        faults: The memory that is shared with the children.

    Returns:
        {"outcome": "right", "killed", "hung" or an error, "operations", "what"}: how many operations there were, and
        which was hit. An error that gives away what failed begins with "named".
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        victim = -os.getpid() if job.get("group") else os.getpid()
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        os.write(writing, _outcome(job, faults, victim).encode())
        os._exit(0)
    os.setpgid(child, child)  # here too: the child may not have come to it
    os.close(writing)
    if job.get("after") is not None:
        time.sleep(job["after"])
        (os.killpg if job.get("group") else os.kill)(child, signal.SIGKILL)
    with open(reading) as pipe:
        outcome = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        outcome = "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}"
    elif status:
        outcome = "hung"
    operations, *_, what = FAULTS.unpack(faults[: FAULTS.size])
    faults[:] = bytes(len(faults))
    return {"outcome": outcome, "operations": operations, "what": what.rstrip(b"\0").decode()}


def _outcome(job, faults, victim):
    os.environ |= {"PA_CACHE_DIR": f"{job['root']}/cache", "TMPDIR": f"{job['root']}/tmp"}
    tempfile.tempdir = os.environ["TMPDIR"]
    error, stays = job.get("error", 0), job.get("stays", False)
    faults[: FAULTS.size] = FAULTS.pack(0, job.get("nth", 0), error, victim, stays, 0, job["root"].encode(), b"")
    try:
        module = pa_compiler.compile(SPEC)
    except (OSError, RuntimeError) as caught:
        return f"{'named' if _is_named(caught, job['root'], error) else 'unnamed'} {caught!r}"
    except BaseException:
        return traceback.format_exc()
    inputs = make_inputs(SPEC, [0, 1, 5])
    assert_close_to_oracle(SPEC, inputs, module.decode(*inputs.arguments))
    return "right" if module.sources["asm"] == ASM else "other sources"


def _is_named(caught, root, error):
    """Whether an error says what failed: which file and why, or what the C++ compiler said."""
    if isinstance(caught, OSError):
        return caught.errno == error and bool(caught.filename)
    return root in str(caught) or re.match(r"the C\+\+ compiler .* failed with status -?\d+:", str(caught)) is not None


def _do_tvms_part_once():
    """Let the backend's steps before the assembly give their first result every time; return the spec's assembly."""
    backend.build_kernels, backend.lower = _once(backend.build_kernels), _once(backend.lower)
    cpu_build.emit = _once(cpu_build.emit, by=lambda kernel, target, number: number)
    return compiler.emit(SPEC)["asm"]


def _once(function, by=lambda *_: None):
    results = {}

    def first_result(*arguments, **options):
        key = by(*arguments)
        if key not in results:
            results[key] = function(*arguments, **options)
        return results[key]

    return first_result


if __name__ == "__main__":
    ASM = _do_tvms_part_once()
    with open(os.environ["FAULTS"], "r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        for line in sys.stdin:
            given = json.loads(line)
            for name in ("cache", "tmp"):
                Path(given["root"], name).mkdir(mode=0o700, parents=True, exist_ok=True)
            print(json.dumps(build(given, memory)), flush=True)
