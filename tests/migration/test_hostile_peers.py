"""Peers of a live move that lie by script: the machine stays where it is, or in doubt, and soon."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.python_machine import PythonMachine
from tests.transports.support import wait_until
from vmferry.errors import VmferryError
from vmferry.migration.control import Control, RunState
from vmferry.migration.status import ENDS, Status
from vmferry.migration.takeover import ABORT, GO, READY
from vmferry.ownership.identity import Identity
from vmferry.wire.commands import Ping
from vmferry.wire.reader import StreamReader
from vmferry.wire.return_path import HavePages, Pong, Reason, RequestPages, ResumeAck, Shut

LONG = 20.0
DEADLINE = 1.0
PAGES = 1500

Say = Callable[[bytes], None]
Script = Callable[[Say], None]


class Liar:
    """A destination that reads everything, and says what its scripts do: *early* as soon as it is
    connected, *late* behind the whole stream, and *last* behind the source's last word."""

    def __init__(
        self,
        stack: ExitStack,
        path: Path,
        *,
        early: Script | None = None,
        late: Script | None = None,
        last: Script | None = None,
    ) -> None:
        self.uri = f"unix:{path}/liar"
        self._early, self._late, self._last = early, late, last
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{path}/liar")
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._is_over = threading.Event()
        self.end = bytearray()
        """What the source has said behind its stream."""
        self._spawn(self._run)
        stack.callback(self._close)

    def _close(self) -> None:
        self._is_over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _spawn(self, work: Callable[[], None]) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):
                work()

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        with self._listener.accept()[0] as connection:
            reader = StreamReader()
            self._start(connection, self._early)
            while data := connection.recv(1 << 20):
                if not reader.finished:
                    for _ in reader.feed(data):
                        pass
                    if reader.finished:
                        self.end += bytes(reader.buffer.view())
                        self._start(connection, self._late)
                else:
                    self.end += data
                if self.end[:12] and self._last is not None:
                    last, self._last = self._last, None
                    self._start(connection, last)

    def _start(self, connection: socket.socket, script: Script | None) -> None:
        def say(data: bytes) -> None:
            if not data:
                connection.shutdown(socket.SHUT_RDWR)
            if self._is_over.is_set():
                raise BrokenPipeError
            connection.sendall(data)

        if script is not None:
            self._spawn(lambda: script(say))


def once(*messages: bytes) -> Script:
    return lambda say: say(b"".join(messages))


def for_ever(message: bytes) -> Script:
    def script(say: Say) -> None:
        while True:
            say(message * 1000)

    return script


def byte_by_byte(message: bytes) -> Script:
    def script(say: Say) -> None:
        for byte in message:
            say(bytes([byte]))
            time.sleep(0.1)

    return script


HANG_UP = once(b"")


def begin(stack: ExitStack, liar: Liar, *, slow: bool = False) -> Control:
    machine = stack.enter_context(PythonMachine(PAGES).fill())
    source = Control(machine)
    stack.callback(source.close)
    source.set_parameters(
        {
            "max-bandwidth": (1 << 20) if slow else 0,
            "x-vmferry-answer-deadline": DEADLINE,
            "x-vmferry-idle-deadline": DEADLINE,
        }
    )
    machine.resume()
    source.migrate(liar.uri)
    return source


def runs_on(source: Control) -> None:
    machine = source.machine
    assert isinstance(machine, PythonMachine)
    assert machine.running
    before = machine.steps
    wait_until(lambda: machine.steps > before)
    machine.pause()
    machine.check()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def pongs(*values: int) -> bytes:
    return b"".join(Pong(value).encode() for value in values)


READY_AS_ME = pongs(READY, *Identity.own().numbers())
DEAD = Identity(Identity.own().host, (1 << 22) - 1, 1)
READY_AS_DEAD = pongs(READY, *DEAD.numbers())
HUGE_BITMAP = HavePages("ram", b"").encode()[:9] + ((1 << 64) - 8).to_bytes(8)

