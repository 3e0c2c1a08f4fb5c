"""``vmferry migrate`` and ``status``: between real QEMUs, and what is shown of odd machines."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guests import Serial, walker
from tests.cli import schema
from tests.cli.command import Running, vmferry
from tests.cli.test_display import ESCAPE, Terminal
from tests.qemu.monitor import Machine
from vmferry.qemu import QemuProcess

Start = Callable[..., QemuProcess]

HELD = ["--parameter", "max-bandwidth=1MiB/s", "--parameter", "downtime-limit=1ms"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a QEMU whose guest writes memory and counts."""
    image = tmp_path / "guest"
    image.write_bytes(walker(pages=512, hot=128, fill=1024))
    # Not a multiple of 64 pages: TCG would lose writes, see tests/support/capture.py.
    return ["-machine", "pc", "-nodefaults", "-m", "16392k", "-kernel", str(image)]


@pytest.fixture
def source(start_qemu: Start, arguments: list[str], tmp_path: Path) -> tuple[str, Serial]:
    """The monitor of a machine that runs, and its serial port."""
    monitor = f"{tmp_path}/source"
    qemu = start_qemu(*arguments, "-name", "web", "-qmp", f"unix:{monitor},server=on,wait=off")
    serial = Serial(qemu.serial)
    serial.wait_beat()
    return monitor, serial


@pytest.fixture
def destination(start_qemu: Start, arguments: list[str], tmp_path: Path) -> tuple[str, Serial]:
    """The URI of a machine that waits, and its serial port."""
    uri = f"unix:{tmp_path}/incoming"
    qemu = start_qemu(*arguments, "-incoming", uri)
    return uri, Serial(qemu.serial)


