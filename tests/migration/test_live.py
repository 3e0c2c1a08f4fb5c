"""A running machine moves; whatever goes wrong it runs on exactly one side, or waits for a word."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import UUID

import pytest

import vmferry
from tests.migration.boards import Disk
from tests.migration.peers import unanswered
from tests.migration.python_machine import PythonMachine
from tests.migration.relay import Relay
from tests.transports.support import accepted, background, receive, wait_until
from tests.vmstate.analyze import ANALYZE, VARIABLE, analyze, find_script
from vmferry import PieceWriter, UsageError
from vmferry.errors import PeerSilent, TransportError
from vmferry.memory import DirtyLog
from vmferry.migration.answers import Answers
from vmferry.migration.control import Control, RunState
from vmferry.migration.destination import Destination
from vmferry.migration.events import DowntimeRaised, Stalled
from vmferry.migration.machine_sink import MachineSink
from vmferry.migration.precopy import Precopy
from vmferry.migration.progress import Meter
from vmferry.migration.status import ENDS, Status
from vmferry.migration.takeover import ABORT, GO, READY
from vmferry.migration.verdict import Verdict
from vmferry.ownership.identity import Identity
from vmferry.transports import RateLimit, connect, listen
from vmferry.vmstate import U8, device
from vmferry.wire.commands import Ping
from vmferry.wire.return_path import Pong, RequestPages, Shut

SCRIPT = find_script()

LONG = 20.0
"""Seconds for what takes milliseconds on a machine that has nothing else to do."""


class Lab:
    """Two sides, closed with everything else at the end of the test."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        self._stack = stack
        self._path = path
        self.events: list[tuple[str, str, object]] = []
        self._listeners: dict[tuple[str, str], Callable[[], object]] = {}

    def heard(self, name: str, event: str, listener: Callable[[], object]) -> None:
        """Call *listener* the first time that this side tells of the event, in the midst of it."""
        self._listeners[name, event] = listener

    def _note(self, name: str, event: str, data: object) -> None:
        self.events.append((name, event, data))
        self._listeners.pop((name, event), lambda: None)()

    def side(self, name: str, machine: PythonMachine) -> Control:
        self._stack.enter_context(machine)
        control = Control(machine, notify=lambda event, data: self._note(name, event, data))
        self._stack.callback(control.close)
        control.set_parameters({"max-bandwidth": 0})
        return control

    def pair(self, *, uri: str = "unix", **machine: object) -> tuple[Control, Control, str]:
        """A source that runs, a destination that listens, and where."""
        there = PythonMachine(**machine)  # type: ignore[arg-type]
        here = PythonMachine(**machine).fill()  # type: ignore[arg-type]
        source, destination = self.side("source", here), self.side("destination", there)
        here.resume()
        return source, destination, destination.incoming(self.uri(uri))

    def uri(self, kind: str = "unix", name: str = "socket") -> str:
        return f"unix:{self._path}/{name}" if kind == "unix" else kind

    def relay(self, target: str, **options: object) -> Relay:
        relay = Relay(self.uri(name="relay"), target, **options)  # type: ignore[arg-type]
        return self._stack.enter_context(relay)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    before = set(threading.enumerate())
    with ExitStack() as stack:
        yield Lab(stack, tmp_path)
    wait_until(lambda: set(threading.enumerate()) <= before)


def machine(control: Control) -> PythonMachine:
    assert isinstance(control.machine, PythonMachine)
    return control.machine


def runs_on(control: Control) -> None:
    """The machine of this side goes on, and all of it is right."""
    assert control.machine.running
    before = machine(control).steps
    wait_until(lambda: machine(control).steps > before)
    machine(control).pause()
    machine(control).check()


MULTIFD = [
    {},
    *(
        {"multifd-channels": channels, "multifd-compression": method}
        for channels in (1, 3)
        for method in ("none", "zlib", "zstd")
    ),
]


