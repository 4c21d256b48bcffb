PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS   ?= 2
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell grep '^torch==' requirements.txt)
INDEX  := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: help demo test slow check bench checkpoints coverage zoo clean
help:  ## print this list
	@grep -E '^[a-z]+: .*##' Makefile | sed 's/:.*## /\t/' | expand -t 8

demo: .venv/ready  ## train two small networks, then fuse, export, verify and run them
	$(BIN)/python examples/demo.py

test: .venv/peers  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

slow: .venv/peers  ## run the tests of full-size networks
	$(BIN)/python -m pytest -m slow

check: .venv/ready  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/peers  ## time reptool against the pipeline of today
	$(BIN)/python benchmarks/pipeline.py

checkpoints: .venv/ready  ## time fusing a large checkpoint against only reading, hashing and writing it
	$(BIN)/python benchmarks/checkpoints.py

coverage: .venv/peers  ## fuse public architectures: what is left, and whether any is slower
	$(BIN)/python benchmarks/coverage.py

zoo: .venv/peers  ## measure what every network and block of the zoo gains
	$(BIN)/python benchmarks/zoo.py

clean:  ## remove the environment and everything that was made
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, and only if that brings no CUDA packages: the dry run reads what pip would download.
.venv/torch: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reptool needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --dry-run --report .venv/torch.json $(INDEX) $(TORCH)
	@! grep -qE '"name": "(nvidia|cuda)-' .venv/torch.json || { \
	  echo "make: pip would download CUDA with $(TORCH), which reptool does not need."; \
	  echo "      Give the CPU index that PyTorch's install page names: make TORCH_INDEX=URL $(MAKECMDGOALS)"; exit 1; }
	$(PIP) install --quiet $(INDEX) $(TORCH)
	@touch $@

.venv/ready: .venv/torch pyproject.toml
	$(PIP) install --quiet -r requirements.txt
	$(PIP) install --quiet --no-deps -e .
	@touch $@

.venv/peers: .venv/ready requirements-peers.txt
	$(PIP) install --quiet --no-deps -r requirements-peers.txt
	@touch $@
