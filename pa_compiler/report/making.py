"""From a module, and what is asked of it, to its page."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from pa_compiler import backends
from pa_compiler.backend import Limits, checked_limits
from pa_compiler.cli.text import flag
from pa_compiler.prediction import calls
from pa_compiler.prediction.rates import Rates
from pa_compiler.report import page
from pa_compiler.report.page import Call, Measured, Subject
from pa_compiler.spec import PagedAttentionSpec
from pa_compiler.verification import cases
from pa_compiler.verification.cases import Case

DEFAULT_LENS = (4096, 33, 1024, 515)
Step = Callable[[str], AbstractContextManager[Any]]
"""Shows that something is going on, which its label names."""


def made(
    module: Any,
    context_lens: Sequence[int] | None,
    query_lens: Sequence[int] | None,
    flops: float | None,
    bandwidth: float | None,
    measure: bool,
    again: str | None = None,
    step: Step = contextlib.nullcontext,
) -> str:
    """The HTML of a module's page. Arguments and errors as of Module.report; again is the command that makes it again.

    Where it is not given, it is made of what the module says of itself. What takes longer than a second is a step.
    """
    spec, limits = module.spec, checked_limits(flops, bandwidth)
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
    command = again or _command(module, None if context_lens is None else case, limits, measure)
    measured = None
    if measure and case is not None:
        measured, limits = _measured(module, case, limits, step)
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
            measured=measured,
            command=command,
        )
    )


def _measured(module: Any, case: Case, limits: Limits, step: Step) -> tuple[Measured, Limits]:
    """Predict and time a call on one thread; with the limits of this core where they are not given."""
    if case.spec.score_mod is not None and case.spec.score_mod.result is None:
        raise ValueError("measure: expected a module that was compiled here, got one that has the text of functions")
    if not case.num_tokens:
        raise ValueError("context_lens: expected tokens that can be measured, got none")
    call, reason, lines, rates = calls.prepared(module, case), calls.unknown(module, case), None, None
    try:
        if not reason:
            with step("Writing down the order in which the call reads"):
                lines = calls.ordered(call)
        with step("Measuring what the machine gives"):
            rates = Rates()
            stream = rates.stream()
    except RuntimeError as error:  # no compiler
        lines, reason, stream = None, str(error), 0.0
    with step("Measuring the call"):
        found = calls.measured(call, rates, lines)
    if rates is not None:
        limits = limits._replace(
            flops=limits.flops or (found.operations or 0) / 1e9 or None, bandwidth=limits.bandwidth or stream / 1e9
        )
    return Measured(found, case.flops, case.kv_bytes, reason), limits


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
