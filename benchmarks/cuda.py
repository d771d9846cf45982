"""The CUDA target's benchmark, on a GPU: decode by CUDA events, beside a device copy and other libraries.

Run it by `make bench-cuda`. Contenders take turns, so that a change of the GPU's clocks meets them all. Before a call
the second-level cache is overwritten, and the GPU waits until the call has been launched: times are the GPU's. Every
result is compared with float64.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import pa_compiler
from benchmarks.inputs import Call, make_call
from benchmarks.peers import Unsupported
from pa_compiler import PagedAttentionSpec
from pa_compiler.runtime import files
from pa_compiler.verification.cases import Case
from pa_compiler.verification.tolerances import tolerance

_ROUNDS, _WARM_UP = 30, 3
_COPY_BYTES, _FLUSH_BYTES = 1 << 30, 1 << 28
_SLEEP_CYCLES = 2_000_000  # about a millisecond, in which a call is launched from Python


def _case(heads: str, head_dim: int, dtype: str, batch: int, *seq_lens: int) -> Case:
    num_heads, num_kv_heads = map(int, heads.split("/"))
    return Case(PagedAttentionSpec(num_heads, num_kv_heads, head_dim, 16, dtype), batch, seq_lens, scale=None)


CASES = {
    "32/8-bf16": _case("32/8", 128, "bfloat16", 64, 4096),
    "32/8-bf16-batch1": _case("32/8", 128, "bfloat16", 1, 32768),
    "32/8-bf16-variable": _case("32/8", 128, "bfloat16", 64, 33, 8192, 4096, 127, 1, 2048, 6000, 64),
    "32/8-f16": _case("32/8", 128, "float16", 64, 4096),
    "32/8-f32": _case("32/8", 128, "float32", 32, 4096),
    "64/8-bf16": _case("64/8", 128, "bfloat16", 64, 4096),
    "16/1-bf16": _case("16/1", 128, "bfloat16", 128, 8192),
    "32/32-bf16": _case("32/32", 128, "bfloat16", 16, 4096),
    "32/8-d64-bf16": _case("32/8", 64, "bfloat16", 64, 8192),
    "16/2-d256-bf16": _case("16/2", 256, "bfloat16", 64, 8192),
}
"""The first is the one that the target's aim is put in: 85 % of the copy's bandwidth on an H100."""

Run = Callable[[], torch.Tensor]
DEVICE = "cuda"


@dataclasses.dataclass(frozen=True)
class OnDevice:
    """The arrays of a call on the GPU; caches in NHD."""

    call: Call
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    context_lens: torch.Tensor

    def contiguous(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache as [batch, num_kv_heads, longest, head_dim], tokens in order."""
        blocks = self.block_table.clamp(min=0).long()
        tokens = cache[blocks].flatten(1, 2)[:, : int(self.call.context_lens.max())]
        return tokens.transpose(1, 2).contiguous()


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A copy of an array on the GPU."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).to(DEVICE).view(torch.bfloat16)
    return torch.from_numpy(array).to(DEVICE)


def prepare_ours(inputs: OnDevice) -> Run:
    """pa_compiler, with the check of indices that it has by default, on the GPU."""
    major, minor = torch.cuda.get_device_capability()
    module = pa_compiler.compile(inputs.call.case.spec, {"kind": "cuda", "arch": f"sm_{major}{minor}"})
    out = torch.empty_like(inputs.query)
    arrays = (inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_table, inputs.context_lens)
    return lambda: module.decode(*arrays, out=out)


