# shardlab. Two commands matter: `make demo` and `make test`. PYTHON=python3.12 chooses another interpreter.
.PHONY: help demo test lab grade build check clean

help:
	@echo "make demo    set up, then fine-tune BLOOM with five methods on two ranks, and report"
	@echo "make check   set up, then check in a minute what needs no ranks: after every edit"
	@echo "make test    set up, then run every test"
	@echo "make lab     set up, then open JupyterLab"
	@echo "make grade   grade the exercises in src/exercises"
	@echo "make build   write skeletons and notebooks again from solutions/"
	@echo "make clean   remove runs/ and the virtual environment"

include install.mk

demo: setup
	$(BIN)/shardlab demo

check: setup
	$(BIN)/ruff check
	$(BIN)/shardlab build --check
	$(BIN)/pytest tests -q -n 2 -m "not ranks and not jobs and not boxes"

# Two processes share the tests: the one that gets those with Slurm mostly waits. DeepSpeed's ops compile meanwhile; who needs one waits for it.
test: setup
	$(BIN)/ruff check
	$(BIN)/shardlab build --check
	$(BIN)/shardlab doctor --build-ops >.venv/ops.log 2>&1 & \
	$(BIN)/pytest tests notebooks -p nbval.plugin --nbval-lax -n 2 --no-loadscope-reorder --durations=40; status=$$?; wait; cat .venv/ops.log; exit $$status

lab: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/.venv" $(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.app_settings_dir=src/shardlab/show/jupyter README.md

grade: setup
	$(BIN)/pytest labs

build: setup
	$(BIN)/shardlab build

clean:
	rm -rf runs .venv
