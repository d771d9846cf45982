"""Records of tuning: what was measured to be best for a spec on a CPU, kept beside the compiled libraries."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from pa_compiler import backends, store
from pa_compiler.runtime import cpu_features, files
from pa_compiler.spec import PagedAttentionSpec


def taken_up(config: dict[str, Any], spec: PagedAttentionSpec) -> dict[str, Any]:
    """A normalized target with what the record of this CPU says is tuned for a spec.

    As it is where it names a CPU, or says itself what is tuned; where there is no record, and where PA_TUNE is 0. A
    record that cannot be read is left out with a warning.

    Raises:
        ValueError: PA_TUNE is neither 0 nor 1.
    """
    if not backends.of(config).names_no_cpu(config) or not _are_wanted():
        return config
    try:
        path = path_of(spec)
        record = json.loads(path.read_text())
    except OSError:  # there is none, or no cache, of which compile says so
        return config
    except ValueError as error:
        return _left_out(path, str(error), config)
    try:
        return backends.normalize({**config, "tuned": record["tuned"]})
    except (KeyError, TypeError, ValueError) as error:
        return _left_out(path, str(error), config)


def keep(spec: PagedAttentionSpec, record: dict[str, Any]) -> Path:
    """Write the record of a spec on this CPU, in place of one that is there; its file.

    Raises:
        OSError: the cache directory cannot be used.
    """
    path = path_of(spec)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.write(path, json.dumps({"spec": spec.stated(), **record}, indent=1).encode())
    return path


def forget(spec: PagedAttentionSpec) -> bool:
    """Remove the record of a spec on this CPU; whether there was one."""
    try:
        path_of(spec).unlink()
    except FileNotFoundError:
        return False
    return True


def path_of(spec: PagedAttentionSpec) -> Path:
    """The file of a spec's record on this CPU: <cache>/tuned/<CPU>/<key>.json."""
    return store.directory() / "tuned" / cpu_features.name() / f"{store.key({'spec': spec.stated()})}.json"


def _are_wanted() -> bool:
    said = os.environ.get("PA_TUNE", "") or "1"
    if said not in ("0", "1"):
        raise ValueError(f"PA_TUNE: expected 0 or 1, got {said!r}")
    return said == "1"


def _left_out(path: Path, reason: str, config: dict[str, Any]) -> dict[str, Any]:
    warnings.warn(
        f"{path}: expected a record of pa-compiler tune, which is left out, got: {reason}", RuntimeWarning, stacklevel=5
    )
    return config
