# make prefill | test | gpu | lint | clean      ARGS="..." is passed on to the benchmark or to pytest
#
# The first call sets up .venv with the versions of constraints.txt.
#   BASE_PYTHON=python3.12                 the interpreter .venv is made from
#   VENV_ARGS=--system-site-packages       keeps the torch that this machine already has
#   PYTHON=python                          no .venv: uses that environment as it is and installs nothing

BASE_PYTHON ?= python3
ifdef PYTHON
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
  PYTHON := .venv/bin/python
  READY := .venv/.ready
endif
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: prefill test gpu lint clean

prefill: $(READY)
	$(PYTHON) benchmarks/prefill.py $(ARGS)

test: $(READY)
	$(PYTHON) -m pytest -n 2 $(ARGS)

gpu: $(READY)
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# Removes what these targets set up and built, but no results.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	rm -f bitune_kernels/_build_info.py bitune_kernels/_C.*.so
	find bitune_kernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# Without an NVIDIA driver the CPU build of torch is asked for; pip finds one only where its configuration offers one.
# Elsewhere the default build has to come with its CUDA packages, driver or not: it cannot be imported without them.
.venv/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/* python/*)
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV_ARGS) .venv
	@set -e; pins=.venv/constraints.txt; cp constraints.txt $$pins; \
	if $(PYTHON) -c 'import sys, torch; sys.exit(torch.__file__.startswith(sys.prefix))' 2>/dev/null; then \
	  echo "keeping the torch of the system"; sed -i.bak -E '/^(torch|triton)==/d' $$pins; \
	elif command -v nvidia-smi >/dev/null || test -e /proc/driver/nvidia; then \
	  $(PYTHON) -m pip install 'torch==$(TORCH),!=$(TORCH)+cpu'; \
	else \
	  $(PYTHON) -m pip install 'torch==$(TORCH)+cpu' || { \
	    echo "no CPU build of torch where pip looks (--find-links, --extra-index-url): taking the default build"; \
	    $(PYTHON) -m pip install 'torch==$(TORCH)'; }; \
	fi; \
	if $(PYTHON) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then \
	  sed -i.bak '/^triton==/d' $$pins; \
	fi
	$(PYTHON) -m pip install -c .venv/constraints.txt -e '.[test,dev]'
	$(PYTHON) -m bitune_kernels.env
	touch $@
