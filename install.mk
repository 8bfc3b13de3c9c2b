# How .venv is made, for the course and for a release. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PIP_OPTIONS := --quiet --disable-pip-version-check

.PHONY: setup
setup: $(INSTALLED)

# Says every 20 s that an installation goes on, and ends with it.
INSTALL = (while sleep 20 >/dev/null && kill -0 $$$$ 2>/dev/null; do echo "  … still installing"; done) & beat=$$!; trap 'kill $$beat' EXIT; \
	$(BIN)/python -m pip install $(PIP_OPTIONS)

# torch comes first and alone: deepspeed's set-up looks for it. Nothing here downloads weights or data.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "Installing PyTorch, DeepSpeed and JupyterLab into .venv: about two minutes, and what downloading takes"
	@$(INSTALL) -c constraints.txt setuptools wheel
	@$(INSTALL) $$(grep '^torch==' constraints.txt)
	@export DS_BUILD_OPS=0; $(INSTALL) -c constraints.txt --no-build-isolation deepspeed
	@$(INSTALL) -c constraints.txt --no-build-isolation -e .
	@touch $@