@pytest.mark.qemu
def test_machine_moves_and_the_summary_says_how(
    source: tuple[str, Serial], destination: tuple[str, Serial]
) -> None:
    done = vmferry(
        *("migrate", source[0], destination[0], "--capability", "return-path"),
        *("--parameter", "max-bandwidth=64MiB/s", "--parameter", "downtime-limit=2s", "--json"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    for number, event in enumerate(events):
        schema.migrate_event(event, f"line {number}")
    assert events[-1]["status"] == "completed"
    assert events[-1]["confirmed"]
    assert events[-1]["total_time"] > 0
    counter = source[1].drain()
    assert destination[1].wait_beat() > counter
    assert vmferry("status", source[0]).stdout.splitlines()[0] == "web is postmigrate"


@pytest.mark.qemu
@pytest.mark.parametrize("when", [("--postcopy",), ("--postcopy-after", "2")], ids=str)
def test_machine_goes_before_its_memory(
    start_qemu: Start,
    source: tuple[str, Serial],
    arguments: list[str],
    tmp_path: Path,
    when: tuple[str, ...],
) -> None:
    uri = f"unix:{tmp_path}/incoming"
    monitor = f"{tmp_path}/there"
    there = start_qemu(
        *(*arguments, "-incoming", "defer", "-qmp", f"unix:{monitor},server=on,wait=off")
    )
    done = vmferry(
        *("migrate", source[0], uri, *when, "--destination-qmp", monitor),
        *("--parameter", "max-bandwidth=4MiB/s"),
        *("--parameter", "downtime-limit=1ms"),
        *("--parameter", "max-postcopy-bandwidth=512KiB/s", "--json"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    for number, event in enumerate(events):
        schema.migrate_event(event, f"line {number}")
    assert events[-1]["status"] == "completed"
    assert events[-1]["confirmed"]
    assert any(event.get("status") == "postcopy-active" for event in events)
    assert Serial(there.serial).wait_beat() > source[1].drain()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--postcopy-after", "soon"], "a number of rounds or STALL"),
        (["--postcopy", "--no-watch"], "has to watch"),
        (["--resume", "--postcopy"], "no other option"),
        (["--copy-storage"], "needs --destination-qmp"),
        (["--incremental"], "is for --copy-storage and --capability block"),
        (["--destination-qmp", "x"], "is for --copy-storage, --capability block"),
    ],
)
def test_options_that_do_not_go_together(wrong: list[str], words: str) -> None:
    done = vmferry("migrate", "socket", "unix:there", *wrong)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())


@pytest.mark.qemu
def test_ctrl_c_cancels_and_says_so(
    source: tuple[str, Serial], destination: tuple[str, Serial]
) -> None:
    with Running("migrate", source[0], destination[0], *HELD, "--json") as command:
        while json.loads(command.wait_for('"progress"'))["transferred"] == 0:
            pass
        command.send_signal(signal.SIGINT)
        assert command.finish() == 130
    message = "interrupted; the migration was cancelled; the source is running"
    assert command.err == [f"vmferry: {message}"]
    assert command.events[-1]["error"]["message"] == message
    source[1].wait_beat(after=source[1].drain())
    status = json.loads(vmferry("status", source[0], "--json").stdout)
    schema.obj(schema.MACHINE)(status, "status")
    assert (status["is_running"], status["migration"]["status"]) == (True, "cancelled")


@pytest.mark.qemu
def test_failure_is_one_line_with_the_reason(source: tuple[str, Serial], tmp_path: Path) -> None:
    done = vmferry("migrate", source[0], f"unix:{tmp_path}/nobody")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("vmferry: the migration failed: ")
    assert done.stderr.endswith("No such file or directory; the source is running\n")
    lines = vmferry("status", source[0]).stdout.splitlines()
    assert lines[0] == "web is running"
    assert lines[1].startswith("migration failed: ")


@pytest.mark.qemu
def test_destination_that_breaks_off_is_a_failure(
    source: tuple[str, Serial], destination: tuple[str, Serial], start_qemu: Start, tmp_path: Path
) -> None:
    image = tmp_path / "guest"
    uri = f"unix:{tmp_path}/other"
    start_qemu("-machine", "pc", "-nodefaults", "-m", "8", "-kernel", str(image), "-incoming", uri)
    done = vmferry("migrate", source[0], uri, "--capability", "return-path")
    assert done.returncode == 4
    assert done.stderr.endswith("; the source is running\n")
    # And another attempt succeeds.
    again = vmferry("migrate", source[0], destination[0], "--parameter", "downtime-limit=2s")
    assert again.returncode == 0
    assert destination[1].wait_beat() > 0


@pytest.mark.qemu
def test_without_watching_it_only_begins(
    source: tuple[str, Serial], destination: tuple[str, Serial]
) -> None:
    done = vmferry("migrate", source[0], destination[0], *HELD, "--no-watch")
    assert done.returncode == 0
    assert done.stdout == (
        f"it migrates to {destination[0]}; vmferry status {source[0]} tells how far\n"
    )
    status = json.loads(vmferry("status", source[0], "--json").stdout)
    assert status["migration"]["status"] in {"setup", "active"}
    again = vmferry("migrate", source[0], destination[0])
    assert again.returncode == 2
    assert "found a migration that is" in again.stderr


ACTIVE = {
    "status": "active",
    "total-time": 2000,
    "setup-time": 5,
    "expected-downtime": 450,
    "cpu-throttle-percentage": 30,
    "ram": {
        "transferred": 6 << 30,
        "remaining": 4 << 30,
        "total": 16 << 30,
        "mbps": 8000.0,
        "dirty-pages-rate": 50_000,
        "page-size": 4096,
        "dirty-sync-count": 3,
    },
}
IN_WORDS = (
    "active, 954 MiB/s, 4 GiB of 16 GiB left, round 3, 195 MiB/s dirtied, "
    "expected downtime 450 ms, throttled by 30%"
)
COMPLETED: dict[str, Any] = ACTIVE | {"status": "completed", "downtime": 12}


def test_log_has_everything_a_line(tmp_path: Path) -> None:
    hold = threading.Event()

    def answer() -> object:
        return (COMPLETED if hold.is_set() else ACTIVE) if begun() else {}

    def begun() -> bool:
        return any(command == "migrate" for command, _ in machine.heard)

    with (
        Machine(tmp_path / "m", query_migrate=answer) as machine,
        Running("migrate", machine.address, "unix:/x") as command,
    ):
        line = command.wait_for("active")
        hold.set()
        assert command.finish() == 0
    assert line == IN_WORDS
    assert command.out == [
        (
            "migrated to unix:/x: 6 GiB in 2 s, 3 GiB/s, 3 rounds, downtime 12 ms, "
            "nobody says whether it was loaded (the capability return-path asks)"
        )
    ]


@pytest.mark.parametrize("columns", [30, 60, 80, 120])
def test_terminal_shows_what_converges(columns: int, tmp_path: Path) -> None:
    hold = threading.Event()
    script = [{}, ACTIVE]

    def answer() -> object:
        return COMPLETED if hold.is_set() else script.pop(0) if len(script) > 1 else script[0]

    with Machine(tmp_path / "m", query_migrate=answer) as machine:
        terminal = Terminal(["migrate", machine.address, "unix:/x"], columns)
        terminal.wait_for("round 3")
        hold.set()
        assert terminal.finish() == 0
        terminal.close()
    drawn = ESCAPE.sub("", terminal.text).replace("\r", "\n").split("\n")
    shown = [line for line in drawn if "migrated" not in line]
    assert max(map(len, shown)) <= columns - 2
    rows = "\n".join(shown)
    assert "MiB/s" in rows
    assert ("4 GiB of 16 GiB left" in rows) == (columns >= 60)
    assert ("195 MiB/s dirtied" in rows) == (columns >= 60)
    assert ("expected downtime 450 ms" in rows) == (columns >= 80)
    assert "migrated to unix:/x" in terminal.text


STALLED = ACTIVE | {"x-vmferry-stall": "no progress for 5 rounds"}


def test_stall_is_said_once_in_a_log(tmp_path: Path) -> None:
    script = [{}, ACTIVE, STALLED, STALLED, STALLED, COMPLETED]
    with Machine(tmp_path / "m", query_migrate=script) as machine:
        plain = vmferry("migrate", machine.address, "unix:/x")
    assert plain.stdout.splitlines()[0] == "no progress for 5 rounds"
    assert len(plain.stdout.splitlines()) == 2
    with Machine(tmp_path / "n", query_migrate=[{}, STALLED, COMPLETED]) as machine:
        done = vmferry("migrate", machine.address, "unix:/x", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    for number, event in enumerate(events):
        schema.migrate_event(event, f"line {number}")
    assert [event["event"] for event in events] == ["stalled", "progress", "result"]


def test_stall_is_said_above_what_is_drawn(tmp_path: Path) -> None:
    hold = threading.Event()
    script = [{}, ACTIVE, ACTIVE, STALLED]

    def answer() -> object:
        return COMPLETED if hold.is_set() else script.pop(0) if len(script) > 1 else script[0]

    with Machine(tmp_path / "m", query_migrate=answer) as machine:
        terminal = Terminal(["migrate", machine.address, "unix:/x"], 80)
        terminal.wait_for("no progress for 5 rounds")
        hold.set()
        assert terminal.finish() == 0
        terminal.close()
    assert terminal.text.count("no progress") == 1


def test_waiting_for_someone_is_said(tmp_path: Path) -> None:
    waiting = {"status": "pre-switchover"}
    with (
        Machine(tmp_path / "m", query_migrate=[{}, waiting]) as machine,
        Running("migrate", machine.address, "unix:/x") as command,
    ):
        assert "waits for migrate-continue" in command.wait_for("pre-switchover")


def test_interrupt_that_comes_too_late_is_no_failure(tmp_path: Path) -> None:
    """The machine completes instead of being cancelled."""
    answers: dict[str, object] = {}
    machine = Machine(tmp_path / "m", query_migrate=lambda: answers["now"])
    machine.says["migrate"] = lambda: answers.update(now=ACTIVE) or {}
    machine.says["migrate_cancel"] = lambda: answers.update(now=COMPLETED) or {}
    answers["now"] = {}
    with machine, Running("migrate", machine.address, "unix:/x", "--json") as command:
        command.wait_for('"active"')
        command.send_signal(signal.SIGINT)
        assert command.finish() == 0
    assert command.events[-1]["status"] == "completed"


def test_interrupt_in_postcopy_leaves_it_alone(tmp_path: Path) -> None:
    with (
        Machine(tmp_path / "m", query_migrate=[{}, {"status": "postcopy-active"}]) as machine,
        Running("migrate", machine.address, "unix:/x") as command,
    ):
        command.wait_for("postcopy-active")
        command.send_signal(signal.SIGINT)
        assert command.finish() == 130
    assert "cannot be cancelled" in command.err[-1]


def test_second_interrupt_leaves_it_to_the_machine(tmp_path: Path) -> None:
    with (
        Machine(tmp_path / "m", query_migrate=[{}, ACTIVE]) as machine,
        Running("migrate", machine.address, "unix:/x") as command,
    ):
        command.wait_for("active")
        command.send_signal(signal.SIGINT)
        while not any(heard == "migrate_cancel" for heard, _ in machine.heard):
            command.wait_for("active")
        command.send_signal(signal.SIGINT)
        assert command.finish() == 130
    assert command.err[-1] == (
        "vmferry: interrupted; cancelling takes long and is left to the machine"
    )


def test_parameters_and_capabilities_reach_the_machine(tmp_path: Path) -> None:
    with Machine(tmp_path / "m", query_migrate=[{}, COMPLETED]) as machine:
        done = vmferry(
            *("migrate", machine.address, "tcp:host:1", "--capability", "xbzrle"),
            *("--capability", "multifd=off", "--parameter", "downtime-limit=1.5s"),
        )
    assert done.returncode == 0
    heard = dict(machine.heard)
    assert heard["migrate"] == {"uri": "tcp:host:1"}
    assert heard["migrate-set-parameters"] == {"downtime-limit": 1500}
    assert heard["migrate-set-capabilities"] == {
        "capabilities": [
            {"capability": "xbzrle", "state": True},
            {"capability": "multifd", "state": False},
        ]
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parameter", "downtime-limit"], "expected NAME=VALUE, found 'downtime-limit'"),
        (["--parameter", "=1"], "expected NAME=VALUE"),
        (["--capability", "xbzrle=maybe"], "expected NAME or NAME=off"),
        (["--parameter", "max-bandwidth=fast"], "parameter max-bandwidth: expected a size"),
        (["--parameter", "speed=1"], "there is no migration parameter"),
    ],
)
def test_bad_settings_are_one_line(more: list[str], message: str, tmp_path: Path) -> None:
    with Machine(tmp_path / "m") as machine:
        done = vmferry("migrate", machine.address, "unix:/x", *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "migrate" not in {command for command, _ in machine.heard}


@pytest.mark.parametrize("verb", [["status"], ["migrate", "unix:/x"]])
def test_no_machine_is_one_line(verb: list[str], tmp_path: Path) -> None:
    done = vmferry(verb[0], tmp_path / "nothing", *verb[1:])
    assert (done.returncode, done.stdout) == (4, "")
    assert "cannot connect to QMP" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        ({}, ["running"]),
        (
            {"socket-address": [{"type": "unix", "path": "/a b"}]},
            ["running", 'listening at "unix:/a b"'],
        ),
        (
            ACTIVE,
            [
                "running",
                f"migration {IN_WORDS}",
            ],
        ),
        (
            COMPLETED,
            ["running", "migration completed: 6 GiB in 2 s, 3 GiB/s, 3 rounds, downtime 12 ms"],
        ),
        ({"status": "completed"}, ["running", "migration completed"]),
        (
            {"status": "failed", "error-desc": "no \x1b[2Jspace"},
            ["running", "migration failed: no \\x1b[2Jspace"],
        ),
        ({"status": "cancelled"}, ["running", "migration cancelled"]),
        (
            COMPLETED | {"status": "sent"},
            ["running", "migration sent: 6 GiB in 2 s, 3 GiB/s, 3 rounds, downtime 12 ms"],
        ),
        (STALLED, ["running", f"migration {IN_WORDS}", "no progress for 5 rounds"]),
    ],
)
def test_status_is_a_few_lines(answer: object, lines: list[str], tmp_path: Path) -> None:
    with Machine(tmp_path / "m", query_migrate=answer) as machine:
        done = vmferry("status", machine.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == lines
