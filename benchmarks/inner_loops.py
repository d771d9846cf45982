"""What matmuls' inner loops consist of, for CPUs that need not be there: python -m benchmarks.inner_loops neoverse-n1.

For each loop of decode and attend whose work is products, those among its instructions, its cycles by llvm-mca, where
that is on PATH and knows the core, and the share of the slots of the units that multiply, in these cycles, that
products take. llvm-mca has all data in the first-level cache. What a jump goes around, as around a fetch for all tiles
of rows but the last, is left out. Where it lets more products into a cycle than the makers
of the core say, as of bfdot in the model of Neoverse V2 in LLVM 19, the cycles are those of the products.
"""

from __future__ import annotations

import argparse
import re

from pa_compiler import PagedAttentionSpec, backends, compiler
from pa_compiler.backend import InnerLoop, Limits
from pa_compiler.cpu import inside, target
from pa_compiler.report import mca

SHAPES = ((32, 8), (16, 1))
DTYPES = ("float32", "float16", "bfloat16")
PASSES = 500
LEAST = 0.4
"""Of a loop's instructions that are products: fewer are of exponentials, and of the sums of lanes."""
_SKIPS = re.compile(r"tbn?z|cbn?z|b\.\w+|j\w+")
"""The jump around a fetch."""


def loops(spec: PagedAttentionSpec, cpu: target.CpuTarget, config: dict, least: float) -> list[tuple[InnerLoop, int]]:
    """Those of products, and how many products each has."""
    sources = compiler.emit(spec, config)
    found = inside.inside(spec, config, sorted(cpu.features), "fused", sources, Limits()).loops
    found = [without_fetches(loop) for loop in found]
    counted = [(loop, loop.mix["FMA"] + loop.mix["dot"]) for loop in found]
    return [(loop, count) for loop, count in counted if count >= (max(8, least * loop.instructions) if least else 0)]


def without_fetches(loop: InnerLoop) -> InnerLoop:
    """A loop as it runs where nothing is fetched: without what is between a jump and the fetch that it goes around."""
    code: list[str] = []
    for line in loop.code:
        code.append(line)
        jumps = [at for at, each in enumerate(code) if _SKIPS.match(each)]
        if line.startswith("prf") and jumps:
            del code[jumps[-1] + 1 :]
    return loop._replace(code=tuple(code), instructions=len(code))


def main() -> None:
    """Print a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mcpu", help="a CPU by LLVM's name")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--kv-layout", default="NHD")
    parser.add_argument("--kv-dtype")
    parser.add_argument("--least", type=float, default=LEAST, help="of a loop's instructions that are products; 0: any")
    options = parser.parse_args()
    config = backends.normalize(backends.named(options.mcpu))
    cpu = target.resolve(config)
    units = inside.core_of(config, cpu).arithmetic
    print("| heads | type | loop | instructions | products | of instructions | cycles | of slots |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in options.dtypes:
        for heads in SHAPES:
            spec = PagedAttentionSpec(*heads, 128, 16, dtype, kv_layout=options.kv_layout, kv_dtype=options.kv_dtype)
            found = loops(spec, cpu, config, options.least)
            triple = config.get("mtriple", cpu.machine)
            for loop, count in found:
                of_mca = (mca.cycles([loop], options.mcpu, triple, PASSES) or [0.0])[0]
                least = max(of_mca, count / units)
                print(
                    f"| {heads[0]}/{heads[1]} | {dtype} | {loop.function} | {loop.instructions} | {count} | "
                    f"{count / loop.instructions:.0%} | {of_mca:.1f} | {count / (units * least or 1):.0%} |"
                )


if __name__ == "__main__":
    main()
