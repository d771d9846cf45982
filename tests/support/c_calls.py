"""A bundle's C interface from Python, by ctypes, with the calls of a Module; and its cases as files, for driver.c."""

from __future__ import annotations

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
from dlpack import CPU, Exported

I64 = ctypes.c_int64
DTYPES = {  # pa_dtype
    "float32": 1, "float16": 2, "bfloat16": 3, "float8_e4m3fn": 4, "float8_e5m2": 5, "int8": 6, "int32": 7, "int64": 8,
    "bool": 9, "uint8": 10, "float64": 11, "int16": 12, "uint16": 13, "uint32": 14, "uint64": 15,
}  # fmt: skip
KINDS = {1: TypeError, 2: ValueError, 3: IndexError, 4: RuntimeError, 5: MemoryError}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("shape", ctypes.POINTER(I64)), ("strides", ctypes.POINTER(I64)),
        ("rank", ctypes.c_int32), ("dtype", ctypes.c_int32),
    )  # fmt: skip


class Error(ctypes.Structure):
    _fields_ = (("message", ctypes.c_char * 512),)


PARALLEL_FOR = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, I64, I64, ctypes.CFUNCTYPE(None, ctypes.c_void_p, I64), ctypes.c_void_p
)


class Options(ctypes.Structure):
    _fields_ = (
        ("num_threads", I64), ("threading", ctypes.c_int32), ("num_cpus", ctypes.c_int32),
        ("cpus", ctypes.POINTER(ctypes.c_int32)), ("parallel_for", PARALLEL_FOR), ("parallel_context", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p), ("workspace_size", ctypes.c_size_t),
    )  # fmt: skip


DECODE = (
    "query", "key_cache", "value_cache", "block_table", "block_indptr", "block_indices", "context_lens", "out", "lse",
    "alibi_slopes", "sinks", "key_scale", "value_scale",
)  # fmt: skip
ATTEND = (*DECODE[:7], "query_start_loc", *DECODE[7:], "tree_mask")
APPEND = ("key", "value", "key_cache", "value_cache", "slot_mapping", "key_scale", "value_scale")
_TAIL = [("inputs", ctypes.POINTER(Tensor)), ("num_inputs", I64), ("scale", ctypes.POINTER(ctypes.c_double))]


def _struct(names, more=()):
    return type("Args", (ctypes.Structure,), {"_fields_": [(name, Tensor) for name in names] + list(more)})


ARGS = {
    "decode": _struct(DECODE, _TAIL),
    "attend": _struct(ATTEND, [*_TAIL, ("not_causal", ctypes.c_int32)]),
    "append_kv": _struct(APPEND),
    "plan": _struct(("context_lens", "query_start_loc"), [("num_threads", I64)]),
}


class Item(ctypes.Structure):
    _fields_ = (("kind", I64), ("numbers", I64 * 9))


def of_dlpack(array):
    """The pa_dtype of an array that is Exported; None where C has no such array."""
    said = array._versioned.tensor
    names = {(10, 8): "float8_e4m3fn", (12, 8): "float8_e5m2", (4, 16): "bfloat16", (6, 8): "bool"}
    kind = {0: "int", 1: "uint", 2: "float"}.get(said.code)
    name = names.get((said.code, said.bits), f"{kind}{said.bits}")
    return DTYPES.get(name) if said.device_type == CPU else None


