"""Module.verify in a Python for aarch64 under qemu: python aarch64_python.py FOLDER.

Debian's packages of Python and the wheels that a library needs to run are fetched into the folder, and specs are
compiled here for it. What is shown is the Python package's own code on aarch64: loading, arguments, threads, and
comparisons with the reference.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pa_compiler
from pa_compiler import PagedAttentionSpec

PACKAGES = (
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1", "libstdc++6"),
    *("libexpat1", "zlib1g", "libssl3", "libffi8", "libbz2-1.0", "liblzma5", "libuuid1"),
)
SPECS = {
    "float32": (PagedAttentionSpec(6, 2, 32, 5, "float32", window=100), "neoverse-n1"),
    "float16": (PagedAttentionSpec(16, 1, 64, 8, "float16", kv_layout="HND"), "neoverse-n1"),
    "bfloat16": (PagedAttentionSpec(16, 1, 64, 16, "bfloat16"), "neoverse-v2"),
    "bfloat16_packed": (PagedAttentionSpec(8, 2, 64, 16, "bfloat16", kv_layout="packed"), "neoverse-v2"),
    "int8": (PagedAttentionSpec(8, 2, 64, 16, "bfloat16", kv_dtype="int8"), "neoverse-v2"),
}
SECONDS = 20
VERIFY = """
import sys, pa_compiler
found = pa_compiler.load(sys.argv[1]).verify(seconds=float(sys.argv[2]), seed=1)
print(found)
sys.exit(bool(found.failures))
"""


def fetch_system(folder: Path) -> None:
    """Debian's packages for arm64, by an apt of our own that leaves the system's alone."""
    root, apt = folder / "root", folder / "apt"
    if root.exists():
        return
    for place in ("lists/partial", "cache/archives/partial", "packages"):
        (apt / place).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    options = ["APT::Architecture=arm64", "APT::Architectures=arm64", f"Dir::State::lists={apt / 'lists'}"]
    options += [f"Dir::Cache={apt / 'cache'}", f"Dir::State::status={apt / 'status'}"]
    command = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    subprocess.run([*command, "update"], check=True)
    subprocess.run([*command, "download", *PACKAGES], check=True, cwd=apt / "packages", stderr=subprocess.DEVNULL)
    for package in sorted((apt / "packages").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, root.with_suffix(".part")], check=True)
    root.with_suffix(".part").rename(root)


def fetch_wheels(folder: Path) -> None:
    """What pa_compiler.runtime imports."""
    site = folder / "site"
    if site.exists():
        return
    platforms = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
    wheels, version = folder / "wheels", importlib.metadata.version("apache-tvm-ffi")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    command += [*(f"--platform={each}" for each in platforms), "--python-version=3.11", f"--dest={wheels}"]
    subprocess.run([*command, "numpy", "ml_dtypes", f"apache-tvm-ffi=={version}"], check=True)
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    fetch_system(folder)
    fetch_wheels(folder)
    root, failed = folder / "root", 0
    path = os.pathsep.join(map(str, (Path(pa_compiler.__file__).parent.parent, folder / "site")))
    for name, (spec, mcpu) in SPECS.items():
        library = folder / f"{name}.so"
        pa_compiler.compile(spec, {"kind": "llvm", "mcpu": mcpu}, merge_states=True, shared_prefix=True).save(library)
        command = ["qemu-aarch64-static", "-L", root, root / "usr/bin/python3.11", "-c", VERIFY, library, str(SECONDS)]
        print(name, mcpu, flush=True)
        failed += bool(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
