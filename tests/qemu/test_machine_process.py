"""Machines in processes of their own, as whoever moves them has them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tests.qemu.hosts import PATIENCE, SMALL
from vmferry.errors import MachineError, PeerError
from vmferry.qemu.machine_process import MachineProcess


def test_guest_runs_in_another_process_and_is_heard_to_the_end() -> None:
    with MachineProcess(SMALL, timeout=PATIENCE) as process:
        assert process.pid != os.getpid()
        process.console.wait_filled(PATIENCE)
        process.qmp.execute("stop")
        process.check()
        process.quit()
        assert process.said.count(b"\n") == process.console.count


def test_process_that_cannot_start_says_why() -> None:
    config = replace(SMALL, guest=replace(SMALL.guest, working_set=SMALL.ram))
    with MachineProcess(config) as process, pytest.raises(PeerError, match=r"status 2: .*work"):
        process.qmp.execute("query-status")


def test_what_is_wrong_is_raised() -> None:
    with MachineProcess(SMALL, timeout=PATIENCE) as process:
        process.console.wait_filled(PATIENCE)
        process.qmp.execute("stop")
        process.console.feed(b"\nE" + b" %016x" % 1 * 5 + b"\n")
        with pytest.raises(MachineError, match="the guest found an error"):
            process.check()


def test_process_is_gone_afterwards() -> None:
    with MachineProcess(SMALL, incoming="defer", timeout=PATIENCE) as process:
        process.qmp.execute("query-status")
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
