"""One page server, and several QEMUs that get their memory from it at once."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.command import Running
from tests.cli.command import vmferry as command
from tests.interop.lab import Lab, monitored, wait_until
from vmferry.qemu.qmp import Qmp, QmpError

pytestmark = pytest.mark.qemu

SLOW = ("--bandwidth", "400kB/s", "--background")


class Server:
    def __init__(self, stack: ExitStack, lab: Lab) -> None:
        self.source = lab.source()
        self.saved = lab.receive(self.source)
        self.after = self.source.serial.drain()
        self.path = lab.directory() / "server"
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.callback(self._manager.close)
        self._manager.bind(str(lab.directory() / "manager"))
        self._manager.settimeout(60)
        self.process = stack.enter_context(
            Running(
                *("serve", self.saved.path, self.path, "--json"),
                NOTIFY_SOCKET=str(self._manager.getsockname()),
            )
        )
        assert self._manager.recv(100) == b"READY=1"

    def restore(self, *arguments: str) -> dict[str, object]:
        done = command("restore", self.saved.path, *arguments, "--server", self.path, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["ok"]
        return dict(result)


@pytest.fixture
def server(lab: Lab) -> Iterator[Server]:
    with ExitStack() as stack:
        yield Server(stack, lab)


def test_several_machines_from_one_server(lab: Lab, server: Server) -> None:
    machines = [monitored(lab) for _ in range(3)]
    for vm, monitor in machines:
        uri = f"unix:{lab.directory()}/socket"
        server.restore(uri, "--qmp", monitor, *SLOW)
        assert vm.run_state == "running"
    # It is told to end, and does when they have all that they need.
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: _refuses(server.path))
    for vm, _ in machines:
        vm.qemu.wait_migration()
        lab.assert_counts(vm, server.after)
    assert server.process.finish() == 0
    events = [json.loads(line) for line in server.process.out]
    assert events[-1] == {"event": "result", "ok": True, "directory": str(server.saved.path)}
    ended = [e for e in events if e.get("status") == "completed"]
    assert len(ended) == 3
    assert all(e["time_to_running_ms"] > 0 for e in ended)


def _refuses(path: Path) -> bool:
    with Qmp.connect(str(path)) as qmp:
        try:
            qmp.execute("restore", {"uri": "unix:nowhere"})
        except QmpError as error:
            return "ends when nobody depends" in error.description
    return False


def test_restore_that_is_waited_for_says_how_it_went(lab: Lab, server: Server) -> None:
    vm, monitor = monitored(lab)
    result = server.restore(f"unix:{lab.directory()}/socket", "--qmp", monitor)
    assert result["requests"]
    assert vm.qemu.wait_migration()["status"] == "completed"
    lab.assert_counts(vm, server.after)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.finish() == 0


def test_server_that_dies_can_be_followed_by_another(lab: Lab, server: Server) -> None:
    vm, monitor = monitored(lab)
    uri = f"unix:{lab.directory()}/socket"
    server.restore(uri, "--qmp", monitor, *SLOW)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: _refuses(server.path))
    server.process.send_signal(signal.SIGTERM)  # this one is obeyed
    assert server.process.finish() == 128 + signal.SIGTERM
    wait_until(lambda: vm.status() == "postcopy-paused")
    with Running("serve", server.saved.path, server.path) as other:
        other.wait_for("listening")
        server.restore(uri, "--qmp", monitor, "--resume")
        other.send_signal(signal.SIGTERM)
        assert other.finish() == 0
    vm.qemu.wait_migration()
    lab.assert_counts(vm, server.after)


def test_wrong_orders(lab: Lab, server: Server, tmp_path: Path) -> None:
    with Qmp.connect(str(server.path)) as qmp:
        for wrong, why in (
            ({}, "uri"),
            ({"uri": "unix:x", "bandwidth": -1}, "bandwidth above 0"),
            ({"uri": "unix:x", "page-sizes": {"ram": 5}}, "powers of two"),
        ):
            with pytest.raises(QmpError, match=why):
                qmp.execute("restore", wrong)
        with pytest.raises(QmpError, match="no restore 7"):
            qmp.execute("query-restores", {"id": 7})
        number = qmp.execute("restore", {"uri": f"unix:{tmp_path}/nobody"})["id"]
        wait_until(lambda: not qmp.execute("query-restores")[0]["under-way"])
        (told,) = qmp.execute("query-restores", {"id": number})
    assert told["status"] == "failed"
    assert "nobody" in told["error-desc"]
    other = lab.receive(lab.source())
    done = command("restore", other.path, "unix:x", "--server", server.path)
    assert done.returncode == 2
    assert "another checkpoint" in done.stderr
    server.process.send_signal(signal.SIGTERM)
    assert server.process.finish() == 0
