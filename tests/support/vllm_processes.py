"""Processes with vLLM in them: with these kernels or without, and nothing of the tests' own settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import vllm_models

LENGTHS = [3, 40, 131, 383, 743]
NEW = 96
SUPPORT = Path(__file__).parent


def settings(*, ours, **variables):
    """Environment variables of a process that has no network, with one thread, in which engines run themselves."""
    found = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    found.pop("CXX", None)  # conftest's is a command of several words, which torch's inductor does not take
    found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | variables
    return found if ours else found | {"VLLM_PLUGINS": ""}


def engine(**options):
    """Arguments of vllm.LLM."""
    return {
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": True,
        **options,
    }


def prompts(name):
    """Texts of the licence, of LENGTHS tokens."""
    from test_readme import ROOT
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(vllm_models.folder(name))((ROOT / "LICENSE").read_text())["input_ids"]
    return [ids[100 * index :][:length] for index, length in enumerate(LENGTHS)]


def generate(model, runs, folder, *, ours, together=False, timeout=1800, **variables):
    """(what vllm_run.py has found, what it has printed). model is a name of vllm_models, or a checkpoint's folder."""
    file, log = (Path(folder) / f"{'ours' if ours else 'theirs'}.{suffix}" for suffix in ("json", "log"))
    checkpoint = model if isinstance(model, Path) else vllm_models.folder(model)
    asked = {"model": str(checkpoint), "runs": runs, "together": together, "file": str(file)}
    command = [sys.executable, str(SUPPORT / "vllm_run.py"), json.dumps(asked)]
    environment = settings(ours=ours, **variables)
    with log.open("w") as output:
        done = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=timeout, check=False
        )
    text = log.read_text()
    assert done.returncode == 0, text[-6000:]
    return json.loads(file.read_text()), text
