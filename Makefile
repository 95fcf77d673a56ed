# The front door. `make help` lists what it opens.
SHELL := /bin/bash
.DEFAULT_GOAL := help
DEPTH ?= 4
ARGS ?=

# uv, from the path or installed by pip into .uv/ (an environment of its own, so that no system Python is touched).
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := $(UV) run --no-sync

.PHONY: help setup demo test check format train bench doctor clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.uv/bin/uv:
	@python3 -m venv .uv && .uv/bin/pip install --quiet uv || { echo "error: could not install uv; install it (pip install uv) and try again" >&2; exit 2; }

.venv/.ready: $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv) pyproject.toml rustbpe/Cargo.toml $(wildcard rustbpe/src/*.rs)
	@command -v cargo >/dev/null || { echo "error: Rust is missing (cargo not found): install it from rustup.rs or your distribution, then run make again" >&2; exit 2; }
	$(UV) sync
	@touch $@

setup: .venv/.ready ## create .venv and install everything, the Rust tokenizer included

demo: setup ## train a small GPT on text that this machine already has; under ten minutes, no network
	$(RUN) python scripts/train.py --demo $(ARGS)

train: setup ## train: make train DEPTH=12 ARGS='--data "my/*.txt"'
	$(RUN) python scripts/train.py --depth $(DEPTH) $(ARGS)

test: setup ## run every test
	$(RUN) pytest -n 2 --dist loadgroup tests $(ARGS)

check: setup ## ruff, mypy, cargo fmt, cargo clippy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	@if cargo fmt --version >/dev/null 2>&1; then cargo fmt --manifest-path rustbpe/Cargo.toml --check; else echo "cargo fmt is not installed: skipped"; fi
	@if cargo clippy --version >/dev/null 2>&1; then cargo clippy --quiet --manifest-path rustbpe/Cargo.toml --all-targets -- -D warnings; else echo "cargo clippy is not installed: skipped"; fi

format: setup ## let ruff and cargo fmt rewrite the tree
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	@cargo fmt --manifest-path rustbpe/Cargo.toml

bench: setup ## run the benchmarks
	$(RUN) python -m bench.mfu --depth $(DEPTH) $(ARGS)

doctor: setup ## say what this machine has and what is wrong
	$(RUN) vibechat doctor

clean: ## remove what was built and cached here (not the base directory with your models)
	rm -rf .venv .uv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks dist build rustbpe/target vibechat/_rustbpe*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