@pytest.mark.parametrize("uri", ["unix", "tcp:127.0.0.1:0"])
@pytest.mark.parametrize("parameters", MULTIFD, ids=str)
def test_running_machine_moves(lab: Lab, uri: str, parameters: dict[str, object]) -> None:
    source, destination, address = lab.pair(uri=uri)
    wait_until(lambda: machine(source).steps > 3)
    source.set_capabilities({"events": True, "multifd": bool(parameters)})
    source.set_parameters(parameters)
    source.migrate(address)
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert source.run_state == RunState.POSTMIGRATE
    before = machine(source).steps
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)
    assert machine(destination).steps > before == machine(source).steps
    answer = source.query()
    assert answer["ram"]["remaining"] == 0
    assert answer["ram"]["normal"] + answer["ram"]["duplicate"] >= 600
    assert ("source", "MIGRATION", {"status": "completed"}) in lab.events
    assert ("destination", "RESUME", {}) in lab.events


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_level_of_compression_counts(lab: Lab, method: str) -> None:
    sent = []
    for level in (0, 9) if method == "zlib" else (1, 19):
        there, here = PythonMachine(), PythonMachine()
        source, destination = lab.side("source", here), lab.side("destination", there)
        text = b"".join(b"%d bottles of beer " % number for number in range(130_000))
        here.ram.view[:] = text[: here.ram.size]
        source.set_capabilities({"multifd": True})
        source.set_parameters({"multifd-compression": method, f"multifd-{method}-level": level})
        source.set_parameters({"multifd-channels": 1})
        source.migrate(destination.incoming(lab.uri(name=str(level))))
        assert source.wait(LONG) == Status.COMPLETED, source.query()
        assert destination.wait(LONG) == Status.COMPLETED
        assert bytes(there.ram.view) == text[: here.ram.size]
        sent.append(source.query()["ram"]["transferred"])
    assert sent[0] > sent[1]


@pytest.mark.parametrize("options", [{"log": "shadow"}, {"shared": True}])
@pytest.mark.parametrize("capability", ["multifd", "xbzrle", "events"])
def test_machine_moves_by_any_log_and_with_shared_memory(
    lab: Lab, options: dict[str, object], capability: str
) -> None:
    source, destination, address = lab.pair(**options)
    wait_until(lambda: machine(source).steps > 3)
    source.set_capabilities({capability: True})
    source.set_parameters({"max-bandwidth": 8 << 20})
    source.migrate(address)
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_machine_that_stands_still_stays_so(lab: Lab) -> None:
    source, destination, address = lab.pair()
    source.stop()
    source.migrate(address)
    assert (source.wait(LONG), destination.wait(LONG)) == (Status.COMPLETED, Status.COMPLETED)
    assert (source.run_state, destination.run_state) == (RunState.POSTMIGRATE, RunState.PAUSED)
    destination.cont()
    runs_on(destination)


def test_there_and_back(lab: Lab) -> None:
    source, destination, address = lab.pair()
    for _ in range(3):
        source.migrate(address)
        assert source.wait(LONG) == Status.COMPLETED
        assert destination.wait(LONG) == Status.COMPLETED
        back = lab.side("back", PythonMachine())
        source, destination = destination, back
        address = back.incoming(lab.uri(name=f"back{id(back)}"))
    runs_on(source)


def test_without_a_return_path_it_is_sent(lab: Lab, tmp_path: Path) -> None:
    source, destination, address = lab.pair()
    source.set_capabilities({"return-path": False})
    source.migrate(address)
    assert source.wait(LONG) == Status.SENT
    assert source.query()["status"] == "sent"
    assert source.run_state == RunState.POSTMIGRATE
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_file_takes_a_running_machine_and_gives_it_back(lab: Lab, tmp_path: Path) -> None:
    source, _, _ = lab.pair()
    source.migrate(f"file:{tmp_path}/saved")
    assert source.wait(LONG) == Status.SENT
    later = lab.side("later", PythonMachine())
    later.incoming(f"file:{tmp_path}/saved")
    assert later.wait(LONG) == Status.COMPLETED, later.query()
    runs_on(later)


def test_checkpoint_keeps_a_running_machine_and_gives_it_back(lab: Lab, tmp_path: Path) -> None:
    source, _, _ = lab.pair()
    listening = threading.Event()
    received = background(
        lambda: vmferry.receive(
            lab.uri(name="keep"), tmp_path / "vm", started=lambda _: listening.set()
        )
    )
    assert listening.wait(LONG)
    source.migrate(lab.uri(name="keep"))
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    received.result(LONG).close()
    later = lab.side("later", PythonMachine())
    vmferry.send(tmp_path / "vm", later.incoming(lab.uri(name="give")))
    assert later.wait(LONG) == Status.COMPLETED, later.query()
    runs_on(later)


@pytest.mark.skipif(SCRIPT is None, reason=f"{VARIABLE} does not say where {ANALYZE} is")
def test_stream_of_a_running_machine_is_read_by_qemus_own_script(lab: Lab, tmp_path: Path) -> None:
    assert SCRIPT is not None
    source, _, _ = lab.pair()
    machine(source).registry.register_iterative(Disk())
    source.migrate(f"file:{tmp_path}/saved")
    assert source.wait(LONG) == Status.SENT
    read = analyze(SCRIPT, tmp_path / "saved")
    assert read["processor (1)"]["steps"] == f"{machine(source).steps:#018x}"
    assert {name.split(" ")[0] for name in read} >= {"processor", "disk", "globalstate", "ram"}


@device("other", version=1)
class Other:
    value: U8 = 0


def more_devices() -> PythonMachine:
    odd = PythonMachine()
    odd.registry.register(Other())
    return odd


