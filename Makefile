# make demo        the main job: data-regularised SFT on 2 CPU processes, with a table and plots
# make demo-rlvr   the same with rewards that can be checked: GRPO
# make demo-rlhf   the same with a reward model: PPO
# make test        lint, types and tests
# make soak        the longer tests that it leaves out: all pairs of layout and rows, more resumes,
#                  44,000 cases of bad input
# make test-versions  what differs between Megatron-Core's versions, on each of them: README's table;
#                  VERSIONS="0.18.2" some of them, or a folder with Megatron's sources
# make lock        requirements.lock anew, of the newest packages, with uv; then make test
# make sbom        sbom.json, a bill of materials (CycloneDX) of requirements.lock; no network
# make audit       known vulnerabilities of what requirements.lock pins, with uv and the network
# make docs        docs/api.md from the docstrings, and the pictures of the feasible sets
# All set up .venv first (about 5 GB, 3 minutes) and can be run again.
# PYTHON=/path/to/python3.12 names the interpreter; by default one is looked for. On Linux x86_64 with
# Python 3.12 the packages are those of requirements.lock; LOCKED=no takes the newest.

PYTHON ?=
LOCKED ?= yes
VERSIONS ?=
VENV := .venv
STAMP := $(VENV)/.ready
PYTEST := -q -n auto --maxprocesses 8 --dist worksteal --durations=5

.PHONY: demo demo-rlvr demo-rlhf test soak test-versions lint lock sbom audit docs setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock setup.py tools/setup_env.sh
	@LOCKED=$(LOCKED) bash tools/setup_env.sh "$(VENV)" "$(PYTHON)"
	@touch $(STAMP)

demo: $(STAMP)
	@$(VENV)/bin/python examples/sft/demo.py

demo-rlvr demo-rlhf: demo-%: $(STAMP)
	@$(VENV)/bin/python examples/$*/demo.py

test: lint
	@$(VENV)/bin/python -m pytest $(PYTEST) -m "not soak"

soak: $(STAMP)
	@$(VENV)/bin/python -m pytest $(PYTEST) -m soak

test-versions: $(STAMP)
	@$(VENV)/bin/python tests/versions.py $(VERSIONS)

lint: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy

lock:
	@(head -n 1 requirements.lock; uv pip compile -q pyproject.toml --extra demo --extra test \
	  --python 3.12 --generate-hashes --no-header --no-annotate) > lock.new
	@mv lock.new requirements.lock

sbom: $(STAMP)
	@$(VENV)/bin/python tools/sbom.py requirements.lock > sbom.new
	@mv sbom.new sbom.json

audit:
	@uvx pip-audit --require-hashes --disable-pip -r requirements.lock

docs: $(STAMP)
	@$(VENV)/bin/python docs/api.py
	@$(VENV)/bin/python docs/feasible_sets.py

clean:
	rm -rf $(VENV) .versions runs
