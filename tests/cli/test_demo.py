"""``vmferry demo``: what it shows, and to whom."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

from tests.cli import schema
from tests.cli.command import Running, vmferry
from tests.machines.hosted import NO_KVM

SMALL = ("demo", "--ram", "16MiB", "--moves", "1")


def test_lines() -> None:
    done = vmferry(*SMALL, "--kind", "unicorn")
    assert (done.returncode, done.stdout.count("\n")) == (0, 10)
    assert done.stdout.startswith("A machine with 16 MiB of RAM runs on the Unicorn emulator.")
    assert re.search(r"stood still for [\d.]+ m?s\.", done.stdout)
    assert "The machine is intact:" in done.stdout
    for line in done.stderr.splitlines():
        assert line.startswith("move 1: ")


def test_json() -> None:
    done = vmferry(*SMALL, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    for number, event in enumerate(events):
        schema.demo_event(event, f"line {number}")
    kinds = [event["event"] for event in events]
    assert [kind for kind in kinds if kind != "progress"] == ["machine", "moved", "result"]
    assert "progress" in kinds
    assert events[0]["kind"] == ("unicorn" if NO_KVM else "kvm")
    assert events[-1]["downtimes"] == [events[-2]["stood_still"]]


def test_without_any_host_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "sys.modules['vmferry.machines.unicorn'] = None\n"
        "real = os.open\n"
        "os.open = lambda path, *more: real('/nothing' if path == '/dev/kvm' else path, *more)\n"
    )
    done = vmferry(*SMALL, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("vmferry: no machine can be run here: there is no /dev/kvm")
    assert "pip install vmferry[unicorn]" in done.stderr


def test_kind_that_there_is_not() -> None:
    done = vmferry(*SMALL, "--kind", "xen")
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected auto, kvm, unicorn, found 'xen'" in done.stderr


def test_ctrl_c_leaves_no_process_behind() -> None:
    with Running("demo", "--kind", "unicorn", "--json", "--moves", "50") as command:
        event = json.loads(command.wait_for('"progress"'))
        command.send_signal(signal.SIGINT)
        assert command.finish() == 130
    for side in event["sides"]:
        assert not Path(f"/proc/{side['pid']}").exists()
    assert command.err == ["vmferry: interrupted"]
