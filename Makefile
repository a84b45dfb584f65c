# Two commands, on a machine with python3, git, make and root or sudo; each installs what is missing and says so.
#
#   make demo                                  import a Docker image without Docker, run it as an ordinary user
#   make demo IMAGE=docker://... RUN='...'     the same with your image and command
#   make test  [ARGS='-k registry']            the whole test-suite, as an ordinary user
#   make lint                                  ruff and mypy only
#   make bench                                 what a start and a pull cost here
#   make clean

.PHONY: demo test lint bench clean
IMAGE =
RUN =
ARGS =

demo:
	@recipes/packages.sh run build $(if $(IMAGE),,demo)
	@recipes/install.sh
	@recipes/demo.sh "$(IMAGE)" $(RUN)

test:
	@recipes/packages.sh run build demo test
	@recipes/install.sh test
	@recipes/test.sh $(ARGS)

lint:
	@recipes/packages.sh run build
	@recipes/install.sh test
	@recipes/test.sh tests/test_linters.py tests/test_house.py

bench: demo
	@recipes/bench.sh $(ARGS)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis sciexec/_pysquashfs.c sciexec/_pysquashfs*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
