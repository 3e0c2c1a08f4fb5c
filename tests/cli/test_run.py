"""``vmferry run``: machines in processes of their own, and the other verbs that deal with them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli import schema
from tests.cli.command import COMMAND, PROMPT, Running, environment, vmferry
from tests.transports.support import wait_until
from vmferry.machines.guest.console import Console
from vmferry.machines.guest.journal import read_journal
from vmferry.qemu import Qmp, query_machine

MACHINE = """
ram = "8MiB"
[guest]
working-set = "1MiB"
rate = 2000
heartbeat = 0.01
"""
HELD = ["--parameter", "max-bandwidth=1MiB", "--parameter", "downtime-limit=1"]

Run = Callable[..., Running]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    path = tmp_path / "machine.toml"
    path.write_text(MACHINE)
    return path


@pytest.fixture
def run(machine: Path) -> Iterator[Run]:
    """Starts ``vmferry run`` with more arguments."""
    with ExitStack() as stack:
        yield lambda *more: stack.enter_context(Running("run", machine, *more))


def monitored(path: Path) -> Path:
    """*path*, as soon as there is a monitor: the file is there a moment before it listens."""

    def listens() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    wait_until(listens)
    return path


def test_machine_moves_from_process_to_process(run: Run, tmp_path: Path) -> None:
    monitors = [tmp_path / "here", tmp_path / "there"]
    serials = [tmp_path / "here.log", tmp_path / "there.log"]
    source = run("--qmp", monitors[0], "--serial", serials[0])
    destination = run(
        *("--qmp", monitors[1], "--serial", serials[1], "--incoming", f"unix:{tmp_path}/s")
    )
    source.wait_for("running")
    address = destination.address()
    wait_until(lambda: b"H " in serials[0].read_bytes())
    moved = vmferry(
        *("migrate", monitors[0], address, "--parameter", "max-bandwidth=1GiB/s"),
        *("--parameter", "downtime-limit=1s"),
    )
    assert (moved.returncode, moved.stderr) == (0, "")
    assert moved.stdout.startswith(f"migrated to {address}: ")
    destination.wait_for("running")
    source.wait_for("migrated away")
    wait_until(lambda: b"H " in serials[1].read_bytes())
    assert vmferry("status", monitors[0]).stdout.startswith("postmigrate\nmigration completed: ")
    assert vmferry("status", monitors[1]).stdout == "running\nmigration completed\n"
    with Qmp.connect(str(monitors[1])) as qmp:
        qmp.execute("quit")
    assert destination.finish() == 0
    assert destination.out[-1] == "ended, as it was told to"
    source.send_signal(signal.SIGTERM)
    assert source.finish() == 143
    assert source.err == ["vmferry: terminated"]
    assert not any(path.exists() for path in monitors)
    # One guest said all of it.
    console = Console()
    console.feed(b"".join(serial.read_bytes() for serial in serials))
    console.check()
    counts = [beat.hot for beat in console.beats]
    assert counts == sorted(counts)
    assert len(counts) > 10


DISK = """
[[disk]]
file = "{}"
[ownership]
store = "none"
"""


def test_machine_moves_with_its_disk(tmp_path: Path) -> None:
    """Each side has an image of its own; the command has the other one wait for what comes."""
    with ExitStack() as stack:
        sides = []
        for name, incoming in (("here", []), ("there", ["--incoming", "defer"])):
            (tmp_path / f"{name}.raw").write_bytes(bytes(3 << 20))
            file = tmp_path / f"{name}.toml"
            file.write_text(MACHINE + DISK.format(f"{name}.raw"))
            monitor = tmp_path / name
            sides.append(stack.enter_context(Running("run", file, "--qmp", monitor, *incoming)))
        source, destination = sides
        wait_until(lambda: read_journal((tmp_path / "here.raw").read_bytes()).last > 5)
        moved = vmferry(
            *("migrate", tmp_path / "here", f"unix:{tmp_path}/s", "--capability", "block"),
            *("--destination-qmp", tmp_path / "there"),
        )
        assert (moved.returncode, moved.stderr) == (0, "")
        destination.wait_for("running")
        left = read_journal((tmp_path / "here.raw").read_bytes()).last
        wait_until(lambda: read_journal((tmp_path / "there.raw").read_bytes()).last > left)
        for side in (destination, source):
            side.send_signal(signal.SIGTERM)
            side.finish()
    journal = read_journal((tmp_path / "there.raw").read_bytes())
    assert not journal.faults


def test_events_are_one_object_a_line(run: Run, tmp_path: Path) -> None:
    command = run("--qmp", tmp_path / "q", "--incoming", f"unix:{tmp_path}/s", "--json")
    command.wait_for("inmigrate")
    with Qmp.connect(str(monitored(tmp_path / "q"))) as qmp:
        qmp.execute("quit")
    assert command.finish() == 0
    for number, event in enumerate(command.events):
        schema.run_event(event, f"line {number}")
    assert [event["event"] for event in command.events] == ["listening", "state", "result"]
    assert command.events[-1]["reason"] == "host-qmp-quit"


def test_standard_output_is_for_the_guest_where_it_is_wanted(machine: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "run", str(machine), "--serial", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # so that nothing is left behind in one when communicate() takes over
        env=environment(),
    ) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(5)]
        process.send_signal(signal.SIGTERM)
        rest, said = process.communicate(timeout=PROMPT)
    assert process.returncode == 143
    assert {line[:1] for line in [*lines, *rest.splitlines()]} <= {b"F", b"H"}
    assert said.splitlines() == [b"running", b"vmferry: terminated"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_it(number: int, status: int, run: Run, tmp_path: Path) -> None:
    command = run("--qmp", tmp_path / "q", "--json")
    command.wait_for("running")
    command.send_signal(number)
    assert command.finish() == status
    assert command.events[-1]["error"]["kind"] == "Interrupted"
    assert not (tmp_path / "q").exists()


def test_signal_ends_the_wait_for_a_machine(run: Run, tmp_path: Path) -> None:
    command = run("--incoming", f"unix:{tmp_path}/s")
    command.wait_for("waiting for a machine")
    command.send_signal(signal.SIGINT)
    assert command.finish() == 130
    assert not (tmp_path / "s").exists()


def test_what_is_no_machine_breaks_off_and_says_why(run: Run, tmp_path: Path) -> None:
    command = run("--incoming", f"unix:{tmp_path}/s", "--json")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(command.address().removeprefix("unix:"))
        connection.sendall(b"QEVM" + bytes(100))
        assert command.finish() == 3
    schema.run_event(command.events[-1], "result")
    assert len(command.err) == 1


def test_who_is_no_machine_is_warned_of_and_the_machine_may_come(run: Run, tmp_path: Path) -> None:
    source = run("--qmp", tmp_path / "here")
    destination = run("--incoming", f"unix:{tmp_path}/s", "--json")
    address = destination.address()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address.removeprefix("unix:"))
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        destination.wait_for("warning")
    source.wait_for("running")
    assert vmferry("migrate", monitored(tmp_path / "here"), address).returncode == 0
    destination.wait_for('"running"')
    warning = next(event for event in destination.events if event["event"] == "warning")
    schema.run_event(warning, "warning")


def test_source_that_dies_ends_the_destination_and_no_other(run: Run, tmp_path: Path) -> None:
    source = run("--qmp", tmp_path / "here")
    destination = run("--incoming", f"unix:{tmp_path}/s")
    source.wait_for("running")
    address = destination.address()
    watching = Running("migrate", monitored(tmp_path / "here"), address, *HELD)
    with watching:
        watching.wait_for("active")
        source.send_signal(signal.SIGKILL)
        assert watching.finish() == 4
        assert "QMP" in watching.err[-1]
    assert destination.finish() in {3, 4}


def test_destination_that_dies_leaves_the_machine_where_it_is(run: Run, tmp_path: Path) -> None:
    source = run("--qmp", tmp_path / "here", "--serial", tmp_path / "log")
    destination = run("--incoming", f"unix:{tmp_path}/s")
    source.wait_for("running")
    address = destination.address()
    with Running("migrate", monitored(tmp_path / "here"), address, *HELD) as watching:
        watching.wait_for("active")
        destination.send_signal(signal.SIGKILL)
        assert watching.finish() == 4
        assert watching.err[-1].startswith("vmferry: the migration failed: ")
        assert watching.err[-1].endswith("; the source is running")
    with Qmp.connect(str(tmp_path / "here")) as qmp:
        assert query_machine(qmp).is_running
    size = (tmp_path / "log").stat().st_size
    wait_until(lambda: (tmp_path / "log").stat().st_size > size)


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("kind = 3", 2, "expected text"),
        ('ram = "lots"', 2, "ram: expected a size"),
        ("[guest]\nspeed = 1", 2, "guest.speed"),
        ("ram = [", 2, "expected TOML"),
        (None, 5, "cannot be read"),
    ],
)
def test_bad_machine_is_one_line(
    text: str | None, status: int, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "machine.toml"
    if text is not None:
        path.write_text(text)
    done = vmferry("run", path)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"vmferry: {path}: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_monitor_of_another_machine_is_left_alone(run: Run, machine: Path, tmp_path: Path) -> None:
    run("--qmp", tmp_path / "q").wait_for("running")
    done = vmferry("run", machine, "--qmp", tmp_path / "q")
    assert done.returncode == 2
    assert "another process listens there" in done.stderr
    assert vmferry("status", tmp_path / "q").stdout == "running\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--incoming", "nowhere"], "expected tcp:HOST:PORT"),
        (["--incoming", "defer"], "a monitor is needed"),
        (["--json", "--quiet"], "expected --json or --quiet, found both"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, machine: Path) -> None:
    done = vmferry("run", machine, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_quiet_is_quiet(run: Run, tmp_path: Path) -> None:
    command = run("--quiet", "--qmp", tmp_path / "q")
    with Qmp.connect(str(monitored(tmp_path / "q"))) as qmp:
        qmp.execute("quit")
    assert command.finish() == 0
    assert (command.out, command.err) == ([], [])


def test_ctrl_c_leaves_the_machine_running_where_it_is(run: Run, tmp_path: Path) -> None:
    source = run("--qmp", tmp_path / "here")
    destination = run("--incoming", f"unix:{tmp_path}/s")
    source.wait_for("running")
    address = destination.address()
    with Running("migrate", monitored(tmp_path / "here"), address, *HELD, "--json") as command:
        while json.loads(command.wait_for('"progress"'))["transferred"] == 0:
            pass
        command.send_signal(signal.SIGINT)
        assert command.finish() == 130
    assert command.err == [
        "vmferry: interrupted; the migration was cancelled; the source is running"
    ]
    assert destination.finish() in {3, 4}
    assert vmferry("status", tmp_path / "here").stdout == "running\nmigration cancelled\n"
