"""Mirrors of a hosted machine whose targets and clients misbehave."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.migration.test_own_disks import SIZES, config, fill, writing
from tests.qemu.test_hosted_mirror import storage_daemons
from tests.transports.support import wait_until
from vmferry.errors import TransportError
from vmferry.images import open_image
from vmferry.qemu import Qmp, QmpError
from vmferry.qemu.block_jobs import BlockJobs
from vmferry.qemu.hosting import Host

LONG = 60.0
PROMPT = 25.0
"""Seconds; less than an NBD server may stay silent."""


class Servers:
    """NBD servers with an empty disk each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, size: int = SIZES[1]) -> dict[str, str]:
        """The address of a new one."""
        name = self._path / f"server{len(self._processes)}"
        with name.with_suffix(".raw").open("wb") as file:
            file.truncate(size)
        command = ["qemu-nbd", "-f", "raw", "-x", "it", "-t", "-e", "4"]
        command += ["-k", f"{name}.socket", f"{name}.raw"]
        self._processes.append(subprocess.Popen(command))
        wait_until(lambda: _listens(f"{name}.socket"))
        return {"type": "unix", "path": f"{name}.socket"}

    def signal(self, number: int) -> None:
        for process in self._processes:
            os.kill(process.pid, number)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return not probe.connect_ex(path)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    found = Servers(tmp_path)
    yield found
    found.close()


