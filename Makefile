# A fleet of vLLM engines on Ray Serve. `make help` lists what there is.
CONFIG   ?= serve_configs/llama.yaml
PYTHON   ?= python3.11
PIP_ARGS ?= # e.g. --extra-index-url https://download.pytorch.org/whl/cpu
BENCH    ?= # of bench, e.g. --requests 100, for a look at what it does

BIN       := .venv/bin
INSTALLED := .venv/.installed
DEV       := .venv/.installed-dev
TINY      := models/tiny-llama
SIMULATED := s-s m-m l-l s-l l-s sharegpt burstgpt
REAL      := l-l-4 sharegpt-4 burstgpt-4

# Read by Ray's own processes (controller, proxies), which no setting in the YAML file reaches:
# HAProxy in front of the ingress and gRPC behind it make a streamed token ten times cheaper.
# HAProxy's ingress would take 30 s to stop, and its streams be cut 120 s after an update.
RAY_ENV := RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_USE_GRPC_BY_DEFAULT=1 \
           RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=1 \
           RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=3600 RAY_USAGE_STATS_ENABLED=0

.DEFAULT_GOAL := help
.PHONY: help install model serve test chaos lint bench clean

help: ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: $(INSTALLED) ## make .venv with the exact versions of requirements/cpu.txt

model: $(TINY)/config.json ## build the tiny model that the tests and llama.yaml serve

serve: $(INSTALLED) $(TINY)/config.json ## run the fleet of CONFIG=serve_configs/llama.yaml
	@echo "==> checking $(CONFIG)"
	@$(BIN)/python -m app check $(CONFIG)
	@echo "==> starting Ray Serve; Ctrl-C stops everything"
	@$(BIN)/python -m app wait $(CONFIG) & exec env $(RAY_ENV) $(BIN)/serve run $(CONFIG)

test: $(DEV) $(TINY)/config.json ## run the tests (T="tests/app -k config" for some of them)
	@echo "==> running the tests"
	@$(BIN)/python -m pytest $(T)

chaos: $(DEV) $(TINY)/config.json ## random moves and kills under load (an hour)
	@echo "==> random moves under load"
	@$(BIN)/python -m pytest tests/chaos -s
	@echo "==> kills under load (for leaks: python -m load_tests.chaos soak)"
	@$(BIN)/python -m load_tests.chaos kills-emulated kills-vllm control scheduler ingress

lint: $(DEV) ## ruff and mypy
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

bench: $(DEV) $(TINY)/config.json ## one replica beside plain vLLM; then the standard scenarios (hours)
	@echo "==> measuring the overhead of the fleet"
	@$(BIN)/python -m load_tests.overhead
	@echo "==> the scenarios of the paper, simulated"
	@$(BIN)/python -m load_tests simulate $(SIMULATED) $(BENCH)
	@$(BIN)/python -m load_tests bound $(SIMULATED) $(BENCH)
	@echo "==> smaller ones on the real fleet, and simulated"
	@$(BIN)/python -m load_tests run $(REAL) $(BENCH)
	@$(BIN)/python -m load_tests simulate $(REAL) $(BENCH)
	@$(BIN)/python -m load_tests report

clean: ## remove .venv, the model, results and caches
	rm -rf .venv models results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements/cpu.txt
	@echo "==> installing into .venv (about 2 GB, one to three minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps $(PIP_ARGS) -r $<
	@touch $@

$(DEV): requirements/dev.txt $(INSTALLED)
	@echo "==> installing the tools for tests and lint"
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps $(PIP_ARGS) -r $<
	@touch $@

$(TINY)/config.json: | $(INSTALLED)
	@echo "==> building the tiny model in $(TINY)"
	@$(BIN)/python -m app model $(TINY)
