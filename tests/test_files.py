"""Files that are written for the user: what is there is kept or replaced whole, and nothing else is harmed."""

from __future__ import annotations

import concurrent.futures
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from specs import BASE

import pa_compiler
from pa_compiler import generate
from pa_compiler.cli import main as cli
from pa_compiler.runtime import files


def build(path, module):
    words = ["build", "-o", path, "--num-heads", "6", "--num-kv-heads", "2", "--head-dim", "24", "--block-size", "5"]
    words += ["--dtype", "float32", "--out-dtype", "float32"]
    result = CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)
    if result.exit_code:
        raise OSError(result.stderr)


WRITERS = {
    "files.write": lambda path, module: files.write(path, module._library),
    "Module.save": lambda path, module: module.save(path),
    "build -o": build,
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@pytest.fixture(scope="module")
def module(compiled):
    return compiled(BASE, attend=True)  # as the command builds it


def device(path, kind, major, minor):
    try:
        os.mknod(path, kind | 0o666, os.makedev(major, minor))
    except PermissionError:
        pytest.skip("device nodes are left out: only root makes them")
    return path


@every_writer
def test_a_link_stays_and_what_it_leads_to_is_written(module, tmp_path, write):
    (tmp_path / "there").mkdir()
    target, link, chain = tmp_path / "there" / "pa.so", tmp_path / "link", tmp_path / "chain"
    link.symlink_to("there/pa.so")
    chain.symlink_to("link")
    for before in (None, b"old"):
        if before:
            target.write_bytes(before)
        write(chain, module)
        assert target.read_bytes() == module._library
        assert (os.readlink(link), os.readlink(chain)) == ("there/pa.so", "link")
        assert [path.name for path in target.parent.iterdir()] == ["pa.so"]


@every_writer
def test_a_character_device_stays(module, tmp_path, write):
    null = device(tmp_path / "null", stat.S_IFCHR, 1, 3)
    write(null, module)
    assert stat.S_ISCHR(null.stat().st_mode)
    assert list(tmp_path.iterdir()) == [null]


@every_writer
def test_a_pipe_is_written_into(module, tmp_path, write):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        write(pipe, module)
        assert read.result() == module._library
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


REFUSED = {
    "a directory": lambda path: path.mkdir(),
    "a block device": lambda path: device(path, stat.S_IFBLK, 7, 200),
    "a socket": make_socket,
}


@every_writer
@pytest.mark.parametrize(("kind", "make"), REFUSED.items(), ids=REFUSED)
def test_what_is_no_file_is_refused_by_name(module, tmp_path, monkeypatch, kind, make, write):
    monkeypatch.chdir(tmp_path)  # a socket's path has to be short
    make(Path("there"))
    before = os.stat("there")
    with pytest.raises(OSError, match=kind) as caught:
        write("there", module)
    assert "there" in str(caught.value)
    assert os.path.samestat(os.stat("there"), before)
    assert os.listdir() == ["there"]


@every_writer
def test_permissions_are_kept(module, tmp_path, write):
    path = tmp_path / "pa.so"
    for mode in (0o600, 0o640, 0o755, 0o444):
        path.write_bytes(b"old")
        path.chmod(mode)
        write(path, module)
        assert (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) == (mode, module._library)
        path.unlink()
    umask = os.umask(0o027)
    try:
        write(path, module)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.getuid() != 0, reason="only root has files of several owners")
def test_the_owner_is_kept(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 12345, 54321)
    files.write(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid, path.read_bytes()) == (12345, 54321, b"new")


def test_what_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            files.write(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["file"])
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/missing/file'"):
        files.write(tmp_path / "missing" / "file", b"")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=f"symbolic links: '{tmp_path}/loop'"):
        files.write(tmp_path / "loop", b"")


def test_an_open_file_without_a_name_is_written_into():
    with tempfile.TemporaryFile() as file:
        files.write(f"/proc/self/fd/{file.fileno()}", b"contents")
        file.seek(0)
        assert file.read() == b"contents"


def test_a_name_of_any_length(tmp_path):
    path = tmp_path / ("x" * 255)
    files.write(path, b"contents")
    assert path.read_bytes() == b"contents"


def test_threads_write_one_file(tmp_path):
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: files.write(tmp_path / "file", each), contents * 4))
    assert (tmp_path / "file").read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_dump_dir_follows_links_and_spares_devices(compiled, tmp_path):
    module, dump = compiled(BASE, attend=True), tmp_path / "dump"
    dump.mkdir()
    (dump / "1_tensorir.py").symlink_to(tmp_path / "elsewhere.py")
    device(dump / "2_scheduled.py", stat.S_IFCHR, 1, 3)
    pa_compiler.compile(BASE, dump_dir=dump)
    assert (dump / "1_tensorir.py").is_symlink()
    assert (tmp_path / "elsewhere.py").read_text() == module.sources["tensorir"]
    assert (dump / "2_scheduled.py").is_char_device()
    assert (dump / "3_host.cc").read_text() == module.sources["host"]
    with pytest.raises(FileExistsError, match=r"elsewhere\.py"):
        pa_compiler.compile(BASE, dump_dir=tmp_path / "elsewhere.py")


def test_generate_removes_nothing_that_it_has_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "emit", lambda: {"case/host.cc": f"// {generate.BANNER}\n"})
    (tmp_path / "thesis.txt").write_text("years of work\n")
    done = CliRunner().invoke(cli.main, ["generate", "--directory", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 2
    assert "'--directory': expected generated files alone" in done.stderr
    assert f"got {tmp_path}/thesis.txt" in done.stderr
    assert os.listdir(tmp_path) == ["thesis.txt"]
