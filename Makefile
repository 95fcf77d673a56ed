# The front door. `make help` lists what it opens.
SHELL := /bin/bash
.DEFAULT_GOAL := help
DEPTH ?= 4
ARGS ?=

# uv, from the path (if it runs: a shim may not) or put by pip into .uv/, so that no system Python is touched.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .uv/bin/uv)
RUN := $(UV) run --no-sync
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: help setup demo test check format train bench doctor docs clean

help: ## list the targets
	@echo "vibechat: a ChatGPT-like language model from nothing. First: make demo"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

.uv/bin/uv:
	@echo "uv is not installed: fetching it into .uv/ with pip"
	@python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target .uv uv || { echo "error: pip could not fetch uv: install uv yourself (docs.astral.sh/uv), then run make again" >&2; exit 2; }

.venv/.ready: $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv) pyproject.toml rustbpe/Cargo.toml $(wildcard rustbpe/src/*.rs)
	@command -v cargo >/dev/null || { echo "error: Rust is missing (cargo not found): install it from rustup.rs or with your package manager, then run make again" >&2; exit 2; }
	$(UV) sync
	@touch $@

setup: .venv/.ready ## install everything into .venv, and build the Rust tokenizer

demo: setup ## train a small GPT on text that this machine has: minutes, no GPU, no network
	$(RUN) python scripts/train.py --demo $(ARGS)

train: setup ## train on your terms: make train DEPTH=12 ARGS='--data "my/*.txt"'
	$(RUN) python scripts/train.py --depth $(DEPTH) $(ARGS)

test: setup ## run every test; then the kernels again, in Triton's interpreter
	$(RUN) pytest -n 2 --dist loadgroup tests $(ARGS)
	TRITON_INTERPRET=1 $(RUN) pytest -n 2 tests/interpreted
	cargo test --quiet --release --manifest-path rustbpe/Cargo.toml

check: setup ## ruff, mypy, cargo fmt, cargo clippy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	@if cargo fmt --version >/dev/null 2>&1; then cargo fmt --manifest-path rustbpe/Cargo.toml --check; else echo "cargo fmt is not installed: skipped"; fi
	@if cargo clippy --version >/dev/null 2>&1; then cargo clippy --quiet --manifest-path rustbpe/Cargo.toml --all-targets --features pyo3 -- -D warnings; else echo "cargo clippy is not installed: skipped"; fi

format: setup ## let ruff and cargo fmt rewrite the tree
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	@cargo fmt --manifest-path rustbpe/Cargo.toml

bench: setup ## measure: tokens/s, MFU, where a step goes; held against this machine's baseline
	$(RUN) python -m bench.mfu --depth $(DEPTH) --check $(ARGS)

doctor: setup ## say what this machine has and what is wrong
	$(RUN) vibechat doctor

docs: setup ## write docs/reference/commands.md from the programs
	$(RUN) python docs/generate.py

clean: ## remove what was built and cached here; your models stay
	rm -rf .venv .uv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks dist build rustbpe/target vibechat/_rustbpe*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
