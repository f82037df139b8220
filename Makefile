# Each target sets up .venv by itself. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
NEEDS := pyproject.toml constraints.txt

.PHONY: demo test

demo: .venv/demo.stamp
	$(BIN)/bitnet-triton generate

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# torch alone and first: the pinned version takes a CPU build where pip finds one, and whatever
# needs torch afterwards is satisfied by it
.venv/torch.stamp: $(NEEDS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q torch -c constraints.txt
	touch $@

.venv/demo.stamp: .venv/torch.stamp
	$(BIN)/python -m pip install -q -e . -c constraints.txt
	touch $@

.venv/test.stamp: .venv/torch.stamp
	$(BIN)/python -m pip install -q -e ".[dev,train]" -c constraints.txt
	touch $@