def more_memory() -> PythonMachine:
    odd = PythonMachine()
    odd.memory.add("more", 4096)
    return odd


REFUSALS: list[tuple[Callable[[], PythonMachine], str]] = [
    (lambda: PythonMachine(name="python-2.0"), 'a machine \\"python-2.0\\"'),
    (lambda: PythonMachine(pages=601), "expected 2461696 bytes, found 2457600"),
    (more_memory, 'expected RAM block \\"more\\" as well'),
    (more_devices, "nothing of \\"),
]


@pytest.mark.parametrize(("wanted", "reason"), REFUSALS, ids=lambda value: str(value)[:20])
def test_other_machine_is_refused_and_both_sides_say_why(
    lab: Lab, wanted: Callable[[], PythonMachine], reason: str
) -> None:
    source, _, _ = lab.pair()
    destination = lab.side("odd", wanted())
    source.migrate(destination.incoming(lab.uri(name="odd")))
    assert (source.wait(LONG), destination.wait(LONG)) == (Status.FAILED, Status.FAILED)
    said = source.query()["error-desc"]
    assert "the destination refused the machine: " in said
    assert reason in said
    assert not destination.machine.running
    with pytest.raises(UsageError, match="only a machine that has not run yet"):
        destination.incoming(lab.uri(name="again"))
    runs_on(source)


def test_uuid_is_compared_where_that_is_asked_for(lab: Lab) -> None:
    source = lab.side("source", PythonMachine(uuid=UUID(int=1)).fill())
    destination = lab.side("destination", PythonMachine(uuid=UUID(int=2)))
    source.machine.resume()
    source.set_capabilities({"validate-uuid": True})
    source.migrate(destination.incoming(lab.uri()))
    assert source.wait(LONG) == Status.FAILED
    assert "UUID" in source.query()["error-desc"]
    runs_on(source)


# What is sent, and when it is enough


def test_differences_are_sent_of_pages_that_change_again_and_again(lab: Lab) -> None:
    source, destination, address = lab.pair(hot=100)
    source.set_capabilities({"xbzrle": True})
    # So slow that a round sends less than is written, and only differences are small enough.
    source.set_parameters({"max-bandwidth": 40 << 20, "downtime-limit": 6})
    source.migrate(address)
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert source.query()["xbzrle-cache"]["pages"] > 0
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_machine_that_writes_too_much_is_slowed_down(lab: Lab) -> None:
    source, destination, address = lab.pair(hot=500)
    source.set_capabilities({"auto-converge": True, "events": True})
    source.set_parameters({"max-bandwidth": 8 << 20, "downtime-limit": 0})
    source.migrate(address)
    wait_until(lambda: bool(machine(source).throttled))
    assert machine(source).throttled[0] == 20
    assert source.query()["cpu-throttle-percentage"] == 20
    source.set_parameters({"downtime-limit": 2000})
    assert source.wait(LONG) == Status.COMPLETED
    assert machine(source).throttled[-1] == 0
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_migration_without_progress_says_so_and_what_would_help(lab: Lab) -> None:
    source, destination, address = lab.pair(hot=200)
    source.set_parameters(
        {
            "max-bandwidth": 8 << 20,
            "downtime-limit": 1,
            "x-vmferry-stall-policy": "give-up",
            "x-vmferry-stall-rounds": 2,
            "x-vmferry-stall-seconds": 0.1,
        }
    )
    source.migrate(address)
    stalls = [event for event in source.watch() if isinstance(event, Stalled)]
    assert source.wait(LONG) == Status.FAILED
    assert len(stalls) == 1
    assert stalls[0].report.advice
    assert "the migration was given up: no progress for" in source.query()["error-desc"]
    assert destination.wait(LONG) == Status.FAILED
    runs_on(source)


def test_limit_of_downtime_is_raised_until_it_fits(lab: Lab) -> None:
    source, destination, address = lab.pair(hot=200)
    source.set_parameters(
        {
            "max-bandwidth": 8 << 20,
            "downtime-limit": 1,
            "x-vmferry-stall-policy": "raise-downtime",
            "x-vmferry-stall-rounds": 2,
            "x-vmferry-stall-seconds": 0.1,
        }
    )
    source.migrate(address)
    raised = [event.limit for event in source.watch() if isinstance(event, DowntimeRaised)]
    assert source.wait(LONG) == Status.COMPLETED
    assert raised
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_memory_that_is_added_on_the_way_breaks_it_off(lab: Lab) -> None:
    source, destination, address = lab.pair()
    source.set_parameters({"max-bandwidth": 4 << 20})
    source.migrate(address)
    wait_until(lambda: source.query()["status"] == "active")
    machine(source).memory.add("late", 4096)
    assert source.wait(LONG) == Status.FAILED
    assert "memory was added" in source.query()["error-desc"]
    assert destination.wait(LONG) == Status.FAILED
    runs_on(source)


