# make demo      SRPO on a miniature Wan2.2, on the CPU: pictures and figures in outputs/demo
# make test      ruff, and one test of every behaviour
# make test-all  ruff and all tests: more engines, precisions, seeds and flags
# make clean     remove what the others made, the virtual environment too

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint clean

.venv/installed: requirements.txt constraints.txt
	@echo "Installing requirements.txt into .venv. This takes minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	@touch $@

# torchao is for --optimizer adamw_8bit, which few runs need.
.venv/test-tools: .venv/installed
	$(BIN)/python -m pip install --quiet pytest pytest-xdist hypothesis ruff torchao --constraint constraints.txt
	@echo "Compiling DeepSpeed's operators for the tests. This takes a minute, once."
	@TORCH_EXTENSIONS_DIR=$(CURDIR)/.pytest_cache/torch_extensions $(BIN)/python tests/compile_operators.py
	@touch $@

demo: .venv/installed
	$(BIN)/python tests/miniature/demo.py

lint: .venv/test-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf .venv outputs .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
