# Every target sets up .venv by itself. Options: SEEDS for bench, CONSTRAINTS for setup, and for train:
#   CONFIG, LLAVA, RUN     what is trained, on what, and where it goes
#   NPROC                  ranks on each machine: one per GPU
#   CHECK_ONLY=1, OVERFIT=1, WEIGHTS_ONLY=1
#   NNODES, NODE_RANK, MASTER=host:port   the same command on each of several machines
#   HOSTFILE               or one command for all of them: lines of `host slots=8`, reached by ssh
BIN := .venv/bin
CONFIG ?= train_llava/configs/tiny-cpu.yaml
NPROC ?= 2
LLAVA ?= llava
RUN ?=
CHECK_ONLY ?=
OVERFIT ?=
WEIGHTS_ONLY ?=
NNODES ?=
NODE_RANK ?=
MASTER ?=
HOSTFILE ?=
SEEDS ?= 0 1 2
CONSTRAINTS ?=

# A misspelt setting would be ignored in silence.
SETTINGS := CONFIG NPROC LLAVA RUN CHECK_ONLY OVERFIT WEIGHTS_ONLY NNODES NODE_RANK MASTER HOSTFILE SEEDS CONSTRAINTS
GIVEN := $(foreach word,$(MAKEOVERRIDES),$(if $(findstring =,$(word)),$(firstword $(subst =, ,$(word)))))
ifneq ($(filter-out $(SETTINGS),$(GIVEN)),)
$(error $(filter-out $(SETTINGS),$(GIVEN)): no such setting; there are $(SETTINGS))
endif

.PHONY: setup demo test train bench lint golden clean

setup:
	@./envs/setup.sh $(CONSTRAINTS)

demo: setup
	@$(BIN)/python -m train_llava.demo

test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile

train: setup
	@exec $(BIN)/python -m train_llava.launch --config "$(CONFIG)" --nproc $(NPROC) --llava "$(LLAVA)" \
		$(if $(RUN),--run "$(RUN)") $(if $(HOSTFILE),--hostfile "$(HOSTFILE)") \
		$(if $(NNODES),--nnodes "$(NNODES)") $(if $(NODE_RANK),--node-rank "$(NODE_RANK)") \
		$(if $(MASTER),--master "$(MASTER)") $(if $(CHECK_ONLY),--check-only) \
		$(if $(OVERFIT),--overfit-batch) $(if $(WEIGHTS_ONLY),--weights-only)

bench: setup
	@$(BIN)/python -m benchmarks.three_seeds $(SEEDS)
	@$(BIN)/python -m benchmarks.parallel
	@$(BIN)/python -m benchmarks.parallel 0 4
	@$(BIN)/python -m benchmarks.act
	@$(BIN)/python -m benchmarks.serve_fuzz
	@$(BIN)/python -m benchmarks.serve_load
	@$(BIN)/python -m benchmarks.transfer
	@$(BIN)/python -m benchmarks.convert
	@$(BIN)/python -m benchmarks.codecs
	@$(BIN)/python -m benchmarks.report
	@$(BIN)/python -m benchmarks.loader_memory

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m tests.check_links

golden: setup
	@$(BIN)/python -m pytest tests -k golden --rewrite-golden

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis
