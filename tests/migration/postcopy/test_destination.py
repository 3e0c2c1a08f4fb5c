"""A machine whose memory comes later, from sources of every kind; its processor is in Python.

So whoever touches a page that is missing holds the interpreter lock of its process.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vmferry
from tests.migration.hosted import LONG, Hosted
from tests.migration.postcopy.scripted import SIZE, Scripted
from tests.migration.python_machine import PythonMachine
from tests.migration.relay import Relay
from tests.support.processes import pagers
from tests.transports.support import background, wait_until
from vmferry.checkpoint.restore import Restore
from vmferry.errors import TransportError
from vmferry.memory import faults
from vmferry.migration.control import Control
from vmferry.migration.takeover import ABORT, ANNOUNCE, GO, READY
from vmferry.ownership.identity import Identity
from vmferry.pages import PAGE, XBZRLE
from vmferry.qemu.qmp import Qmp
from vmferry.wire.buffer import encode_name
from vmferry.wire.commands import (
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    ReceivedBitmap,
)
from vmferry.wire.return_path import HavePages, Pong, ResumeAck, Shut
from vmferry.wire.sections import SectionPart

HOT = 8
"""Pages that the machine writes to all the time."""

NO_FAULTS = faults.missing(kernel=False)
pytestmark = pytest.mark.skipif(NO_FAULTS is not None, reason=str(NO_FAULTS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[vmferry.Checkpoint]:
    """The machine, in the middle of its work."""
    directory = tmp_path_factory.mktemp("saved")
    uri = f"unix:{directory}/socket"
    with PythonMachine() as machine:
        machine.fill().resume()
        control = Control(machine)
        wait_until(lambda: machine.steps > 10)
        receiving = background(lambda: vmferry.receive(uri, directory / "checkpoint"))
        wait_until(Path(directory / "socket").exists)
        control.migrate(uri)
        with receiving.result(LONG) as received:
            yield received
        control.close()


class Waiting(Hosted):
    """The process of a machine that lets its memory come later."""

    def __init__(self, path: Path) -> None:
        super().__init__(path / "qmp", "destination")
        self.directory = path
        self.allow("postcopy-ram")
        self.uri = f"unix:{path}/migration"
        self._listened = 0

    def allow(self, name: str, *, state: bool = True) -> None:
        states = [{"capability": name, "state": state}]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": states})

    def listen(self) -> str:
        self.qmp.execute("migrate-incoming", {"uri": self.uri})
        return self.uri

    def recover(self) -> str:
        self._listened += 1
        uri = f"{self.uri}-{self._listened}"
        self.qmp.execute("migrate-recover", {"uri": uri})
        return uri

    def pager(self) -> int:
        """The pid of the pager."""
        (found,) = pagers(self._process.pid)
        return found

    def descriptors(self) -> dict[int, str]:
        """What the process has open, by number, as far as it still is."""
        found = {}
        for link in Path(f"/proc/{self._process.pid}/fd").iterdir():
            with suppress(OSError):
                found[int(link.name)] = str(link.readlink())
        return found

    def holds_nothing_more(self, before: dict[int, str]) -> None:
        """Neither descriptors nor a pager are left of a migration."""
        wait_until(lambda: sorted(self.descriptors().values()) == sorted(before.values()), LONG)
        assert not pagers(self._process.pid)

    def free_descriptor(self) -> int:
        """The number of the next descriptor that the process opens."""
        taken = self.descriptors()
        return next(number for number in count() if number not in taken)

    def limit_descriptors(self, most: int) -> int:
        """Let it have numbers below *most*; the limit before."""
        pid, kind = self._process.pid, resource.RLIMIT_NOFILE
        before, hard = resource.prlimit(pid, kind)
        resource.prlimit(pid, kind, (most, hard))
        return before

    def wait_for_pause(self) -> None:
        """Wait until it is paused once more."""
        paused = self.qmp.wait_event("VMFERRY_WARNING", timeout=LONG)
        assert "source is lost" in paused["data"]["message"]
        self.wait_for("postcopy-paused")

    def error(self) -> str:
        return str(self.query().get("error-desc"))

    def is_whole(self) -> None:
        assert self.wait_for("completed", "failed") == "completed"
        self.runs_on()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Waiting]:
    with Waiting(tmp_path) as waiting:
        yield waiting


@pytest.fixture
def running(there: Waiting, checkpoint: vmferry.Checkpoint) -> Iterator[Scripted]:
    """The source of a machine that runs, and has of its memory what it writes to."""
    with Scripted(checkpoint, there.listen()) as source:
        source.begin()
        source.package()
        source.say(*map(source.page, range(HOT)))
        source.hear_loaded()
        wait_until(lambda: there.run_state == "running", LONG)
        yield source


def resume(source: Scripted, uri: str, announced: Sequence[int] = ()) -> np.ndarray:
    """Be the source once more, who said who it is if it did; which pages the machine has."""
    again = Scripted(source.checkpoint, uri)
    source.channel.close()
    source.channel, source._reader = again.channel, again._reader
    source.say(*(Ping(number).encode() for number in announced))
    source.say(ReceivedBitmap(source.block.name).encode())
    have = source.hear(lambda message: isinstance(message, HavePages))
    assert isinstance(have, HavePages)
    bits = np.unpackbits(np.frombuffer(have.bitmap, np.uint8), bitorder="little")
    assert len(bits) % 64 == 0
    assert not bits[source.pages :].any()
    source.say(PostcopyResume().encode())
    source.hear(lambda message: isinstance(message, ResumeAck))
    return bits[: source.pages]


def finish(source: Scripted, have: np.ndarray) -> None:
    missing = np.flatnonzero(have == 0).tolist()
    source.say(source.part(*map(source.page, missing)), b"\0")
    source.hear(lambda message: message == Shut(0))


def test_thread_that_holds_the_interpreter_lock_gets_its_page(
    there: Waiting, checkpoint: vmferry.Checkpoint
) -> None:
    """The pager asks for it, and puts it there, while no Python runs in the machine's process."""
    before = there.descriptors()
    with Scripted(checkpoint, there.listen()) as source:
        source.begin()
        source.package()
        source.hear_loaded()
        for page in range(HOT):
            assert source.hear_request() == page
            source.say(source.page(page))
        source.say(*(source.page(n) for n in range(HOT, source.pages)))
        source.end()
        source.hear(lambda message: message == Shut(0))
    there.is_whole()
    there.holds_nothing_more(before)


