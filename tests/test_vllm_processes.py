"""Engines of vLLM in processes of their own: tensor parallel, together in one, without TVM, and behind a server."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: its processes are not run", allow_module_level=True)

import vllm_models
from vllm_processes import engine, generate, prompts, settings

NEW = 32
CLIENTS, SECONDS = 16, 60

needs_gemma3 = pytest.mark.skipif(not vllm_models.is_installed("gemma3"), reason="Gemma 3 is not installed")
needs_smollm2 = pytest.mark.skipif(not vllm_models.is_installed("smollm2"), reason="SmolLM2 is not installed")


def run_of(given, **options):
    return {"engine": engine(**options), "waves": [given], "new": NEW}


@needs_gemma3
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU: vLLM has no two ranks")
def test_tensor_parallel(tmp_path):
    """Two ranks, each with half of the query heads, and the kv head: each on a CPU of its own."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    runs = {"run": run_of(prompts("gemma3"), tensor_parallel_size=2)}
    theirs, log = generate("gemma3", runs, tmp_path, ours=False, **variables)
    assert "pa_compiler" not in log
    ours, log = generate("gemma3", runs, tmp_path, ours=True, **variables)
    assert ours["run"]["tokens"] == theirs["run"]["tokens"]
    lines = [line for line in log.splitlines() if "pa_compiler attends in" in line]
    for rank in range(2):
        of_rank = [line for line in lines if f"Worker_TP{rank}" in line]
        assert sum(int(line.split("attends in ")[1].split()[0]) for line in of_rank) == 18
        assert all("num_heads=2, num_kv_heads=1" in line for line in of_rank)


@needs_smollm2
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU: vLLM binds no two threads")
def test_all_threads_that_vllm_binds_are_used(tmp_path):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": f"{first},{second}"}
    _, log = generate("smollm2", {"run": run_of([[7] * 40])}, tmp_path, ours=True, **variables)
    assert "pa_compiler attends in 30 layers on 2 threads" in log


@needs_smollm2
def test_two_engines_in_one_process(tmp_path):
    """They take turns with their steps, on other prompts and in chunks of other sizes."""
    given = prompts("smollm2")
    runs = {"first": run_of(given), "second": run_of(given[::-1], max_num_batched_tokens=100)}
    found, log = generate("smollm2", runs, tmp_path, ours=True, together=True)
    assert found["first"]["tokens"] == found["second"]["tokens"][::-1]
    assert log.count("pa_compiler attends in 30 layers on 1 threads") == 2


@needs_smollm2
def test_without_tvm_and_compilers(tmp_path):
    """Libraries that were built elsewhere are loaded from PA_MODULES. Without them vLLM's kernel attends."""
    from pa_compiler import PagedAttentionSpec
    from pa_compiler.integrations.vllm.libraries import build_command

    spec = PagedAttentionSpec(9, 3, 64, 128, "float32", kv_layout="packed")
    libraries, poor = tmp_path / "libraries", tmp_path / "poor"
    for folder in (libraries, poor, tmp_path / "cache"):
        folder.mkdir()
    command = [sys.executable, "-m", "pa_compiler", *build_command(spec).split()[1:-1], str(libraries / "smollm2.so")]
    subprocess.run(command, check=True, capture_output=True)
    (poor / "tvm.py").write_text('raise ImportError("there is no TVM here")\n')
    shutil.rmtree(tmp_path / "cache")
    paths = os.pathsep.join(filter(None, [str(poor), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": paths, "PA_CACHE_DIR": str(tmp_path / "cache"), "CXX": "/nowhere/g++"}
    runs = {"run": run_of(prompts("smollm2"))}
    loaded, log = generate("smollm2", runs, tmp_path, ours=True, PA_MODULES=str(libraries), **variables)
    assert "pa_compiler attends in 30 layers on 1 threads: model.layers.0-29.self_attn.attn" in log
    left, log = generate("smollm2", runs, tmp_path, ours=True, **variables)
    assert "pa_compiler leaves 30 layers to vLLM's kernel: model.layers.0-29.self_attn.attn" in log
    assert build_command(spec) in log
    assert loaded["run"]["tokens"] == left["run"]["tokens"]


@pytest.fixture
def server(tmp_path):
    """(its address, its log): vLLM serves SmolLM2, on this machine's loopback alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host=127.0.0.1", f"--port={port}", "--dtype=bfloat16", "--max-model-len=1024", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes=268435456", "--served-model-name=smollm2"]
    # `vllm serve` asks for the version of a package named vllm, which vllm-cpu 0.32.0 is not, and ends.
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, f"--model={vllm_models.folder('smollm2')}", *options]
    log = tmp_path / "serve.log"
    with log.open("w") as file:
        environment = settings(ours=True, VLLM_ENABLE_V1_MULTIPROCESSING="1")
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_it_answers(address, process, log):
    end = time.monotonic() + 900
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-6000:])


@needs_smollm2
def test_a_server(server, record_property):
    """Clients of OpenAI's, 16 at once, for a minute: each asks again when it has its answer."""
    import openai

    address, log = server
    answers, errors, end = [], [], time.monotonic() + SECONDS

    def ask(number):
        # By default it asks again where the server has ended a connection that was idle.
        client = openai.OpenAI(base_url=address, api_key="none", timeout=300)
        asked = 0
        while time.monotonic() < end:
            text = f"Question {number}.{asked}: " + "what is a cache? " * (1 + 7 * number)
            try:
                options = {"max_tokens": 8 + 2 * number, "temperature": 0}
                found = client.completions.create(model="smollm2", prompt=text, **options)
                answers.append(found.choices[0].text)
            except Exception as error:  # each is a failure of the test
                errors.append(repr(error))
                return
            asked += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert errors == []
    assert len(answers) >= CLIENTS
    text = log.read_text()
    assert "pa_compiler attends in 30 layers on 1 threads: model.layers.0-29.self_attn.attn" in text
    assert "ERROR" not in text
    record_property("answers", len(answers))
