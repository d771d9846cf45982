"""docs/context_parallel.py: two processes, each with half of the pages, give what one with all of them gives."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: make test-torch")

EXAMPLE = Path(__file__).parent.parent / "docs" / "context_parallel.py"


def test_two_processes(build_cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, EXAMPLE],
            env=os.environ | world | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, text) in enumerate(zip(processes, printed, strict=True)):
        assert process.returncode == 0, text
        assert re.search(rf"^process {rank} of 2: \d+ of 322 pages, \S+ from one process$", text, re.MULTILINE), text
