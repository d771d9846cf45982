"""What a seeded fault is."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """One edit, and the pytest arguments that should catch it."""

    file: str
    right: str
    wrong: str
    tests: str