EARLY = {
    "success": (Shut(0).encode(), "a machine that was not sent yet"),
    "failure": (Shut(1).encode(), "its own messages say why"),
    "any failure": (Shut((1 << 32) - 1).encode(), "its own messages say why"),
    "a reason": (Reason("\x1b[2J\n").encode() + Shut(1).encode(), "\\x1b[2J\\n"),
    "ready": (READY_AS_ME, "a machine that was not sent yet"),
    "unknown": ((99).to_bytes(2) + bytes(2), "from 1 to 7"),
    "huge": (b"\0\1\xff\xff" + bytes(70_000), "4 bytes for message 1"),
    "huge bitmap": (HUGE_BITMAP, "a bitmap of at most 0 bytes"),
    "a request": (RequestPages(0, 4096, "ram").encode(), "as if this were postcopy"),
    "a resume": (ResumeAck().encode(), "as if this were postcopy"),
    "noise": (random.Random(1).randbytes(10_000), "expected"),  # noqa: S311
}


@pytest.mark.parametrize("name", EARLY)
def test_lie_while_memory_goes_ends_the_migration_at_once(
    stack: ExitStack, tmp_path: Path, name: str
) -> None:
    said, reason = EARLY[name]
    source = begin(stack, Liar(stack, tmp_path, early=once(said)), slow=True)
    assert source.wait(3) == Status.FAILED  # to send everything takes 4 s
    assert reason in source.query()["error-desc"]
    runs_on(source)


def test_destination_that_hangs_up_while_memory_goes_has_nothing(
    stack: ExitStack, tmp_path: Path
) -> None:
    source = begin(stack, Liar(stack, tmp_path, early=HANG_UP), slow=True)
    assert source.wait(3) == Status.FAILED
    runs_on(source)


HARMLESS = {
    "nothing": None,
    "answers that nobody asked for": once(pongs(7, GO, ABORT, 0, (1 << 32) - 1)),
    "half a message": once(b"\0\1\0"),
    "half of who it is": once(pongs(READY, 1, 2)),
    "byte by byte": byte_by_byte(READY_AS_ME),
    "answers for ever": for_ever(pongs(1)),
    "reasons for ever": for_ever(Reason("because " * 10).encode()),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_whoever_does_not_get_ready_has_a_deadline(
    stack: ExitStack, tmp_path: Path, name: str
) -> None:
    liar = Liar(stack, tmp_path, late=HARMLESS[name])
    before = resident()
    source = begin(stack, liar)
    assert source.wait(LONG) == Status.FAILED
    assert "waited 1 s for the destination's answer" in source.query()["error-desc"]
    assert resident() - before < 64 << 20
    runs_on(source)
    wait_until(lambda: bytes(liar.end) == Ping(ABORT).encode())


@pytest.mark.parametrize("name", ["answers for ever", "reasons for ever"])
def test_flood_while_memory_goes_takes_no_memory(
    stack: ExitStack, tmp_path: Path, name: str
) -> None:
    source = begin(stack, Liar(stack, tmp_path, early=HARMLESS[name]), slow=True)
    before = resident()
    wait_until(lambda: source.query().get("ram", {}).get("transferred", 0) > 1 << 20, LONG)
    assert resident() - before < 64 << 20
    source.cancel()
    assert source.wait(1) == Status.CANCELLED
    runs_on(source)


LAST = {
    "nothing": None,
    "ready again": once(READY_AS_ME),
    "noise": once(b"\xff" * 100),
    "a request": once(RequestPages(0, 4096, "ram").encode()),
    "the end": HANG_UP,
    "byte by byte": byte_by_byte(Shut(0).encode() * 9),
    "answers for ever": for_ever(pongs(1)),
}


WHO = {"itself": READY_AS_ME, "one who died": READY_AS_DEAD, "twice": READY_AS_ME * 2}


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", LAST)
def test_whoever_was_given_the_machine_and_does_not_say_so_leaves_a_doubt(
    stack: ExitStack, tmp_path: Path, name: str, who: str
) -> None:
    liar = Liar(stack, tmp_path, late=once(WHO[who]), last=LAST[name])
    source = begin(stack, liar)
    status = source.wait(LONG)
    assert bytes(liar.end) == Ping(GO).encode()
    assert source.run_state == RunState.POSTMIGRATE
    if name == "byte by byte" and status == Status.COMPLETED:
        return  # it was quick enough
    assert status == Status.FAILED
    assert source.in_doubt
    source.cont()
    runs_on(source)


def test_whoever_was_given_the_machine_may_still_refuse_it(
    stack: ExitStack, tmp_path: Path
) -> None:
    liar = Liar(stack, tmp_path, late=once(READY_AS_ME), last=once(Shut(1).encode()))
    source = begin(stack, liar)
    assert source.wait(LONG) == Status.FAILED
    assert bytes(liar.end) == Ping(GO).encode()
    runs_on(source)


# Sources


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """All that a source of a small machine says up to its last word."""
    path = tmp_path_factory.mktemp("recorded")
    with ExitStack() as stack, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}/socket")
        listener.listen()
        source = Control(stack.enter_context(PythonMachine(20).fill()))
        stack.callback(source.close)
        source.machine.resume()
        source.set_parameters({"x-vmferry-answer-deadline": 0.3})
        source.migrate(f"unix:{path}/socket")
        data = bytearray()
        with listener.accept()[0] as connection:
            while piece := connection.recv(1 << 16):
                data += piece
        assert source.wait(LONG) == Status.FAILED
        return bytes(data).removesuffix(Ping(ABORT).encode())