def test_handlers_of_the_machine_take_part(lab: Lab) -> None:
    source, destination, address = lab.pair()
    content = bytes(range(100))
    machine(source).registry.register_iterative(Disk(content))
    machine(destination).registry.register_iterative(disk := Disk())
    source.migrate(address)
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert destination.wait(LONG) == Status.COMPLETED
    assert disk.content == content
    runs_on(destination)


class Untidy(Disk):
    """Fails when its migration is over, as a handler of a machine's own may."""

    def cleanup(self) -> None:
        raise ZeroDivisionError("an untidy disk")


def warned(lab: Lab, name: str) -> str:
    """What an operator of this side was told."""
    return str([data for side, event, data in lab.events if (side, event) == (name, _WARNING)])


_WARNING = "VMFERRY_WARNING"


@pytest.mark.parametrize("answered", [True, False])
def test_cleanup_that_fails_behind_a_migration_takes_nothing_back(lab: Lab, answered: bool) -> None:
    source, destination, address = lab.pair()
    machine(source).registry.register_iterative(Untidy())
    machine(destination).registry.register_iterative(Disk())
    source.set_capabilities({"return-path": answered})
    source.migrate(address)
    assert source.wait(LONG) == (Status.COMPLETED if answered else Status.SENT)
    assert source.run_state == RunState.POSTMIGRATE
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)
    assert not source.machine.running
    assert "an untidy disk" in warned(lab, "source")


@pytest.mark.parametrize("cancel", [True, False])
def test_cleanup_that_fails_behind_a_failure_does_not_hide_it(lab: Lab, cancel: bool) -> None:
    source, destination, address = lab.pair()
    machine(source).registry.register_iterative(Untidy())
    machine(destination).registry.register_iterative(Disk())
    source.set_parameters({"max-bandwidth": 1 << 20})
    source.migrate(address)
    wait_until(lambda: destination.query()["status"] == "active")
    if cancel:
        source.cancel()
        assert source.wait(LONG) == Status.CANCELLED
    else:
        destination.cancel_incoming()
        assert source.wait(LONG) == Status.FAILED
        assert "was cancelled on this side" in source.query()["error-desc"]
    runs_on(source)
    assert "an untidy disk" in warned(lab, "source")


class Stuck(PythonMachine):
    """Does not start at first."""

    starts = True

    def resume(self) -> None:
        if not self.starts:
            self.starts = True
            raise ZeroDivisionError("a machine that does not start")
        super().resume()


def test_machine_that_does_not_start_where_it_came_is_there_nonetheless(lab: Lab) -> None:
    source, _, _ = lab.pair()
    destination = lab.side("destination", stuck := Stuck())
    stuck.starts = False
    source.migrate(destination.incoming(lab.uri(name="stuck")))
    assert (source.wait(LONG), destination.wait(LONG)) == (Status.COMPLETED, Status.COMPLETED)
    assert (source.run_state, destination.run_state) == (RunState.POSTMIGRATE, RunState.PAUSED)
    assert "a machine that does not start" in warned(lab, "destination")
    destination.cont()
    runs_on(destination)


class Endless(Disk):
    """Has as much to write at the end as at the beginning."""

    def pending(self) -> int:
        return 16

    def iterate(self, piece: PieceWriter) -> None:
        piece.number(len(self.content), 4)  # which is loaded as often as it comes


def test_handler_that_never_ends_keeps_nobody_waiting(lab: Lab) -> None:
    source, destination, address = lab.pair()
    machine(source).registry.register_iterative(Endless())
    machine(destination).registry.register_iterative(Disk())
    source.migrate(address)
    assert source.wait(LONG) == Status.FAILED
    assert 'section "disk"' in source.query()["error-desc"]
    runs_on(source)


def test_shared_block_is_left_out_on_both_sides(lab: Lab) -> None:
    source, destination, address = lab.pair()
    for side in (source, destination):
        machine(side).memory.add("shared", 8 * 4096, shared=True)
    machine(source).memory["shared"].array[:] = 7
    source.set_capabilities({"x-ignore-shared": True})
    source.migrate(address)
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert destination.wait(LONG) == Status.COMPLETED
    assert not machine(destination).memory["shared"].array.any()
    runs_on(destination)


@pytest.mark.parametrize("capability", ["events", "multifd"])
def test_what_was_in_memory_before_the_machine_came_is_gone(lab: Lab, capability: str) -> None:
    source, _, _ = lab.pair()
    used = lab.side("used", PythonMachine())
    machine(used).ram.array[:] = 7
    source.set_capabilities({capability: True})
    source.migrate(used.incoming(lab.uri(name="used")))
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert used.wait(LONG) == Status.COMPLETED
    runs_on(used)


# Pausing, cancelling