class Elsewhere:
    """A monitor whose machine listens at *there* where it is told to listen at *here*."""

    def __init__(self, qmp: Qmp, here: str, there: str) -> None:
        self._qmp = qmp
        self._here = here
        self._there = there
        self.wait_event = qmp.wait_event

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        if arguments and arguments.get("uri") == self._here:
            arguments = {"uri": self._there}
        return self._qmp.execute(command, arguments)


def test_restore_whose_last_answer_is_lost_is_over(
    there: Waiting, checkpoint: vmferry.Checkpoint, tmp_path: Path
) -> None:
    with Relay(f"unix:{tmp_path}/relay", there.uri, trigger=Shut(0).encode()) as relay:
        paused: list[Exception] = []
        monitor: Any = Elsewhere(there.qmp, relay.address, there.uri)
        restore = Restore(checkpoint, relay.address, qmp=monitor, learn=False, paused=paused.append)
        background(restore.run).result(LONG)
        assert paused
    there.is_whole()


def test_pings_are_answered(there: Waiting, running: Scripted) -> None:
    running.say(running.end_of_part(), Ping(4).encode(), running.part(running.rest()), b"\0")
    running.hear(lambda message: message == Pong(4))
    running.hear(lambda message: message == Shut(0))
    there.is_whole()


def test_what_came_before_stays_and_what_was_discarded_comes_again(
    there: Waiting, checkpoint: vmferry.Checkpoint
) -> None:
    stale, early = 10, [11, 12]
    with Scripted(checkpoint, there.listen()) as source:
        precopied = source.part(source.page(stale, b"stale" * 819 + b"!"), *map(source.page, early))
        source.begin(before=precopied)
        source.package(RamDiscard(source.block.name, ((stale * SIZE, SIZE),)))
        source.say(*(source.page(n) for n in range(source.pages) if n not in early))
        source.end()
        source.hear(lambda message: message == Shut(0))
    there.is_whole()


