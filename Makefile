# Zephyr Loop. `make run` and `make test` need Python 3.11+ and make, nothing else: each does its own set-up.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help run setup setup-dev test test-browser test-faults test-resume fuzz check practice bench-first-token bench-store bench-serving bench-quantisation bench-train bench-gate bench-candidates bench-retrain soak-swaps soak-baking soak-floods clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ –/'

run: setup       ## serve the chat on http://127.0.0.1:7860 (ZLOOP_PORT and friends: README)
	@exec $(BIN)/zloop serve

setup: .venv/.ready-run        ## the environment in .venv, pinned, with the embedded model
setup-dev: .venv/.ready-dev    ## the same plus what tests and checks need

.venv/.ready-run: pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" bash scripts/setup.sh run

.venv/.ready-dev: .venv/.ready-run
	@PYTHON="$(PYTHON)" bash scripts/setup.sh dev

# Trainings of two tests at once share the cores: threads that wait for each other must not hold them.
test: setup-dev  ## all tests but the browser's
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not browser" -n 2 --dist loadfile

test-browser: setup-dev  ## the tests that drive Chromium (Debian package `chromium`)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m browser -n 2

test-faults: setup-dev  ## kill -9, full and broken disks under the store → docs/benchmarks/faults.md (minutes)
	$(BIN)/python -m tests.faults

test-resume: setup-dev  ## 50 × kill -9 of a training, its weights compared bit for bit → docs/benchmarks/resume.md
	$(BIN)/python -m tests.resume

fuzz: setup-dev  ## schemathesis and the Big List of Naughty Strings at length, a new seed each time (an hour or so)
	FUZZ=all $(BIN)/python -m pytest tests/security/test_schemathesis.py tests/security/test_naughty_strings.py

check: setup-dev ## lint, format, types, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

practice: setup  ## teach it a taste: the whole loop in a few minutes, without data or network (TASTE=shorter)
	$(BIN)/zloop practice --taste $(or $(TASTE),shorter)

bench-first-token: setup-dev  ## first-token time idle and while a run trains → docs/benchmarks/
	$(BIN)/python scripts/bench_first_token.py

bench-store: setup-dev  ## picks a second, imports, snapshots, statistics → docs/benchmarks/
	$(BIN)/python scripts/bench_store.py picks --there 0 1000000
	$(BIN)/python scripts/bench_data.py

bench-train: setup-dev  ## our DPO step against TRL's trainer on real pairs → docs/benchmarks/ (half an hour or more)
	$(BIN)/python scripts/bench_train.py

soak-swaps: setup-dev  ## 200 swaps under 32 streams, 8 kinds of failing swap ten times each → docs/benchmarks/ (minutes)
	$(BIN)/python scripts/soak_swaps.py
	SWAPS=200 FAILING_SWAPS=10 $(BIN)/python -m pytest tests/test_engine_swaps.py tests/test_failing_swaps.py

soak-baking: setup-dev  ## 50 faulty versions promoted under streams and taken back → docs/benchmarks/ (minutes)
	$(BIN)/python scripts/soak_baking.py

soak-floods: setup-dev  ## picks beside 45 imports, answers beside 1,200 held connections → docs/benchmarks/ (minutes)
	$(BIN)/python scripts/soak_floods.py

bench-serving: setup-dev  ## the whole product against a bare llama-server, transformers serve, Gradio → docs/benchmarks/
	$(BIN)/python scripts/bench_serving.py

bench-quantisation: setup-dev  ## which form of the embedded model to serve → docs/benchmarks/
	$(BIN)/python scripts/bench_quantisation.py

bench-gate: setup-dev  ## 2,000 simulated live trials of each kind: wrong promotions, votes needed → docs/benchmarks/
	$(BIN)/python scripts/bench_gate.py

bench-candidates: setup-dev  ## twenty spoiled candidates and honest ones through the whole gate → docs/benchmarks/ (two hours)
	$(BIN)/python scripts/bench_candidates.py

bench-retrain: setup-dev  ## 200 new picks → trained → evaluated → served: minutes → docs/benchmarks/ (over an hour)
	$(BIN)/python scripts/bench_retrain.py $(if $(FILE),--file $(FILE))

clean:           ## remove the environment (never the data directory)
	rm -rf .venv build *.egg-info
