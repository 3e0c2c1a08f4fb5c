"""The command between two real QEMUs: saved while it runs, shown, resumed, and interrupted."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from guests import Serial, walker
from tests.cli import schema
from tests.cli.command import Running, vmferry
from vmferry.qemu import QemuProcess

pytestmark = pytest.mark.qemu

Start = Callable[..., QemuProcess]

MACHINE = ("-machine", "pc", "-nodefaults", "-m", "16")


@pytest.fixture
def machine(tmp_path: Path) -> list[str]:
    """Arguments of a QEMU whose guest writes memory and counts."""
    image = tmp_path / "guest"
    image.write_bytes(walker(pages=512, hot=128, fill=1024))
    return [*MACHINE, "-kernel", str(image)]


@pytest.fixture
def source(start_qemu: Start, machine: list[str]) -> tuple[QemuProcess, Serial]:
    """The machine, running."""
    qemu = start_qemu(*machine)
    serial = Serial(qemu.serial)
    serial.wait_ready()
    serial.wait_beat()
    return qemu, serial


def test_machine_is_saved_shown_and_resumed(
    source: tuple[QemuProcess, Serial], start_qemu: Start, machine: list[str], tmp_path: Path
) -> None:
    qemu, serial = source
    saved = tmp_path / "saved"
    with Running("receive", "tcp:127.0.0.1:0", saved) as command:
        qemu.migrate(command.address(), capabilities=["return-path"])
        qemu.wait_migration()
        assert command.finish() == 0
    counter = serial.drain()
    assert command.out[-1].startswith("received pc-i440fx-7.2 with 16.")
    content = json.loads(vmferry("inspect", saved, "--json", "--verify").stdout)
    schema.INSPECT(content, "inspect")
    assert content["machine"] == "pc-i440fx-7.2"
    assert "return-path" in content["capabilities"]

    destination = start_qemu(*machine, "-incoming", "defer")
    uri = f"unix:{tmp_path}/incoming"
    destination.incoming(
        uri,
        capabilities=["multifd"],
        parameters={"multifd-channels": 2, "multifd-compression": "zstd"},
    )
    sent = vmferry("send", saved, uri, "--multifd", "2", "--compress", "zstd", "--verify")
    assert (sent.returncode, sent.stderr) == (0, "")
    destination.wait_running()
    assert Serial(destination.serial).wait_beat(after=counter) > counter


def test_interrupted_in_the_middle_the_source_runs_on(
    source: tuple[QemuProcess, Serial], tmp_path: Path
) -> None:
    qemu, serial = source
    with Running("receive", f"unix:{tmp_path}/s", tmp_path / "saved", "--json") as command:
        qemu.migrate(
            command.address(),
            capabilities=["return-path"],
            parameters={"max-bandwidth": 1 << 20, "downtime-limit": 1},
        )
        command.wait_for_phase("active")
        command.send_signal(signal.SIGINT)
        assert command.finish() == 130
    qemu.wait_migration("failed")
    assert qemu.execute("query-status")["status"] == "running"
    serial.wait_beat(after=serial.drain())
    assert not (tmp_path / "saved").exists()


def test_destination_that_does_not_fit_is_one_line(
    source: tuple[QemuProcess, Serial], start_qemu: Start, machine: list[str], tmp_path: Path
) -> None:
    qemu, _ = source
    saved = tmp_path / "saved"
    with Running("receive", f"unix:{tmp_path}/s", saved, "--quiet") as command:
        command.wait_until_at_rest()
        qemu.migrate(f"unix:{tmp_path}/s")
        assert command.finish() == 0
    machine[machine.index("16")] = "8"
    uri = f"unix:{tmp_path}/incoming"
    start_qemu(*machine, "-incoming", "defer").incoming(uri)
    sent = vmferry("send", saved, uri)
    assert (sent.returncode, sent.stdout) == (4, "")
    assert sent.stderr.count("\n") == 1
    assert "its own messages" in sent.stderr