def test_page_that_comes_twice_stays_as_it_came_first(there: Waiting, running: Scripted) -> None:
    """The machine may have written to it."""
    number = HOT + 2
    running.say(running.page(number), running.page(number, b"\1" * SIZE), running.page(0))
    running.say(running.rest(but=number))
    running.end()
    running.hear(lambda message: message == Shut(0))
    there.is_whole()


def beyond(source: Scripted) -> bytes:
    word = source.block.length | PAGE
    return word.to_bytes(8) + encode_name(source.block.name) + bytes(SIZE)


def unknown(_source: Scripted) -> bytes:
    return PAGE.to_bytes(8) + encode_name("unknown") + bytes(SIZE)


def delta(source: Scripted) -> bytes:
    return XBZRLE.to_bytes(8) + encode_name(source.block.name) + b"\1\0\0"


def garbage(_source: Scripted | None = None) -> bytes:
    return b"\xff" * 64


def another_section(source: Scripted) -> bytes:
    return source.end_of_part() + b"\2\0\0\0\7"


def package_again(source: Scripted) -> bytes:
    content = PostcopyListen().encode() + PostcopyRun().encode()
    return source.end_of_part() + Package(content).encode()


def discard_again(source: Scripted) -> bytes:
    return source.end_of_part() + RamDiscard(source.block.name, ((0, SIZE),)).encode()


def half_a_page(source: Scripted) -> bytes:
    return source.page(HOT + 5)[:100]


def nothing(_source: Scripted) -> bytes:
    return b""


BAD = [
    *(beyond, unknown, delta, garbage, another_section, package_again, discard_again),
    *(half_a_page, nothing),
]


def test_bad_source_is_left_and_a_good_one_goes_on(there: Waiting, running: Scripted) -> None:
    came = list(range(HOT))
    for number, bad in enumerate(BAD):
        came += [HOT + 20 + number]
        running.say(running.page(came[-1]), bad(running))
        if bad in {half_a_page, nothing}:
            running.channel.end_of_data()
        there.wait_for("postcopy-paused")
        assert there.error()
        assert there.run_state == "running"
        have = resume(running, there.recover())
        assert np.flatnonzero(have).tolist() == came
        running.say(SectionPart(1, "ram").encode())
    running.say(running.end_of_part())
    finish(running, have)
    there.is_whole()


def test_page_of_precopy_that_comes_again_is_refused(
    there: Waiting, checkpoint: vmferry.Checkpoint
) -> None:
    """Which of the two is right only the source knows: it should have discarded the first."""
    with Scripted(checkpoint, there.listen()) as source:
        source.begin(before=source.part(source.page(20)))
        source.package()
        source.say(*map(source.page, range(HOT)))
        source.hear_loaded()
        source.say(source.page(20))
        there.wait_for("postcopy-paused")
        assert "unless it was discarded" in there.error()
        finish(source, resume(source, there.recover()))
    there.is_whole()


@pytest.mark.parametrize(
    "bad",
    [garbage(), PostcopyResume().encode(), ReceivedBitmap("no").encode(), b"", b"\0"],
    ids=["garbage", "only-resume", "unknown-block", "nothing", "only-the-end"],
)
def test_recovery_that_fails_can_be_tried_again(
    there: Waiting, running: Scripted, bad: bytes
) -> None:
    running.close()
    there.wait_for_pause()
    again = Scripted(running.checkpoint, there.recover())
    again.say(bad)
    again.channel.end_of_data()
    again.close()
    there.wait_for_pause()
    # It may be listened for anew before anybody has come, too.
    there.recover()
    finish(running, resume(running, there.recover()))
    there.is_whole()


# Before it runs