def tensor(array):
    """pa_tensor of an array or None, with its strides in elements. It keeps what it points to."""
    if array is None:
        return Tensor()
    if isinstance(array, Exported):
        said = array._versioned.tensor
        made = Tensor((said.data or 0) + said.byte_offset, said.shape, said.strides, said.ndim, of_dlpack(array))
        made.kept = array
        return made
    rank, size = array.ndim, array.itemsize
    shape = (I64 * rank)(*array.shape)
    strides = (I64 * rank)(*(stride // size for stride in array.strides))
    made = Tensor(array.ctypes.data, shape, strides, rank, DTYPES[str(array.dtype)])
    made.kept = (array, shape, strides)
    return made


def tensors(args, arrays):
    """Set arrays of a struct by their names; what they need is kept with it."""
    args.kept = {name: tensor(array) for name, array in arrays.items()}
    for name, made in args.kept.items():
        setattr(args, name, made)
    return args


class Library:
    """A bundle that is loaded, by the path of its folder."""

    def __init__(self, folder: Path) -> None:
        self.c = ctypes.CDLL(str(folder / "lib" / "libpa.so"))
        for name in ("pa_isa", "pa_name", "pa_manifest", "pa_kernels_name"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.c.pa_count.restype = I64
        self.isa = self.c.pa_isa()

    def find(self, name):
        """pa_kernels, as a pointer."""
        found, error = ctypes.c_void_p(), Error()
        check(self.c.pa_find(name.encode(), ctypes.byref(found), ctypes.byref(error)), error)
        return found

    def names(self):
        return [self.c.pa_name(I64(number)).decode() for number in range(self.c.pa_count())]


def check(status, error):
    """Raise what a status says."""
    message = error.message.decode()
    assert bool(status) == bool(message)
    if status:
        raise KINDS[status](message)


class Kernels:
    """The kernels of a spec, with the calls that a Module has. options are those of pa_options."""

    def __init__(self, library: Library, name: str, spec, **options) -> None:
        self.library, self.spec = library, spec
        self.pointer = library.find(name)
        self.options = Options(**options)

    def call(self, name, args, options=None):
        error = Error()
        function = getattr(self.library.c, f"pa_{name}")
        options = self.options if options is None else options
        check(function(self.pointer, ctypes.byref(args), ctypes.byref(options), ctypes.byref(error)), error)

    def workspace(self, name, args):
        """Bytes of a call's workspace."""
        size, error = ctypes.c_size_t(), Error()
        function = getattr(self.library.c, f"pa_{name}_workspace")
        words = (self.pointer, ctypes.byref(args), ctypes.byref(self.options), ctypes.byref(size), ctypes.byref(error))
        check(function(*words), error)
        return size.value

    def attention(self, name, arrays, scale, out, lse, return_lse, inputs=None, causal=True):
        query = arrays["query"]
        if out is None:
            out = np.empty((*query.shape[:2], self.spec.result_dim), numpy_dtype(self.spec.result_dtype))
        if return_lse and lse is None:
            lse = np.empty(query.shape[:2], np.float32)
        table = arrays.pop("block_table")
        pair = table if isinstance(table, tuple) else (None, None)
        arrays |= {"block_indptr": pair[0], "block_indices": pair[1], "out": out, "lse": lse}
        arrays["block_table"] = None if isinstance(table, tuple) else table
        args = tensors(ARGS[name](), arrays)
        if scale is not None:
            args.scale = ctypes.pointer(ctypes.c_double(scale))
        if inputs:
            made = [tensor(inputs[each.name]) for each in self.spec.inputs]
            args.inputs, args.num_inputs = (Tensor * len(made))(*made), len(made)
            args.kept["inputs"] = made
        if name == "attend":
            args.not_causal = not causal
        self.call(name, args)
        return out if lse is None else (out, lse)

    def decode(self, query, key_cache, value_cache, block_table, context_lens, scale=None, out=None, *, lse=None,
               return_lse=False, inputs=None, **heads):  # fmt: skip
        arrays = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "block_table": block_table}
        arrays |= {"context_lens": context_lens, **heads}
        return self.attention("decode", arrays, scale, out, lse, return_lse, inputs)

    def attend(self, query, key_cache, value_cache, block_table, context_lens, query_start_loc, scale=None, out=None, *,
               lse=None, return_lse=False, causal=True, inputs=None, **heads):  # fmt: skip
        arrays = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "block_table": block_table}
        arrays |= {"context_lens": context_lens, "query_start_loc": query_start_loc, **heads}
        return self.attention("attend", arrays, scale, out, lse, return_lse, inputs, causal)

    def append_kv(self, key, value, key_cache, value_cache, slot_mapping, **scales):
        arrays = {"key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
        self.call("append_kv", tensors(ARGS["append_kv"](), arrays | {"slot_mapping": slot_mapping} | scales))

    def plan(self, context_lens, query_start_loc=None, num_threads=0):
        """Tuples of the fields of the items."""
        args = tensors(ARGS["plan"](), {"context_lens": context_lens, "query_start_loc": query_start_loc})
        args.num_threads = num_threads
        count, error = I64(), Error()

        def ask(items, capacity):
            words = (self.pointer, ctypes.byref(args), items, I64(capacity), ctypes.byref(count), ctypes.byref(error))
            check(self.library.c.pa_plan(*words), error)
            return count.value

        items = (Item * ask(None, 0))()
        assert ask(items, len(items)) == len(items)
        return [tuple(item.numbers[: {1: 5, 2: 9}[item.kind]]) for item in items]


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def write_case(
    path, call, spec_name, arrays, *, manner="default", threads=2, threading=1, scale=None, causal=True, beside=None,
    over=None
):  # fmt: skip
    """Write a file for driver.c. Arrays by their names in pa.h; None is left out, a pair of tables is two.

    beside: The name of an array that is to lie one element further than its memory.
    over: Those of one that is to lie in the memory of the other.
    """
    table = arrays.get("block_table")
    if isinstance(table, tuple):
        arrays = arrays | {"block_table": None, "block_indptr": table[0], "block_indices": table[1]}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    lines = ["pa-case", f"call {call}", f"spec {spec_name}", f"threads {threads}", f"threading {threading}"]
    lines += [f"manner {manner}"]
    lines += [] if scale is None else [f"scale {float(scale).hex()}"]
    lines += [] if causal else ["not_causal 1"]
    lines += [] if beside is None else [f"beside {beside}"]
    lines += [] if over is None else [f"over {' '.join(over)}"]
    for name, array in arrays.items():
        lines.append(" ".join(map(str, ("array", name, DTYPES[str(array.dtype)], array.ndim, *array.shape))))
    text = "\n".join([*lines, "end", ""]).encode()
    path.write_bytes(text + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values()))


def read_result(path, written):
    """(status, message, arrays) of a result; written are arrays of the shapes and dtypes of those in it."""
    line, _, data = path.read_bytes().partition(b"\n")
    status, _, message = line.decode().partition(" ")
    arrays, start = [], 0
    for like in written if status == "0" else ():
        arrays.append(np.frombuffer(data, like.dtype, like.size, start).reshape(like.shape))
        start += like.nbytes
    assert start == len(data)
    return int(status), message, arrays
