# Needs Python 3.10 or newer with pip, nothing else. `make demo` and `make test` set up what they need themselves.

PYTHON ?= python3
# Installed first and by exact version, so that a package that only asks for "torch" leaves it alone.
TORCH_VERSION ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TYPED := flux_kit.engine flux_kit.hosts flux_kit.cli

.PHONY: setup demo test lint types bench looks examples thumbnails check

setup: $(VENV)/.setup-test

demo: $(VENV)/.setup-run
	@mkdir -p demo_output
	$(BIN)/flux-kit generate "a large red circle on the left on a blue background" -o demo_output/circle.png
	$(BIN)/flux-kit generate "a small yellow star at the top on a black background" -o demo_output/star.png
	$(BIN)/flux-kit generate "a large green triangle in the center on a white background" -o demo_output/triangle.png
	$(BIN)/flux-kit generate "a small purple square at the bottom on an orange background" -o demo_output/square.png
	$(BIN)/flux-kit generate "a large white ring on the right on a purple background" -o demo_output/ring.png
	$(BIN)/flux-kit generate "a small blue circle in the centre on a yellow background" --steps 4 \
		--model $(CURDIR)/tiny_flux/models/diffusion_models/tiny-flux-schnell.safetensors -o demo_output/schnell.png
	@echo "The pictures are in demo_output/"

test: $(VENV)/.setup-test
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/.setup-test
	$(BIN)/ruff check .

# mypy cannot check a package that is the repository's root; it can through a link of the package's name.
types: $(VENV)/.setup-test
	@mkdir -p .build && ln -sfn "$(CURDIR)" .build/flux_kit
	MYPYPATH=.build $(BIN)/mypy $(foreach package,$(TYPED),-p $(package))

bench: $(VENV)/.setup-test
	$(BIN)/python -P benchmarks/blocks.py

# What ComfyUI shows of the nodes: English texts and the tables of the help pages, from the schemas.
looks: $(VENV)/.setup-test
	$(BIN)/python -P docs/tools/node_docs.py

# After a change of an example's table, or of a node's inputs.
examples: $(VENV)/.setup-test
	$(BIN)/python -P docs/tools/examples.py

# After a change of tiny-flux or of an example.
thumbnails: $(VENV)/.setup-test
	$(BIN)/python -P docs/tools/thumbnails.py --sheet docs/images/examples.png

check: lint types test

# Stamps: done again only when pyproject.toml changes.
$(VENV)/.setup-run: pyproject.toml | $(BIN)/python
	$(PIP) install "torch==$(TORCH_VERSION)"
	$(PIP) install -e ".[standalone]"
	@touch $@

$(VENV)/.setup-test: pyproject.toml $(VENV)/.setup-run
	$(PIP) install -e ".[standalone,test,dev]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Flux Kit needs Python 3.10 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		$(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $@ install pip; }
