"""Saved machines that run at once in a stock QEMU, and get their memory as they ask for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vmferry
from tests.cli.command import COMMAND, environment
from tests.cli.command import vmferry as vmferry_command
from tests.data.record import DRIVES
from tests.interop.lab import PC, Lab, Vm, monitored, wait_until
from tests.support.capture import Scenario
from vmferry.checkpoint import working_set
from vmferry.checkpoint.restore import Restore, Restored
from vmferry.errors import CheckpointDamaged, Refused
from vmferry.migration.postcopy.source import LazyOptions, Paused

pytestmark = pytest.mark.qemu

CARDS = "-netdev hubport,id=n0,hubid=0 -device virtio-net-pci,netdev=n0"
MACHINES = [
    pytest.param(replace(PC, machine=("-machine", "pc", "-vga", "std")), id="pc"),
    pytest.param(
        replace(
            PC,
            machine=(
                *f"-machine q35 -nodefaults -smp 3 {CARDS} -device virtio-rng-pci".split(),
                *("-device", "virtio-blk-pci,drive=disk0", "-device", "ide-hd,drive=disk1"),
            ),
            disks=DRIVES,
        ),
        id="q35-virtio-smp",
    ),
    pytest.param(
        replace(
            PC,
            machine=(
                *("-machine", "pc,memory-backend=ram", "-nodefaults"),
                *("-object", "memory-backend-memfd,id=ram,size={ram},share=on"),
            ),
        ),
        id="memfd",
    ),
    pytest.param(replace(PC, machine=("-machine", "microvm", "-nodefaults")), id="microvm"),
    pytest.param(
        replace(PC, machine=("-machine", "pc-i440fx-2.3", "-nodefaults")), id="without-footers"
    ),
]


def restored(
    lab: Lab, checkpoint: vmferry.Checkpoint, scenario: Scenario = PC, **options: Any
) -> tuple[Vm, Restored]:
    """A fresh QEMU that runs the machine and has all of it."""
    vm = lab.destination(scenario)
    uri = f"unix:{lab.directory()}/socket"
    result = checkpoint.serve(uri, qmp=vm.qemu.qmp, **options)
    vm.qemu.wait_migration()
    return vm, result


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("scenario", MACHINES)
def test_machine_goes_on_with_all_of_its_memory(
    lab: Lab, scenario: Scenario, preempt: bool
) -> None:
    source = lab.source(scenario)
    checkpoint = lab.receive(source, scenario)
    vm, result = restored(lab, checkpoint, scenario, options=LazyOptions(preempt=preempt))
    lab.assert_goes_on(vm, source, scenario)
    assert result.running is not None
    assert result.requests > 0


def test_memory_is_that_of_the_checkpoint(lab: Lab) -> None:
    """A machine that was saved while it stood still stands still, with every page in its place."""
    source = lab.source()
    source.qemu.execute("stop")
    checkpoint = lab.receive(source)
    vm, result = restored(lab, checkpoint)
    assert result.running is None
    assert vm.run_state == "paused"
    path = vm.qemu.directory / "memory"
    vm.qemu.save_memory(path, 0, 640 << 10)
    memory = next(b for b in checkpoint.blocks if b.length == PC.ram_size)
    expected = bytearray(640 << 10)
    pages = checkpoint.memory(memory)
    assert pages is not None
    pages.read(0, memoryview(expected))
    assert path.read_bytes() == expected
    vm.qemu.execute("cont")
    lab.assert_goes_on(vm, source)


def test_same_checkpoint_many_times(lab: Lab) -> None:
    """What is served is not changed; each restore learns what to send first in the next one."""
    source = lab.source()
    checkpoint = lab.receive(source)
    after = source.serial.drain()
    for _ in range(4):
        vm, _ = restored(lab, checkpoint)
        lab.assert_counts(vm, after)
        vm.qemu.stop()
    checkpoint.verify()
    known = working_set.read(checkpoint.path, [1 << 20] * len(checkpoint.blocks))
    assert known.restores == 4
    assert known.coverage is not None
    assert known.pushed > 0


@pytest.mark.parametrize(
    ("machine", "what"),
    [
        (("-machine", "pc", "-nodefaults", "-device", "VGA"), "more"),
        (("-machine", "pc", "-nodefaults", "-m", "64M"), "has 64 MiB, not"),
        (("-machine", "q35", "-nodefaults"), "type .pc-q35-7.2., the saved machine of .pc-i440"),
        (
            ("-machine", "pc-i440fx-7.1", "-nodefaults"),
            "type .pc-i440fx-7.1., the saved",
        ),
    ],
)
def test_another_machine_is_refused_before_it_runs(
    lab: Lab, machine: tuple[str, ...], what: str
) -> None:
    checkpoint = lab.receive(lab.source())
    vm = lab.destination(replace(PC, machine=machine))
    if "-m" in machine:
        vm.qemu.stop()
        vm = Vm(lab._start_qemu(*machine, "-incoming", "defer"), vm.serial)
    with pytest.raises(Refused, match=what):
        Restore(checkpoint, f"unix:{lab.path}/socket", qmp=vm.qemu.qmp).run()
    assert vm.run_state == "inmigrate"


def test_checkpoint_with_disks_is_refused(lab: Lab) -> None:
    machine = ("-machine", "pc", "-nodefaults", "-device", "virtio-blk-pci,drive=disk0")
    scenario = replace(PC, machine=machine, disks=DRIVES[:1], capabilities=("block",))
    checkpoint = lab.receive(lab.source(scenario), scenario)
    with pytest.raises(vmferry.UsageError, match="carries disks"):
        Restore(checkpoint, f"unix:{lab.path}/socket").run()


def test_damaged_page_is_never_given_to_the_machine(lab: Lab) -> None:
    checkpoint = lab.receive(lab.source())
    block = next(b for b in checkpoint.blocks if b.length == PC.ram_size)
    pages = checkpoint.memory(block)
    assert pages is not None
    wrong = int(np.flatnonzero(pages.sums)[-1])
    with pages.path.open("r+b") as file:
        file.seek(wrong * 4096 + 17)
        file.write(b"damage")
    vm = lab.destination()
    uri = f"unix:{lab.directory()}/socket"
    vm.qemu.incoming(uri, capabilities=("postcopy-ram",))
    with pytest.raises((Paused, CheckpointDamaged), match="damaged") as caught:
        Restore(checkpoint, uri, verify=True).run()
    if isinstance(caught.value, Paused):
        wait_until(lambda: vm.status() == "postcopy-paused")


@pytest.mark.parametrize("verify", [False, True])
def test_page_that_has_vanished_is_no_zero_page(lab: Lab, verify: bool) -> None:
    """What nobody asks for: the file was cut, or it has a hole where it has to have content."""
    checkpoint = lab.receive(lab.source())
    block = next(b for b in checkpoint.blocks if b.name == "pc.bios")
    pages = checkpoint.memory(block)
    assert pages is not None
    os.truncate(pages.path, 0)
    if verify:
        os.truncate(pages.path, block.length)
    vm = lab.destination()
    uri = f"unix:{lab.directory()}/socket"
    vm.qemu.incoming(uri, capabilities=("postcopy-ram",))
    what = "does not match its sum" if verify else "shorter than"
    with pytest.raises((Paused, CheckpointDamaged), match=what):
        Restore(checkpoint, uri, verify=verify).run()


@contextmanager
def command(*arguments: str | Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """The command while it runs."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_page_server_that_is_killed_can_be_followed_by_another(lab: Lab) -> None:
    source = lab.source()
    checkpoint = lab.receive(source)
    after = source.serial.drain()
    vm, monitor = monitored(lab)
    uri = f"unix:{lab.directory()}/socket"
    fault = {"VMFERRY_FAULT": "loaded-heard:kill"}
    options = ("--qmp", monitor, "--no-working-set")
    with command("restore", checkpoint.path, uri, *options, **fault) as first:
        assert first.wait(60) == -signal.SIGKILL
    wait_until(lambda: vm.status() == "postcopy-paused")
    with command("restore", checkpoint.path, uri, *options, "--resume", "--json") as second:
        out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["ok"]
    vm.qemu.wait_migration()
    lab.assert_counts(vm, after)


