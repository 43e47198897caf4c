# Each target is enough on a machine that has Python 3.11 or newer, pip and make; .venv is built when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: venv demo test test-deepspeed test-kernels bench check lint types docs clean

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,docs]"
	@touch $@

demo: venv
	$(BIN)/lightning-lora demo

# As many processes as cores, with one thread each; then the tests that start processes of their own, two at a time. Those
# of one file go together, as they look at the same runs. Tests for a GPU are tried without one last: by then they ran on one,
# where there is one.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical -m "not gloo"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m gloo --durations=25 tests
	OMP_NUM_THREADS=1 LL_GPU_TESTS_ON=cpu $(BIN)/python -m pytest -q -n logical -m gpu tests/gpu

# DeepSpeed is built from source, without its CUDA kernels, and kept apart from the environment of the other tests.
.deepspeed: constraints.txt | $(READY)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target .deepspeed -c constraints.txt deepspeed einops hjson msgpack ninja py-cpuinfo

test-deepspeed: venv .deepspeed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.deepspeed $(BIN)/python -m pytest -q tests/distributed/test_deepspeed.py $(TESTS)

# Triton comes with torch for CUDA, which says which version, and not with torch for CPUs. It interprets its kernels here,
# and compiles them for GPUs that aren't.
.triton: Makefile | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .triton --upgrade triton==3.9.0
	@touch $@

test-kernels: venv .triton
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n logical tests/ops/test_kernels.py
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.triton $(BIN)/python -m pytest -q -n logical tests/ops/test_kernels_compiled.py

bench: venv
	$(BIN)/python -m tests.benchmarks.speed $(ARGS)

check: lint types docs

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

docs: venv
	$(BIN)/python -m sphinx -q -n -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf .venv .deepspeed .triton docs/_build