def test_pause_before_switchover_and_go_on(lab: Lab) -> None:
    source, destination, address = lab.pair()
    source.set_capabilities({"pause-before-switchover": True, "events": True})
    source.migrate(address)
    wait_until(lambda: source.query()["status"] == "pre-switchover")
    assert source.run_state == RunState.FINISH_MIGRATE
    assert not destination.machine.running
    with pytest.raises(UsageError, match="its migration decides"):
        source.cont()
    source.proceed("pre-switchover")
    assert source.wait(LONG) == Status.COMPLETED
    statuses = [
        data for side, event, data in lab.events if (side, event) == ("source", "MIGRATION")
    ]
    assert [status["status"] for status in statuses] == [  # type: ignore[index]
        *("setup", "active", "pre-switchover", "device", "completed")
    ]
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_destination_that_goes_before_the_switchover_keeps_nobody_waiting(lab: Lab) -> None:
    source, destination, address = lab.pair()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(address)
    wait_until(lambda: source.query()["status"] == "pre-switchover")
    wait_until(lambda: destination.status == Status.ACTIVE)  # so that it can answer
    destination.cancel_incoming()
    assert source.wait(LONG) == Status.FAILED
    assert "cancelled on this side" in source.query()["error-desc"]
    runs_on(source)


def test_destination_waits_as_long_as_the_source_says_that_it_is_there(lab: Lab) -> None:
    source, _, _ = lab.pair()
    patient = lab.side("patient", PythonMachine())
    patient.set_parameters({"x-vmferry-idle-deadline": 3})
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(patient.incoming(lab.uri(name="patient")))
    wait_until(lambda: source.query()["status"] == "pre-switchover")
    time.sleep(4)
    source.proceed("pre-switchover")
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert patient.wait(LONG) == Status.COMPLETED
    runs_on(patient)


@pytest.mark.parametrize("capability", ["events", "xbzrle"])
def test_nothing_of_guest_memory_is_kept_behind_a_migration(lab: Lab, capability: str) -> None:
    source, _, address = lab.pair(log="shadow")
    source.set_capabilities({capability: True})
    source.set_parameters({"max-bandwidth": 1 << 20})
    source.migrate(address)
    wait_until(lambda: source.query()["status"] == "active")
    source.cancel()
    assert source.wait(LONG) == Status.CANCELLED

    def is_gone() -> bool:
        gc.collect()
        return not any(isinstance(one, Precopy) for one in gc.get_objects())

    wait_until(is_gone)  # the threads of tests before this one may still end


def test_cancelled_at_the_switchover_it_runs_on(lab: Lab) -> None:
    source, destination, address = lab.pair()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(address)
    wait_until(lambda: source.query()["status"] == "pre-switchover")
    source.cancel()
    assert source.machine.running
    assert source.wait(LONG) == Status.CANCELLED
    assert destination.wait(LONG) == Status.FAILED
    runs_on(source)


def test_cancelled_while_memory_goes_it_runs_on_and_can_go_again(lab: Lab) -> None:
    source, destination, address = lab.pair()
    source.set_parameters({"max-bandwidth": 1 << 20})
    source.migrate(address)
    wait_until(lambda: source.query()["status"] == "active")
    source.cancel()
    assert source.machine.running
    assert source.wait(LONG) == Status.CANCELLED
    assert destination.wait(LONG) == Status.FAILED
    another = lab.side("another", PythonMachine())
    source.set_parameters({"max-bandwidth": 0})
    source.migrate(another.incoming(lab.uri(name="another")))
    assert source.wait(LONG) == Status.COMPLETED
    assert another.wait(LONG) == Status.COMPLETED
    runs_on(another)


def test_log_that_takes_long_to_stop_holds_up_no_status_but_the_next_migration(lab: Lab) -> None:
    source, _, address = lab.pair()
    another = lab.side("another", PythonMachine())
    onwards = another.incoming(lab.uri(name="another"))
    may_stop, stops, logs = threading.Event(), threading.Event(), []
    make_log = machine(source).dirty_log

    def dirty_log() -> DirtyLog:
        log = make_log()
        stop = log.stop

        def stop_late() -> None:
            if source.status in ENDS:
                stops.set()
                assert may_stop.wait(LONG)
            stop()

        log.stop = stop_late  # type: ignore[method-assign]
        logs.append(log)
        return log

    machine(source).dirty_log = dirty_log  # type: ignore[method-assign]
    source.set_parameters({"max-bandwidth": 1 << 20})
    source.migrate(address)
    wait_until(lambda: source.query().get("ram", {}).get("dirty-sync-count", 0) > 0)
    source.cancel()
    assert stops.wait(LONG)
    source.set_parameters({"max-bandwidth": 0})
    source.migrate(onwards)
    assert source.wait(0.1) == Status.SETUP
    assert len(logs) == 1
    may_stop.set()
    assert source.wait(LONG) == another.wait(LONG) == Status.COMPLETED
    assert len(logs) == 2
    runs_on(another)


