"""Modules whose calls are made through the C interface of a bundle too, which must give the same bits."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from c_calls import Kernels, Library, numpy_dtype
from dlpack import Exported
from tolerances import assert_same_bits

import pa_compiler
from pa_compiler import naming

_BEFORE_OUT = {"decode": 6, "attend": 7}
"""Positional arguments before out."""


class Twin:
    """A module; what it computes, a bundle of its spec for its target computes again.

    Calls that raise an error are the module's alone: tests/test_bundle_errors.py has those.
    """

    def __init__(self, module, target):
        object.__setattr__(self, "module", module)
        folder = Path(tempfile.mkdtemp()) / "bundle"
        pa_compiler.bundle([module.spec], [target], folder)
        self.__dict__["kernels"] = Kernels(Library(folder), naming.spec_name(module.spec), module.spec, num_threads=2)
        shutil.rmtree(folder.parent)  # what is loaded stays

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __setattr__(self, name, value):
        setattr(self.module, name, value)
        if name == "num_threads":
            self.kernels.options.num_threads = value

    def decode(self, *arguments, **words):
        return self._both("decode", arguments, words)

    def attend(self, *arguments, **words):
        return self._both("attend", arguments, words)

    def append_kv(self, key, value, key_cache, value_cache, *arguments, **scales):
        """Caches and scales may be views: what the module writes is compared where it stands, and C's is a copy."""
        written = [each.array if isinstance(each, Exported) else each for each in (key_cache, value_cache)]
        copies = [None if each is None else each.copy() for each in written]
        of_c = {name: None if scale is None else scale.copy() for name, scale in scales.items()}
        self.module.append_kv(key, value, key_cache, value_cache, *arguments, **scales)
        self.kernels.append_kv(key, value, *copies, *arguments, **of_c)
        for array, copy in zip((*written, *scales.values()), (*copies, *of_c.values()), strict=True):
            if copy is not None:
                assert_same_bits(array, copy)

    def _both(self, name, arguments, words):
        found = getattr(self.module, name)(*arguments, **words)
        out, lse = found if isinstance(found, tuple) else (found, None)
        given = words | {"out": np.zeros_like(np.asarray(out)), "return_lse": False}
        given["lse"] = None if lse is None else np.zeros_like(np.asarray(lse))
        assert given["out"].dtype == numpy_dtype(self.module.spec.result_dtype)
        result = getattr(self.kernels, name)(*arguments[: _BEFORE_OUT[name]], **given)
        for ours, of_c in zip((out, lse), result if lse is not None else (result, None), strict=True):
            if ours is not None:
                assert_same_bits(np.asarray(ours), of_c)
        return found