def prepare_flashinfer(inputs: OnDevice) -> Run:
    """FlashInfer's batch decode, planned before it is timed."""
    try:
        import flashinfer
    except ImportError as error:
        raise Unsupported(str(error)) from error
    spec, lens = inputs.call.case.spec, inputs.call.context_lens
    counts = -(-lens // spec.block_size)
    used = np.concatenate([row[:count] for row, count in zip(inputs.call.block_table, counts, strict=True)])
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=spec.group >= 4)
    wrapper.plan(
        as_torch(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
        as_torch(used),
        as_torch((lens - (counts - 1) * spec.block_size).astype(np.int32)),
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.block_size,
        q_data_type=inputs.query.dtype,
        kv_data_type=inputs.query.dtype,
    )
    return lambda: wrapper.run(inputs.query, (inputs.key_cache, inputs.value_cache))


def prepare_sdpa(inputs: OnDevice) -> Run:
    """torch's scaled_dot_product_attention over contiguous keys and values; a mask where lengths differ."""
    key, value = inputs.contiguous(inputs.key_cache), inputs.contiguous(inputs.value_cache)
    query, lens = inputs.query.unsqueeze(2), inputs.context_lens
    mask = None
    if len(set(inputs.call.context_lens.tolist())) > 1:
        mask = (torch.arange(key.shape[2], device=DEVICE) < lens[:, None])[:, None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, key, value, attn_mask=mask, enable_gqa=True).squeeze(2)


def prepare_flex(inputs: OnDevice) -> Run:
    """torch's FlexAttention, compiled, over contiguous keys and values with a block mask of the lengths."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    key, value = inputs.contiguous(inputs.key_cache), inputs.contiguous(inputs.value_cache)
    query, lens = inputs.query.unsqueeze(2), inputs.context_lens

    def is_valid(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv < lens[b]

    torch.compiler.reset()  # or from some case on it is not compiled any more
    mask = create_block_mask(is_valid, len(lens), None, 1, key.shape[2], device=DEVICE)
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda: attend(query, key, value, block_mask=mask, enable_gqa=True).squeeze(2)


CONTENDERS: dict[str, Callable[[OnDevice], Run]] = {
    "pa_compiler": prepare_ours,
    "FlashInfer": prepare_flashinfer,
    "torch SDPA": prepare_sdpa,
    "FlexAttention": prepare_flex,
}


def errors_of(inputs: OnDevice, outs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest error of each result against float64, as a fraction of its bound; infinite where one is NaN."""
    case, spec = inputs.call.case, inputs.call.case.spec
    of_out, of_magnitude = tolerance(spec, case.longest)
    worst = dict.fromkeys(outs, 0.0)
    for seq, length in enumerate(inputs.call.context_lens.tolist()):
        blocks = inputs.block_table[seq, : -(-length // spec.block_size)].long()
        keys, values = (
            cache[blocks].flatten(0, 1)[:length].double().repeat_interleave(spec.group, 1)
            for cache in (inputs.key_cache, inputs.value_cache)
        )
        scores = torch.einsum("hd,thd->ht", inputs.query[seq].double(), keys) / spec.head_dim**0.5
        probs = torch.softmax(scores, 1)
        expected, magnitude = (torch.einsum("ht,thd->hd", probs, each) for each in (values, values.abs()))
        bound = of_out * expected.abs() + of_magnitude * magnitude
        for name, out in outs.items():
            fraction = ((out[seq].double() - expected).abs() / bound).nan_to_num(nan=float("inf"))
            worst[name] = max(worst[name], fraction.max().item())
    return worst


def time_in_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call."""
    written, read = (torch.zeros(_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(_WARM_UP + rounds):
        for name, run in runs.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            written.zero_()
            read.max()  # what was written has left the cache
            torch.cuda._sleep(_SLEEP_CYCLES)
            before.record()
            run()
            after.record()
            torch.cuda.synchronize()
            if turn >= _WARM_UP:
                times[name].append(before.elapsed_time(after) / 1e3)
    return times


def measure(case: Case, rounds: int, chosen: tuple[str, ...]) -> dict[str, Any]:
    """Time a case; what came out, for the table and as JSON."""
    call = make_call(case, 1, huge_pages=False)
    names = ("query", "key_cache", "value_cache", "block_table", "context_lens")
    inputs = OnDevice(call, *(as_torch(getattr(call, name)) for name in names))
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    for name in chosen:
        try:
            runs[name] = CONTENDERS[name](inputs)
            runs[name]()
            torch.cuda.synchronize()
        except Exception as error:  # a library's own, of any kind: it sits out, and the table says why
            if name == "pa_compiler":
                raise
            runs.pop(name, None)
            reasons[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    errors = errors_of(inputs, {name: run().clone() for name, run in runs.items()})
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = time_in_turns(runs | {"copy": lambda: target.copy_(source)}, rounds)
    copy = 2 * _COPY_BYTES / statistics.median(times.pop("copy"))
    rows = {
        name: {
            "seconds": spread(own),
            "bandwidth": case.kv_bytes / statistics.median(own),
            "of_copy": case.kv_bytes / statistics.median(own) / copy,
            "ours_is_faster": spread([one / mine for one, mine in zip(own, times["pa_compiler"], strict=True)]),
            "error": errors[name],
        }
        for name, own in times.items()
    }
    return {"copy": copy, "kv_bytes": case.kv_bytes, "rows": rows, "reasons": reasons}


def spread(values: list[float]) -> list[float]:
    """The median, the 10th and the 90th percentile."""
    return [float(value) for value in np.percentile(values, [50, 10, 90])]


def print_case(console: Console, name: str, case: Case, measured: dict[str, Any]) -> None:
    """A table of one case."""
    console.print(
        f"\n[bold]{name}[/bold]: {case.batch} sequences of {case.context_lens.min()} to {case.longest} tokens, "
        f"{case.kv_bytes / 1e6:.0f} MB of KV; a copy moves {measured['copy'] / 1e9:.0f} GB/s"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("", "us", "GB/s", "of copy", "pa_compiler is faster by", "error"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for contender, row in measured["rows"].items():
        median, low, high = row["ours_is_faster"]
        ratio = "" if contender == "pa_compiler" else f"{median:.2f} ({low:.2f}-{high:.2f})"
        cells = (f"{1e6 * row['seconds'][0]:.1f}", f"{row['bandwidth'] / 1e9:.0f}", f"{100 * row['of_copy']:.0f} %")
        table.add_row(contender, *cells, ratio, f"{row['error']:.2f}")
    console.print(table)
    for contender, reason in measured["reasons"].items():
        console.print(f"{contender}: {reason}", style="dim", markup=False)


@click.command(context_settings={"show_default": True})
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Default: all.")
@click.option("--contender", "chosen", multiple=True, type=click.Choice(list(CONTENDERS)), help="Default: all.")
@click.option("--rounds", type=click.IntRange(1), default=_ROUNDS, help="Turns of each contender.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results there.")
def main(names: tuple[str, ...], chosen: tuple[str, ...], rounds: int, json_path: Path | None) -> None:
    """Time decode on this machine's GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("no GPU: torch finds none, and this benchmark measures nothing else")
    console = Console(highlight=False)
    contenders = tuple(dict.fromkeys(("pa_compiler", *(chosen or CONTENDERS))))
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {rounds} rounds")
    results = {}
    for name in names or CASES:
        with console.status(name):
            results[name] = measure(CASES[name], rounds, contenders)
        print_case(console, name, CASES[name], results[name])
    if json_path is not None:
        measured = {"gpu": torch.cuda.get_device_name(), "cases": results}
        files.write(json_path, f"{json.dumps(measured)}\n".encode())
    wrong = [name for name, result in results.items() if not result["rows"]["pa_compiler"]["error"] <= 1]
    if wrong:
        raise click.ClickException(f"wrong results of pa_compiler: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
