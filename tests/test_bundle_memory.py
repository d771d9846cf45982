"""Arrays and workspaces that only a bundle's calls can be given: on each other, half a pair, past all addresses."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
from bundles import kernels, target_names
from c_calls import Error, Options, Tensor, check, tensor
from inputs import make_inputs
from refusals import bytes_of

CALLS = ("decode", "attend", "append_kv")


def alone(array):
    """The same values at a multiple of 64 bytes, with 64 bytes before and behind them that are no array's."""
    if array is None:
        return None
    room = np.zeros(array.nbytes + 192, np.uint8)
    room = room[64 + -room.ctypes.data % 64 :][: array.nbytes]
    placed = room.view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed


def recorded(kernels, call, pair):
    """Arguments of a good call with every array that its spec has: the struct, and all of these by what errors say."""
    made = []
    kernels.call = lambda name, args: made.append(args)
    inputs = make_inputs(kernels.spec, [9, 0, 20, 7])
    query, *caches, table, lens = map(alone, inputs.arguments)
    given = {name: alone(array) for name, array in inputs.heads.get("inputs", {}).items()}
    heads = {name: alone(array) for name, array in inputs.heads.items() if name != "inputs"}
    if call == "append_kv":
        scales = {name: array for name, array in heads.items() if name.endswith("_scale")}
        kernels.append_kv(*map(alone, query[None, :, :2].repeat(2, 0)), *caches, alone(np.arange(4)), **scales)
    else:
        more = heads | {"inputs": given, "out": alone(inputs.out), "lse": alone(inputs.lse)}
        starts = alone(np.arange(5) * table.shape[1])
        table = (starts, alone(table.reshape(-1))) if pair else table
        if call == "decode":
            kernels.decode(query, *caches, table, lens, **more)
        else:
            more["tree_mask"] = alone(np.ones(3, bool))
            loc = alone(np.array([0, 1, 1, 2, 3]))
            kernels.attend(query[:3], *caches, table, lens, loc, **more | {name: more[name][:3] for name in RESULTS})
    (args,) = made
    arrays = {SAID.get(name, name): each for name, each in args.kept.items() if name != "inputs" and each.dtype}
    arrays |= {f"inputs[{i}]": each for i, each in enumerate(args.kept.get("inputs", ()))}
    del kernels.call
    return args, arrays


RESULTS = ("out", "lse")
SAID = {"block_indptr": "block_table[0]", "block_indices": "block_table[1]"}


@pytest.mark.parametrize(("call", "pair"), [*((call, False) for call in CALLS), ("decode", True), ("attend", True)])
@pytest.mark.parametrize("name", ["scored", "codes_and_a_function", "int4"])
def test_a_workspace_that_meets_an_array(bundle, monkeypatch, name, call, pair):
    """Its first line of 64 bytes or its last one, or all of it: it is refused, and not a byte of any array changes."""
    of = kernels(bundle, target_names(bundle)[1], name, monkeypatch, num_threads=1)
    args, arrays = recorded(of, call, pair)
    of.call(call, args)
    assert len(arrays) >= {"decode": 9, "attend": 11, "append_kv": 5}[call]
    kept = [each.kept[0] for each in arrays.values()]
    before = bytes_of(kept)
    for said, each in arrays.items():
        size = each.kept[0].nbytes
        assert size > 0
        for first, num_bytes in ((0, 64), ((size - 1) // 64 * 64, 64), (-64, 65), (-64, size + 128)):
            options = Options(num_threads=1, workspace=each.data + first, workspace_size=num_bytes)
            meets = rf"^workspace: expected memory apart from {re.escape(said)}'s bytes \[{-first}, {size - first}\), "
            with pytest.raises(ValueError, match=rf"{meets}got bytes \[0, {num_bytes}\)$"):
                of.call(call, args, options)
    assert bytes_of(kept) == before


def test_a_workspace_right_between_two_arrays(bundle, monkeypatch):
    of = kernels(bundle, target_names(bundle)[1], "scored", monkeypatch, num_threads=1)
    args, arrays = recorded(of, "decode", False)
    of.call("decode", args)
    out, query = (arrays[each].kept[0] for each in ("out", "query"))
    expected, size = out.tobytes(), of.workspace("decode", args)
    assert query.nbytes % 64 == size % 64 == 0
    room = alone(np.zeros(query.nbytes + size + out.nbytes, np.uint8))
    room[: query.nbytes] = query.reshape(-1).view(np.uint8)
    args.query.data = room.ctypes.data
    args.out.data = room.ctypes.data + query.nbytes + size
    of.call("decode", args, Options(num_threads=1, workspace=room.ctypes.data + query.nbytes, workspace_size=size))
    assert room[query.nbytes + size :].tobytes() == expected


@pytest.mark.parametrize("call", ["decode", "attend"])
@pytest.mark.parametrize("left_out", [(), ("block_indptr",), ("block_indices",)])
def test_a_table_beside_a_pair(bundle, monkeypatch, call, left_out):
    of = kernels(bundle, target_names(bundle)[1], "float32", monkeypatch)
    args, _ = recorded(of, call, True)
    args.block_table = tensor(np.zeros((4, 3), np.int32))
    for name in left_out:
        setattr(args, name, Tensor())
    with pytest.raises(TypeError, match=r"^block_table: .* beside block_indptr and block_indices, got .* \[4, 3\]$"):
        of.call(call, args)


@pytest.mark.parametrize(("left_out", "said"), [("block_indptr", 0), ("block_indices", 1)])
def test_half_a_pair(bundle, monkeypatch, left_out, said):
    of = kernels(bundle, target_names(bundle)[1], "float32", monkeypatch)
    args, _ = recorded(of, "decode", True)
    setattr(args, left_out, Tensor())
    with pytest.raises(TypeError, match=rf"^block_table\[{said}\]: expected an array, got none$"):
        of.call("decode", args)


@pytest.mark.parametrize("num_blocks", [2**63 - 1, 2**62, 2**53])
def test_caches_of_more_blocks_than_there_are_addresses(bundle, monkeypatch, num_blocks):
    of = kernels(bundle, target_names(bundle)[1], "float32", monkeypatch)
    for call in CALLS:
        args, _ = recorded(of, call, False)
        for cache in (args.key_cache, args.value_cache):
            cache.shape[0], cache.strides = num_blocks, None
        with pytest.raises(ValueError, match=rf"^key_cache: .* 56 bits, got shape \[{num_blocks}, "):
            of.call(call, args)


@pytest.mark.parametrize("call", CALLS)
def test_the_size_of_a_workspace_goes_somewhere(bundle, monkeypatch, call):
    of = kernels(bundle, target_names(bundle)[1], "float32", monkeypatch)
    args, _ = recorded(of, call, False)
    error = Error()
    measure = getattr(of.library.c, f"pa_{call}_workspace")
    with pytest.raises(TypeError, match=r"^size: expected a pointer, got NULL$"):
        check(measure(of.pointer, ctypes.byref(args), None, None, ctypes.byref(error)), error)
