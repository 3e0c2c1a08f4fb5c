"""The same URIs on both sides of a connection with a real QEMU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.transports.support import accepted, need_ipv6, receive
from vmferry.qemu import QemuProcess
from vmferry.transports import connect, listen

pytestmark = pytest.mark.qemu

Start = Callable[..., QemuProcess]
SMALL = ("-machine", "pc,accel=tcg", "-nodefaults", "-m", "4", "-S")
LISTENING = ["tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp::0", "unix:{}/a,b", "exec:cat {}/fifo"]
CONNECTING = ["tcp:127.0.0.1:{port}", "tcp:[::1]:{port}", "unix:{}/a,b", "exec:cat >{}/fifo"]


def migrated(source: QemuProcess, uri: str) -> bytes:
    """The stream of a whole migration from *source* to where *uri* listens."""
    with listen(uri) as listener:
        is_socket = listener.address.startswith(("tcp", "unix"))
        target = listener.address if is_socket else uri.replace("cat ", "cat >")
        source.migrate(target)
        with accepted(listener.accept(10)) as receiver:
            return receive(receiver)


@pytest.mark.parametrize("uri", LISTENING)
def test_qemu_connects_to_what_listens(uri: str, start_qemu: Start, tmp_path: Path) -> None:
    if "[::1]" in uri:
        need_ipv6()
    os.mkfifo(tmp_path / "fifo")
    stream = migrated(start_qemu(*SMALL), uri.format(tmp_path))
    assert stream[:8] == b"QEVM\0\0\0\3"
    assert b'"page_size"' in stream[-100_000:]


@pytest.mark.parametrize("uri", CONNECTING)
def test_qemu_takes_what_is_sent(uri: str, start_qemu: Start, tmp_path: Path) -> None:
    if "[::1]" in uri:
        need_ipv6()
    stream = migrated(start_qemu(*SMALL), f"unix:{tmp_path}/out")
    uri = uri.format(tmp_path, port=free_port())
    destination = start_qemu(*SMALL, "-incoming", "defer")
    os.mkfifo(tmp_path / "fifo")
    destination.incoming(uri.replace("cat >", "cat "))
    with connect(uri) as sender:
        sender.send([stream[i : i + 1000] for i in range(0, len(stream), 1000)])
        sender.end_of_data()
    assert destination.wait_migration()["status"] == "completed"
