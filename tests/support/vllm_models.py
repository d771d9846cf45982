"""Models as vLLM loads them: folders of safetensors, converted once from the files of packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import gemma3

from examples import demo

PACKAGES = {"smollm2": demo.PACKAGE, "gemma3": gemma3.PACKAGE}
SMOLLM2 = Path(sys.prefix) / "models" / "smollm2-135m"
"""Of the environment that the package is installed in, as gemma3.FOLDER."""


def is_installed(name: str) -> bool:
    """Whether the package of a model is."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def folder(name: str) -> Path:
    """The folder of a model in float32, with its tokenizer. The first call converts it, in a process of its own."""
    found = SMOLLM2 if name == "smollm2" else gemma3.FOLDER
    if not found.exists():
        {"smollm2": _convert_smollm2, "gemma3": gemma3._convert}[name]()
    return found


def _convert_smollm2():
    import torch

    tokenizer, model = demo.load(torch.float32)
    SMOLLM2.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SMOLLM2.parent) as made:
        made = Path(made) / "made"
        tokenizer.save_pretrained(made)
        del model.config.quantization_config, model.quantization_method
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(made)
        try:
            os.rename(made, SMOLLM2)
        except OSError:  # another process was first
            shutil.rmtree(made)
