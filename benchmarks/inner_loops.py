"""What matmuls' inner loops consist of, for CPUs that need not be there: python -m benchmarks.inner_loops neoverse-n1.

For each loop of decode and attend whose work is products, those among its instructions, its cycles by llvm-mca, where
that is on PATH and knows the core, and the share of the slots of the units that multiply, in these cycles, that
products take. llvm-mca has all data in the first-level cache. Where it lets more products into a cycle than the makers
of the core say, as of bfdot in the model of Neoverse V2 in LLVM 19, the cycles are those of the products.
"""

from __future__ import annotations

import argparse

from pa_compiler import PagedAttentionSpec, backends, compiler
from pa_compiler.backend import InnerLoop, Limits
from pa_compiler.cpu import inside, target
from pa_compiler.report import mca

SHAPES = ((32, 8), (16, 1))
DTYPES = ("float32", "float16", "bfloat16")
PASSES = 500
LEAST = 0.4
"""Of a loop's instructions that are products: fewer are of exponentials, and of the sums of lanes."""


def loops(spec: PagedAttentionSpec, cpu: target.CpuTarget, config: dict) -> list[tuple[InnerLoop, int]]:
    """Those of products, and how many products each has."""
    sources = compiler.emit(spec, config)
    found = inside.inside(spec, config, sorted(cpu.features), "fused", sources, Limits()).loops
    counted = [(loop, loop.mix["FMA"] + loop.mix["dot"]) for loop in found]
    return [(loop, count) for loop, count in counted if count >= max(8, LEAST * loop.instructions)]


def main() -> None:
    """Print a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mcpu", help="a CPU by LLVM's name")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    options = parser.parse_args()
    config = backends.normalize(backends.named(options.mcpu))
    cpu = target.resolve(config)
    units = inside.core_of(config, cpu).arithmetic
    print("| heads | type | loop | instructions | products | of instructions | cycles | of slots |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in options.dtypes:
        for heads in SHAPES:
            spec = PagedAttentionSpec(*heads, 128, 16, dtype)
            found = loops(spec, cpu, config)
            cycles = mca.cycles([loop for loop, _ in found], options.mcpu, config.get("mtriple", cpu.machine), PASSES)
            for (loop, count), of_mca in zip(found, cycles or [0.0] * len(found), strict=True):
                least = max(of_mca, count / units)
                print(
                    f"| {heads[0]}/{heads[1]} | {dtype} | {loop.function} | {loop.instructions} | {count} | "
                    f"{count / loop.instructions:.0%} | {of_mca:.1f} | {count / (units * least):.0%} |"
                )


if __name__ == "__main__":
    main()
