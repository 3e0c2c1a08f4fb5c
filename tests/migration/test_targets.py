"""A running machine goes to a command, a file or a descriptor that fails: it runs on, says why, and
nothing that is left looks like a machine."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.hosted import Hosted
from tests.migration.python_machine import PythonMachine
from tests.transports.support import background, wait_until
from vmferry.migration.control import Control, RunState
from vmferry.migration.status import Status

LONG = 20.0


class Lab:
    """A source that runs, and machines that are to come of what it has left."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.machine = PythonMachine().fill()
        self.source = self._side(self.machine)
        self.machine.resume()

    def _side(self, machine: PythonMachine) -> Control:
        control = Control(self._stack.enter_context(machine))
        self._stack.callback(control.close)
        control.set_parameters({"max-bandwidth": 0})
        return control

    def failure(self, uri: str) -> str:
        """Why the migration to *uri* failed; the machine runs on."""
        self.source.migrate(uri)
        assert self.source.wait(LONG) == Status.FAILED, self.source.query()
        assert self.source.run_state == RunState.RUNNING
        before = self.machine.steps
        wait_until(lambda: self.machine.steps > before)
        return str(self.source.query()["error-desc"])

    def loads(self, path: Path) -> bool:
        """Whether what is in the file is a machine."""
        destination = self._side(PythonMachine())
        destination.incoming(f"file:{path}")
        return destination.wait(LONG) == Status.COMPLETED


@pytest.fixture
def lab() -> Iterator[Lab]:
    before = set(threading.enumerate())
    with ExitStack() as stack:
        made = Lab(stack)
        yield made
        made.machine.pause()
        made.machine.check()
    wait_until(lambda: set(threading.enumerate()) <= before)


COMMANDS = {
    "takes nothing": ("exit 3", "ended with status 3"),
    "is not there": ("no-such-command 2>&-", "status 127 (the command was not found)"),
    "fails midway": ("head -c 100000 >{file}; exit 4", "ended with status 4"),
    "dies midway": ("head -c 100000 >{file}; kill -9 $$", "killed by signal 9"),
    "fails behind all": ("cat >/dev/null; exit 5", "ended with status 5"),
    "finds the disk full": ("cat 2>&- >/dev/full", "ended with status 1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_that_fails_leaves_the_machine_here(lab: Lab, tmp_path: Path, name: str) -> None:
    command, why = COMMANDS[name]
    file = tmp_path / "left"
    uri = f"exec:{command.format(file=file)}"
    reason = lab.failure(uri)
    assert uri[:12] in reason
    assert why in reason
    assert not file.exists() or not lab.loads(file)


def test_command_that_was_killed_behind_all_may_have_given_the_machine_on(lab: Lab) -> None:
    lab.source.migrate("exec:cat >/dev/null; kill -9 $$")
    assert lab.source.wait(LONG) == Status.FAILED
    assert lab.source.in_doubt
    reason = lab.source.query()["error-desc"]
    assert "killed by signal 9" in reason
    assert "it stays stopped here" in reason
    lab.source.cont()
    assert lab.source.run_state == RunState.RUNNING


@pytest.mark.parametrize("place", ["no/such", ".", "file/below"])
def test_file_that_cannot_be_created_leaves_the_machine_here(
    lab: Lab, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    reason = lab.failure(f"file:{tmp_path}/{place}")
    assert f'"file:{tmp_path}/{place}": cannot be opened: ' in reason


def whole(lab: Lab, path: Path) -> int:
    """Bytes of the machine, which stands still, in a file."""
    lab.source.stop()
    lab.source.migrate(f"file:{path}")
    assert lab.source.wait(LONG) == Status.SENT
    assert lab.loads(path)
    lab.source.cont()
    return path.stat().st_size


@pytest.mark.parametrize("short", [1, 100, 1_000_000])
def test_file_that_must_not_grow_leaves_the_machine_here(
    lab: Lab, tmp_path: Path, short: int
) -> None:
    """Also where it is the very last byte that finds no room."""
    file = tmp_path / "left"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = whole(lab, tmp_path / "whole")
    lab.source.stop()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - short, limits[1]))
    try:
        lab.source.migrate(f"file:{file}")
        assert lab.source.wait(LONG) == Status.FAILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f'"file:{file}": sending failed: File too large' in lab.source.query()["error-desc"]
    assert lab.source.run_state == RunState.PAUSED
    assert file.stat().st_size == 0
    assert not lab.loads(file)
    lab.source.cont()


def test_file_of_a_migration_that_is_cancelled_holds_nothing_of_it(
    lab: Lab, tmp_path: Path
) -> None:
    file = tmp_path / "left"
    file.write_bytes(b"head")
    lab.source.set_parameters({"max-bandwidth": 1 << 20})
    lab.source.migrate(f"file:{file},offset=4")
    wait_until(lambda: file.stat().st_size > 1000)
    lab.source.cancel()
    assert lab.source.run_state == RunState.RUNNING
    assert lab.source.wait(LONG) == Status.CANCELLED
    assert file.read_bytes() == b"head"


def small_disk(directory: Path) -> list[str]:
    """What to put before a command that alone sees a disk of 1 MiB at *directory*."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, *mount], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount anything, not even for one process")
    return [*unshare, "sh", "-c", f'{shlex.join(mount)} && exec "$0" "$@"']


@pytest.mark.parametrize("target", ["file:{disk}/left", "exec:cat 2>&- >{disk}/left"])
def test_full_disk_leaves_the_machine_here(tmp_path: Path, target: str) -> None:
    disk = tmp_path / "disk"
    uri = target.format(disk=disk)
    with Hosted(tmp_path / "qmp", "source", before=small_disk(disk)) as source:
        for _ in range(2):
            source.qmp.execute("migrate", {"uri": uri})
            source.wait_for("failed")
            reason = source.query()["error-desc"]
            assert uri in reason
            assert ("No space left" if "file:" in uri else "ended with status 1") in reason
        # It can go to where there is room afterwards.
        source.qmp.execute("migrate", {"uri": f"file:{tmp_path}/whole"})
        source.wait_for("sent")
        source.qmp.execute("cont")
        source.runs_on()


def test_descriptor_that_is_not_open_leaves_the_machine_here(lab: Lab) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    os.close(reading)
    assert f'"fd:{writing}": opening failed: Bad file descriptor' in lab.failure(f"fd:{writing}")


def test_descriptor_that_is_for_reading_leaves_the_machine_here(lab: Lab) -> None:
    reading, writing = os.pipe()
    try:
        assert "found one that is only for reading" in lab.failure(f"fd:{reading}")
    finally:
        os.close(writing)
        os.close(reading)


def test_descriptor_whose_reader_goes_midway_leaves_the_machine_here(lab: Lab) -> None:
    reading, writing = os.pipe()

    def read_some() -> None:
        for _ in range(10):
            os.read(reading, 1000)
        os.close(reading)

    gone = background(read_some)
    reason = lab.failure(f"fd:{writing}")
    gone.result(LONG)
    assert f'"fd:{writing}": sending failed: Broken pipe' in reason


def test_descriptor_of_a_full_device_leaves_the_machine_here(lab: Lab) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    assert f'"fd:{full}": sending failed: No space left' in lab.failure(f"fd:{full}")
