"""Two QEMUs with one image, and a record of who owns the machine, whatever breaks."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from guests import Serial, walker
from tests.cli.command import Running, vmferry
from tests.interop.lab import wait_until
from tests.migration.relay import Relay
from tests.support.processes import is_frozen
from vmferry.errors import ImageLocked, TransportError
from vmferry.images import open_image
from vmferry.ownership.store import open_store
from vmferry.qemu import QemuProcess
from vmferry.wire.return_path import Shut

pytestmark = pytest.mark.qemu

UUID = "00112233-4455-6677-8899-aabbccddeeff"


class Pair:
    """A QEMU whose guest runs, one that waits for it, and the command that leads both."""

    def __init__(self, path: Path, start: Callable[..., QemuProcess]) -> None:
        self.path = path
        self._start = start
        self.image = path / "disk"
        self.image.write_bytes(bytes(1 << 20))
        self.store = open_store(f"file:{path}/owner")
        self.here = self._qemu("here")
        self.serial = Serial(self.here.serial)
        self.serial.wait_beat()
        self.uri = f"unix:{path}/channel"
        self.there = self._qemu("there", "-incoming", self.uri)

    def _qemu(self, name: str, *more: str) -> QemuProcess:
        program = self.path / "guest"
        program.write_bytes(walker(pages=256, hot=16, fill=256))
        monitor = f"unix:{self.path}/{name}.qmp,server=on,wait=off"
        drive = f"if=none,id=disk0,format=raw,file={self.image}"
        return self._start(
            *("-machine", "pc", "-nodefaults", "-m", "16392k", "-kernel", str(program)),
            *("-uuid", UUID, "-drive", drive, "-device", "virtio-blk-pci,drive=disk0"),
            *("-qmp", monitor, *more),
        )

    def command(self, *more: str, uri: str = "") -> list[str]:
        return [
            *("migrate", f"{self.path}/here.qmp", uri or self.uri, "--json"),
            *("--destination-qmp", f"{self.path}/there.qmp", "--record", self.store.uri, *more),
        ]

    def migrate(self, *more: str, uri: str = "", fault: str = "") -> int:
        done = vmferry(*self.command(*more, uri=uri), **({"VMFERRY_FAULT": fault} if fault else {}))
        self.said = done.stdout + done.stderr
        assert "Traceback" not in self.said
        return done.returncode

    def killed(self, point: str) -> None:
        """Lead the move up to *point*, and no further."""
        assert self.migrate(fault=f"{point}:kill") == -signal.SIGKILL
        assert self.run_states().count("running") <= 1

    def run_states(self) -> list[str]:
        """What each does; "gone" where it has ended."""
        found = []
        for qemu in (self.here, self.there):
            try:
                found.append(str(qemu.execute("query-status")["status"]))
            except TransportError:
                found.append("gone")
            except Exception as error:
                if "ended with status" not in str(error):
                    raise
                found.append("gone")
        return found

    @property
    def acts(self) -> list[str]:
        record = self.store.read().record
        assert record is not None
        return [entry.act for entry in record.history]

    def runs_there(self) -> None:
        before = self.serial.drain()
        assert Serial(self.there.serial).wait_beat() > before
        self._alone(self.there)

    def runs_here(self) -> None:
        self.here.wait_running()
        self.serial.drain()
        self.serial.wait_beat()
        self._alone(self.here)

    def _alone(self, one: QemuProcess) -> None:
        """It runs and has the image, and the other one neither."""
        states = self.run_states()
        assert states.count("running") == 1, states
        with pytest.raises(ImageLocked):
            open_image(self.image, active=True)
        if one is self.there and states[0] != "gone":
            assert states[0] == "postmigrate"


@pytest.fixture
def pair(start_qemu: Callable[..., QemuProcess], tmp_path: Path) -> Pair:
    return Pair(tmp_path, start_qemu)


def test_machine_moves_with_its_record(pair: Pair) -> None:
    assert pair.migrate() == 0, pair.said
    assert pair.acts == ["claim", "offer", "grant", "take", "start"]
    pair.runs_there()
    # And back: what is there is the owner by now.
    record = pair.store.read().record
    assert record is not None
    assert str(pair.there.pid) in record.owner
    assert pair.migrate("--settle") == 0, pair.said


def test_machine_that_stood_still_does_so_there(pair: Pair) -> None:
    pair.here.execute("stop")
    assert pair.migrate() == 0, pair.said
    assert pair.run_states() == ["postmigrate", "paused"]
    pair.there.execute("cont")
    pair.runs_there()


BEFORE = ["claim-landed", "offer-asked", "offer-landed"]
BEHIND = ["grant-asked", "grant-landed", "take-asked", "take-landed", "start-asked", "start-landed"]


@pytest.mark.parametrize("point", BEFORE)
def test_move_that_was_left_before_the_end_is_taken_back(pair: Pair, point: str) -> None:
    pair.killed(point)
    assert pair.migrate("--settle") == 4, pair.said
    pair.runs_here()


@pytest.mark.parametrize("point", BEHIND)
def test_move_that_was_left_at_its_end_is_ended(pair: Pair, point: str) -> None:
    pair.killed(point)
    assert "running" not in pair.run_states()
    assert pair.migrate("--settle") == 0, pair.said
    assert pair.acts[-5:] == ["claim", "offer", "grant", "take", "start"]
    pair.runs_there()


@pytest.mark.parametrize("point", BEHIND)
def test_source_that_has_died_by_then_is_not_needed(pair: Pair, point: str) -> None:
    pair.killed(point)
    before = pair.serial.drain()
    os.kill(pair.here.pid, signal.SIGKILL)
    pair.here.wait_exit()
    assert pair.migrate("--settle") == 0, pair.said
    assert Serial(pair.there.serial).wait_beat() > before
    assert pair.run_states() == ["gone", "running"]


@pytest.mark.parametrize("point", BEHIND[:-1])
def test_destination_that_has_died_and_never_run_leaves_it(pair: Pair, point: str) -> None:
    pair.killed(point)
    os.kill(pair.there.pid, signal.SIGKILL)
    pair.there.wait_exit()
    assert pair.migrate("--settle") == 4, pair.said
    pair.runs_here()


def test_destination_that_may_have_run_takes_it_along(pair: Pair) -> None:
    """Nobody knows: what the source still has may be out of date, and does not run."""
    pair.killed("start-landed")
    os.kill(pair.there.pid, signal.SIGKILL)
    pair.there.wait_exit()
    assert pair.migrate("--settle") == 4
    assert "as after a power cut" in pair.said
    # Nor may it be moved from there once more, now that its owner is seen to be dead.
    pair.there = pair._qemu("there", "-incoming", pair.uri)
    assert pair.migrate() == 2
    assert "given its machine away" in pair.said
    assert pair.migrate("--settle") == 4
    assert pair.run_states() == ["postmigrate", "inmigrate"]


def test_owner_that_is_fenced_meanwhile_is_not_run(pair: Pair) -> None:
    """By an operator, while the one who leads does not look."""
    with Running(*pair.command(), VMFERRY_FAULT="start-asked:stop") as command:
        wait_until(lambda: is_frozen(command._process.pid))
        record = pair.store.read().record
        assert record is not None
        fence = ["--engine", record.owner, "--generation", str(record.generation)]
        done = vmferry("owner", "fence", pair.store.uri, *fence, "--i-have-fenced-it")
        assert done.returncode == 0, done.stderr
        command.send_signal(signal.SIGCONT)
        assert command.finish() == 4
    assert pair.run_states() == ["postmigrate", "paused"]
    assert pair.migrate("--settle") == 4
    assert "fenced" in pair.said
    assert pair.run_states() == ["postmigrate", "paused"]


def test_machine_that_stood_still_is_not_run_by_who_ends_its_move(pair: Pair) -> None:
    pair.here.execute("stop")
    pair.killed("take-landed")
    assert pair.migrate("--settle") == 0, pair.said
    assert pair.run_states() == ["postmigrate", "paused"]


def test_machine_that_was_stopped_afterwards_is_left_so(pair: Pair) -> None:
    assert pair.migrate() == 0, pair.said
    pair.there.execute("stop")
    assert pair.migrate("--settle") == 0, pair.said
    assert pair.run_states() == ["postmigrate", "paused"]


def test_another_machine_is_left_alone(pair: Pair) -> None:
    pair.killed("grant-landed")
    pair.image = pair.path / "another"
    pair.image.write_bytes(bytes(1 << 20))
    other = pair._qemu("other", "-uuid", UUID.replace("0", "1"))
    pair.image = pair.path / "disk"
    command = [part.replace("there.qmp", "other.qmp") for part in pair.command("--settle")]
    done = vmferry(*command)
    assert done.returncode == 2, done.stdout
    assert other.execute("query-status")["status"] == "running"
    assert pair.migrate("--settle") == 0, pair.said
    pair.runs_there()


def test_source_that_dies_before_the_end_is_started_again(pair: Pair) -> None:
    pair.killed("offer-landed")
    os.kill(pair.here.pid, signal.SIGKILL)
    pair.here.wait_exit()
    assert pair.migrate("--settle") == 4
    assert "vmferry owner release" in pair.said
    assert "running" not in pair.run_states()


def test_word_that_is_lost_leaves_one_that_runs(pair: Pair) -> None:
    """Two QEMUs by themselves would both run: the destination starts before it says that it has."""
    relay = f"unix:{pair.path}/relay"
    with Relay(relay, pair.uri, trigger=Shut(0).encode()) as network:
        assert pair.migrate(uri=relay) == 4, pair.said
        assert network.has_cut.is_set()
    pair.runs_here()
    assert pair.acts[-1] == "revoke"


def test_image_that_cannot_be_had_goes_back(pair: Pair) -> None:
    """Somebody else has it by the time when the destination is to run."""
    pair.killed("take-landed")
    with open_image(pair.image, active=True):
        assert pair.migrate("--settle") == 4
    assert "cannot have the machine" in pair.said
    assert pair.run_states()[1] == "gone"
    record = pair.store.read().record
    assert record is not None
    assert str(pair.here.pid) in record.owner


def test_store_that_is_silent_is_waited_for(pair: Pair) -> None:
    with Path(f"{pair.path}/owner.lock").open("w") as lock:
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, wanted)
        with Running(*pair.command()) as command:
            command.wait_for("in doubt")
            lock.close()
            assert command.finish() == 0
    pair.runs_there()


def test_machine_of_another_owner_is_left_alone(pair: Pair) -> None:
    assert pair.migrate(fault="claim-landed:kill") == -signal.SIGKILL
    path = Path(f"{pair.path}/owner")
    record = pair.store.read().record
    assert record is not None
    path.write_text(path.read_text().replace(record.owner, "another"))
    assert pair.migrate() == 2
    assert "owner fence" in pair.said
    assert pair.run_states() == ["running", "inmigrate"]


def test_record_of_another_machine_is_refused(pair: Pair) -> None:
    assert pair.migrate(fault="claim-landed:kill") == -signal.SIGKILL
    path = Path(f"{pair.path}/owner")
    path.write_text(path.read_text().replace(UUID, UUID.replace("0", "1")))
    assert pair.migrate() == 2
    assert "expected the record of" in pair.said


@pytest.mark.parametrize("point", ["offer-landed", "grant-landed", "take-landed", "start-landed"])
def test_leader_that_is_frozen_leaves_no_room_for_another(pair: Pair, point: str) -> None:
    """What it knows of the record may be out of date when it wakes, and a QEMU checks nothing."""
    with Running(*pair.command(), VMFERRY_FAULT=f"{point}:stop") as command:
        wait_until(lambda: is_frozen(command._process.pid))
        assert pair.migrate("--settle") == 2
        assert "another process leads" in pair.said
        assert pair.run_states().count("running") == 0
        command.send_signal(signal.SIGCONT)
        assert command.finish() == 0
    pair.runs_there()


def test_lease_is_refused(pair: Pair) -> None:
    done = vmferry(*pair.command()[:-1], "etcd://127.0.0.1:1/vm")
    assert done.returncode == 2
    assert "renews no lease" in done.stdout + done.stderr