def test_command_says_how_it_went(lab: Lab) -> None:
    source = lab.source()
    checkpoint = lab.receive(source)
    vm, monitor = monitored(lab)
    uri = f"unix:{lab.directory()}/socket"
    with command("restore", checkpoint.path, uri, "--lazy", "--qmp", monitor, "--json") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["ok"]
    assert result["time_to_running_ms"] > 0
    assert result["requests"] >= len(result["fault_service_us"]["histogram"]) - 12
    assert set(result) >= {"pages_sent", "total_ms"}
    lab.assert_goes_on(vm, source)


def test_command_starts_qemu(lab: Lab) -> None:
    source = lab.source()
    checkpoint = lab.receive(source)
    directory = lab.directory()
    serial = directory / "serial"
    qemu = ["qemu-system-x86_64", *PC.arguments(directory), "-display", "none"]
    qemu += ["-chardev", f"file,id=s,path={serial}", "-serial", "chardev:s"]
    after = source.serial.drain()
    slow = ("--bandwidth", "100kB/s")  # so that it lacks memory when it is told to end
    with command("restore", checkpoint.path, "--json", *slow, "--", *qemu) as process:
        wait_until(lambda: serial.exists() and b"C " in serial.read_bytes())
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    beats = [line for line in serial.read_text().splitlines() if line.startswith("C ")]
    assert int(beats[0].split()[1], 16) > after
    assert not [line for line in serial.read_text().splitlines() if line.startswith("E")]


