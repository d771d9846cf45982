"""All that is done with libraries where there is no compiler, as a script that imports no more than there is.

test_runtime.py runs it. Its arguments are a folder and the names of packages that must not be there. The folder has
libraries NAME.so, and for each NAME.bits: the bytes of out and of lse that decode gave for make_inputs(spec, LENGTHS)
where the library was compiled.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from pathlib import Path

import numpy as np
import tvm_ffi
from dlpack import Exported
from inputs import make_inputs

import pa_compiler
from pa_compiler.__main__ import main as command

LENGTHS = [0, 1, 37, 200, 9]


def bits(module, inputs, **given):
    """The bytes of a call's out and lse."""
    out, lse = module.decode(*inputs.arguments, return_lse=True, **given)
    return out.tobytes() + lse.tobytes()


def check_decode(module, expected):
    inputs = make_inputs(module.spec, LENGTHS)
    for threads in (1, 2, 7):
        module.num_threads = threads
        assert bits(module, inputs) == expected, threads
        assert bits(module, inputs, out=inputs.out, lse=inputs.lse) == expected, threads
    assert sum(item.num_tokens for item in module.plan(inputs.context_lens)) == sum(LENGTHS)


def check_kinds_of_arrays(module, expected):
    """Views, read-only arrays, and DLPack of no library in particular, whose result is a tensor of tvm-ffi's."""
    inputs = make_inputs(module.spec, LENGTHS)
    key_cache, value_cache = (np.stack([cache, cache], axis=1)[:, 0] for cache in inputs.arguments[1:3])
    assert bits(module, inputs.replace(key_cache=key_cache, value_cache=value_cache)) == expected
    out, lse = inputs.out, inputs.lse
    exported = [Exported(array) for array in (*inputs.arguments, out, lse)]
    module.decode(*exported[:5], out=exported[5], lse=exported[6])
    assert out.tobytes() + lse.tobytes() == expected
    new_out, new_lse = module.decode(*exported[:5], return_lse=True)
    assert (tuple(new_out.shape), str(new_out.dtype)) == (out.shape, module.spec.result_dtype)
    assert np.from_dlpack(new_lse).tobytes() == lse.tobytes()
    if module.spec.result_dtype != "bfloat16":  # which NumPy's from_dlpack does not know
        assert np.from_dlpack(new_out).tobytes() == out.tobytes()
    for array in inputs.arguments:
        array.flags.writeable = False
    assert bits(module, inputs) == expected


def check_append_kv(module):
    """Whole blocks of tokens in reversed order, as NumPy's arrays and by DLPack, in the module's layout."""
    caches = [module.empty_cache(4), module.empty_cache(4)]
    shape = (4 * module.spec.block_size, module.spec.num_kv_heads, module.spec.head_dim)
    rng = np.random.default_rng(0)
    key, value = (rng.uniform(-1, 1, shape).astype(caches[0][0].dtype) for _ in range(2))
    slots = np.arange(len(key))[::-1].copy()
    module.append_kv(key, value, *caches[0], slots)
    module.append_kv(*(Exported(array) for array in (key, value, *caches[1], slots)))
    blocks = (4, module.spec.block_size, *shape[1:])
    in_order = (array[::-1].reshape(blocks) for array in (key, value))
    expected = pa_compiler.convert_cache(*in_order, "NHD", module.spec.kv_layout)
    for pair in caches:
        assert [cache.tobytes() for cache in pair] == [cache.tobytes() for cache in expected]


def check_errors(module):
    inputs = make_inputs(module.spec, LENGTHS)
    query, key_cache, value_cache, block_table, context_lens = inputs.arguments
    key = np.zeros((1, module.spec.num_kv_heads, module.spec.head_dim), key_cache.dtype)
    too_far = np.full_like(block_table, len(key_cache))
    no_slot = np.array([len(key_cache) * module.spec.block_size])
    rows = [
        (ValueError, "query", module.decode, query[:, :, :-1], key_cache, value_cache, block_table, context_lens),
        (TypeError, "key_cache", module.decode, query, context_lens, value_cache, block_table, context_lens),
        (ValueError, "context_lens", module.decode, query, key_cache, value_cache, block_table, -context_lens),
        (IndexError, "block_table", module.decode, query, key_cache, value_cache, too_far, context_lens),
        (IndexError, "slot_mapping", module.append_kv, key, key, key_cache, value_cache, no_slot),
    ]
    for kind, name, function, *arrays in rows:
        for error in (raised(function, *arrays), raised(function, *map(Exported, arrays))):
            assert isinstance(error, kind), repr(error)
            assert str(error).startswith(f"{name}: expected "), error
    error = raised(module.decode, [1.0], key_cache, value_cache, block_table, context_lens)
    assert isinstance(error, TypeError), repr(error)


