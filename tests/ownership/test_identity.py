"""Whether a process has ended, as another one can tell."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vmferry.ownership.identity import Identity


def test_process_lives_until_it_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        identity = replace(Identity.own(), pid=process.pid, started=int(stat[19]) & 0xFFFFFFFF)
        assert not identity.is_dead()
        assert not identity.dies_within(0.01)
        process.communicate(b"\n")
    assert identity.is_dead()
    assert identity.dies_within(0)


def test_another_process_of_that_number_is_another_one() -> None:
    assert replace(Identity.own(), started=1).is_dead()


def test_nothing_is_known_of_another_host() -> None:
    assert not replace(Identity.own(), host=1, pid=0x7FFFFFFF).is_dead()


@pytest.mark.parametrize("pid", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_number_that_no_process_has(pid: int) -> None:
    assert replace(Identity.own(), pid=pid).is_dead() == (pid != 0)


def test_process_that_proc_hides_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(pid: int) -> tuple[str, int]:
        raise FileNotFoundError(pid)

    identity = Identity.own()
    monkeypatch.setattr("vmferry.ownership.identity._state", hidden)
    assert not identity.is_dead()