@pytest.mark.parametrize(
    "advise", [PostcopyAdvise(SIZE | 2 << 20, SIZE), PostcopyAdvise(1 << 16, SIZE)]
)
def test_other_pages_are_refused_before_memory_comes(
    there: Waiting, checkpoint: vmferry.Checkpoint, advise: PostcopyAdvise
) -> None:
    with Scripted(checkpoint, there.listen()) as source:
        source.begin(advise=advise)
        source.hear(lambda message: message == Shut(1))
    assert there.wait_for("completed", "failed") == "failed"


def test_postcopy_is_refused_from_the_beginning_where_it_is_off(
    there: Waiting, checkpoint: vmferry.Checkpoint
) -> None:
    there.allow("postcopy-ram", state=False)
    with Scripted(checkpoint, there.listen()) as source:
        source.begin()
        source.hear(lambda message: message == Shut(1))
    assert there.wait_for("completed", "failed") == "failed"


@pytest.mark.parametrize(
    "devices", [b"", b"\4" + b"\xff" * 40, b"\1\2\3"], ids=["none", "broken", "no-device"]
)
def test_devices_that_do_not_fit_leave_the_machine_to_its_source(
    there: Waiting, checkpoint: vmferry.Checkpoint, devices: bytes
) -> None:
    before = there.descriptors()
    with Scripted(checkpoint, there.listen()) as source:
        source.begin()
        try:
            source.package(devices=devices)
            source.hear(lambda message: message == Shut(1))
        except TransportError:
            assert not devices.startswith(b"\4")
    assert there.wait_for("completed", "failed") == "failed"
    assert there.run_state == "inmigrate"
    there.holds_nothing_more(before)


# Between two engines of this kind

WHO = (ANNOUNCE, *Identity.own().numbers())


@contextmanager
def waiting_for_go(there: Waiting, checkpoint: vmferry.Checkpoint) -> Iterator[Scripted]:
    """A source that announced itself; the machine is loaded and waits for its last word."""
    with Scripted(checkpoint, there.listen()) as source:
        source.begin(*map(Ping, WHO))
        source.package()
        source.hear_loaded()
        source.hear(lambda message: message == Pong(READY))
        assert there.run_state == "inmigrate"
        yield source


@pytest.fixture
def ready(there: Waiting, checkpoint: vmferry.Checkpoint) -> Iterator[Scripted]:
    """See :func:`waiting_for_go`."""
    with waiting_for_go(there, checkpoint) as source:
        yield source


def test_machine_waits_for_the_last_word(there: Waiting, ready: Scripted) -> None:
    ready.say(ready.page(0), ready.end_of_part())
    assert there.run_state == "inmigrate"
    ready.say(Ping(GO).encode(), ready.part(ready.rest(but=0)), b"\0")
    ready.hear(lambda message: message == Shut(0))
    there.is_whole()


def test_source_takes_its_machine_back(there: Waiting, ready: Scripted) -> None:
    ready.say(ready.end_of_part(), Ping(ABORT).encode())
    assert there.wait_for("completed", "failed") == "failed"
    assert there.run_state == "inmigrate"


def test_source_that_resumes_has_given_its_machine_away(there: Waiting, ready: Scripted) -> None:
    """It is cut off when it has said go; whether that was heard nobody knows."""
    ready.close()
    there.wait_for("postcopy-paused")
    assert there.run_state == "inmigrate"
    have = resume(ready, there.recover(), WHO)
    assert not have.any()
    ready.say(ready.part(*map(ready.page, range(HOT))))
    wait_until(lambda: there.run_state == "running", LONG)
    have[:HOT] = 1
    finish(ready, have)
    there.is_whole()


def test_source_that_comes_when_all_has_come_hears_so(there: Waiting, ready: Scripted) -> None:
    ready.say(ready.end_of_part(), Ping(GO).encode(), ready.part(ready.rest()), b"\0")
    ready.hear(lambda message: message == Shut(0))
    there.is_whole()
    with Scripted(ready.checkpoint, there.recover()) as other:
        other.say(PostcopyResume().encode())
        with pytest.raises((TransportError, AssertionError)):
            other.hear(lambda _message: True)
    have = resume(ready, there.recover(), WHO)
    assert have.all()
    finish(ready, have)


