# Every target sets up .venv by itself. Options: CONFIG, NPROC, LLAVA and RUN for train; SEEDS for bench, CONSTRAINTS for setup.
BIN := .venv/bin
CONFIG ?= train_llava/configs/tiny-cpu.yaml
NPROC ?= 2
LLAVA ?= llava
RUN ?=
SEEDS ?= 0 1 2
CONSTRAINTS ?=

.PHONY: setup demo test train bench lint golden clean

setup:
	@./envs/setup.sh $(CONSTRAINTS)

demo: setup
	@$(BIN)/python -m train_llava.demo

test: setup
	@$(BIN)/python -m pytest

train: setup
	@$(BIN)/python -m train_llava.launch --config "$(CONFIG)" --nproc $(NPROC) --llava "$(LLAVA)" $(if $(RUN),--run "$(RUN)")

bench: setup
	@$(BIN)/python -m benchmarks.three_seeds $(SEEDS)
	@$(BIN)/python -m benchmarks.transfer
	@$(BIN)/python -m benchmarks.convert
	@$(BIN)/python -m benchmarks.codecs

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

golden: setup
	@$(BIN)/python -m pytest tests -k golden --rewrite-golden

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis
