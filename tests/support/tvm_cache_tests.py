"""TVM's own tests of its paged KV cache on CPUs, with the functions of pa_compiler.integrations.relax as its kernels.

    python tests/support/tvm_cache_tests.py [--file PATH] [options of pytest]

The file is TVM's, under its license, fetched at COMMIT and checked by its SHA-256; nothing of it is kept here or
changed. It builds its kernels once for each configuration and keeps them in a dict: that dict is exchanged for one
which makes ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

COMMIT = "27c2e019d0ce6182158020c7534dda4a3ce981ae"
"""Of apache/tvm: the last one before TVM 0.27.0 that changes the file."""

NAME = "tests/python/relax/test_runtime_builtin_paged_attention_kv_cache_cpu.py"
URL = f"https://raw.githubusercontent.com/apache/tvm/{COMMIT}/{NAME}"
SHA256 = "e6721df4ba5c20383c1208ede1ead1ba16a8f90a01233294564feea966fa52f7"

FOLDER = Path(__file__).resolve().parents[2] / "build" / "tvm"


class OurKernels:
    """Stands for the dict of kernels that the file has built, by configuration."""

    def __init__(self):
        self.made = {}

    def get(self, key):
        """The tuple of kernels for a configuration, in the file's order."""
        if key not in self.made:
            from pa_compiler import PagedAttentionSpec
            from pa_compiler.integrations.relax import kv_cache_functions

            _, _, heads, kv_heads, head_dim, page_size, dtype, rope_scale, theta, scaling, window = key
            spec = PagedAttentionSpec(heads, kv_heads, head_dim, page_size, dtype, kv_layout="HND", window=window)
            rope = {"rope_theta": theta, "rope_scale": rope_scale, "rope_scaling": json.loads(scaling)}
            self.made[key] = in_order(kv_cache_functions(spec, **rope))
        return self.made[key]


def in_order(functions):
    """Functions in the order of the file's tuple."""
    return (
        functions.transpose_append,
        functions.debug_get_kv,
        functions.attention_prefill,
        functions.attention_decode,
        functions.attention_prefill_sliding_window,
        functions.attention_decode_sliding_window,
        functions.attention_prefill_ragged,
        functions.attention_prefill_with_tree_mask,
        functions.attention_prefill_with_tree_mask_paged_kv,
        functions.merge_state_inplace,
        functions.split_rotary,
        functions.copy_single_page,
        functions.compact_copy,
    )


class Exchange:
    """A plug-in of pytest: exchanges the dict once the file is imported, and says how many configurations were ours."""

    def __init__(self):
        self.kernels = OurKernels()

    def pytest_collection_modifyitems(self, items):
        for module in {item.module for item in items}:
            assert isinstance(module._COMPILED_KERNEL_CACHE, dict)
            module._COMPILED_KERNEL_CACHE = self.kernels

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.write_line(f"TVM's file at {COMMIT}, on {len(self.kernels.made)} sets of our functions")


def fetched():
    """The path of the file, fetched where it is not there yet; None where the network does not reach it."""
    path = FOLDER / COMMIT / Path(NAME).name
    if not path.exists():
        try:
            with urllib.request.urlopen(URL, timeout=15) as answer:
                text = answer.read()
        except (urllib.error.URLError, OSError) as error:
            print(f"{URL} cannot be fetched ({error}): TVM's own tests of its cache are not run.", file=sys.stderr)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--file", type=Path, help="a copy of TVM's file, where the network does not reach it")
    arguments, options = parser.parse_known_args()
    path = arguments.file or fetched()
    if path is None:
        return 0
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{path}: expected TVM's file with SHA-256 {SHA256}, got {found}")
    import scipy  # noqa: F401  # without it, TVM's file would be skipped

    where = ["--rootdir", str(path.parent), "-c", "/dev/null", "-p", "no:cacheprovider"]
    return pytest.main([*where, str(path), *options], plugins=[Exchange()])


if __name__ == "__main__":
    sys.exit(main())
