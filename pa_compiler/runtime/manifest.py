"""What a library says of itself, and the seal that says whether it is whole.

A library is an ELF file with a trailer, which the system's loader ignores:

    ELF | manifest as JSON | length of the JSON (u64) | format (u32) | SHA-256 of all before it | magic (12)

So a reader needs the file's bytes alone: nothing is mapped or run before the checksum has matched, and a library for
another CPU can be described where it cannot be loaded. A section of the ELF file could not hold the checksum of the
whole file, would need objcopy to write and an ELF reader to find it, and leaves the ELF headers to be trusted first.
The checksum is against accidents, not against people: who can write the file can seal it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import struct
from collections.abc import Mapping
from typing import Any

from pa_compiler.runtime.cpu_features import missing_features
from pa_compiler.score import Function
from pa_compiler.score_checks import FIELDS
from pa_compiler.spec import PagedAttentionSpec

FORMAT = 11
"""Of the manifest and of the library's entry points: load() refuses any other. Raised when either changes."""

_FOOTER = struct.Struct("<QI32s12s")
_CHECKED = _FOOTER.size - 44
"""Bytes of the footer that the checksum covers."""
_MAGIC = b"pa_compiler\n"

_LSE = "natural logarithm"


def _empty_rows(spec: PagedAttentionSpec) -> str:
    return "out 0, lse the sink" if spec.sinks else "out 0, lse -inf"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a library says of itself.

    Attributes:
        spec: What it computes: heads, sizes, dtypes, layout of the caches.
        pipeline: "fused" or "staged".
        target: The TVM target dict that it was compiled for.
        machine: The architecture, such as "x86_64".
        features: LLVM's names of the instruction sets that the kernels may use, sorted.
        kernels: SHA-256 of the kernels' assembly (Module.sources["asm"], or "ptx"), in hexadecimal.
        versions: Of pa-compiler, apache-tvm and apache-tvm-ffi.
        lse: What lse is: the logarithm of the softmax's denominator, to which base.
        empty_rows: What a sequence of length 0 gives, by its spec.
    """

    spec: PagedAttentionSpec
    pipeline: str
    target: Mapping[str, Any]
    machine: str
    features: tuple[str, ...]
    kernels: str
    versions: Mapping[str, str]
    lse: str = _LSE
    empty_rows: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "empty_rows", self.empty_rows or _empty_rows(self.spec))

    @property
    def is_foreign(self) -> bool:
        """Whether the library is for another architecture than this machine's."""
        return self.machine != platform.machine()

    def unfit(self) -> str:
        """Why this machine cannot run the library, or ""."""
        if self.is_foreign:
            return f"expected a library for this machine, {platform.machine()}, got one for {self.machine}"
        if missing := missing_features(self.features):
            return f"expected a library for this CPU, got one that uses what it lacks: {' '.join(missing)}"
        return ""


def seal(library: bytes, manifest: Manifest) -> bytes:
    """An ELF file's bytes with the trailer behind them."""
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    text = json.dumps(fields | {"spec": manifest.spec.stated()}, sort_keys=True).encode()
    body = library + text + struct.pack("<QI", len(text), FORMAT)
    return body + hashlib.sha256(body).digest() + _MAGIC


def read(library: bytes, name: str | os.PathLike[str]) -> Manifest:
    """The manifest of a sealed library, after its checksum has matched; name is the file's, for messages.

    Raises:
        RuntimeError: the bytes are no library of pa_compiler, of another format, or damaged, or they say what this
            version of pa_compiler does not mean. The message says what was found.
    """
    footer = library[-_FOOTER.size :]
    if len(footer) < _FOOTER.size or not footer.endswith(_MAGIC):
        raise RuntimeError(
            f"{name}: expected a library written by Module.save, which ends with {_MAGIC!r}, got {len(library):,} "
            f"bytes that end with {footer[-len(_MAGIC) :]!r}"
        )
    length, found_format, expected, _ = _FOOTER.unpack(footer)
    if found_format != FORMAT:
        raise RuntimeError(
            f"{name}: expected a library of format {FORMAT}, got format {found_format}: it is damaged, or of another "
            "version of pa_compiler; compile its spec again"
        )
    found = hashlib.sha256(library[: _CHECKED - _FOOTER.size]).digest()
    if found != expected:
        raise RuntimeError(
            f"{name}: expected a library of SHA-256 {expected.hex()}, as it was sealed, got {found.hex()}: damaged"
        )
    fields = json.loads(library[-_FOOTER.size - length : -_FOOTER.size])
    manifest = Manifest(**{**fields, "spec": _spec(fields["spec"]), "features": tuple(fields["features"])})
    for field, meant in (("lse", _LSE), ("empty_rows", _empty_rows(manifest.spec))):
        if getattr(manifest, field) != meant:
            raise RuntimeError(f"{name}: expected {field} to be {meant!r}, got {getattr(manifest, field)!r}")
    return manifest


def _spec(stated: Mapping[str, Any]) -> PagedAttentionSpec:
    """The spec of PagedAttentionSpec.stated(), with the texts of its functions in place of the functions."""
    functions = {name: None if stated[name] is None else Function(stated[name]) for name in FIELDS}
    return PagedAttentionSpec(**{**stated, **functions, "inputs": {name: given for name, *given in stated["inputs"]}})


def checksum(library: bytes) -> str:
    """The SHA-256 that a sealed library carries, in hexadecimal."""
    return library[-len(_MAGIC) - 32 : -len(_MAGIC)].hex()
