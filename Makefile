# Every target sets up what it needs. PYTHON chooses the interpreter: 3.11 to 3.14, for which every pinned package has a wheel.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPUS := .cpus
CUDA := .cuda
DEMO := demo
PRESET ?= small
COMFYUI ?= ../ComfyUI
COMFYUI_OWN := .comfyui
COMFYUI_PYTHON ?= $(COMFYUI_OWN)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit soak fuzz audit test-cpus test-cuda test-extras test-comfyui test-gpu test-webgpu test-serve soak-serve test-ray format bench-cpu bench-peers bench-gpu clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## Make .venv with everything for building, running and testing

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,gpu,pictures,serve,dev]'
	@# The oracles would pull a CUDA torch and a whole application along; their own files are enough.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt \
	  torchvision diffsynth diffusers peft accelerate
	@mkdir -p .typecheck && ln -sfn .. .typecheck/i2l
	@touch $@

# What the demo needs, and none of what the tests compare with; a whole setup has it too.
$(VENV)/.demo-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,export]'
	@touch $@

demo: $(if $(wildcard $(VENV)/.ready),setup,$(VENV)/.demo-ready)  ## Tiny checkpoints, engines, a LoRA from a picture, and what is in it; installs only what that takes
	$(BIN)/i2l make-checkpoints $(DEMO)/models --preset tiny
	$(BIN)/i2l build-engines --models $(DEMO)/models --engines $(DEMO)/engines
	$(BIN)/i2l run docs/photo.jpg --engines $(DEMO)/engines --output $(DEMO)/photo.safetensors
	$(BIN)/i2l inspect $(DEMO)/photo.safetensors

test: lint types unit  ## Lint, types and tests; .ci/run has what CI runs besides

lint: setup  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: export MYPYPATH := .typecheck:tests:tests/export:tests/engines/standin:tests/engines/provider:tests/shipping:tests/faults:tests/serve:benchmarks
types: setup  ## mypy, strict; our own code also as Windows and macOS see it
	$(BIN)/mypy -p i2l
	$(BIN)/mypy -p i2l --platform win32 --config-file .ci/mypy-elsewhere.ini --cache-dir .mypy_cache/win32
	$(BIN)/mypy -p i2l --platform darwin --config-file .ci/mypy-elsewhere.ini --cache-dir .mypy_cache/darwin

unit: setup  ## pytest, in a process for each core
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

soak: setup  ## Kills at every file-system call, signals, a full disk, 500 LoRAs of one pipeline: docs/reliability.md
	I2L_FAULTS=long $(BIN)/python -m pytest tests/faults/test_crashes.py tests/faults/test_soak.py

fuzz: setup  ## Thousands of damaged manifests, headers, pictures and files (I2L_SEED=number: other ones)
	I2L_FAULTS=long $(BIN)/python -m pytest tests/faults/test_fuzz.py

audit: setup  ## Known vulnerabilities of what is installed, where pip-audit's service can be reached
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --skip-editable

test-cpus: $(CPUS)/.ready  ## The same LoRA on other CPUs, which qemu emulates; on Debian, x86-64
	$(BIN)/python -m pytest -m cpus tests/test_cpus.py
	$(CPUS)/qemu/qemu-x86_64-static -cpu Haswell $(BIN)/python -m pytest tests/export/test_precision.py tests/export/test_sums.py -k "not packs"

$(CPUS)/.ready: $(VENV)/.ready tests/cpus/setup
	tests/cpus/setup $(CPUS) $(BIN)/python
	@touch $@

test-cuda: $(CUDA)/.ready  ## The cuda backend on onnxruntime's real CUDA provider, NVIDIA's libraries played; x86-64 Linux with cc
	$(BIN)/python -m pytest -m cuda tests/engines

test-extras: setup  ## The extras cpu, cuda and tensorrt, each in a fresh environment: what it brings, what i2l doctor says
	$(BIN)/python -m pytest -m extras tests/shipping
	rm -rf .extras

$(CUDA)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet --constraint constraints.txt onnxruntime-gpu cuda-bindings safetensors pillow click rich filelock
	@# Headers alone: the real runtime would be found and loaded, and it asks for a card.
	$(CUDA)/bin/python -m pip install --quiet --no-deps --constraint constraints.txt --target $(CUDA)/headers nvidia-cuda-runtime nvidia-cuda-crt
	@touch $@

test-comfyui: setup $(if $(filter $(COMFYUI_OWN)/%,$(COMFYUI_PYTHON)),$(COMFYUI_OWN)/.ready)  ## The nodes in a real ComfyUI and a browser (COMFYUI=folder; COMFYUI_PYTHON=its Python, or one is set up)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright
	$(BIN)/python tests/real_comfyui.py $(COMFYUI) --python $(COMFYUI_PYTHON) $(if $(SCREENSHOTS),--screenshots $(SCREENSHOTS))

$(COMFYUI_OWN)/.ready: $(VENV)/.ready tests/comfyui/setup
	tests/comfyui/setup $(COMFYUI_OWN) $(COMFYUI) $(BIN)/python
	@touch $@

test-gpu: setup  ## i2l prove, and what else only a GPU shows; skipped with a reason where there is none
	$(BIN)/python -m pytest -m gpu -rs

test-serve: setup  ## The service with its page in a real browser (Debian: apt-get install chromium)
	I2L_TEST_PAGE=must $(BIN)/python -m pytest tests/serve -rs

soak-serve: setup  ## 2,000 requests on one service, 500 odd ones, 200 clients at once, 20 kills; for minutes
	$(BIN)/python -m pytest -m soak tests/serve -s

test-ray: setup  ## i2l batch --ray on a Ray of two workers: kills, poison, missing engines, Ctrl-C
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest -m ray tests/cluster -rs

test-webgpu: setup  ## The webgpu backend on a software device (Debian: apt-get install chromium-common libvulkan1)
	tests/webgpu/with_device $(BIN)/python -m pytest -m webgpu -rs

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
	rm -rf $(DEMO) $(CPUS) $(CUDA) $(COMFYUI_OWN) .mypy_cache .pytest_cache .ruff_cache .hypothesis
