"""Entries of the build cache: what damage they survive, who builds them, and whose directory they are in."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import stat
import time
import warnings

import pytest

from pa_compiler import store as cache

LIBRARY = {"pa.so": b"library" * 100, "host.cc": b"host"}


def write_library(directory):
    for name, content in LIBRARY.items():
        (directory / name).write_bytes(content)


def entries(own_cache):
    return sorted(path for path in own_cache.iterdir() if path.is_dir())


def flip_a_byte(entry):
    damaged = bytearray((entry / "pa.so").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (entry / "pa.so").write_bytes(damaged)


def move_behind_a_link(entry):
    elsewhere = entry.with_name("elsewhere")
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)


def remove_all(entry):
    for path in entry.iterdir():
        path.unlink()
    (entry / "digests.json").write_text("{}")


DAMAGES = {
    "flipped": flip_a_byte,
    "cut": lambda entry: os.truncate(entry / "pa.so", 100),
    "emptied": lambda entry: os.truncate(entry / "pa.so", 0),
    "removed": lambda entry: (entry / "pa.so").unlink(),
    "source_changed": lambda entry: (entry / "host.cc").write_text("other"),
    "file_added": lambda entry: (entry / "more.so").write_text(""),
    "digests_removed": lambda entry: (entry / "digests.json").unlink(),
    "digests_cut": lambda entry: os.truncate(entry / "digests.json", 7),
    "digests_empty": lambda entry: (entry / "digests.json").write_text("{}"),
    "digests_a_list": lambda entry: (entry / "digests.json").write_text('["pa.so", "host.cc"]'),
    "digests_a_number": lambda entry: (entry / "digests.json").write_text("7"),
    "moved_behind_a_link": move_behind_a_link,
    "all_removed": remove_all,
    "digests_binary": lambda entry: (entry / "digests.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.scorecard(22)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_built_again(own_cache, damage):
    assert cache.get_or_build("name", write_library) == LIBRARY
    assert cache.get_or_build("name", None) == LIBRARY
    damage(own_cache / "name")
    assert cache.get_or_build("name", write_library) == LIBRARY
    assert not (own_cache / "name").is_symlink()
    assert cache.get_or_build("name", None) == LIBRARY


def test_a_failed_build_leaves_nothing(own_cache):
    def fail(directory):
        write_library(directory)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        cache.get_or_build("name", fail)
    assert not entries(own_cache)
    assert cache.get_or_build("name", write_library) == LIBRARY


def test_a_killed_build_is_done_again(own_cache):
    """SIGKILL between two writes: no half entry is served, no lock is left held."""

    def die(directory):
        (directory / "pa.so").write_bytes(b"libr")
        os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork in a process with threads
        child = os.fork()
    if child == 0:
        cache.get_or_build("name", die)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert cache.get_or_build("name", write_library) == LIBRARY


def test_threads_build_once(own_cache):
    asked = []

    def build(directory):
        asked.append(directory)
        time.sleep(0.2)
        write_library(directory)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: cache.get_or_build("name", build), range(16)))
    assert len(asked) == 1
    assert results == [LIBRARY] * 16


@pytest.mark.scorecard(24)
def test_directory_is_the_users_alone(own_cache, figure):
    assert cache.directory() == own_cache
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700
    for mode in (0o701, 0o710, 0o720, 0o740, 0o777):
        own_cache.chmod(mode)
        with pytest.raises(PermissionError, match=f"0700, got {mode:04o}"):
            cache.directory()
        figure("directories refused", 1)


def test_directory_of_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("PA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "pa_compiler"


@pytest.mark.scorecard(24)
def test_a_symbolic_link_is_refused(own_cache, tmp_path, figure):
    (tmp_path / "elsewhere").mkdir()
    own_cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="symbolic link"):
        cache.directory()
    (tmp_path / "elsewhere").rmdir()
    with pytest.raises(FileExistsError, match=str(own_cache)):
        cache.directory()
    figure("directories refused", 2)


@pytest.mark.scorecard(24)
def test_somebody_elses_directory_is_refused(own_cache, monkeypatch, figure):
    owner = cache.directory().stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match=rf"{owner + 1}.*{owner}"):
        cache.directory()
    figure("directories refused", 1)


def test_clear_removes_entries_and_nothing_else(own_cache):
    name = cache.key({"of": "this test"})
    cache.get_or_build(name, write_library)
    (own_cache / f".{name}.killed").mkdir()
    (own_cache / "a user's own").mkdir()
    (own_cache / "notes.txt").touch()
    cache.clear()
    assert sorted(path.name for path in own_cache.iterdir()) == [f"{name}.lock", "a user's own", "notes.txt"]
    cache.clear()


def test_what_a_killed_build_left_is_removed_by_the_next(own_cache):
    name = cache.key({"of": "this test"})
    (cache.directory() / f".{name}.killed").mkdir()
    cache.get_or_build(name, write_library)
    assert not (own_cache / f".{name}.killed").exists()
    (own_cache / name).rename(own_cache / "aside")
    (own_cache / name).touch()  # a plain file where the entry should be
    assert cache.get_or_build(name, write_library) == LIBRARY
    assert (own_cache / name).is_dir()
