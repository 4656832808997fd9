# make quickstart   set up, draw the built-in data, train a small CLIP, evaluate it
# make test         set up, run the tests
# make test-fast    those of the core in under a minute: model, losses, data order, tokeniser
# make lint         style and types
# make test-slow    the longer tests; CHOICE="..." says which, in words of pytest
# make bench        measure everything, on a machine without other work: an hour or two on two cores
#                   (an estimate: it was not yet run whole)
# make bench-tiny   every benchmark with sizes of a moment, to see that it works

PYTHON ?= python3
RUN := .venv/bin
# A process a core for the tests; those of a file, which share models and folders, stay together.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile
READY := .venv/.ready

.PHONY: setup quickstart test test-fast test-slow bench bench-tiny lint format clean

setup: $(READY)

# Made anew only when the requirements change.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "leanclip needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 2; }
	@echo "setting up .venv (a few minutes, once) ..."
	@test -x $(RUN)/python || $(PYTHON) -m venv .venv
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[app,dev,export,hub,tensorboard]'
# OpenAI's own code, which some tests read: without torchvision, which it asks for and they do not need.
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

BENCHMARKS := train_step roofline encode images pipeline tokenizer loss checkpoint read_weights \
  startup scaling growth pack table embed search app

# Each on its own: make bench BENCHMARKS="loss startup"
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