def test_what_was_not_begun_is_not_gone_on_with(lab: Lab) -> None:
    checkpoint = lab.receive(lab.source())
    vm, monitor = monitored(lab)
    uri = f"unix:{lab.directory()}/socket"
    done = vmferry_command("restore", checkpoint.path, uri, "--qmp", monitor, "--resume")
    assert done.returncode == 2
    assert 'postcopy-paused, found one where it is "none"' in done.stderr
    assert vm.run_state == "inmigrate"


@pytest.mark.parametrize(
    "option", ["--preempt", "--resume", "--verify", "--background", "--bandwidth=1M"]
)
def test_options_for_memory_that_follows_do_not_go_with_a_whole_machine(
    tmp_path: Path, option: str
) -> None:
    done = vmferry_command("restore", tmp_path, "unix:nowhere", "--whole", option)
    assert done.returncode == 2
    assert f"found --whole and {option.partition('=')[0]}" in done.stderr


def test_command_ends_while_its_qemu_has_not_even_begun(lab: Lab) -> None:
    checkpoint = lab.receive(lab.source())
    started = lab.directory() / "started"
    program = ["sh", "-c", 'touch "$1"; exec sleep 60', "sh", str(started)]
    with command("restore", checkpoint.path, "--", *program) as process:
        wait_until(started.exists)
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=20)  # a QEMU has longer to open its monitor
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "vmferry: terminated\n"


def test_what_was_wanted_is_shown(lab: Lab) -> None:
    checkpoint = lab.receive(lab.source())
    arguments = ("inspect", checkpoint.path, "--working-set")
    assert "never restored" in vmferry_command(*arguments).stdout
    for _ in range(2):
        restored(lab, checkpoint)
    content = json.loads(vmferry_command(*arguments, "--json").stdout)
    assert content["restores"] == 2
    assert content["pages"] == sum(content["blocks"].values())
    counts = [pages for _, pages in content["within_ms"]]
    assert 0 < counts[-1] <= content["pages"]
    assert counts == sorted(counts)
    assert 0 < content["share"] < 1
    assert 0 < content["coverage"] <= 1
    assert "learned in 2 restores" in vmferry_command(*arguments).stdout


def test_command_that_returns_leaves_a_process_that_serves(lab: Lab) -> None:
    source = lab.source()
    checkpoint = lab.receive(source)
    after = source.serial.drain()
    vm, monitor = monitored(lab)
    uri = f"unix:{lab.directory()}/socket"
    done = vmferry_command(
        *("restore", checkpoint.path, uri, "--qmp", monitor, "--background"),
        *("--bandwidth", "400kB/s", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    assert vm.run_state == "running"
    assert vm.status() in {"postcopy-active", "completed"}  # the guest may have asked for all
    vm.qemu.wait_migration()
    lab.assert_counts(vm, after)


def test_what_a_qemu_says_is_not_taken_for_what_the_command_says(lab: Lab) -> None:
    """As which VNC server it runs, or the serial port of the guest."""
    source = lab.source()
    checkpoint = lab.receive(source)
    directory = lab.directory()
    qemu = ["sh", "-c", 'echo "VNC server running" $1; shift; exec "$@"', "sh", "--quiet"]
    qemu += ["qemu-system-x86_64", *PC.arguments(directory), "-display", "none"]
    qemu += ["-chardev", f"file,id=s,path={directory}/serial", "-serial", "chardev:s"]
    arguments = ["restore", str(checkpoint.path), "--background", "--json", "--", *qemu]
    said = directory / "said"
    with said.open("wb") as file:  # what is left behind has it open, too
        done = subprocess.run(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            timeout=60,
            check=False,
            env=environment(),
        )
    assert done.returncode == 0, said.read_text()
    assert "VNC server running --quiet" in said.read_text()
    result = json.loads(done.stdout)
    try:
        assert result["ok"]
        serial = directory / "serial"
        wait_until(lambda: serial.exists() and b"C " in serial.read_bytes())
    finally:
        os.kill(result["pid"], signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{result['pid']}/exe").exists())


def test_destination_that_dies_ends_the_restore(lab: Lab) -> None:
    checkpoint = lab.receive(lab.source())
    vm = lab.destination()
    uri = f"unix:{lab.directory()}/socket"
    vm.qemu.incoming(uri, capabilities=("postcopy-ram",))
    with command("restore", checkpoint.path, uri, "--bandwidth", "1MB/s") as process:
        wait_until(lambda: vm.status() == "postcopy-active")
        os.kill(vm.qemu.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "Traceback" not in err
    assert "destination" in err


def test_destination_without_the_capability_is_told_from_a_broken_network(lab: Lab) -> None:
    checkpoint = lab.receive(lab.source())
    vm = lab.destination()
    uri = f"unix:{lab.directory()}/socket"
    vm.qemu.incoming(uri)
    with pytest.raises(vmferry.PeerError, match="postcopy-ram"):
        Restore(checkpoint, uri).run()
