"""The parts of a bundle -> its library, shared and static, and the files that say how to use it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pa_compiler import dependencies, host, installation, native
from pa_compiler.bundles.tasks import About, Task
from pa_compiler.cpu import target as _target
from pa_compiler.interface import CPU_ENTRY_POINTS
from pa_compiler.naming import target_name
from pa_compiler.spec import PagedAttentionSpec

FORMAT = 1
"""Of manifest.json."""

_EXPORTED = re.compile(r"\b(pa_\w+)\(")


def check_tools(machine: str) -> None:
    """Look for what a bundle is linked with beside the C++ compiler.

    Raises:
        RuntimeError: it is not there.
    """
    native.tool("OBJCOPY", machine)
    native.tool("AR", machine)


def link(
    made: Path,
    scratch: Path,
    specs: Sequence[PagedAttentionSpec],
    names: Sequence[str],
    todo: Sequence[Task],
    built: Sequence[About],
) -> None:
    """Write a bundle into a folder. todo and built are in the order of specs, and for each of them in that of targets.

    Raises:
        RuntimeError: a tool failed.
        OSError: a file cannot be written.
    """
    count = len(todo) // len(specs)
    order = sorted(range(count), key=lambda place: built[place].rank, reverse=True)
    variants = [built[spec * count + place] for spec in range(len(specs)) for place in order]
    isas = [_isa(todo[place].config, [built[spec * count + place] for spec in range(len(specs))]) for place in order]
    manifest = json.dumps(_manifest(specs, names, isas, variants), indent=1)
    door = _render_door(specs, names, isas, variants, manifest)
    _write_stages(made, scratch, names, isas, [todo[s * count + p] for s in range(len(specs)) for p in order], door)
    (made / "manifest.json").write_text(manifest + "\n")
    header = installation.templates()["bundle/pa.h"]
    (made / "include").mkdir()
    (made / "include" / "pa.h").write_text(header)
    objects = [task.objects / name for task in todo for name in ("renamed.o", "kernels.o")]
    _link(made / "lib", scratch, door, objects, _exported(header), manifest, todo[0].config)
    _write_packages(made / "lib", names, _soname(manifest))


def _isa(config: dict[str, Any], built: Sequence[About]) -> dict[str, Any]:
    """A target of a bundle, with what it needs for any spec."""
    needs = sorted({feature for each in built for feature in each.features})
    return {
        "name": target_name(built[0].target, config),
        "target": built[0].target,
        "architecture": _target.architecture(config),
        "features": needs,
        "tile_registers": any(each.tile_registers for each in built),
    }


def _manifest(
    specs: Sequence[PagedAttentionSpec], names: Sequence[str], isas: Sequence[dict[str, Any]], variants: Sequence[About]
) -> dict[str, Any]:
    by_spec = [variants[number * len(isas) : (number + 1) * len(isas)] for number in range(len(specs))]
    return {
        "format": FORMAT,
        "versions": dependencies.versions(),
        "targets": list(isas),
        "specs": [
            {
                "name": name,
                "spec": spec.stated(),
                "variants": [
                    {
                        "target": isa["name"],
                        "name": each.name,
                        "strategies": each.strategies,
                        "kernels": each.kernels,
                        "scratch": each.scratch,
                    }
                    for isa, each in zip(isas, of_spec, strict=True)
                ],
            }
            for spec, name, of_spec in zip(specs, names, by_spec, strict=True)
        ],
    }


def _render_door(
    specs: Sequence[PagedAttentionSpec],
    names: Sequence[str],
    isas: Sequence[dict[str, Any]],
    variants: Sequence[About],
    manifest: str,
) -> str:
    values: dict[str, Any] = {
        "banner": host.BANNER,
        "entry_points": CPU_ENTRY_POINTS,
        "specs": names,
        "isas": [isa | {"instruction_sets": [*map(host.instruction_set, isa["features"])]} for isa in isas],
        "tile_registers": any(isa["tile_registers"] for isa in isas),
        "manifest": [json.dumps(line) for line in manifest.splitlines(keepends=True)],  # literals of C too
        "variants": [
            {
                "name": each.name,
                "scale": repr(1.0 / math.sqrt(spec.head_dim)),
                "num_inputs": len(spec.inputs),
                "by_attend": each.by_attend,
                "kernel_bytes": each.scratch,
            }
            for spec, each in zip((spec for spec in specs for _ in isas), variants, strict=True)
        ],
    }
    return host.render_text("bundle/door.cc.j2", values)


def _write_stages(
    made: Path, scratch: Path, names: Sequence[str], isas: Sequence[dict[str, Any]], todo: Sequence[Task], door: str
) -> None:
    """The texts of the stages, in a folder for each spec and target, and the headers of all hosts, once."""
    included: dict[str, str] = host.headers(door)
    places = [(name, isa["name"]) for name in names for isa in isas]
    for (name, isa), task in zip(places, todo, strict=True):
        (made / "stages" / name).mkdir(parents=True, exist_ok=True)
        task.stages.rename(made / "stages" / name / isa)
        included |= host.headers((made / "stages" / name / isa / "host.cc").read_text())
    (made / "stages" / "door.cc").write_text(door)
    native.write_headers(included, made / "stages" / "include")


def _exported(header: str) -> list[str]:
    """The functions that a header declares."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    return sorted(set(_EXPORTED.findall(text)))


