"""A program: engines of vLLM generate, and leave their tokens as JSON.

Its argument is JSON: {"model": a folder, "runs": {name: run}, "together": bool, "file": where the result goes}. A run
is {"engine": arguments of vllm.LLM, "waves": [[prompt, ...], ...], "new": tokens, "abort": {prompt's number: after so
many steps}, "sampling": more arguments of SamplingParams, "checked": vllm_checked.EXPECTED, in a process without
plug-ins}. Prompts are lists of tokens, and those of a wave are answered together. Each run has an engine of its own,
which is gone before the next is made; or all are there together, and take turns with their steps.

The result has for each run {"tokens": those of each prompt, or None where it was aborted, "prompt_logprobs": of the
tokens of each prompt but the first, where they were asked for, "cached": tokens of each prompt that were in the cache
already, "steps": of the engine, "preempted": how often a prompt was, "pages": that the engine has}, and where it was
checked vllm_checked.FOUND.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path


class Run:
    """A run and its engine. next() makes a step."""

    def __init__(self, model, run):
        from vllm import LLM, SamplingParams

        self.engine = LLM(model=model, **run["engine"]).llm_engine
        options = {"temperature": 0, "max_tokens": run["new"], "ignore_eos": True, "detokenize": False}
        self.sampling = SamplingParams(**options, **run.get("sampling", {}))
        self.waves, self.first, self.running = list(run["waves"]), 0, []
        self.aborts = {int(number): steps for number, steps in run.get("abort", {}).items()}
        self.checked, count = {}, sum(map(len, self.waves))
        self.found = {name: [None] * count for name in ("tokens", "prompt_logprobs", "cached")}
        self.found |= {"steps": 0, "preempted": 0, "pages": self.engine.vllm_config.cache_config.num_gpu_blocks}

    def next(self):
        """Whether there was something to do."""
        if not self.engine.has_unfinished_requests():
            if not self.waves:
                return False
            self._begin(self.waves.pop(0))
        for output in self.engine.step():
            if output.finished:
                number = int(output.request_id)
                self.found["tokens"][number] = list(output.outputs[0].token_ids)
                self.found["prompt_logprobs"][number] = only((output.prompt_logprobs or [])[1:])
                self.found["cached"][number] = output.num_cached_tokens
        self.steps += 1
        self.found["steps"] += 1
        if leaving := [str(each) for each in self.running if self.aborts.get(each) == self.steps]:
            self.engine.abort_request(leaving)
        return True

    def _begin(self, prompts):
        self.running = list(range(self.first, self.first + len(prompts)))
        self.first, self.steps = self.first + len(prompts), 0
        for number, prompt in zip(self.running, prompts, strict=True):
            self.engine.add_request(str(number), {"prompt_token_ids": prompt}, self.sampling)


def checking():
    """What makes runs in a process whose runs are checked."""
    import vllm_checked

    def make(model, run):
        vllm_checked.EXPECTED.clear()
        vllm_checked.EXPECTED.update(run["checked"])
        made = Run(model, run)
        made.checked = vllm_checked.FOUND
        made.checked.update(calls=0, worst=0.0)
        return made

    vllm_checked.take_its_place()
    return make


def only(logprobs):
    """Of each token, of which there is one at each place."""
    return [each.logprob for at in logprobs for each in at.values()]


def count_preemptions(counted):
    """Have the scheduler say counted() for each."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt = Scheduler._preempt_request

    def counting(*arguments, **options):
        counted()
        return preempt(*arguments, **options)

    Scheduler._preempt_request = counting


def main():
    """Make all runs."""
    from vllm.distributed import cleanup_dist_env_and_memory

    asked, found, preempted = json.loads(sys.argv[1]), {}, []
    count_preemptions(lambda: preempted.append(1))
    waiting = list(asked["runs"].items())
    make = checking() if any("checked" in run for _, run in waiting) else Run
    while waiting:
        names = [waiting.pop(0) for _ in range(len(waiting) if asked.get("together") else 1)]
        print(f"run: {[name for name, _ in names]}", flush=True)
        runs = {name: make(asked["model"], run) for name, run in names}
        preempted.clear()
        while sum(run.next() for run in runs.values()):  # and not any(), by which the second would wait for the first
            pass
        for name, run in runs.items():
            found[name] = run.found | run.checked | {"preempted": len(preempted)}
            run.engine.engine_core.shutdown()
        del runs, run
        gc.collect()
        cleanup_dist_env_and_memory()
        Path(asked["file"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
