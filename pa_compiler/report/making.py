"""From a module, and what is asked of it, to its page."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pa_compiler import backends
from pa_compiler.backend import Limits
from pa_compiler.cli.text import flag
from pa_compiler.report import page
from pa_compiler.report.page import Call, Measured, Subject
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification import cases
from pa_compiler.verification.cases import Case

DEFAULT_LENS = (4096, 33, 1024, 515)
_SECONDS = 1.0
_LEAST, _MOST = 5, 200


def made(
    module: Any,
    context_lens: Sequence[int] | None,
    query_lens: Sequence[int] | None,
    limits: Limits,
    measure: bool,
    again: str | None = None,
) -> str:
    """The HTML of a module's page. Arguments and errors as of Module.report; again is the command that makes it again.

    Where it is not given, it is made of what the module says of itself.
    """
    spec = module.spec
    if query_lens is not None and context_lens is None:
        raise ValueError("query_lens: expected context_lens beside them, got None")
    runs = backends.of(dict(module.target)).takes_numpy and not module.manifest.is_foreign
    if not runs and (measure or context_lens is not None):
        raise ValueError("context_lens: expected None, and no measuring, of a module for a GPU or another architecture")
    case = None
    if runs:
        lens = tuple(int(each) for each in (DEFAULT_LENS if context_lens is None else context_lens))
        queries = None if query_lens is None else tuple(int(each) for each in query_lens)
        if queries is not None and len(queries) != len(lens):
            raise ValueError(f"query_lens: expected {len(lens)} numbers, one for each sequence, got {len(queries)}")
        case = Case(spec, len(lens), lens, scale=None, query_lens=queries)
    call = None
    if case is not None:
        items = module.plan(case.context_lens, case.query_start_loc)
        call = Call(tuple(case.context_lens.tolist()), case.query_lens, items, module.num_threads)
    return page.page(
        Subject(
            spec=spec,
            manifest=page.manifest_rows(module.manifest, module.checksum),
            target=module.target,
            features=module.manifest.features,
            pipeline=module.pipeline,
            sources=module.sources,
            links=module._links,
            call=call,
            limits=limits,
            measured=_measured(module, case) if measure and case else None,
            command=again or _command(module, None if context_lens is None else case, limits, measure),
        )
    )


def checked_limits(flops: float | None, bandwidth: float | None) -> Limits:
    """The limits of a core.

    Raises:
        ValueError: one of them is not above 0.
    """
    for name, value in (("flops", flops), ("bandwidth", bandwidth)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return Limits(flops, bandwidth)


def _measured(module: Any, case: Case) -> Measured:
    """Time a call on one thread, with caches of which it reads each block once."""
    if case.spec.score_mod is not None and case.spec.score_mod.result is None:
        raise ValueError("measure: expected a module that was compiled here, got one that has the text of functions")
    caches = module.empty_cache(case.num_blocks)
    arrays = cases.make_inputs(case, 0, caches=caches)._replace(block_table=cases.distinct_blocks(case))
    heads = cases.head_arrays(case)
    before = module.num_threads
    module.num_threads = 1
    try:
        out = cases.call(module, case, arrays, **heads)
        seconds = [_timed(module, case, arrays, out, heads)]
        while len(seconds) < _LEAST or (sum(seconds) < _SECONDS and len(seconds) < _MOST):
            seconds.append(_timed(module, case, arrays, out, heads))
    finally:
        module.num_threads = before
    return Measured(statistics.median(seconds), len(seconds), case.flops, case.kv_bytes)


def _timed(module: Any, case: Case, arrays: Any, out: np.ndarray, heads: dict[str, Any]) -> float:
    start = time.perf_counter()
    cases.call(module, case, arrays, out, **heads)
    return time.perf_counter() - start


def _command(module: Any, case: Case | None, limits: Limits, measure: bool) -> str:
    """What makes the page again. Functions of scores are named by their text, since nobody else knows their names."""
    words = ["pa-compiler", "report", *_spec_words(module.spec)]
    words += ["--target", json.dumps(dict(module.target), sort_keys=True)]
    words += [] if module.pipeline == "fused" else ["--pipeline", module.pipeline]
    words += [] if module.has_attend else ["--no-attend"]
    words += ["--merge-states"] if module.has_merge_states else []
    words += ["--shared-prefix"] if module.has_attend_shared_prefix else []
    if case is not None:
        words += ["--batch", str(case.batch), "--seq-len", ",".join(map(str, case.seq_lens))]
        words += ["--query-len", ",".join(map(str, case.query_lens))] if case.query_lens else []
    for name in ("flops", "bandwidth"):
        value = getattr(limits, name)
        words += [] if value is None else [flag(name), f"{value:g}"]
    words += ["--measure"] if measure else []
    return f"{shlex.join(words)} -o report.html"


def _spec_words(spec: PagedAttentionSpec) -> list[str]:
    """The options that give a spec, but for what the command takes where an option is not given."""
    words: list[str] = []
    for field in dataclasses.fields(spec):
        value, default = getattr(spec, field.name), getattr(cases.DEFAULT.spec, field.name)
        if value == default or field.name in ("inputs", "constants"):
            continue
        if value is True:
            words.append(flag(field.name))
        elif field.name in ("score_mod", "mask_mod"):
            words += [flag(field.name), f"MODULE:{value.name}" if hasattr(value, "name") else "MODULE:FUNCTION"]
        elif value is not None and value is not False:
            words += [flag(field.name), str(value)]
    for name, dtype, shape, *_ in spec.inputs:
        words += ["--input", f"{name}={dtype}:{'x'.join(map(str, shape))}"]
    return words
