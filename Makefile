# Each target sets up what it needs: .venv the first time and when the dependencies or a kernel
# change, QEMU where it is missing and may be installed.

BIN := .venv/bin
READY := .venv/.ready
KERNELS := $(wildcard $(addprefix src/vmferry/pages/_compiled/,*.pyx *.pxd))

.PHONY: demo test lint bench soak qemu etcd linux

demo: $(READY) qemu
	$(BIN)/python -m demo

test: $(READY) qemu etcd linux
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) qemu linux
	$(BIN)/python -m bench $(ARGS)

soak: $(READY)
	$(BIN)/python -m tests.soak

qemu:
	@scripts/setup qemu

etcd:
	@scripts/setup etcd

linux:
	@scripts/setup linux

$(READY): pyproject.toml $(KERNELS)
	@scripts/setup python
	@touch $@
