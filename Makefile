# make quickstart   set up, draw the built-in data, train a small CLIP, evaluate it
# make test         set up, run the default tests
# make test-fast    the core in under a minute: model, losses, data order, tokeniser
# make lint         formatting, linting and type checking
# make test-slow    the slow tests; CHOICE="..." holds options for pytest
# make bench        run all benchmarks, on an idle machine: an hour or two on two cores (estimated)
# make bench-tiny   run all benchmarks with tiny sizes, to check that they work

PYTHON ?= python3
RUN := .venv/bin
# One test process per core; the tests of a file share fixtures and stay together.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile
READY := .venv/.ready

.PHONY: setup quickstart test test-fast test-slow bench bench-tiny lint format clean

setup: $(READY)

# Only when the requirements change.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "leanclip needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 2; }
	@echo "setting up .venv (a few minutes, once) ..."
	@test -x $(RUN)/python || $(PYTHON) -m venv .venv
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[app,dev,export,hub,tensorboard,tokenizers]'
# OpenAI's code, as a reference in tests; without torchvision, which they do not need.
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps clip-anytorch==2.6.0 \
	  || echo "no clip-anytorch could be installed: THE DROP-IN WILL NOT BE COMPARED WITH OPENAI'S CODE"
	@touch $@

quickstart: $(READY)
	@$(RUN)/leanclip data shapes data/shapes
	@$(RUN)/leanclip train -c configs/quickstart.yaml

test: $(READY)
	@$(RUN)/python -m pytest -q $(PARALLEL)

test-fast: $(READY)
	@$(RUN)/python -m pytest -q tests/model tests/test_loss.py tests/preprocess/test_tokenizer.py \
	  tests/data/test_loader.py tests/test_imports.py

test-slow: $(READY)
	@$(RUN)/python -m pytest -q -m slow $(PARALLEL) $(CHOICE)

BENCHMARKS := train_step naflex roofline encode images pipeline tokenizer loss checkpoint \
  read_weights startup scaling growth pack table embed search app

# One or a few: make bench BENCHMARKS="loss startup"
bench: $(READY)
	@for name in $(BENCHMARKS); do echo "$$name ..."; \
	  $(RUN)/python benchmarks/$$name.py --out benchmarks/$$name.json || exit 1; done
	@$(RUN)/python benchmarks/render.py

bench-tiny: $(READY)
	@for name in $(BENCHMARKS); do echo "$$name ..."; \
	  $(RUN)/python benchmarks/$$name.py --tiny > /dev/null || exit 1; done

lint: $(READY)
	@$(RUN)/ruff format --check .
	@$(RUN)/ruff check .
	@$(RUN)/pyright

format: $(READY)
	@$(RUN)/ruff check --fix .
	@$(RUN)/ruff format .

clean:
	rm -rf .venv runs data/shapes
