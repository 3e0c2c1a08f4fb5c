"""Two processes of a host share the memory of a machine: it moves without it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.machines.hosted import KINDS, MIB, config
from tests.transports.support import wait_until
from vmferry.errors import StorageError, UsageError
from vmferry.machines import MachineConfig, create
from vmferry.memory import GuestMemory
from vmferry.qemu.machine_process import MachineProcess

LONG = 30.0


@pytest.fixture
def memory() -> Iterator[Path]:
    """A place in memory that processes share."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(prefix="vmferry-", dir="/dev/shm") as directory:
        yield Path(directory)


def start(stack: ExitStack, machine: MachineConfig, incoming: str | None = None) -> MachineProcess:
    return stack.enter_context(MachineProcess(machine, incoming=incoming))


def status(process: MachineProcess) -> str:
    return str(process.qmp.execute("query-migrate").get("status"))


def migrate(source: MachineProcess, uri: str, *, ignore: bool = True) -> str:
    states = [{"capability": "x-ignore-shared", "state": ignore}]
    source.qmp.execute("migrate-set-capabilities", {"capabilities": states})
    source.qmp.execute("migrate", {"uri": uri})
    wait_until(lambda: status(source) in {"completed", "failed"}, LONG)
    return status(source)


@pytest.mark.parametrize("kind", KINDS)
def test_machine_moves_without_the_memory_that_both_sides_have(
    memory: Path, tmp_path: Path, kind: str
) -> None:
    machine = config(kind, ram=32 * MIB, working_set=8 * MIB, rate=5000)
    machine = replace(machine, memory_file=str(memory / "ram"))
    with ExitStack() as stack:
        source = start(stack, machine)
        source.console.wait_filled()
        for number in range(2):
            before = source.console.wait_beat()
            uri = f"unix:{tmp_path}/{number}"
            there = start(stack, machine, uri)
            assert there.qmp.execute("query-status")["status"] == "inmigrate"
            assert migrate(source, uri) == "completed"
            ram = source.qmp.execute("query-migrate")["ram"]
            assert ram["normal"] == ram["duplicate"] == 0
            assert ram["transferred"] < 100_000
            wait_until(lambda: status(there) == "completed", LONG)  # noqa: B023
            assert source.qmp.execute("query-status")["status"] == "postmigrate"
            after = there.console.wait_beat()
            while (after := there.console.wait_beat()).hot < before.hot + 2 * 2048:
                pass
            assert after.time > before.time
            source.quit()
            source = there
        source.qmp.execute("stop")
        source.check()
        source.quit()


def test_fresh_machine_takes_nothing_from_the_one_before(memory: Path) -> None:
    machine = replace(config("unicorn"), memory_file=str(memory / "ram"))
    (memory / "ram").write_bytes(b"\xff" * machine.ram)
    with ExitStack() as stack:
        process = start(stack, machine)
        process.console.wait_filled()
        time.sleep(0.1)
        process.qmp.execute("stop")
        process.check()


def test_memory_that_only_one_side_shares_is_refused(memory: Path, tmp_path: Path) -> None:
    machine = config("unicorn")
    with ExitStack() as stack:
        source = start(stack, replace(machine, memory_file=str(memory / "ram")))
        source.console.wait_filled()
        uri = f"unix:{tmp_path}/socket"
        there = start(stack, machine, uri)
        assert there.qmp.execute("query-status")["status"] == "inmigrate"
        assert migrate(source, uri) == "failed"
        reason = source.qmp.execute("query-migrate")["error-desc"]
        assert "the content of a block that is not shared here" in reason
        source.console.wait_beat()
        source.qmp.execute("stop")
        source.check()


def test_memory_that_both_sides_have_is_not_overwritten(memory: Path, tmp_path: Path) -> None:
    machine = replace(config("unicorn"), memory_file=str(memory / "ram"))
    with ExitStack() as stack:
        source = start(stack, machine)
        source.console.wait_filled()
        another = stack.enter_context(create(machine, serial=lambda _: None))
        with pytest.raises(StorageError, match="another process has this memory too"):
            another.start()
        uri = f"unix:{tmp_path}/socket"
        there = start(stack, machine, uri)
        assert there.qmp.execute("query-status")["status"] == "inmigrate"
        assert migrate(source, uri, ignore=False) == "failed"
        reason = source.qmp.execute("query-migrate")["error-desc"]
        assert "another process has this memory too" in reason
        source.console.wait_beat()
        source.qmp.execute("stop")
        source.check()


def test_file_of_another_size_is_refused(memory: Path) -> None:
    (memory / "ram").write_bytes(bytes(4097))
    with GuestMemory() as guest, pytest.raises(UsageError, match="a file of 8192 bytes"):
        guest.add("ram", 8192, shared=True, file=str(memory / "ram"))
