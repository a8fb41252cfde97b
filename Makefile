# make demo        the main job: data-regularised SFT on 2 CPU processes, with a table and plots
# make demo-rlvr   the same with rewards that can be checked: GRPO
# make demo-rlhf   the same with a reward model: PPO
# make test        lint, types and tests
# make soak        the longer tests that it leaves out: all pairs of layout and rows, more resumes
# make docs        docs/api.md from the docstrings, and the pictures of the feasible sets
# All set up .venv first (about 5 GB, 3 minutes) and can be run again.
# PYTHON=/path/to/python3.12 names the interpreter; by default one is looked for.

PYTHON ?=
VENV := .venv
STAMP := $(VENV)/.ready
PYTEST := -q -n auto --maxprocesses 8 --dist worksteal --durations=5

.PHONY: demo demo-rlvr demo-rlhf test soak lint docs setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py tools/setup_env.sh
	@bash tools/setup_env.sh "$(VENV)" "$(PYTHON)"
	@touch $(STAMP)

demo: $(STAMP)
	@$(VENV)/bin/python examples/sft/demo.py

demo-rlvr demo-rlhf: demo-%: $(STAMP)
	@$(VENV)/bin/python examples/$*/demo.py

test: lint
	@$(VENV)/bin/python -m pytest $(PYTEST) -m "not soak"

soak: $(STAMP)
	@$(VENV)/bin/python -m pytest $(PYTEST) -m soak

lint: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy

docs: $(STAMP)
	@$(VENV)/bin/python docs/api.py
	@$(VENV)/bin/python docs/feasible_sets.py

clean:
	rm -rf $(VENV) runs
