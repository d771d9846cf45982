"""Models as vLLM loads them: folders of safetensors, converted once from the files of packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gemma3

from benchmarks import engines_checkpoints
from examples import demo

PACKAGES = {"smollm2": demo.PACKAGE, "gemma3": gemma3.PACKAGE}


def is_installed(name: str) -> bool:
    """Whether the package of a model is."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def folder(name: str) -> Path:
    """The folder of a model in float32, with its tokenizer. The first call converts it."""
    if name == "smollm2":
        return engines_checkpoints.smollm2()
    if not gemma3.FOLDER.exists():
        gemma3._convert()
    return gemma3.FOLDER