def raised(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return error
    return None


def check_calls_at_once(module, expected):
    """16 threads whose calls succeed and fail in turn."""
    inputs, wrong = make_inputs(module.spec, LENGTHS), []
    bad = inputs.replace(block_table=np.full_like(inputs.block_table, -1))

    def call():
        for _ in range(10):
            if bits(module, inputs) != expected or not isinstance(raised(bits, module, bad), IndexError):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def check_without_a_gpu(module, path):
    """A library for a GPU can be loaded, looked at and saved."""
    inputs = make_inputs(module.spec, LENGTHS)
    error = raised(lambda: module.decode(*inputs.arguments, out=inputs.out))
    assert isinstance(error, ValueError), repr(error)
    assert str(error).startswith("query: expected "), error
    status, printed = run("show", str(path))
    assert (status, "loads     yes" in printed) == (0, True), printed
    status, printed = run("verify", str(path))
    assert (status, "Error: torch, by which arrays are brought to a GPU, cannot be" in printed) == (1, True), printed


def check_saving(module, folder):
    module.save(folder / "saved")
    again = pa_compiler.load(folder / "saved")
    assert (again.manifest, again.spec) == (module.manifest, module.spec)


def run(*words):
    """A command's exit status, and what it printed."""
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            command(list(words))
        except SystemExit as end:
            status = end.code
    return status or 0, printed.getvalue()


def check_commands(path):
    status, printed = run("show", str(path))
    assert (status, "loads     yes" in printed) == (0, True), printed
    status, printed = run("verify", str(path), "--seconds", "0", "--seed", "3")
    assert (status, "result    PASS" in printed) == (0, True), printed
    status, printed = run("verify", str(path), "--draw", "3")
    assert (status, "argument --seed: expected the seed of draw 3, got None" in printed) == (2, True), printed


def check_what_is_not_there(absent):
    """Compiling says what is missing and what to install, however it is asked for."""
    install = "pip install 'pa-compiler[compiler]'"
    for words in (["run"], ["build", "-o", "pa.so"], ["explain"], ["cache", "dir"], ["generate", "--check"]):
        status, printed = run(*words)
        assert (status, install in printed) == (1, True), printed
    status, printed = run("--help")
    assert (status, "show" in printed, install in printed) == (0, True, True), printed
    assert run("--version") == (0, "pa-compiler, version 0.1.0\n")
    from pa_compiler import compiler, generate
    from pa_compiler.cpu import target
    from pa_compiler.cuda import backend as cuda_compiler
    from pa_compiler.cuda import target as cuda_target

    spec = pa_compiler.PagedAttentionSpec(2, 1, 16, 16, "float32")
    for error in (
        raised(pa_compiler.compile, spec),
        raised(pa_compiler.compile, spec, "cuda"),
        raised(compiler.emit, spec),
        raised(cuda_compiler.lower, spec, cuda_target.CudaTarget("sm_90")),
        raised(target.resolve, {"kind": "llvm"}),
        raised(generate.check, Path("generated")),
    ):
        assert isinstance(error, ImportError), repr(error)
        assert all(words in str(error) for words in (install, *absent)), error


def main():
    folder, absent = Path(sys.argv[1]), sys.argv[2:]
    paths = sorted(folder.glob("*.so"))
    assert paths
    for path in paths:
        module = pa_compiler.load(path)
        if isinstance(module, pa_compiler.CudaModule):
            check_without_a_gpu(module, path)
            continue
        expected = path.with_suffix(".bits").read_bytes()
        check_decode(module, expected)
        check_kinds_of_arrays(module, expected)
        check_append_kv(module)
        check_errors(module)
        check_calls_at_once(module, expected)
        check_saving(module, folder)
        assert module.verify(seed=5, draw=2).passed
        check_commands(path)
    imported = {name.partition(".")[0] for name in sys.modules if sys.modules[name]}
    assert not imported & {"tvm", *absent}, imported & {"tvm", *absent}
    assert "pa_compiler.compiler" not in sys.modules
    check_what_is_not_there(absent)
    print(f"tvm-ffi {tvm_ffi.__version__}: {len(paths)} libraries")


if __name__ == "__main__":
    main()
