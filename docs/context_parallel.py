"""Context parallel decode: every process has some pages of each sequence, and the parts are merged.

    torchrun --nproc-per-node 2 docs/context_parallel.py

Each process attends to its own pages with all query heads. What it hands on is out in float32 and lse, a few kilobytes
a token, and never a key or a value. Here pages are dealt out in turn, so that each process has as many tokens, give or
take a page.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

import pa_compiler
from pa_compiler import PagedAttentionSpec

SPEC = PagedAttentionSpec(32, 8, 128, 16, "float32")
CONTEXT_LENS = [1000, 0, 17, 4096, 5]


def own_part(lengths: torch.Tensor, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pages, tokens) of each sequence that a process has: of its pages every world-th, from the rank-th on."""
    size = SPEC.block_size
    pages = -(-lengths // size)
    own = (pages - rank + world - 1) // world
    has_last = (pages > 0) & ((pages - 1) % world == rank)
    return own, own * size - torch.where(has_last, pages * size - lengths, 0)


def decode_part(
    module: pa_compiler.Module,
    query: torch.Tensor,
    caches: Sequence[torch.Tensor],
    pages: torch.Tensor,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the pages that this process has, which lie in its caches one sequence after another."""
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), pages.cumsum(0)])
    indices = torch.arange(int(indptr[-1]))
    out, lse = module.decode(query, *caches, (indptr, indices), tokens, return_lse=True)
    return out, lse


def merge_all(module: pa_compiler.Module, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of all processes' parts together, the same bits on each of them."""
    world = dist.get_world_size()
    outs, lses = torch.empty(world, *out.shape), torch.empty(world, *lse.shape)
    dist.all_gather(list(outs.unbind()), out)
    dist.all_gather(list(lses.unbind()), lse)
    merged, total = module.merge_states(outs, lses, return_lse=True)
    return merged, total


def main() -> None:
    """Decode on all processes, and compare with one that has all pages."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    module = pa_compiler.compile(SPEC, attend=False, merge_states=True)
    generator = torch.Generator().manual_seed(0)  # the same data on every process, of which each takes its pages
    lengths = torch.tensor(CONTEXT_LENS)
    counts = (-(-lengths // SPEC.block_size)).tolist()
    shape = (sum(counts), *SPEC.key_cache_shape[1:])
    caches = torch.randn(2, *shape, generator=generator).unbind()
    query = torch.randn(len(lengths), SPEC.num_heads, SPEC.head_dim, generator=generator)

    own = torch.cat([pages[rank::world] for pages in torch.arange(sum(counts)).split(counts)])
    part = decode_part(module, query, [cache[own] for cache in caches], *own_part(lengths, rank, world))
    merged = merge_all(module, *part)

    expected = decode_part(module, query, caches, *own_part(lengths, 0, 1))
    error = max(float((one - other).nan_to_num().abs().max()) for one, other in zip(merged, expected, strict=True))
    print(f"process {rank} of {world}: {len(own)} of {sum(counts)} pages, {error:.1e} from one process", flush=True)
    dist.destroy_process_group()
    assert error < 1e-5


if __name__ == "__main__":
    main()
