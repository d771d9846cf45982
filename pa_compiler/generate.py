"""Write and check generated/: what the compiler emits for a few named specs, and the headers of their hosts, once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pa_compiler import artifact, backends, installation, interrupts
from pa_compiler.backend import NO_EXTRAS, Extras
from pa_compiler.host import BANNER, headers
from pa_compiler.runtime import files
from pa_compiler.spec import PagedAttentionSpec

_CASE1 = PagedAttentionSpec(16, 1, 128, 128, "bfloat16", "float32")
_GQA = PagedAttentionSpec(32, 8, 128, 16, "bfloat16")
_PACKED = PagedAttentionSpec(32, 8, 128, 16, "bfloat16", kv_layout="packed")
_MLA = PagedAttentionSpec(128, 1, 576, 64, "bfloat16", value_dim=512, shared_kv=True)  # DeepSeek-V3


def _decay(score: Any, batch: Any, head: Any, query_pos: Any, key_pos: Any) -> Any:
    """A score falls with the distance of its key, the faster the higher the head."""
    return score - (head + 1) * 0.0625 * (query_pos - key_pos) / 128


_LOCAL = PagedAttentionSpec(  # a local layer of Gemma 2, with a function
    16, 8, 256, 16, "bfloat16", window=4096, softcap=50.0, score_mod=_decay
)


class _Entry(NamedTuple):
    spec: PagedAttentionSpec
    pipeline: str
    target: str  # fixed, so that every machine emits the same text: an mcpu, or an arch of CUDA
    extras: Extras = NO_EXTRAS

    @property
    def config(self) -> dict[str, Any]:
        return backends.normalize(backends.named(self.target))


ENTRIES = {
    "case1_fused": _Entry(_CASE1, "fused", "x86-64-v4"),
    "case1_neon": _Entry(_CASE1, "fused", "neoverse-v2"),  # with bfdot
    "case1_staged": _Entry(_CASE1, "staged", "x86-64-v4"),
    "gqa_fused": _Entry(_GQA, "fused", "x86-64-v4", Extras(attend=True, shared_prefix=True)),
    "gqa_packed_fused": _Entry(_PACKED, "fused", "sapphirerapids", Extras(attend=True)),  # with AVX512_BF16
    "mla_fused": _Entry(_MLA, "fused", "sapphirerapids"),
    "local_fused": _Entry(_LOCAL, "fused", "x86-64-v4"),
    "gqa_cuda": _Entry(_GQA, "fused", "sm_90", Extras(attend=True)),
}
"""Folder under generated/ -> what is emitted there."""


_COMMENTS = {".py": "#", ".cc": "//", ".cu": "//", ".ll": ";"}
"""What a comment begins with, by the file's suffix."""


def emit() -> dict[str, str]:
    """Emit every file of generated/: its path below generated/ -> its text."""
    return interrupts.shielded(_emitted)


def _emitted() -> dict[str, str]:
    installation.check()
    from pa_compiler import compiler

    texts: dict[str, str] = {}
    templates = installation.templates()
    for folder, entry in ENTRIES.items():
        sources = compiler.emit_portable(entry.spec, entry.config, entry.pipeline, entry.extras)
        for stage, origin in backends.of(entry.config).origins.items():
            file = artifact.STAGE_FILES[stage]
            text = _without_addresses(sources[stage]).removeprefix(f"// {BANNER}\n//\n")
            texts[f"{folder}/{file}"] = _headed(_COMMENTS[Path(file).suffix], _header(origin, entry), text)
        for place, text in headers(sources["host"]).items():
            template = place if place in templates else f"{place}.j2"
            about = (BANNER, f"Template: templates/{template}", "Regenerate: pa-compiler generate")
            texts[f"include/{place}"] = _headed("//", about, text)
    return texts


def _headed(comment: str, about: Iterable[str], text: str) -> str:
    """A text with lines about it before it, in its language."""
    return "".join(f"{comment} {line}\n" for line in about) + f"\n{text.strip()}\n"


def write(root: Path) -> list[str]:
    """Write every file below root, remove what this has once written there, and return the paths that changed.

    Raises:
        ValueError: something else is below root; then nothing is written or removed.
    """
    emitted, present = emit(), _present(root)
    for path in sorted(present.keys() - emitted.keys()):
        if BANNER not in present[path].partition("\n")[0]:
            raise ValueError(f"directory: expected generated files alone, which say {BANNER!r}, got {root / path}")
    changed = sorted(path for path in emitted.keys() | present.keys() if emitted.get(path) != present.get(path))
    for path in changed:
        if path not in emitted:
            (root / path).unlink()
            continue
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        files.write(root / path, emitted[path].encode())
    return changed


def check(root: Path) -> str:
    """Compare the files below root with what would be emitted; nothing is written.

    Returns:
        A unified diff, from the files as they are to the files as emitted: "" where they are the same. A missing file
        is compared from /dev/null, a surplus one to /dev/null.
    """
    emitted, present = emit(), _present(root)
    diff: list[str] = []
    for path in sorted(emitted.keys() | present.keys()):
        before = present.get(path, "").splitlines(keepends=True)
        after = emitted.get(path, "").splitlines(keepends=True)
        old, new = (f"generated/{path}" if path in side else "/dev/null" for side in (present, emitted))
        diff += difflib.unified_diff(before, after, old, new)
    return "".join(diff)


def _without_addresses(text: str) -> str:
    """Number TVM's names of alias classes in LLVM metadata: they are addresses, and other ones in every process."""
    numbers: dict[str, int] = {}
    return re.sub(
        r'(?<=!")0x[0-9a-f]+(?=[."])', lambda found: f"buffer{numbers.setdefault(found[0], len(numbers))}", text
    )


def _header(origin: str, entry: _Entry) -> tuple[str, ...]:
    kind, *rest = entry.config.items()
    target = ", ".join([kind[1], *(f"{name} {value}" for name, value in rest)])
    return (
        BANNER,
        f"Template: {origin}",
        f"Spec: {entry.spec}",
        f"Target: {target}; pipeline {entry.pipeline}",
        "Regenerate: pa-compiler generate",
    )


def _present(root: Path) -> dict[str, str]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace") for path in paths}
