"""How long a first compile takes, and where the time goes: each spec in a fresh process, without the cache.

    python benchmarks/compile_time.py [ROUNDS]

"import" is TVM's own; "kernels" parses and schedules TensorIR; "code" lowers it and runs LLVM; "link" waits for the
host's C++, which g++ has compiled meanwhile, and links. "CPU" is what all of that takes of the CPU, g++ too: where it
comes near the sum of the others the machine was idle. "hit" is the compile of another process, which finds it in the
cache. Medians of some rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

SPECS = {
    "16/1 heads, d128, block 128, bfloat16": "16, 1, 128, 128, 'bfloat16'",
    "32/8 heads, d128, block 16, float32": "32, 8, 128, 16, 'float32'",
}

COLD = """
import json, resource, time
times = {}

def timed(name, function):
    def call(*args, **kwargs):
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        times[name] = time.perf_counter() - begin
        return result
    return call

import pa_compiler
from pa_compiler import native
from pa_compiler.cpu import backend, build
timed("import", __import__)("tvm")
backend.lower = timed("kernels", backend.lower)
build.compile_kernels = timed("code", build.compile_kernels)
native.link = timed("link", native.link)
timed("compile", pa_compiler.compile)(pa_compiler.PagedAttentionSpec(SPEC), cache=False)
usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
times["CPU"] = sum(usage.ru_utime + usage.ru_stime for usage in usages)
print(json.dumps(times))
"""

HIT = """
import json, time
import pa_compiler
spec = pa_compiler.PagedAttentionSpec(SPEC)
begin = time.perf_counter()
pa_compiler.compile(spec)
print(json.dumps({"hit": time.perf_counter() - begin}))
"""


def measure(program: str, spec: str, directory: Path) -> dict[str, float]:
    """Run a program in a fresh process, with a cache in directory; seconds by name."""
    file = directory / "program.py"  # code given by -c has no file, which TVM's parser looks for again and again
    file.write_text(program.replace("SPEC)", f"{spec})"))
    environment = {**os.environ, "PA_CACHE_DIR": str(directory / "cache")}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Measure, and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    names = ("import", "kernels", "code", "link", "compile", "CPU", "hit")
    times: dict[str, list[dict[str, float]]] = {title: [] for title in SPECS}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for title, spec in SPECS.items():
            measure(HIT, spec, directory)  # fills the cache
            for _ in track(range(rounds), title, transient=True):
                times[title].append(measure(COLD, spec, directory) | measure(HIT, spec, directory))
    table = Table("spec", *names, "import and compile", title=f"seconds, medians of {rounds}")
    for title, measured in times.items():
        medians = {name: statistics.median(time[name] for time in measured) for name in names}
        both = statistics.median(time["import"] + time["compile"] for time in measured)
        table.add_row(title, *(f"{medians[name]:.3f}" for name in names), f"{both:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