@contextmanager
def full_queue(path: Path) -> Iterator[str]:
    """An address where no connection comes about, as there is no room for another one."""
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
        full.bind(str(path))
        full.listen(0)
        first.connect(str(path))
        yield f"unix:{path}"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_cancelled_while_nobody_answers_it_has_ended_at_once(
    lab: Lab, tmp_path: Path, kind: str
) -> None:
    source, _, _ = lab.pair()
    with unanswered() if kind == "tcp" else full_queue(tmp_path / "full") as uri:
        source.migrate(uri)
        time.sleep(0.1)
        source.cancel()
        assert source.machine.running
        assert source.wait(1) == Status.CANCELLED
    runs_on(source)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_nobody_who_answers_is_waited_for_as_long_as_was_said(
    lab: Lab, tmp_path: Path, kind: str
) -> None:
    source, _, _ = lab.pair()
    source.set_parameters({"x-vmferry-connect-deadline": 0.2})
    with unanswered() if kind == "tcp" else full_queue(tmp_path / "full") as uri:
        source.migrate(uri)
        assert source.wait(LONG) == Status.FAILED
    assert "waited 200 ms" in source.query()["error-desc"]
    runs_on(source)


# Two who stop the machine and let it run


def test_machine_that_was_stopped_behind_a_cancel_stays_so(lab: Lab) -> None:
    source, _, address = lab.pair()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(address)
    wait_until(lambda: source.query()["status"] == "pre-switchover")
    lab.heard("source", "RESUME", source.stop)
    source.cancel()
    assert source.wait(LONG) == Status.CANCELLED
    assert source.run_state == RunState.PAUSED
    source.cont()
    runs_on(source)


class LateMachine(PythonMachine):
    """Is let run late: as the migration stops it, if that does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.starting, self.stopping = threading.Event(), threading.Event()

    def pause(self) -> None:
        super().pause()
        self.stopping.set()

    def resume(self) -> None:
        self.starting.set()
        self.stopping.wait(0.5)
        super().resume()


def test_machine_that_is_let_run_at_the_switchover_runs_on_one_side(lab: Lab) -> None:
    source = lab.side("source", late := LateMachine())
    late.fill()
    destination = lab.side("destination", PythonMachine())

    def cont() -> None:
        background(source.cont)
        assert late.starting.wait(LONG)

    lab.heard("source", "MIGRATION_PASS", cont)
    source.set_capabilities({"events": True})
    source.migrate(destination.incoming(lab.uri()))
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert destination.wait(LONG) == Status.COMPLETED
    assert not late.running


def test_whoever_is_told_of_a_status_may_ask_while_another_cancels(lab: Lab) -> None:
    source, _, address = lab.pair()

    def ask() -> None:
        background(source.cancel)
        time.sleep(0.1)  # for the cancel to wait for what is held here
        source.query()

    # The first tells of setup, in the thread that begins.
    lab.heard("source", "MIGRATION", lambda: lab.heard("source", "MIGRATION", ask))
    source.set_capabilities({"events": True})
    source.migrate(address)
    assert source.wait(LONG) in {Status.CANCELLED, Status.COMPLETED}


# Words that are lost

READY_WORD = Pong(READY).encode()
GO_WORD = Ping(GO).encode()
SHUT_WORD = Shut(0).encode()


@pytest.mark.parametrize("forward", [False, True])
def test_cut_as_the_destination_is_ready(lab: Lab, forward: bool) -> None:
    """Whether the source hears of it or not, it has not said go when the connection breaks."""
    source, destination, address = lab.pair()
    relay = lab.relay(address, trigger=READY_WORD, forward=forward)
    source.migrate(relay.address)
    status = source.wait(LONG)
    if status == Status.FAILED and source.machine.running:
        assert not destination.machine.running
        runs_on(source)
        destination.cancel_incoming()
        assert destination.wait(LONG) == Status.FAILED
    else:  # it heard, and its go was on its way when the connection broke
        assert source.run_state == RunState.POSTMIGRATE


def test_go_that_is_lost_leaves_both_in_doubt_and_an_operator_decides(lab: Lab) -> None:
    source, destination, address = lab.pair()
    relay = lab.relay(address, trigger=GO_WORD)
    source.migrate(relay.address)
    assert source.wait(LONG) == Status.FAILED
    assert source.run_state == RunState.POSTMIGRATE
    assert "did not say that it runs it" in source.query()["error-desc"]
    wait_until(lambda: destination.in_doubt)
    assert not source.machine.running
    assert not destination.machine.running
    destination.cont()
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_go_that_is_lost_and_the_machine_goes_back(lab: Lab) -> None:
    source, destination, address = lab.pair()
    relay = lab.relay(address, trigger=GO_WORD)
    source.migrate(relay.address)
    assert source.wait(LONG) == Status.FAILED
    wait_until(lambda: destination.in_doubt)
    destination.cancel_incoming()
    assert destination.wait(LONG) == Status.FAILED
    source.cont()
    runs_on(source)


def test_first_word_of_an_operator_counts(lab: Lab) -> None:
    source, destination, address = lab.pair()
    relay = lab.relay(address, trigger=GO_WORD)
    source.migrate(relay.address)
    assert source.wait(LONG) == Status.FAILED
    wait_until(lambda: destination.in_doubt)
    destination.cont()
    destination.cancel_incoming()
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_destination_that_is_told_to_give_up_as_it_loads_does(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination, address = lab.pair()

    def commit(sink: MachineSink, features: frozenset[str], *, footers: bool) -> None:
        destination.cancel_incoming()
        load(sink, features, footers=footers)

    load = MachineSink.commit
    monkeypatch.setattr(MachineSink, "commit", commit)
    source.migrate(address)
    assert destination.wait(LONG) == Status.FAILED
    assert source.wait(LONG) == Status.FAILED
    assert "cancelled on this side" in source.query()["error-desc"]
    runs_on(source)


def test_cancel_at_the_end_of_the_stream_is_heard_or_too_late(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A destination that nobody asks takes the machine with the end of the stream."""
    source, destination, address = lab.pair()
    source.set_capabilities({"return-path": False})
    cancelling, over = threading.Event(), threading.Event()

    def reach(point: str) -> None:
        if point == "devices-sent":
            background(source.cancel)
            assert cancelling.wait(LONG)

    def shutdown(_limit: RateLimit) -> None:
        cancelling.set()
        assert over.wait(LONG)

    monkeypatch.setattr("vmferry.migration.source.reach", reach)
    monkeypatch.setattr(RateLimit, "shutdown", shutdown)
    source.migrate(address)
    assert destination.wait(LONG) == Status.FAILED
    over.set()
    assert source.wait(LONG) == Status.CANCELLED
    runs_on(source)