@pytest.mark.parametrize("announced", [(), (*WHO[:-1], WHO[-1] + 1)], ids=["nobody", "another"])
def test_another_source_does_not_give_the_machine_away(
    there: Waiting, ready: Scripted, announced: tuple[int, ...]
) -> None:
    """It may have one of the same shape, and the machine still be its own source's."""
    ready.close()
    there.wait_for("postcopy-paused")
    other = Scripted(ready.checkpoint, there.recover())
    other.say(*(Ping(number).encode() for number in announced))
    other.say(ReceivedBitmap(ready.block.name).encode(), PostcopyResume().encode())
    wait_until(lambda: "another source" in there.error(), LONG)
    other.close()
    assert there.run_state == "inmigrate"
    finish(ready, resume(ready, there.recover(), WHO))
    there.is_whole()


def test_source_that_comes_back_and_does_not_go_on_is_left(
    there: Waiting, checkpoint: vmferry.Checkpoint
) -> None:
    """Nobody waits for a page, and yet somebody else has to get a turn."""
    there.set(x_vmferry_idle_deadline=1.0)
    with waiting_for_go(there, checkpoint) as source:
        source.close()
        there.wait_for("postcopy-paused")
        with Scripted(checkpoint, there.recover()) as other:
            there.wait_for("postcopy-recover")
            with suppress(TransportError):
                while there.query()["status"] == "postcopy-recover":
                    other.say(Ping(1).encode())
                    time.sleep(0.1)
            there.wait_for("postcopy-paused")
        assert "goes on" in there.error()
        have = resume(source, there.recover(), WHO)
        finish(source, have)
    there.is_whole()


# Deaths


def test_pager_that_dies_is_replaced(there: Waiting, running: Scripted) -> None:
    for number in range(2):
        running.say(running.page(HOT + number), running.end_of_part(), Ping(number).encode())
        running.hear(lambda message, number=number: message == Pong(number))
        os.kill(there.pager(), signal.SIGKILL)
        there.wait_for("postcopy-paused")
        assert "the pager has ended" in there.error()
        have = resume(running, there.recover())
        assert np.flatnonzero(have).tolist() == list(range(HOT + number + 1))
        running.say(SectionPart(1, "ram").encode())
    running.say(running.end_of_part())
    finish(running, have)
    there.is_whole()


def test_host_that_has_nothing_for_another_pager_may_have_it_later(
    there: Waiting, running: Scripted
) -> None:
    os.kill(there.pager(), signal.SIGKILL)
    there.wait_for("postcopy-paused")
    uri, free = there.recover(), there.free_descriptor()
    # For the connection there is one, for a pager there is none.
    before = there.limit_descriptors(free + 1)
    other = Scripted(running.checkpoint, uri)
    wait_until(lambda: "Too many open files" in there.error(), LONG)
    other.close()
    there.limit_descriptors(before)
    assert there.run_state == "running"
    finish(running, resume(running, there.recover()))
    there.is_whole()


def test_pager_that_dies_before_the_last_word_is_replaced(there: Waiting, ready: Scripted) -> None:
    os.kill(there.pager(), signal.SIGKILL)
    there.wait_for("postcopy-paused")
    assert there.run_state == "inmigrate"
    finish(ready, resume(ready, there.recover(), WHO))
    there.is_whole()


def test_pager_that_dies_before_the_machine_is_loaded_leaves_it_to_its_source(
    there: Waiting, checkpoint: vmferry.Checkpoint
) -> None:
    with Scripted(checkpoint, there.listen()) as source:
        source.begin()
        os.kill(there.pager(), signal.SIGKILL)
        source.package()
        source.hear(lambda message: message == Shut(1))
    assert there.wait_for("completed", "failed") == "failed"
    assert there.run_state == "inmigrate"


def test_nothing_is_left_of_a_destination_that_dies(there: Waiting, running: Scripted) -> None:
    pager = there.pager()
    there._process.kill()
    there.wait_death()
    with pytest.raises((TransportError, AssertionError)):
        running.hear(lambda _message: False)
    wait_until(lambda: not Path(f"/proc/{pager}").exists(), LONG)
