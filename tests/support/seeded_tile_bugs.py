"""The faults of seeded_bugs.py that are in what the tile registers of AMX multiply."""

from __future__ import annotations

from seeded_bug import Fault

_KERNELS = "pa_compiler/kernels/"

TILE_FAULTS = {
    "a token group that is not seen whole read in place by tiles": Fault(
        f"{_KERNELS}pv_in_place.py",
        "holds = first + tiling.token_group <= tile.valid_len",
        "holds = first <= tile.valid_len",
        "test_tokens_in_tiles.py",
    ),
    "an unused slot in a tile of packed values": Fault(
        f"{_KERNELS}pv_in_place.py",
        "seen = column < tile.valid_len",
        "seen = column <= tile.valid_len",
        "test_tokens_in_tiles.py",
    ),
    "rows of one tile of products for all": Fault(
        "schedules/intrinsics/tile_nests.py",
        "IfThenElse(of_columns == 0,",
        "IfThenElse(of_columns == 1,",
        "test_tokens_in_tiles.py",
    ),
    "the query of other elements for all but one tile of tokens": Fault(
        "schedules/intrinsics/tile_nests.py",
        "IfThenElse(of_rows == 0,",
        "IfThenElse(of_rows == 1,",
        "test_rows_in_tiles.py",
    ),
    "the neighbour of an element that is not finite": Fault(
        f"{_KERNELS}rows_in_place.py", "if infinite[0] != 0:", "if infinite[0] == 2:", "test_rows_in_tiles.py"
    ),
    "rows of a window from its first token on": Fault(
        f"{_KERNELS}rows.py", "seen - T.floormod(seen, TILE_TOKENS))", "seen)", "test_rows_in_tiles.py"
    ),
}
"""By what goes wrong."""
