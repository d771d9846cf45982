"""A program: engines of vLLM generate, one after the other, and leave their tokens as JSON.

Its argument is JSON: {"model": a folder, "runs": {name: run}, "file": where the result goes}. A run is {"engine":
arguments of vllm.LLM, "waves": [[prompt, ...], ...], "new": tokens, "abort": {prompt's number: after so many steps}}.
Prompts are lists of tokens, and those of a wave are answered together. The result has for each run a list with the
tokens of each prompt, or None for one that was aborted.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path


def make(model, run):
    """The engine of a run."""
    from vllm import LLM

    return LLM(model=model, **run["engine"]).llm_engine


def generate(engine, run):
    """The likeliest tokens, without a stop. Waves come one after the other."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=run["new"], ignore_eos=True, detokenize=False)
    aborts = {int(number): steps for number, steps in run.get("abort", {}).items()}
    found, first = {}, 0
    for wave in run["waves"]:
        names = {str(number): prompt for number, prompt in enumerate(wave, first)}
        first += len(wave)
        for name, prompt in names.items():
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        steps = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    found[int(output.request_id)] = list(output.outputs[0].token_ids)
            steps += 1
            if leaving := [name for name in names if aborts.get(int(name)) == steps]:
                engine.abort_request(leaving)
    return [found.get(number) for number in range(first)]


def main():
    """Make all runs, each with an engine of its own that is gone before the next."""
    from vllm.distributed import cleanup_dist_env_and_memory

    asked, found = json.loads(sys.argv[1]), {}
    for name, run in asked["runs"].items():
        print(f"run: {name}", flush=True)
        engine = make(asked["model"], run)
        found[name] = generate(engine, run)
        engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(asked["file"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