def test_answer_that_makes_no_sense_behind_go_is_no_refusal(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination, address = lab.pair()
    monkeypatch.setattr(Answers, "confirm", lambda answers: answers.say(RequestPages(0, 4096)))
    source.migrate(address)
    assert destination.wait(LONG) == Status.COMPLETED
    assert source.wait(LONG) == Status.FAILED
    assert source.in_doubt
    assert not source.machine.running


def test_destination_that_dies_late_had_the_machine_if_it_said_so(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers when the source has given up waiting, runs the machine, and dies."""
    source, destination, address = lab.pair()
    await_success = Verdict.await_success

    def silence(_verdict: Verdict, _patience: float | None) -> None:
        monkeypatch.setattr(Verdict, "await_success", await_success)
        raise PeerSilent("no answer")

    def die(_identity: Identity, _seconds: float) -> bool:
        assert destination.wait(LONG) == Status.COMPLETED
        return True

    monkeypatch.setattr(Verdict, "await_success", silence)
    monkeypatch.setattr(Identity, "dies_within", die)
    source.migrate(address)
    assert source.wait(LONG) == Status.COMPLETED
    assert not source.machine.running


def test_last_word_that_is_lost_leaves_the_machine_at_the_destination(lab: Lab) -> None:
    source, destination, address = lab.pair()
    relay = lab.relay(address, trigger=SHUT_WORD)
    source.migrate(relay.address)
    assert source.wait(LONG) == Status.FAILED
    assert source.run_state == RunState.POSTMIGRATE
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_cut_in_the_middle_leaves_it_at_the_source(lab: Lab) -> None:
    source, destination, address = lab.pair()
    relay = lab.relay(address)
    source.set_parameters({"max-bandwidth": 1 << 20})
    source.migrate(relay.address)
    wait_until(lambda: source.query()["status"] == "active")
    # Before that it takes a connection that ends for a stranger's.
    wait_until(lambda: destination.query()["status"] == "active")
    relay.cut()
    assert (source.wait(LONG), destination.wait(LONG)) == (Status.FAILED, Status.FAILED)
    runs_on(source)


# Connections that are none of a source


STRANGERS = {
    "closes": b"",
    "closes too early": b"QEV",
    "is no source": b"GET / HTTP/1.1\r\n",
}


@pytest.mark.parametrize("kind", ["unix", "tcp:127.0.0.1:0"])
@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_stranger_does_not_end_the_wait_for_a_machine(lab: Lab, kind: str, said: bytes) -> None:
    source, destination, address = lab.pair(uri=kind)
    for _ in range(3):
        with connect(address) as stranger:
            if said:
                stranger.send([said])
            stranger.end_of_data()
            with suppress(TransportError):
                assert receive(stranger) == b""
    source.migrate(address)
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)
    warnings = [event for event in lab.events if event[1] == "VMFERRY_WARNING"]
    assert len(warnings) == 3
    assert "no machine came" in str(warnings[0][2])


@pytest.mark.parametrize("channels", [0, 2])
def test_stranger_that_says_nothing_is_dropped_in_the_end(lab: Lab, channels: int) -> None:
    source, _, _ = lab.pair()
    destination = lab.side("impatient", PythonMachine())
    destination.set_parameters({"x-vmferry-hello-deadline": 0.3})
    address = destination.incoming(lab.uri(name="impatient"))
    with connect(address) as stranger:
        assert receive(stranger) == b""
    with connect(address):  # this one is there when the machine comes
        source.set_capabilities({"multifd": bool(channels)})
        source.migrate(address)
        assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def test_strangers_do_not_prolong_the_wait_for_a_machine(lab: Lab) -> None:
    destination = lab.side("impatient", PythonMachine())
    destination.set_parameters({"x-vmferry-listen-deadline": 0.5})
    address = destination.incoming(lab.uri())
    while destination.status not in ENDS:
        with suppress(TransportError), connect(address):
            time.sleep(0.05)
    assert destination.status == Status.FAILED
    assert "for a connection" in str(destination.error)


def test_strangers_that_stay_make_no_more_than_a_source_has(lab: Lab) -> None:
    source, destination, address = lab.pair()
    with ExitStack() as strangers:
        for _ in range(300):
            strangers.enter_context(connect(address))
        wait_until(lambda: named_threads("peer") >= 257, LONG)
        time.sleep(0.1)
        assert named_threads("peer") == 257
        source.migrate(address)
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


def named_threads(name: str) -> int:
    return len([thread for thread in threading.enumerate() if thread.name == name])


# Parameters that count while it goes


def test_limit_on_bandwidth_changes_while_it_goes(lab: Lab) -> None:
    source, destination, address = lab.pair(pages=4000)
    source.set_parameters({"max-bandwidth": 1 << 20})
    source.migrate(address)
    began = time.monotonic()
    wait_until(lambda: source.query()["status"] == "active")
    source.set_parameters({"max-bandwidth": 0})
    assert source.wait(LONG) == Status.COMPLETED
    assert time.monotonic() - began < 10  # not the 11 s that 11 MiB would take
    assert destination.wait(LONG) == Status.COMPLETED
    runs_on(destination)


# Words that nobody can hear any more


def everything_but_the_last_word(lab: Lab, path: Path) -> bytes:
    """What a source of a small machine sends before it hears anything."""
    source = lab.side("recorded", PythonMachine(pages=20).fill())
    source.machine.resume()
    source.set_parameters({"x-vmferry-answer-deadline": 0.5})
    with listen(f"unix:{path}/recorder") as listener:
        source.migrate(listener.address)
        with accepted(listener.accept(LONG)) as channel:
            sent = receive(channel)
    assert source.wait(LONG) == Status.FAILED
    assert sent.endswith(Ping(ABORT).encode())
    return sent.removesuffix(Ping(ABORT).encode())


def test_source_that_ended_before_it_was_answered_has_sent_a_whole_machine(
    lab: Lab, tmp_path: Path
) -> None:
    sent = everything_but_the_last_word(lab, tmp_path)
    with PythonMachine(pages=20) as there, listen(lab.uri(name="late")) as listener:
        with connect(listener.address) as gone:
            gone.send([sent])
        sink = MachineSink(there)
        phases: list[str] = []
        destination = Destination(
            listener,
            sink,
            meter=Meter(lambda now: phases.append(now.phase)),
            loader=sink,
            taken=there.resume,
        )
        outcome = background(destination.run)
        wait_until(lambda: "in-doubt" in phases or outcome.done(), LONG)
        assert not there.running
        destination.decide(take=True)
        outcome.result(LONG)
        assert there.running


def test_checkpoint_of_a_machine_that_stays_at_its_source_is_not_kept(
    lab: Lab, tmp_path: Path
) -> None:
    source, _, _ = lab.pair()
    destinations: list[Destination] = []
    phases: list[str] = []
    received = background(
        lambda: vmferry.receive(
            lab.uri(name="keep"),
            tmp_path / "vm",
            started=destinations.append,
            progress=lambda now: phases.append(now.phase),
        )
    )
    wait_until(lambda: bool(destinations), LONG)
    relay = lab.relay(lab.uri(name="keep"), trigger=READY_WORD)
    source.migrate(relay.address)
    assert source.wait(LONG) == Status.FAILED
    wait_until(lambda: "in-doubt" in phases, LONG)
    destinations[0].cancel()
    assert isinstance(received.exception(LONG), vmferry.VmferryError)
    assert not (tmp_path / "vm").exists()
    runs_on(source)
