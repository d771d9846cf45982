"""Options that several commands take, and what becomes of their values."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from pa_compiler import backends
from pa_compiler.backend import Extras
from pa_compiler.cli import functions
from pa_compiler.cli.text import flag
from pa_compiler.compiler import PIPELINES
from pa_compiler.kv_types import KV_DOTS, KV_ROTATIONS, KV_TYPES, SCALES
from pa_compiler.spec import DTYPES, KV_LAYOUTS, PagedAttentionSpec
from pa_compiler.verification import cases

_Record = TypeVar("_Record", bound=Any)


class Command(click.Command):
    """A command that shows the API's errors without a traceback; all commands are of this class."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it. An error about a value that an option or an environment variable gave names that."""
        try:
            return super().invoke(ctx)
        except (TypeError, ValueError) as error:
            name, _, rest = str(error).partition(": ")
            for param in self.params:
                if param.name == name.partition("[")[0]:  # of inputs['bias'] too
                    raise click.BadParameter(rest, ctx, param) from error
            if name in os.environ:
                raise click.ClickException(str(error)) from error
            raise
        except (ImportError, OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE):  # of stdout: main() shows it
                raise
            if type(error).__module__ != "builtins":  # TVM's own: a defect of the compiler, where the traceback helps
                raise
            raise click.ClickException(str(error)) from error


class SeqLens(click.ParamType):
    """Lengths in tokens with commas between them."""

    name = "LENGTHS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse an option's value."""
        try:
            lengths = tuple(int(part) for part in value.split(","))
        except ValueError:
            lengths = ()
        if not lengths or not all(0 <= length < 2**31 for length in lengths):
            self.fail(f"expected lengths of 0 or more with commas between them, such as 33,64,17,128, got {value!r}")
        return lengths


class Target(click.ParamType):
    """llvm, the name of a CPU, cuda, the name of a GPU's architecture, or a TVM target as JSON."""

    name = "TARGET"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> backends.TargetLike:
        """Parse an option's value."""
        if not value.startswith("{"):
            return backends.named(value)
        try:
            return dict(json.loads(value))
        except ValueError as error:
            self.fail(f"expected llvm, cuda, the name of a CPU or a GPU, or a target as JSON, got {value!r}: {error}")


class FunctionOf(click.ParamType):
    """A Python function by its module and its name."""

    name = "MODULE:FUNCTION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Callable[..., Any]:
        """Import it."""
        try:
            return functions.imported(value)
        except ValueError as error:
            self.fail(str(error))


class DeclaredInput(click.ParamType):
    """An input of functions: its name, its dtype and its extents."""

    name = "NAME=DTYPE:EXTENTS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Parse an option's value. What the spec checks is left to it."""
        match = re.fullmatch(r"(\w+)=(\w+):(\w+)", value)
        if not match:
            self.fail(f"expected name=dtype:extents, such as bias=float32:8x1024 or doc=int32:batchx64, got {value!r}")
        name, dtype, extents = match.groups()
        return name, (dtype, tuple(int(each) if each.isdecimal() else each for each in extents.split("x")))


