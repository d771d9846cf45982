"""empty_cache: shapes, alignment, advice about huge pages, and memory that goes back to the system."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import DTYPES, lay_out
from specs import BASE, SPECS

from pa_compiler.runtime import memory

HUGE_PAGE = 2 << 20


def mapping_of(address):
    """The lines of /proc/self/smaps about the mapping that holds an address, or None."""
    for text in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        if text:
            begin, end = (int(number, 16) for number in text.split(" ", 1)[0].split("-"))
            if begin <= address < end:
                return text
    return None


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_empty_cache(compiled, spec):
    caches = compiled(spec).empty_cache(3)
    natural = np.zeros((3, spec.block_size, spec.num_kv_heads, spec.head_dim), DTYPES[spec.dtype])
    for cache, expected in zip(caches, lay_out(spec, natural, natural), strict=True):
        assert isinstance(cache, np.ndarray)
        assert (cache.shape, cache.dtype) == (expected.shape, expected.dtype)
        assert cache.flags.c_contiguous
        assert cache.flags.writeable
        assert cache.ctypes.data % HUGE_PAGE == 0
        assert not cache.view(np.uint8).any()
        cache.fill(1)
    assert not np.shares_memory(*caches)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_empty_cache_of_torch(compiled, spec):
    """On huge pages too, in every dtype; decode and append_kv take it."""
    torch = pytest.importorskip("torch", reason="torch is not installed: its tensors are not tested")
    module = compiled(spec)
    expected = module.empty_cache(3)
    caches = module.empty_cache(3, like="torch")
    for cache, other in zip(caches, expected, strict=True):
        assert type(cache) is torch.Tensor
        assert cache.dtype == getattr(torch, spec.dtype)
        assert tuple(cache.shape) == other.shape
        assert cache.is_contiguous()
        assert cache.data_ptr() % HUGE_PAGE == 0
        assert not cache.any()
    slots = torch.arange(3 * spec.block_size)
    new = torch.rand(len(slots), spec.num_kv_heads, spec.head_dim).to(caches[0].dtype)
    module.append_kv(new, new, *caches, slots)
    query = torch.rand(1, spec.num_heads, spec.head_dim).to(caches[0].dtype)
    table, lengths = torch.tensor([[2, 0, 1]]), torch.tensor([2 * spec.block_size + 1])
    out = module.decode(query, *caches, table, lengths)
    numpy_caches = [cache.view(torch.uint8).numpy().view(DTYPES[spec.dtype]) for cache in caches]
    numpy_query = query.view(torch.uint8).numpy().view(DTYPES[spec.dtype])
    found = module.decode(numpy_query, *numpy_caches, table.numpy(), lengths.numpy())
    assert out.view(torch.uint8).numpy().tobytes() == found.tobytes()


def test_the_memory_of_a_tensor_goes_with_its_last_view(compiled):
    pytest.importorskip("torch", reason="torch is not installed: its tensors are not tested")
    cache, _ = compiled(BASE).empty_cache(5, like="torch")
    view, address = cache[3:].mT, cache.data_ptr()
    del cache
    assert view.fill_(1).all()
    del view
    text = mapping_of(address)
    assert text is None or " hg" not in text


@pytest.mark.parametrize("num_bytes", [1, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE])
def test_all_of_it_is_advised_to_use_huge_pages(num_bytes):
    """To the end of the last page, so that the last block is not on small ones."""
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no transparent huge pages")
    array = memory.huge_zeros((num_bytes,), np.dtype(np.uint8))
    last_page = array.ctypes.data + (num_bytes - 1) // HUGE_PAGE * HUGE_PAGE
    for address in (array.ctypes.data, last_page, last_page + HUGE_PAGE - 1):
        text = mapping_of(address)
        assert " hg" in re.search(r"^VmFlags:.*$", text, re.MULTILINE)[0]
        assert text.split()[1] == "rw-p"  # private: for shared memory the system asks for more than advice
    array.fill(1)
    assert array.sum(dtype=np.int64) == num_bytes


def test_pages_are_taken_when_they_are_written():
    array = memory.huge_zeros((1 << 30,), np.dtype(np.uint8))
    array[:: 1 << 28] = 1
    resident = int(re.search(r"^Rss: +(\d+) kB$", mapping_of(array.ctypes.data), re.MULTILINE)[1])
    assert resident <= 4 * HUGE_PAGE >> 10


def test_the_memory_goes_with_the_last_view():
    array = memory.huge_zeros((5, HUGE_PAGE), np.dtype(np.float32))
    view, address = array[3:4, 7:].T, array.ctypes.data
    view[...] = 1
    del array
    assert mapping_of(address) is not None
    assert view.all()
    del view
    text = mapping_of(address)
    assert text is None or " hg" not in text


class NoHugePages(mmap.mmap):
    """Memory of a kernel without transparent huge pages."""

    def madvise(self, *_):
        raise OSError(22, "Invalid argument")


def test_ordinary_pages_where_there_are_no_huge_ones(monkeypatch):
    monkeypatch.setattr(memory.mmap, "mmap", NoHugePages)
    array = memory.huge_zeros((2, 3), np.dtype(np.float32))
    assert array.ctypes.data % HUGE_PAGE == 0
    assert not array.any()


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("num_blocks", "words"),
    [(1 << 50, str(1 << 50)), (1 << 80, str(1 << 80)), (10**5000, "an int of 16610 bits")],
    ids=["2^50", "2^80", "10^5000"],
)
def test_too_much_memory_is_named(figure, compiled, num_blocks, words):
    with pytest.raises(MemoryError, match=rf"bytes.*\[{words}"):
        compiled(BASE).empty_cache(num_blocks)
    figure("kinds", 1)


@pytest.mark.scorecard(13)
@pytest.mark.parametrize(
    ("num_blocks", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), ("2", TypeError), (True, TypeError)]
)
def test_num_blocks_is_checked(figure, compiled, num_blocks, error):
    with pytest.raises(error, match=rf"^num_blocks\b.*{num_blocks}"):
        compiled(BASE).empty_cache(num_blocks)
    figure("kinds", 1)


def test_num_blocks_of_numpy(compiled):
    assert len(compiled(BASE).empty_cache(np.int64(3))[0]) == 3


@pytest.mark.scorecard(13)
@pytest.mark.parametrize("like", ["jax", "", None, np])
def test_other_libraries_are_refused(figure, compiled, like):
    with pytest.raises(ValueError, match=rf"^like: expected 'numpy' or 'torch', got {re.escape(repr(like))}$"):
        compiled(BASE).empty_cache(3, like=like)
    figure("kinds", 1)


def test_without_torch(compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch"):
        compiled(BASE).empty_cache(3, like="torch")
