# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
# The mini-lab is so small that threads cost more than they bring.
SMALL := OMP_NUM_THREADS=1
# Tests of one file share what they have built.
PARALLEL := -n logical --dist loadfile
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Every variant of conf/lora: not the full weights, a rank, or quantised bases.
VARIANTS := $(filter-out none lora_r16 qlora,$(patsubst conf/lora/%.yaml,%,$(wildcard conf/lora/*.yaml)))
NAMES := $(patsubst experiments/%/table.yaml,%,$(wildcard experiments/*/table.yaml))

.DEFAULT_GOAL := help
.PHONY: help setup demo variants cost test test-all check bench bench-plan plan-paper mini-models tables clean

help: ## this list
	@grep -hE '^[a-zA-Z%_-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv with everything pinned (once)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 setup"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY) ## the main job: sft, lora, kd and neo over three seeds, then table and figure
	$(SMALL) $(BIN)/python -m neo.train experiment=mini hydra/launcher=parallel
	$(BIN)/python -m neo.report mini runs=runs out=experiments/mini

variants: $(READY) ## the LoRA variants: a rate for each, then five seeds, then the page (an hour or more)
	@# recorded runs are skipped; one that fails or diverges stops nothing: the tables name it
	printf 'lora=%s\n' $(VARIANTS) | $(SMALL) xargs -P 2 -L 1 \
		$(BIN)/python -m neo.train experiment=variants_search trainer.enable_progress_bar=false || true
	$(BIN)/python -m neo.report variants_search runs=runs out=experiments/variants_search
	$(SMALL) xargs -P 2 -L 1 $(BIN)/python -m neo.train experiment=variants \
		trainer.enable_progress_bar=false < experiments/variants_search/chosen.txt || true
	$(BIN)/python -m neo.report variants runs=runs out=experiments/variants

experiment-%: $(READY) ## train an experiment of the paper at the mini scale, and render it
	$(SMALL) $(BIN)/python -m neo.train experiment=$* hydra/launcher=parallel
	test $* != main || $(SMALL) $(BIN)/python -m neo.evaluate run=runs/main tasks=mini_lab models=student,base,teacher
	test ! -d runs/$*_search || $(BIN)/python -m neo.report $*_search runs=runs out=experiments/$*_search
	$(BIN)/python -m neo.report $* runs=runs out=experiments/$*

cost: $(READY) ## what the four methods cost: 20 short runs one after another, the plan at the paper's size
	$(BIN)/python benchmarks/workload.py build/cost
	MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 $(BIN)/python -m neo.train experiment=cost
	$(BIN)/python -m neo.plan experiment=cost scale=paper seed=0 offline=true out=experiments/cost/plan.md
	$(BIN)/python -m neo.report cost runs=runs out=experiments/cost

test: $(READY) ## the tests, a process for each core
	$(SMALL) $(BIN)/pytest $(PARALLEL)

test-all: $(READY) ## the tests, slow ones too
	$(SMALL) $(BIN)/pytest $(PARALLEL) -m 'not gpu or gpu'

check: $(READY) ## format, lint, types, and that committed tables are what their records give
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m neo.report check=true

bench: $(READY) ## speed and memory: the loss against its peers, a step against the plain way, caches, each variant against lora
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/variants.py

plan-paper: $(READY) ## render experiments/plan: Llama-3.1-8B into 1B on 1, 8 and 64 devices, nothing loaded
	$(BIN)/python benchmarks/plan.py --paper

bench-plan: $(READY) ## the plan of a run against its peak memory on this CPU (an hour, 10 GiB)
	$(BIN)/python benchmarks/plan.py

mini-models: $(READY) ## build the shipped mini teacher and student from nothing
	$(BIN)/python -m neo.mini build/mini
	$(SMALL) $(BIN)/python -m neo.train experiment=mini_teacher
	$(SMALL) $(BIN)/python -m neo.train experiment=mini_student
	$(BIN)/python -m neo.export run=runs/mini/teacher out=neo/models/mini/teacher overwrite=true
	$(BIN)/python -m neo.export run=runs/mini/student out=neo/models/mini/student overwrite=true

table-%: $(READY) ## render experiments/%/table.md and its figures from its records
	$(BIN)/python -m neo.report $*

tables: $(addprefix table-,$(NAMES)) ## render them all

clean: ## remove what the tools left behind, not .venv and not runs/
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