def _as_mapping(ctx: click.Context, param: click.Parameter, values: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    names = [name for name, _ in values]
    if len(set(names)) < len(names):
        raise click.BadParameter(f"expected different names, got {', '.join(names)}", ctx, param)
    return dict(values)


def _score_options(option: Callable[..., Callable[[Any], Any]]) -> list[Callable[[Any], Any]]:
    """Options of what becomes of scores; option makes one of a field."""
    return [
        option("window", "Tokens that a query sees, the last ones, its own among them.", int, show_default="all"),
        option("softcap", "Scores become C tanh(score / C).", float, show_default="none", metavar="C"),
        option("alibi", "Scores get a bias by their distance, with a slope for each head.", is_flag=True),
        option("sinks", "The softmax of each head has one more score, without a value.", is_flag=True),
        *(option(field, text, FunctionOf(), show_default="none") for field, text in functions.FIELDS.items()),
        click.option(
            "--input",
            "inputs",
            type=DeclaredInput(),
            multiple=True,
            callback=_as_mapping,
            help='An array that these functions take by keyword, such as bias=float32:8x1024; "batch" is an extent.',
        ),
    ]


def spec_fields(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each field of the spec."""
    integers = {
        "num_heads": "Query heads, a multiple of --num-kv-heads.",
        "num_kv_heads": "Heads of the caches.",
        "head_dim": "Elements of one head of query and of one key.",
        "block_size": "Tokens in one block of the cache.",
        "head_tile": "Query heads that a kernel takes at a time, a power of two.",
        "batch_chunk": "Sequences of one chunk.",
    }
    names = {
        "dtype": (DTYPES, "Type of query, and of caches that have no type of their own."),
        "kv_dtype": ((*DTYPES, *KV_TYPES), "Type of the caches: codes, with scales beside them, if not --dtype."),
        "kv_scale": (SCALES, "What has a scale of its own in caches of codes."),
        "kv_rotation": (KV_ROTATIONS, "What keys and values are multiplied by before they become codes."),
        "kv_dots": (KV_DOTS, "What decode makes of queries, and of weights, to multiply codes of int4 by."),
        "out_dtype": (DTYPES, "Type of out."),
        "kv_layout": (KV_LAYOUTS, "Layout of the caches."),
    }

    def option(field: str, text: str, kind: Any = None, **more: Any) -> Callable[[Any], Any]:
        return click.option(flag(field), type=kind, default=getattr(cases.DEFAULT.spec, field), help=text, **more)

    decorators = [option(field, text, int) for field, text in integers.items()]
    decorators += [
        option("value_dim", "Elements of one value and of one head of out.", int, show_default="head_dim"),
        option("shared_kv", "The value of a token is the first elements of its key: one cache.", is_flag=True),
        *_score_options(option),
        option("invariant", "A token's bits are the same decoded and prefilled.", is_flag=True),
    ]
    decorators += [option(field, text, click.Choice(choices)) for field, (choices, text) in names.items()]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each field of the spec, and --target and --pipeline."""
    decorators = [
        spec_fields,
        click.option(
            "--target",
            type=Target(),
            default="llvm",
            help="llvm for this CPU, the name of a CPU such as x86-64-v3, cuda for a GPU, the name of a GPU's "
            "architecture such as sm_80, or a TVM target as JSON.",
        ),
        click.option("--pipeline", type=click.Choice(PIPELINES), default="fused"),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def extras_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each entry point that a library may have or not."""
    for decorator in (
        click.option("--shared-prefix", is_flag=True, help="With attend_shared_prefix."),
        click.option("--merge-states", is_flag=True, help="With merge_states."),
        click.option("--attend/--no-attend", default=True, help="With or without attend, which takes time to compile."),
    ):
        command = decorator(command)
    return command


def extras(options: dict[str, Any]) -> dict[str, bool]:
    """What they say, of a command's options, as compile takes it."""
    return {name: options[name] for name in Extras._fields}


def call_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a call of decode or attend: --case, the spec's, and those of what it is called with."""
    default = cases.DEFAULT
    decorators: list[Callable[[Any], Any]] = [
        click.option(
            "--case", "case_name", type=click.Choice(list(cases.CASES)), help="Start from one of the seed's cases."
        ),
        spec_options,
        click.option("--batch", type=click.IntRange(min=0), default=default.batch, help="Sequences."),
        click.option(
            "--seq-len",
            "seq_lens",
            type=SeqLens(),
            default=",".join(map(str, default.seq_lens)),
            envvar="PA_SEQ_LEN",
            show_envvar=True,
            help="Tokens of each sequence. A shorter list is repeated to fill the batch, a longer one is cut.",
        ),
        click.option(
            "--query-len",
            "query_lens",
            type=SeqLens(),
            show_default="one each, by decode",
            help="Query tokens of each sequence, its last ones, by attend. A list as for --seq-len.",
        ),
        click.option(
            "--max-model-len",
            type=click.IntRange(min=1),
            show_default="the longest length",
            help="Tokens that one row of block_table can name.",
        ),
        click.option(
            "--scale", type=float, show_default="1/sqrt(head_dim); 1 with --case", help="Factor of the scores."
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            envvar="PA_NUM_THREADS",
            show_envvar=True,
            show_default="the CPUs of this process",
            help="Threads that share the work.",
        ),
        click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the inputs."),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def replace(base: _Record, **changes: Any) -> _Record:
    """Replace fields of a spec or a case by changes and by the options of this command that the user gave."""
    ctx = click.get_current_context()
    fields = {field.name for field in dataclasses.fields(base)} - changes.keys()
    given = {name for name in fields & ctx.params.keys() if ctx.get_parameter_source(name) != ParameterSource.DEFAULT}
    return dataclasses.replace(base, **changes, **{name: ctx.params[name] for name in given})


def check_takes_numpy(target: Any) -> None:
    """Refuse the target of a GPU, for a command that runs NumPy's arrays."""
    if not backends.of(backends.normalize(target)).takes_numpy:
        command = click.get_current_context().info_name
        raise ValueError(f"target: expected a CPU for {command}, got {target!r}; build, explain and inspect take a GPU")


def compared_numbers(spec: PagedAttentionSpec) -> int:
    """Numbers that a comparison in float64 has of a token: keys, values, their magnitudes, and six of scores."""
    return spec.num_kv_heads * (spec.head_dim + 2 * spec.result_dim) + 6 * spec.num_heads


def check_memory(needed: int) -> None:
    """Refuse what needs more bytes than this machine has."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise click.UsageError(f"{needed / 1e9:.1f} GB are needed and this machine has {memory / 1e9:.1f} GB.")
