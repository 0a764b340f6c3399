# Every target works alone on a fresh clone with only python3 (>= 3.11), make and the package registry.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_MODEL := checkpoints/smollm2-135m-instruct
META_TOKENIZER := .cache/meta-llama3-tokenizer
PYTEST := $(BIN)/python -m pytest
JOBS ?= 2
# A version of Triton other than the pinned one, for test-compile.
TRITON ?=
COMPILER := $(if $(TRITON),.venv-triton-$(TRITON),$(VENV))

.PHONY: setup clients demo demo-model test test-slow chaos soak test-kernels test-compile test-browser test-package test-ray test-lm-eval test-gpu memcheck lint bench bench-gpu

setup: $(READY)

# pip itself is left as the venv brings it. Without build isolation the pinned hatchling builds the editable install.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable '.[server,structured,tools,dev]'
	touch $@

# The demo model, and Meta's tokenizer that tests compare with: after this everything runs offline.
demo-model: $(DEMO_MODEL) $(META_TOKENIZER)

$(DEMO_MODEL): | $(READY)
	$(BIN)/python tools/fetch_demo_model.py --output $@

$(META_TOKENIZER): | $(READY)
	$(BIN)/python tools/fetch_meta_tokenizer.py --output $@

# In float32: the two best first tokens lie closer than bfloat16 can tell apart, and a tie is decided by the lower id.
demo: $(DEMO_MODEL) | $(READY)
	$(BIN)/llama generate $(DEMO_MODEL) "What is the capital of France?" --chat --temperature 0 --dtype float32

# In two processes; make test JOBS=0 runs it in one. The kernels are tested whatever the rest said.
test: demo-model $(READY)
	status=0; $(PYTEST) -n $(JOBS) || status=$$?; $(MAKE) test-kernels || status=$$?; exit $$status

test-slow: demo-model $(READY)
	$(PYTEST) -n $(JOBS) --dist loadfile -m slow --hypothesis-profile new-examples
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) -m slow tests/interpreter
	$(MAKE) test-compile

# Attacks and injected faults on a server of its own, some minutes; `make soak MINUTES=20` goes on with them.
chaos: $(READY)
	$(PYTEST) -m "slow or not slow" tests/chaos tests/server/test_server_faults.py tests/text/test_worker.py

MINUTES ?= 20
soak: $(READY)
	PYTHONPATH=.:tools $(BIN)/python -m tests.chaos.soak --minutes $(MINUTES)

# The Triton kernels in the interpreter; elsewhere they run on a GPU alone.
test-kernels: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) tests/interpreter

# The kernels compiled for GPUs that need not be there. make test-compile TRITON=3.6.0 does it with that version, in a
# venv of its own; UPDATE=1 writes that version's expectations anew. ARCHITECTURES=90 leaves out the others for now.
test-compile: $(COMPILER)/.ready
	TRITON_CACHE_DIR=.cache/triton $(COMPILER)/bin/python -m tests.compile.run $(if $(UPDATE),--update) \
		$(if $(ARCHITECTURES),--architectures $(ARCHITECTURES))

# Everything but Triton comes from the project's own venv.
.venv-triton-%/.ready: $(READY)
	$(BIN)/python -m venv .venv-triton-$*
	.venv-triton-$*/bin/python -m pip install --quiet triton==$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$(.venv-triton-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	touch $@

# The wheel, in environments of its own; it fetches the packages beside which it must work. A part of make test-slow.
test-package: demo-model $(READY)
	$(PYTEST) -m slow tests/package

# On a GPU machine, with its own python3: they want torch for CUDA, Triton, safetensors and pytest, and fetch nothing.
# N=12: in so many processes (pytest-xdist), for most of the time goes into compiling: 457 kernels were counted, without
# those of whole engines, at half a second of one core each. With N=12 that is a minute, should each be compiled three
# times. Tests that want the memory of the whole GPU come one by one, behind the others.
test-gpu:
	status=0; $(PYTHON) -m pytest --continue-on-collection-errors -m "gpu and not alone" \
		$(if $(N),-n $(N) --dist worksteal) || status=$$?; \
		$(PYTHON) -m pytest --continue-on-collection-errors -m "gpu and alone" || status=$$?; exit $$status

# Accesses outside of any allocation. Each tensor is one of its own here, or its neighbours would hide them.
memcheck:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PYTHON) -m pytest -m gpu tests/gpu/test_memcheck_gpu.py

# The playground in Chromium, which Debian's packages bring where they are missing and may be installed.
test-browser: $(READY)
	{ command -v chromium && command -v chromedriver; } > /dev/null || \
		{ apt-get update && apt-get install -y chromium chromium-driver; }
	$(PYTEST) -m browser tests/browser

# Client packages of Python and npm against a server, unchanged. They have an environment of their own, and so has vLLM,
# whose `vllm bench serve` is tried where VLLM=DIRECTORY names a virtual environment that holds it.
clients: demo-model .venv-clients/.ready
	$(BIN)/python -m tests.clients.run --output docs/clients.md \
		$(if $(MODELS),--models $(MODELS)) $(if $(VLLM),--vllm $(VLLM))

.venv-clients/.ready: $(READY) constraints-clients.txt tests/clients/package.json
	command -v npm > /dev/null || { echo "make clients needs Node.js, 20 or newer, with npm" >&2; exit 1; }
	$(BIN)/python -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --constraint constraints-clients.txt openai cloudflare \
		langchain-openai openai-agents litellm 'pydantic-ai-slim[openai]' instructor 'lm-eval[api]'
	mkdir -p .venv-clients/npm && cp tests/clients/package.json .venv-clients/npm
	npm install --prefix .venv-clients/npm --no-package-lock --no-audit --no-fund
	touch $@

# Batches, rows and servers on Ray, on clusters of this machine. All but Ray and what it brings comes from the project's own venv.
test-ray: .venv-ray/.ready
	.venv-ray/bin/python -m pytest tests/ray

.venv-ray/.ready: $(READY) constraints-ray.txt
	$(BIN)/python -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --constraint constraints-ray.txt 'ray[data,serve]'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$(.venv-ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	touch $@

# lm-evaluation-harness on a local task, nnsight, and a notebook, with a venv of their own as well.
test-lm-eval: .venv-lm-eval/.ready
	.venv-lm-eval/bin/python -m pytest tests/lm_eval

.venv-lm-eval/.ready: $(READY) constraints-lm-eval.txt
	$(BIN)/python -m venv .venv-lm-eval
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$(.venv-lm-eval/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	.venv-lm-eval/bin/python -m pip install --quiet --constraint constraints-lm-eval.txt lm-eval nnsight \
		nbclient ipykernel ipywidgets
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEMO_MODEL) $(READY)
	$(BIN)/python benchmarks/latency.py --model $(DEMO_MODEL)
	$(BIN)/python benchmarks/throughput.py --model $(DEMO_MODEL)

# Like the GPU's tests; both end with one line of JSON.
bench-gpu:
	$(PYTHON) -m benchmarks.ops --op all
	$(PYTHON) -m benchmarks.decode_gpu
	for form in int4 int8 fp8; do $(PYTHON) -m benchmarks.decode_gpu --quantization $$form --contexts 1024 131072; done
	for form in fp8 int4; do $(PYTHON) -m benchmarks.decode_gpu --preset llama-3.1-70b --quantization $$form \
		--kv-cache-dtype fp8 --contexts 1024 131072 --prefill 2048; done
