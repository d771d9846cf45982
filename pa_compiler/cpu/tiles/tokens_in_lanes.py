"""Tiles where the tokens of a packed block lie in the lanes of a vector register: for any group."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from pa_compiler.cpu.tiles.basis import Basis, CpuTiling, register_tile
from pa_compiler.key_ranges import decodes_in_step
from pa_compiler.spec import PACKED_TOKENS


@dataclasses.dataclass(frozen=True)
class TokensInLanes(CpuTiling):
    """Tiles of schedules/cpu/tokens_in_lanes.py."""

    strategy: ClassVar[str] = "tokens_in_lanes"

    @classmethod
    def takes(cls, basis: Basis) -> tuple[bool, str]:
        """The packed layout."""
        if basis.spec.kv_layout == "packed":
            return True, "kv_layout packed has the tokens of a block side by side."
        return False, f"kv_layout {basis.spec.kv_layout} has the elements of a row side by side."

    @classmethod
    def choose(cls, basis: Basis) -> TokensInLanes:
        """Scores of one vector of tokens, or of 1, 2 or 4 times PACKED_TOKENS.

        In a sweep it is as many vectors as registers hold, so that a step reads several places in different pages.
        """
        target, machine = basis.target, basis.machine
        lanes = target.vector_lanes
        sweep = basis.sweep(cls._sweep_rows(basis))
        columns = [1, *(groups * PACKED_TOKENS // lanes for groups in (1, 2, 4))]
        if sweep:
            columns = [max(vectors for vectors in columns if vectors <= target.vector_sums)]
        of_row = machine.broadcast_registers
        qk_rows, vectors = register_tile(basis.rows, columns, target, basis.load_cost, 2, of_row=of_row)
        pv_rows, pv_dims = basis.pv_tile()
        token_group = max(vectors * lanes, PACKED_TOKENS)
        places = machine.streams if basis.values.word == 1 else machine.paired_streams
        return cls(
            **basis.common(token_group, sweep),
            copy_keys=False,
            copy_values=False,
            streams=1,
            qk_rows=qk_rows,
            qk_tokens=vectors * lanes,
            pv_rows=pv_rows,
            pv_dims=pv_dims,
            group_places=math.gcd(token_group, places) if sweep else 1,
        )

    @staticmethod
    def _sweep_rows(basis: Basis) -> int:
        """Rows up to which there is a sweep: one at least where decode cannot be in the steps of attend."""
        spec, of_machine = basis.spec, basis.machine.sweep_rows
        rows = of_machine if isinstance(of_machine, int) else dict(of_machine).get(spec.cache_dtype, 0)
        if decodes_in_step(spec):
            return 0 if spec.invariant else rows
        return max(rows, 1)
