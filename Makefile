# Every target sets up what it needs. PYTHON chooses the interpreter: 3.11 to 3.13, as transformers 5.23 and numpy 2.4, which
# the tests compare with, have nothing for 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPUS := .cpus
DEMO := demo
PRESET ?= small
COMFYUI ?= ../ComfyUI
COMFYUI_OWN := .comfyui
COMFYUI_PYTHON ?= $(COMFYUI_OWN)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit test-cpus test-comfyui test-gpu format bench-cpu bench-peers bench-gpu clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## Make .venv with everything for building, running and testing

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,pictures,dev]'
	@# The oracles would pull a CUDA torch and a whole application along; their own files are enough.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt \
	  torchvision diffsynth diffusers peft accelerate
	@mkdir -p .typecheck && ln -sfn .. .typecheck/i2l
	@touch $@

demo: setup  ## Tiny checkpoints, engines, a LoRA from a picture, and what is in it
	$(BIN)/i2l make-checkpoints $(DEMO)/models --preset tiny
	$(BIN)/i2l build-engines --models $(DEMO)/models --engines $(DEMO)/engines
	$(BIN)/i2l run docs/photo.jpg --engines $(DEMO)/engines --output $(DEMO)/photo.safetensors
	$(BIN)/i2l inspect $(DEMO)/photo.safetensors

test: lint types unit  ## Lint, types and tests; CI runs this and test-cpus

lint: setup  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy, strict
	MYPYPATH=.typecheck:tests:tests/export:benchmarks $(BIN)/mypy -p i2l

unit: setup  ## pytest
	$(BIN)/python -m pytest

test-cpus: $(CPUS)/.ready  ## The same LoRA on other CPUs, which qemu emulates; on Debian, x86-64
	$(BIN)/python -m pytest -m cpus tests/test_cpus.py
	$(CPUS)/qemu/qemu-x86_64-static -cpu Haswell $(BIN)/python -m pytest tests/export/test_precision.py tests/export/test_sums.py -k "not packs"

$(CPUS)/.ready: $(VENV)/.ready tests/cpus/setup
	tests/cpus/setup $(CPUS) $(BIN)/python
	@touch $@

test-comfyui: setup $(if $(filter $(COMFYUI_OWN)/%,$(COMFYUI_PYTHON)),$(COMFYUI_OWN)/.ready)  ## The nodes in a real ComfyUI and a browser (COMFYUI=folder; COMFYUI_PYTHON=its Python, or one is set up)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright
	$(BIN)/python tests/real_comfyui.py $(COMFYUI) --python $(COMFYUI_PYTHON) $(if $(SCREENSHOTS),--screenshots $(SCREENSHOTS))

$(COMFYUI_OWN)/.ready: $(VENV)/.ready tests/comfyui/setup
	tests/comfyui/setup $(COMFYUI_OWN) $(COMFYUI) $(BIN)/python
	@touch $@

test-gpu: setup  ## What only a GPU shows; skipped with a reason where there is none
	$(BIN)/python -m pytest -m gpu -rs

format: setup  ## Let ruff mend and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-cpu: setup  ## This project beside the torch reference (PRESET=small|full)
	$(BIN)/python benchmarks/cpu.py --preset $(PRESET)

bench-peers: setup  ## One block beside torch, onnxruntime and OpenVINO, after bench-cpu PRESET=full (AS_CPU=avx2: as such a CPU)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt nncf openvino
	$(BIN)/python benchmarks/peers.py --models bench/full --engines bench/full-int8 $(if $(AS_CPU),--as-cpu $(AS_CPU))

bench-gpu: setup  ## The backends of a GPU: parity, bandwidth, times, VRAM, kernels (PRESET=small|full)
	$(BIN)/python benchmarks/gpu.py --preset $(PRESET)

clean:  ## Remove the demo and all caches
	rm -rf $(DEMO) $(CPUS) $(COMFYUI_OWN) .mypy_cache .pytest_cache .ruff_cache .hypothesis
