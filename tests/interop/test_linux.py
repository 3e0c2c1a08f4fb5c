"""A Linux that was saved while it ran, and runs at once where it is restored."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import vmferry
from guests.linux import LinuxGuest, Shell, lacks
from tests.transports.support import background, wait_until
from vmferry.qemu import QemuProcess

pytestmark = pytest.mark.qemu

GUEST = LinuxGuest(memory=512, data=16)
BOOT = 180.0


class Saved(NamedTuple):
    """A checkpoint; how often its guest has added up what it holds by then, and its clock."""

    directory: Path
    passes: int
    clock: float


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A Linux that was up, with a process at work."""
    if (why := lacks()) is not None:
        if os.environ.get("VMFERRY_REQUIRE_QEMU"):
            pytest.fail(f"VMFERRY_REQUIRE_QEMU is set, but {why}", pytrace=False)
        pytest.skip(why)
    path = tmp_path_factory.mktemp("linux")
    uri = f"unix:{path}/socket"
    with QemuProcess(GUEST.arguments(path)) as qemu:
        shell = Shell(qemu.serial)
        shell.wait_ready(BOOT)
        passes, clock = shell.check(), shell.uptime()
        arrival = background(lambda: vmferry.receive(uri, path / "saved"))
        wait_until((path / "socket").exists)
        qemu.migrate(uri, parameters={"max-bandwidth": 1 << 40, "downtime-limit": 5000})
        arrival.result(BOOT).close()
    return Saved(path / "saved", passes, clock)


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
def test_linux_goes_on(
    saved: Saved, start_qemu: Callable[..., QemuProcess], tmp_path: Path, preempt: bool
) -> None:
    """Its shell answers, what its process and its files hold is right, and its clock goes on."""
    qemu = start_qemu(*GUEST.arguments(tmp_path), "-incoming", "defer")
    options = vmferry.LazyOptions(preempt=preempt)
    shell, began = Shell(qemu.serial), time.monotonic()
    with vmferry.Checkpoint(saved.directory) as checkpoint:
        restoring = background(
            lambda: checkpoint.serve(f"unix:{tmp_path}/socket", qmp=qemu.qmp, options=options)
        )
        # What is typed before it runs is lost with the serial port that was there before.
        qemu.wait_running()
        clock = shell.uptime()
        assert shell.check() >= saved.passes
        result = restoring.result(BOOT)
    assert result.running is not None
    assert saved.clock <= clock <= saved.clock + (time.monotonic() - began) + BOOT
    before = shell.check()
    shell.run("sleep 1")
    assert shell.uptime() >= clock + 1
    assert shell.check() > before
