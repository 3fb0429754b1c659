# Two commands do everything: `make demo` and `make test`. Both build .venv first (Python 3.10 with Lava where there is one) and share it.
VENV := .venv
CORE := .venv-core
PEERS := .venv-peers
OLDEST := .venv-oldest
MIDDLE := .venv-312
NEWEST := .venv-newest
AUDIT := .venv-audit
PINS := pyproject.toml $(wildcard constraints/py3*.txt) .ci/make-venv
# what other versions of Python, NumPy and torch can break; the pages and the packages are tested by `make test-slow` and `make package`
CODE := tests/unit tests/property tests/golden tests/targets tests/cli tests/docs/test_house.py tests/docs/test_dependencies_page.py
# two workers with a thread each; a file's tests stay with one worker
PYTEST := -m pytest --numprocesses 2 --dist loadfile
test test-slow test-core test-oldest test-312 test-newest: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-core test-oldest test-312 test-newest lint types audit docs sanitize fuzz package endurance endurance-deploy endurance-training load peers bench bench-lava bench-spide bench-scale bench-saf bench-gradient bench-quantization bench-budget bench-learning bench-netx

help:  ## list these commands
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 27

demo: $(VENV)/ready  ## set up, then run mnist-fc on PyTorch, the simulator and Lava, and write out/report
	$(VENV)/bin/toolchain compare mnist-fc --targets torch,sim,lava-sim --fallback sim --report out/report

test: $(VENV)/ready  ## set up, then run the tests
	$(VENV)/bin/python $(PYTEST)

test-slow: $(VENV)/ready  ## the tests that take long: planted faults, kills, large networks, the pages, the packages
	$(VENV)/bin/python $(PYTEST) -m slow

test-core: $(CORE)/ready  ## the same tests on Python 3.11 or newer, without Lava
	$(CORE)/bin/python $(PYTEST)

test-oldest: $(OLDEST)/ready  ## the code's tests on the lowest versions that pyproject.toml declares, with nothing optional
	$(OLDEST)/bin/python $(PYTEST) $(CODE) -m 'not slow'

test-312: $(MIDDLE)/ready  ## the code's tests on Python 3.12, without Lava
	$(MIDDLE)/bin/python $(PYTEST) $(CODE) -m 'not slow'

test-newest: $(NEWEST)/ready  ## the code's tests on Python 3.13 with the newest NumPy and torch, without Lava
	$(NEWEST)/bin/python $(PYTEST) $(CODE) -m 'not slow'

lint: $(VENV)/ready  ## ruff: format and rules
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/ready  ## mypy, strict
	$(VENV)/bin/mypy

audit: $(AUDIT)/ready  ## ask the package index for known vulnerabilities of every pinned version; says how many it answered about
	$(AUDIT)/bin/python .ci/audit $(AUDIT)/bin/pip-audit $(wildcard constraints/*.txt)

docs: $(VENV)/ready  ## the documentation's pages, in site/: runs what they show, and fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

sanitize: $(VENV)/ready  ## the native kernel's tests on a build that stops at wrong addresses and undefined behaviour
	.ci/sanitize $(VENV)/bin/python

fuzz: $(VENV)/ready  ## 200,000 mutated and drawn files through every reader, in bounded processes; what is found lies in out/fuzz
	$(VENV)/bin/python -m fuzz

package:  ## build the source distribution and the wheel in dist/, install the wheel in an environment of its own, and run it there
	.ci/package

endurance: $(VENV)/ready  ## whether Lava runs always end and leave nothing: 200 in one process, 60 ended at random moments
	$(VENV)/bin/python benchmarks/endurance.py

endurance-deploy: $(VENV)/ready  ## whether deployments that are ended at random moments go on to the same record, field by field: 30
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/endurance_deploy.py

endurance-training: $(VENV)/ready  ## whether training runs that are killed at random moments resume to the same files, bit for bit: 100 and more
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/endurance_training.py

load: $(VENV)/ready  ## whether full MNIST, pass after pass on every target, holds memory, processes and handles steady (data: docs/data.md)
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/load.py

peers: $(PEERS)/ready  ## the simulators that `make bench` compares with, SpikingJelly and snnTorch, on a Python 3.11 or newer of their own

bench: $(VENV)/ready  ## samples per second of `sim` beside other simulators (those of `make peers`, and Lava), whether it is exact, and what it costs
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/simulation.py

bench-lava: $(VENV)/ready  ## samples per second on lava-sim: our processes beside Lava's stock ones, and their ratio
	$(VENV)/bin/python benchmarks/lava_sim.py

bench-spide: $(VENV)/ready  ## SPIDE's training on ConvNet-F: ours beside the equations written plainly in PyTorch
	$(VENV)/bin/python benchmarks/spide_training.py

bench-scale: $(VENV)/ready  ## the gradient with an automatic scale factor beside the exact one, over a whole training run
	$(VENV)/bin/python benchmarks/spide_scale.py --model mnist-fc
	$(VENV)/bin/python benchmarks/spide_scale.py --model mnist-fc2

bench-gradient: $(VENV)/ready  ## the gradient of integer graphs beside float SPIDE's, at 8, 6 and 4 bits
	$(VENV)/bin/python benchmarks/feedback_gradient.py --bits 8,6,4

bench-saf: $(VENV)/ready  ## forward multiply-adds, time and memory of SAF-E and SAF-F beside OTTT_O
	$(VENV)/bin/python benchmarks/saf.py

bench-quantization: $(VENV)/ready  ## every trained network's accuracy in floats and at 8 to 2 weight bits, answer by answer
	$(VENV)/bin/python benchmarks/quantization.py

bench-budget: $(VENV)/ready  ## where accuracy goes, from the float equilibrium to 8, 4 and 3 weight bits, factor by factor with intervals
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/budget.py

bench-learning: $(VENV)/ready  ## learning on Lava processes, floats and 8 bits, beside the readout alone and PyTorch SPIDE; out/learning.png
	$(VENV)/bin/python benchmarks/learning.py --picture out/learning.png

bench-netx: $(VENV)/ready  ## networks as netx files, read by lava-dl and run in Lava, beside the exact graph
	$(VENV)/bin/python benchmarks/netx.py --thresholds

$(VENV)/ready: $(PINS)
	.ci/make-venv lava $(VENV)

$(CORE)/ready: $(PINS)
	.ci/make-venv core $(CORE)

$(PEERS)/ready: constraints/peers.txt .ci/make-venv
	.ci/make-venv peers $(PEERS)

$(OLDEST)/ready: pyproject.toml constraints/oldest.txt .ci/make-venv
	.ci/make-venv oldest $(OLDEST)

$(MIDDLE)/ready: $(PINS)
	.ci/make-venv 312 $(MIDDLE)

$(NEWEST)/ready: $(PINS)
	.ci/make-venv newest $(NEWEST)

$(AUDIT)/ready: constraints/audit.txt .ci/make-venv
	.ci/make-venv audit $(AUDIT)