def _soname(manifest: str) -> str:
    """A name that two bundles have in common only if they are for the same, so that one is not taken for the other."""
    return f"libpa-{hashlib.sha256(manifest.encode()).hexdigest()[:12]}.so"


def _link(
    lib: Path,
    scratch: Path,
    door: str,
    objects: Sequence[Path],
    exported: Sequence[str],
    manifest: str,
    config: dict[str, Any],
) -> None:
    """libpa.a and libpa.so of one object, in which the functions of the C interface alone are global.

    It has what it needs of the C++ runtime in it, for itself alone: a program may have another one, or none.
    """
    lib.mkdir()
    machine = _target.architecture(config)
    folder = scratch / "door"
    folder.mkdir()
    with native.compiling_part(door, folder, host.headers(door), machine):
        pass
    whole, kept, exports = scratch / "pa.o", scratch / "kept", scratch / "exports.map"
    cxx, parts = native.cxx(machine), [str(folder / "host.o"), *map(str, objects)]
    runtime = ["-Wl,--start-group", "-l:libsupc++.a", "-l:libgcc_eh.a", "-Wl,--end-group"]
    native.run([*cxx, "-r", "-nostdlib", "-Wl,--force-group-allocation", *parts, *runtime, "-o", str(whole)], whole)
    kept.write_text("".join(f"{name}\n" for name in exported))
    native.run([*native.tool("OBJCOPY", machine), f"--keep-global-symbols={kept}", str(whole)], whole)
    native.run([*native.tool("AR", machine), "rcsD", str(lib / "libpa.a"), str(whole)], lib / "libpa.a")
    soname = _soname(manifest)
    node = re.sub(r"\W", "_", soname.removesuffix(".so"))
    exports.write_text(f"{node} {{ global: {' '.join(f'{name};' for name in exported)} local: *; }};\n")
    native.run(
        [
            *(
                *cxx,
                "-shared",
                "-nodefaultlibs",
                str(whole),
                "-Wl,--as-needed",
                "-lm",
                "-lpthread",
                "-ldl",
                "-lc",
                "-lgcc",
            ),
            *("-Xlinker", f"--version-script={exports}", "-Wl,--no-undefined", "-Wl,-Bsymbolic", "-Wl,-z,now"),
            *(f"-Wl,-soname,{soname}", "-o", str(lib / soname)),
        ],
        lib / soname,
    )
    (lib / "libpa.so").symlink_to(soname)


def _write_packages(lib: Path, names: Sequence[str], soname: str) -> None:
    """What pkg-config and CMake find the library by."""
    values = {"version": dependencies.versions()["pa-compiler"], "specs": names, "soname": soname}
    for name, folder in (
        ("pa.pc", "pkgconfig"),
        ("pa-config.cmake", "cmake/pa"),
        ("pa-config-version.cmake", "cmake/pa"),
    ):
        (lib / folder).mkdir(parents=True, exist_ok=True)
        (lib / folder / name).write_text(host.render_text(f"bundle/{name}.j2", values))
