# The two commands of the README are `make demo` and `make test`; each sets up what it needs by itself.
# Set-up lives in .venv (remove it with `make clean`). PYTHON chooses the interpreter (3.10 to 3.13).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without a GPU the CPU build of torch is asked for first: the general build brings several GB of GPU libraries.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
PINNED_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# of `make test-torch`, the oldest that pyproject.toml allows; everything else uses the pinned one
TORCH ?= $(shell sed -n 's/^ *"torch>=\([0-9.]*\)",$$/\1.0/p' pyproject.toml)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-torch package-check lint tables paper peers clean

demo: $(VENV)/.installed
	$(BIN)/ldr demo --out demo-output

# One process a core, at most four, each with one thread: processes with several threads each hinder one another.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What Slicer's extension catalogue asks for, checked from the tree (a part of `make test`).
package-check: $(VENV)/.installed-test
	$(BIN)/python -m pytest Testing/unit/test_slicer_catalogue.py

# The core's tests under the oldest torch that is supported, or another (TORCH=2.13.0), in a virtual environment of its own
# of up to 6 GB. Too slow for .ci/run. Slicer's module and other registration programs are left to `make test`.
CORE_TESTS := Testing/unit Testing/oracle Testing/integration/test_cli.py Testing/integration/test_memory.py \
	Testing/integration/test_precision.py Testing/integration/test_registration.py \
	Testing/integration/test_training.py

OTHER_TORCH := .venv-torch-$(TORCH)
OTHER_PIP := $(OTHER_TORCH)/bin/python -m pip --disable-pip-version-check install --quiet \
	--constraint $(OTHER_TORCH)/constraints.txt

test-torch: $(OTHER_TORCH)/.installed
	$(OTHER_TORCH)/bin/python -m pytest $(CORE_TESTS) --ignore=Testing/unit/test_slicer_extension.py

# The paper's tables and figures on whatever lies in DATA (see Training/configs): make tables DATA=folder
# Goes on where it stopped. WORKERS pairs at a time; PAIRS=n only the first n of every data set; MODELS: folders with
# exported models; PEER_PYTHON: a Python with ANTs, greedy ... (pip install '.[peers]').
OUT ?= runs/tables
WORKERS ?= 2
PEER_PYTHON ?= $(BIN)/python
CHOICE = --config Training/configs/evaluate-ixi.toml --config Training/configs/evaluate-paper.toml \
	--data "$(DATA)" --out "$(OUT)" --peer-python "$(PEER_PYTHON)" \
	$(if $(PAIRS),--pairs $(PAIRS)) $(foreach folder,$(MODELS),--models "$(folder)")

tables: $(VENV)/.installed-evaluate
	$(if $(DATA),,$(error DATA must be the folder with the data sets: make tables DATA=folder))
	$(BIN)/python -m Training.evaluate $(CHOICE) --workers $(WORKERS) || test $$? -eq 1
	$(BIN)/python -m Training.report $(CHOICE)

# Trains every row of those tables within its budget and evaluates it, days on a CPU: make paper DATA=folder
# Goes on where it stopped. PAPER says what is trained (Training/configs/paper*.toml); TRIAL=yes: two steps a row.
PAPER ?= Training/configs/paper.toml
TRIAL ?=

paper: OUT = runs/paper
paper: $(VENV)/.installed-evaluate
	$(if $(DATA),,$(error DATA must be the folder with the data sets: make paper DATA=folder))
	$(BIN)/python -m Training.paper --config "$(PAPER)" --data "$(DATA)" --out "$(OUT)$(if $(TRIAL),-trial)" \
		--workers $(WORKERS) --peer-python "$(PEER_PYTHON)" $(if $(TRIAL),--trial) $(if $(PAIRS),--pairs $(PAIRS))

# Other registration programs in a Python of their own (their packages conflict): ANTs, greedy, convexAdam, voxelmorph,
# and packages that read and write transform files (nitransforms, fslpy, surfa, pydicomrt, DIPY, plastimatch).
# elastix is the program of that name, from the system's packages. Then: LDR_PEER_PYTHON=$(PEERS)/bin/python make test
PEERS := .venv-peers

peers: $(PEERS)/.installed

clean:
	rm -rf $(VENV) $(PEERS) .venv-torch-* demo-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.created:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f"Python must be 3.10 to 3.13, got {v[0]}.{v[1]}: set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(if $(HAS_GPU),$(PIP) torch,$(PIP) "torch==$(PINNED_TORCH)+cpu" 2>/dev/null || $(PIP) torch)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.installed-evaluate: $(VENV)/.installed
	$(PIP) --editable '.[evaluate]'
	touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(PIP) --editable '.[lint]'
	touch $@

$(PEERS)/.installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(subst $(BIN),$(PEERS)/bin,$(if $(HAS_GPU),$(PIP) torch,$(PIP) "torch==$(PINNED_TORCH)+cpu" 2>/dev/null || $(PIP) torch))
	$(subst $(BIN),$(PEERS)/bin,$(PIP)) antspyx picsl_greedy convexAdam voxelmorph SimpleITK \
		nitransforms fslpy surfa pydicomrt dipy plastimatch
	touch $@

# The pins but for torch's; of torch the CPU build where the index has one.
$(OTHER_TORCH)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OTHER_TORCH)
	grep -v '^torch==' constraints.txt > $(OTHER_TORCH)/constraints.txt
	$(OTHER_PIP) "torch==$(TORCH)+cpu" 2>/dev/null || $(OTHER_PIP) "torch==$(TORCH)"
	$(OTHER_PIP) "torch==$(TORCH)" --editable '.[train,evaluate,fast]' pytest hypothesis monai
	touch $@