def boundaries(stream: bytes) -> list[int]:
    """Where one thing ends in the stream and another begins."""
    reader = StreamReader()
    found = {at + 1 for at in range(len(stream)) if list(reader.feed(stream[at : at + 1]))}
    return sorted(found | {0, len(stream)})


def _await_doubt(destination: Control, source: socket.socket) -> None:
    """Leave a destination that is in doubt, as it says nothing more."""
    wait_until(lambda: destination.status in ENDS or destination.in_doubt, LONG)
    with contextlib.suppress(OSError):
        source.shutdown(socket.SHUT_RD)


def offer(path: Path, said: bytes) -> tuple[Status, str]:
    """What becomes of a destination that hears this, and then the end."""
    with ExitStack() as stack:
        destination = Control(stack.enter_context(PythonMachine(20)))
        stack.callback(destination.close)
        destination.set_parameters({"x-vmferry-hello-deadline": 2, "x-vmferry-idle-deadline": 2})
        destination.incoming(f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as source:
            source.connect(str(path))
            doubting = threading.Thread(target=lambda: _await_doubt(destination, source))
            doubting.start()
            with contextlib.suppress(OSError):
                source.sendall(said)
                source.shutdown(socket.SHUT_WR)
                while source.recv(1 << 16):
                    pass
            doubting.join()
        doubted = destination.in_doubt
        assert not destination.machine.running
        destination.cancel_incoming()
        assert destination.wait(LONG) == Status.FAILED
        assert not destination.machine.running
        assert isinstance(destination.error, VmferryError)
        return (Status.ACTIVE if doubted else Status.FAILED), str(destination.error)


def test_source_that_is_cut_off_anywhere_gives_nobody_a_machine(
    stream: bytes, tmp_path: Path
) -> None:
    places = boundaries(stream)
    assert len(places) > 20
    cuts = sorted({place + more for place in places for more in (0, 1)} - {0, len(stream) + 1})
    for number, cut in enumerate(cut for cut in cuts if cut >= 4):
        outcome, reason = offer(tmp_path / str(number), stream[:cut])
        assert (outcome == Status.ACTIVE) == (cut == len(stream)), (cut, reason)


def test_source_with_one_wrong_bit_in_any_part_gives_nobody_a_machine(
    stream: bytes, tmp_path: Path
) -> None:
    chance = random.Random(os.environ.get("SEED", "1"))  # noqa: S311
    # Who the source is, is its word against nobody's: of a dead one the machine is taken.
    memory = stream.index(b"\x03ram")
    places = [place for place in boundaries(stream) if place > memory]
    assert len(places) > 10
    for number, (first, last) in enumerate(itertools.pairwise(places)):
        wrong = bytearray(stream)
        at = chance.randrange(first, last)
        wrong[at] ^= 1 << chance.randrange(8)
        offer(tmp_path / str(number), bytes(wrong))  # content may be anything