class Mirrored:
    """A machine that runs, its monitor, and what is asked of it."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        machine = config(path, "disk")
        fill(machine, 1)
        self.host = stack.enter_context(Host(machine, monitor=f"{path}/qmp"))
        self.host.console.wait_filled()
        self.qmp = stack.enter_context(Qmp.connect(f"{path}/qmp"))

    def add(self, server: dict[str, str], name: str = "target") -> None:
        node = {"driver": "nbd", "node-name": name, "export": "it", "server": server}
        self.qmp.execute("blockdev-add", node)

    def mirror(self, target: str = "target", name: str = "copy") -> None:
        job = {"job-id": name, "device": "disk1", "target": target, "sync": "full"}
        self.qmp.execute("blockdev-mirror", job | {"auto-dismiss": False})

    def job(self) -> dict[str, Any]:
        (found,) = self.qmp.execute("query-jobs")
        return dict(found)

    def wait_for(self, status: str, timeout: float = LONG) -> dict[str, Any]:
        wait_until(lambda: self.job()["status"] == status, timeout)
        return self.job()


@pytest.fixture
def mirrored(tmp_path: Path) -> Iterator[Mirrored]:
    with ExitStack() as stack:
        yield Mirrored(tmp_path, stack)


def test_mirror_that_was_cancelled_is_no_copy(mirrored: Mirrored, servers: Servers) -> None:
    mirrored.add(servers.start())
    mirrored.mirror()
    mirrored.wait_for("ready")
    mirrored.qmp.execute("block-job-cancel", {"device": "copy", "force": True})
    assert mirrored.wait_for("concluded")["error"] == "it was cancelled"


def test_two_mirrors_do_not_share_a_target(mirrored: Mirrored, servers: Servers) -> None:
    mirrored.add(servers.start())
    mirrored.mirror()
    with pytest.raises(QmpError, match="in use by a mirror"):
        mirrored.mirror(name="other")


def test_mirror_is_ready_though_its_disk_is_written_all_the_time(
    mirrored: Mirrored, servers: Servers
) -> None:
    """What is left at any moment is copied within another one, when the machine stands still."""
    mirrored.add(servers.start())
    image = mirrored.host.machine.images[1]
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            for offset in range(0, image.size - 512, 1 << 20):
                image.write(offset, b"written" * 10)

    writer = threading.Thread(target=work)
    writer.start()
    try:
        mirrored.mirror()
        mirrored.wait_for("ready", 20.0)
    finally:
        done.set()
        writer.join()


def test_server_that_hangs_holds_nothing_else(mirrored: Mirrored, servers: Servers) -> None:
    address = servers.start()
    mirrored.add(address)
    begun = time.monotonic()
    with writing(mirrored.host):
        mirrored.mirror()
        mirrored.wait_for("ready")
        servers.signal(signal.SIGSTOP)
        time.sleep(0.1)  # so that it has asked for something
        with Qmp.connect(f"{mirrored.path}/qmp") as other:
            adding = threading.Thread(target=adds_in_vain, args=(mirrored, address))
            adding.start()
            other.execute("stop")
            other.execute("cont")
            other.execute("block-job-cancel", {"device": "copy", "force": True})
            wait_until(lambda: other.execute("query-jobs")[0]["status"] == "concluded", PROMPT)
            other.execute("job-dismiss", {"id": "copy"})
            other.execute("blockdev-del", {"node-name": "target"})
            mirrored.host.console.wait_beat()
    assert time.monotonic() - begun < PROMPT
    servers.signal(signal.SIGKILL)
    adding.join()


def adds_in_vain(mirrored: Mirrored, address: dict[str, str]) -> None:
    with pytest.raises(QmpError):
        mirrored.add(address, "another")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_machine_ends_whatever_its_targets_do(
    tmp_path: Path, servers: Servers, number: int
) -> None:
    begun = time.monotonic()
    with ExitStack() as stack:
        mirrored = Mirrored(tmp_path, stack)
        mirrored.add(servers.start())
        mirrored.add(servers.start(), "unused")
        mirrored.mirror()
        mirrored.wait_for("ready")
        servers.signal(number)
        mirrored.host.machine.images[1].write(0, b"more")
        time.sleep(0.1)  # so that it has asked for something
    assert time.monotonic() - begun < PROMPT
    assert not [one.name for one in threading.enumerate() if one.name == "mirror"]


def test_job_is_dismissed_when_its_end_is_being_told(tmp_path: Path, servers: Servers) -> None:
    """A client may be that fast."""
    told = threading.Event()

    def emit(_name: str, data: dict[str, Any]) -> None:
        if data["status"] == "concluded":
            commands["job-dismiss"].run({"id": "a"})
            told.set()

    machine = config(tmp_path, "disk")
    with open_image(machine.disk[1].file, active=True) as image:
        jobs = BlockJobs([image], emit)
        commands = jobs.commands()
        server = {"server": servers.start(), "export": "it"}
        commands["blockdev-add"].run({"driver": "nbd", "node-name": "target"} | server)
        job = {"job-id": "a", "device": "disk0", "target": "target", "sync": "full"}
        commands["blockdev-mirror"].run(job | {"auto-dismiss": False})
        commands["block-job-cancel"].run({"device": "a", "force": True})
        assert told.wait(LONG)
        jobs.close()
    assert commands["query-jobs"].run({}) == []


SENSELESS = [
    ({"type": "unix", "path": "a\0b"}, ""),
    ({"type": "unix", "path": "a" * 5000}, ""),
    ({"type": "unix", "path": "\ud800"}, ""),
    ({"type": "unix", "path": ""}, ""),
    ({"type": "unix", "path": "/nowhere"}, "\ud800"),
    ({"type": "unix", "path": "/nowhere"}, "a" * 5000),
    ({"type": "inet", "host": "", "port": "1"}, ""),
    ({"type": "inet", "host": "127.0.0.1/x", "port": "1"}, ""),
    ({"type": "inet", "host": "a\0b", "port": "1"}, ""),
    ({"type": "inet", "host": "a" * 5000, "port": "1"}, ""),
    ({"type": "inet", "host": "127.0.0.1", "port": "99999"}, ""),
    ({"type": "inet", "host": "127.0.0.1", "port": "http"}, ""),
    ({"type": "inet", "host": "user@127.0.0.1", "port": "1"}, ""),
    ({"type": "inet", "host": "::1%lo]/x[", "port": "1"}, ""),
]


@pytest.mark.parametrize(("server", "export"), SENSELESS)
def test_senseless_servers(mirrored: Mirrored, server: dict[str, str], export: str) -> None:
    node = {"driver": "nbd", "node-name": "a", "server": server, "export": export}
    with pytest.raises(QmpError) as caught:
        mirrored.qmp.execute("blockdev-add", node)
    assert "bug" not in str(caught.value)
    with pytest.raises(QmpError, match="no node"):
        mirrored.qmp.execute("blockdev-del", {"node-name": "a"})


def test_daemon_that_hangs_holds_no_other_command(tmp_path: Path) -> None:
    with ExitStack() as stack:
        host = stack.enter_context(
            Host(config(tmp_path, "disk"), incoming="defer", monitor=f"{tmp_path}/qmp")
        )
        qmp, other = (stack.enter_context(Qmp.connect(f"{tmp_path}/qmp")) for _ in range(2))
        address = {"type": "unix", "data": {"path": f"{tmp_path}/nbd"}}
        qmp.execute("nbd-server-start", {"addr": address})
        (daemon,) = storage_daemons()
        os.kill(daemon, signal.SIGSTOP)
        export = {"type": "nbd", "id": "a", "node-name": "disk0", "writable": True}
        with pytest.raises(TransportError, match="silent"):
            qmp.execute("block-export-add", export, timeout=0.5)
        other.execute("migrate-incoming", {"uri": f"unix:{tmp_path}/channel"}, timeout=PROMPT)
        assert host.state == "inmigrate"
        os.kill(daemon, signal.SIGCONT)
        other.execute("nbd-server-stop")
        with pytest.raises(QmpError, match="no NBD server"):
            qmp.execute("block-export-add", export)
    assert not storage_daemons()
