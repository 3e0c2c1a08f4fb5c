"""What a migration took is given back at each of its ends, on both sides, each time."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.attempts import descriptors
from tests.migration.python_machine import PythonMachine
from tests.migration.relay import Relay
from tests.transports.support import PROMPT, wait_until
from vmferry.migration.control import Control
from vmferry.migration.status import Status
from vmferry.migration.takeover import GO
from vmferry.wire.commands import Ping

LONG = 20.0
ROUNDS = 12


def mappings() -> Counter[str]:
    """How often what is mapped into this process; what has no name under none."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return Counter([*line.split(maxsplit=5), ""][5].partition(" ")[0] for line in lines)


def tasks() -> int:
    """Threads of this process, as the kernel counts them."""
    return len(list(Path("/proc/self/task").iterdir()))


class Sides:
    """A source that runs, and a destination for one migration."""

    def __init__(self, stack: ExitStack, path: Path, source: Control, number: int) -> None:
        self.stack = stack
        self.path = path
        self.source = source
        self.uri = f"unix:{path}/{number}"
        self.there = stack.enter_context(PythonMachine())
        self.destination = Control(self.there)
        stack.callback(self.destination.close)

    def begin(self, uri: str = "", **capabilities: bool) -> None:
        named = {name.replace("_", "-"): on for name, on in capabilities.items()}
        self.source.set_capabilities(named)
        self.source.migrate(uri or self.destination.incoming(self.uri))

    def ends(self, source: Status, destination: Status) -> None:
        assert self.source.wait(LONG) == source, self.source.query()
        assert self.destination.wait(LONG) == destination
        if self.source.run_state == "postmigrate":
            self.there.pause()
            self.source.cont()


def completed(sides: Sides) -> None:
    sides.begin()
    sides.ends(Status.COMPLETED, Status.COMPLETED)


def completed_with_multifd(sides: Sides) -> None:
    sides.begin(multifd=True)
    sides.ends(Status.COMPLETED, Status.COMPLETED)


def completed_with_differences(sides: Sides) -> None:
    sides.begin(xbzrle=True)
    sides.ends(Status.COMPLETED, Status.COMPLETED)


def completed_over_tcp(sides: Sides) -> None:
    sides.begin(sides.destination.incoming("tcp:127.0.0.1:0"), multifd=True)
    sides.ends(Status.COMPLETED, Status.COMPLETED)


def sent_to_a_file(sides: Sides) -> None:
    sides.begin(f"file:{sides.path}/file")
    sides.ends(Status.SENT, Status.NONE)


def sent_to_a_command(sides: Sides) -> None:
    sides.begin("exec:cat >/dev/null")
    sides.ends(Status.SENT, Status.NONE)


def failed_in_a_command(sides: Sides) -> None:
    sides.begin("exec:head -c 100000 >/dev/null; exit 3")
    sides.ends(Status.FAILED, Status.NONE)


def failed_as_nobody_listens(sides: Sides) -> None:
    sides.begin(f"unix:{sides.path}/nobody")
    sides.ends(Status.FAILED, Status.NONE)


def failed_as_it_is_refused(sides: Sides) -> None:
    sides.there.name = "python-2.0"
    sides.begin(multifd=True)
    sides.ends(Status.FAILED, Status.FAILED)


def failed_as_it_is_given_up_there(sides: Sides) -> None:
    sides.source.set_parameters({"max-bandwidth": 1 << 20})
    sides.begin(multifd=True)
    wait_until(lambda: sides.destination.status == Status.ACTIVE)
    sides.destination.cancel_incoming()
    sides.ends(Status.FAILED, Status.FAILED)


def failed_in_doubt(sides: Sides) -> None:
    with Relay(
        f"unix:{sides.path}/relay",
        sides.destination.incoming(sides.uri),
        trigger=Ping(GO).encode(),
    ) as relay:
        sides.begin(relay.address)
        assert sides.source.wait(LONG) == Status.FAILED
        wait_until(lambda: sides.destination.in_doubt)
        sides.destination.cancel_incoming()
        sides.ends(Status.FAILED, Status.FAILED)


def cancelled(sides: Sides) -> None:
    sides.source.set_parameters({"max-bandwidth": 1 << 20})
    sides.begin(multifd=True)
    wait_until(lambda: sides.destination.status == Status.ACTIVE)
    sides.source.cancel()
    sides.ends(Status.CANCELLED, Status.FAILED)


def cancelled_at_the_switchover(sides: Sides) -> None:
    sides.begin(pause_before_switchover=True, xbzrle=True)
    wait_until(lambda: sides.source.status == Status.PRE_SWITCHOVER, LONG)
    wait_until(lambda: sides.destination.status == Status.ACTIVE)
    sides.source.cancel()
    sides.ends(Status.CANCELLED, Status.FAILED)


ENDS = (
    completed,
    completed_with_multifd,
    completed_with_differences,
    completed_over_tcp,
    sent_to_a_file,
    sent_to_a_command,
    failed_in_a_command,
    failed_as_nobody_listens,
    failed_as_it_is_refused,
    failed_as_it_is_given_up_there,
    failed_in_doubt,
    cancelled,
    cancelled_at_the_switchover,
)


@pytest.mark.parametrize("log", ["auto", "shadow"])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_nothing_is_left(tmp_path: Path, end: Callable[[Sides], None], log: str) -> None:
    with PythonMachine(log=log).fill() as here:
        source = Control(here)
        source.set_parameters({"max-bandwidth": 0})
        here.resume()
        seen: list[Counter[str]] = []
        for number in range(ROUNDS):
            with ExitStack() as stack:
                sides = Sides(stack, tmp_path, source, number)
                threads, files, kernel = set(threading.enumerate()), descriptors(), tasks()
                end(sides)
                wait_until(lambda: set(threading.enumerate()) <= threads)  # noqa: B023
                wait_until(lambda: tasks() <= kernel)  # noqa: B023
                wait_until(lambda: descriptors() <= files, PROMPT)  # noqa: B023
            source.set_parameters({"max-bandwidth": 0})
            capabilities = dict.fromkeys(map(str, source.capabilities), False)
            source.set_capabilities(capabilities | {"return-path": True})
            gc.collect()  # some memory is in rings of objects; descriptors and threads are not
            seen.append(mappings())
        source.close()
    # What is used again and again, stacks of threads and arenas, is there after the first few.
    grown = seen[-1] - seen[ROUNDS // 3]
    assert grown.total() < ROUNDS // 2, grown
