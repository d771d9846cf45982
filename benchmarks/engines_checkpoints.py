"""SmolLM2 as vLLM loads it: a folder of safetensors, converted once from the file of its package."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from examples import demo

SMOLLM2 = Path(sys.prefix) / "models" / "smollm2-135m"
"""Of the environment that the package is installed in."""


def smollm2() -> Path:
    """The folder, in float32 and with the tokenizer. The first call makes it.

    Raises:
        ModuleNotFoundError: the package of the model is not installed.
    """
    if not SMOLLM2.exists():
        import torch

        tokenizer, model = demo.load(torch.float32)
        SMOLLM2.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SMOLLM2.parent) as name:
            made = Path(name) / "made"
            tokenizer.save_pretrained(made)
            # save_pretrained() takes a model that came from such a file for a quantized one, which its weights are not.
            del model.config.quantization_config, model.quantization_method
            model.hf_quantizer, model.is_quantized = None, False
            model.save_pretrained(made)
            try:
                os.rename(made, SMOLLM2)
            except OSError:  # another process was first
                shutil.rmtree(made)
    return SMOLLM2
