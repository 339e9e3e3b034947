# make demo   SRPO on a miniature Wan2.2, on the CPU: pictures and figures in outputs/demo
# make test   ruff and the whole test suite
# make clean  remove what the two made, the virtual environment too

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

.venv/installed: requirements.txt
	@echo "Installing requirements.txt into .venv. This takes minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

# torchao is for --optimizer adamw_8bit, which few runs need.
.venv/test-tools: .venv/installed
	$(BIN)/python -m pip install --quiet "pytest>=9" "pytest-xdist>=3.8" "ruff>=0.17" "torchao>=0.18"
	@touch $@

demo: .venv/installed
	$(BIN)/python tests/miniature/demo.py

test: .venv/test-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf .venv outputs .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
