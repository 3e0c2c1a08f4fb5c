"""A guest that never stops writing is saved while it runs, and resumed; by each capability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

import vmferry
from guests import check_ram
from tests.data.record import DISKS, DRIVES, UUID, add_bitmaps
from tests.interop.lab import GUEST, PC, Lab, Vm
from tests.support.capture import Scenario
from vmferry.qemu import QemuProcess

pytestmark = pytest.mark.qemu


def row(name: str, scenario: Scenario, shown: Sequence[str] | None = None) -> Any:
    """A scenario, and the capabilities that its stream has to show."""
    return pytest.param(scenario, {*(scenario.capabilities if shown is None else shown)}, id=name)


def multifd(channels: int, compression: str) -> Any:
    parameters = (("multifd-channels", channels), ("multifd-compression", compression))
    scenario = replace(PC, capabilities=("multifd",), parameters=parameters)
    shown = (
        ["multifd"] if compression == "none" else ["multifd", f"multifd-compression={compression}"]
    )
    return row(f"multifd-{channels}-{compression}", scenario, shown)


def with_capabilities(*names: str, **changes: Any) -> Scenario:
    return replace(PC, capabilities=names, **changes)


SLOW = 4 << 20
"""Bytes a second, where few of them stand for many pages; see :class:`Scenario`."""

CAPABILITIES = [
    row("plain", PC),
    row("xbzrle", with_capabilities("xbzrle", rounds=5, bandwidth=SLOW)),
    row("compress", with_capabilities("compress", bandwidth=SLOW)),
    row("xbzrle-compress", with_capabilities("xbzrle", "compress", rounds=5, bandwidth=SLOW)),
    *(multifd(channels, method) for channels in (2, 4, 16) for method in ("none", "zlib", "zstd")),
    row("return-path", with_capabilities("return-path")),
    row("postcopy-ram", with_capabilities("postcopy-ram"), ["postcopy-ram", "return-path"]),
    row(
        "postcopy-preempt",
        with_capabilities("postcopy-ram", "postcopy-preempt"),
        ["postcopy-ram", "return-path"],
    ),
    row(
        "multifd-postcopy-ram",
        with_capabilities("multifd", "postcopy-ram"),
        ["multifd", "postcopy-ram", "return-path"],
    ),
    row(
        "multifd-postcopy-preempt",
        with_capabilities("multifd", "postcopy-ram", "postcopy-preempt"),
        ["multifd", "postcopy-ram", "return-path"],
    ),
    row("auto-converge", with_capabilities("auto-converge"), []),
    row("events", with_capabilities("events"), []),
    row(
        "validate-uuid",
        with_capabilities("validate-uuid", machine=(*PC.machine, "-uuid", UUID)),
    ),
    row(
        "everything",
        with_capabilities("multifd", "xbzrle", "return-path", "auto-converge", "events", rounds=5),
        ["multifd", "return-path"],
    ),
]


@pytest.mark.parametrize(("scenario", "shown"), CAPABILITIES)
def test_guest_goes_on_where_it_was_saved(lab: Lab, scenario: Scenario, shown: set[str]) -> None:
    """No page is lost, stale or torn, the source ends well, the stream shows how it was sent."""
    source = lab.source(scenario)
    checkpoint = lab.receive(source, scenario)
    assert set(checkpoint.manifest.capabilities) == shown
    answer = source.qemu.query_migrate()
    assert answer["status"] == "completed"
    assert answer["ram"]["dirty-sync-count"] > 2
    assert source.run_state == "postmigrate"
    resumed = lab.resume(checkpoint, scenario)
    lab.assert_goes_on(resumed, source, scenario)


SENDING = [
    pytest.param(1, vmferry.Method.NONE, id="multifd-1-none"),
    pytest.param(2, vmferry.Method.NONE, id="multifd-2-none"),
    pytest.param(4, vmferry.Method.ZLIB, id="multifd-4-zlib"),
    pytest.param(4, vmferry.Method.ZSTD, id="multifd-4-zstd"),
    pytest.param(16, vmferry.Method.ZSTD, id="multifd-16-zstd"),
]


@pytest.mark.parametrize(("channels", "method"), SENDING)
def test_guest_goes_on_when_sent_by_multifd(
    lab: Lab, channels: int, method: vmferry.Method
) -> None:
    """QEMU takes the pages from as many channels as it was told of, compressed as it was told."""
    source = lab.source()
    checkpoint = lab.receive(source)
    resumed = lab.resume(
        checkpoint,
        options=vmferry.SendOptions(multifd=channels, method=method, bandwidth=64 << 20),
        capabilities=["multifd"],
        parameters={"multifd-channels": channels, "multifd-compression": method.name.lower()},
    )
    lab.assert_goes_on(resumed, source)


def test_paused_machine_stays_paused_and_can_be_resumed_again_and_again(lab: Lab) -> None:
    """A machine saved while it is paused waits for ``cont``, and does so each time it is sent."""
    source = lab.source()
    source.qemu.execute("stop")
    checkpoint = lab.receive(source)
    stopped_at = source.serial.drain()
    for _ in range(2):
        resumed = lab.resume(checkpoint)
        assert resumed.run_state == "paused"
        resumed.qemu.execute("cont")
        lab.assert_counts(resumed, stopped_at)


def test_source_that_pauses_before_it_switches_over_is_waited_for(lab: Lab) -> None:
    """At ``pre-switchover`` the guest stands still and nothing comes until somebody lets it go."""
    scenario = with_capabilities("pause-before-switchover", "return-path")
    source = lab.source(scenario)
    arrival = lab.arrival()
    lab.depart(source, scenario, arrival.address)
    source.qemu.prepare_migration(parameters={"downtime-limit": 2_000_000})
    source.qemu.wait_migration("pre-switchover")
    source.qemu.execute("migrate-continue", {"state": "pre-switchover"})
    source.qemu.wait_migration()
    checkpoint = lab.saved(arrival.result(), scenario)
    lab.assert_goes_on(lab.resume(checkpoint, scenario), source, scenario)


def test_source_may_be_let_run_again_and_saved_again(lab: Lab) -> None:
    """A checkpoint takes nothing away: ``cont`` brings the machine back, and each save is whole."""
    scenario = replace(DISKED, capabilities=("return-path",))
    source = lab.source(scenario)
    counters = []
    for _ in range(2):
        checkpoint = lab.receive(source, scenario)
        counters.append(source.serial.drain())
        source.qemu.execute("cont")
        source.serial.wait_beat(after=counters[-1])
    assert counters[0] < counters[1]
    lab.assert_counts(lab.resume(checkpoint, scenario), counters[1], scenario)


def test_background_snapshot_is_the_machine_as_it_was_when_it_began(lab: Lab) -> None:
    """The guest runs on while it is saved, and its snapshot goes on from where that began."""
    scenario = with_capabilities("background-snapshot")
    source = lab.source(scenario)
    before = source.serial.drain()
    checkpoint = lab.receive(source, scenario, tolerate=vmferry.Tolerate.NO_END)
    assert source.status() == "completed"
    after = source.serial.wait_beat()  # the source never stopped
    assert source.run_state == "running"
    resumed = lab.resume(checkpoint, scenario)
    resumed.qemu.wait_running()
    assert before < resumed.serial.wait_beat()
    lab.assert_counts(resumed, before, scenario)
    assert source.serial.wait_beat() > after


def test_background_snapshot_is_refused_unless_asked_for(lab: Lab) -> None:
    """Without ``Tolerate.NO_END`` it is an error that says how to have it, and nothing is left."""
    scenario = with_capabilities("background-snapshot")
    source = lab.source(scenario)
    arrival = lab.arrival()
    lab.depart(source, scenario, arrival.address)
    with pytest.raises(vmferry.StreamError, match=r"a background snapshot has none: .* no-end"):
        arrival.result()
    assert not arrival.directory.exists()
    source.serial.wait_beat()


def test_shared_memory_stays_where_it_is(lab: Lab) -> None:
    """With x-ignore-shared the stream has no page of a shared block; the file has them all."""
    shared = lab.path / "shared"
    backend = f"memory-backend-file,id=m0,mem-path={shared},size={{ram}},share=on"
    scenario = with_capabilities(
        "x-ignore-shared",
        machine=("-machine", "pc,memory-backend=m0", "-nodefaults", "-object", backend),
    )
    source = lab.source(scenario)
    checkpoint = lab.receive(source, scenario)
    assert [entry.name for entry in checkpoint.manifest.ram if entry.ignored] == ["m0"]
    assert "x-ignore-shared" in checkpoint.manifest.stream_capabilities
    assert check_ram(shared.read_bytes(), **dict(GUEST)) == []
    resumed = lab.resume(checkpoint, scenario, capabilities=scenario.capabilities)
    lab.assert_goes_on(resumed, source, scenario)


DISKED = replace(PC, machine=DISKS, disks=DRIVES)


@pytest.mark.parametrize("more", [(), ("zero-blocks",)], ids=["block", "block-zero-blocks"])
def test_disks_in_the_stream_are_those_of_the_source(lab: Lab, more: tuple[str, ...]) -> None:
    """What is written while they migrate is in the checkpoint, and in the new QEMU's images."""
    scenario = replace(DISKED, capabilities=("block", *more))
    source = lab.source(scenario)
    images = sorted(lab.path.glob("machine1/disk*"))
    arrival = lab.arrival()
    lab.depart(source, scenario, arrival.address)
    for number in range(8):
        source.qemu.hmp(f'qemu-io disk{number % 2} "write -P {number + 65} {number * 192}k 96k"')
    checkpoint = lab.complete(source, scenario, arrival)
    disks = {name: store.path.read_bytes() for name, store in checkpoint.disks}
    assert disks == {"disk0": images[0].read_bytes(), "disk1": images[1].read_bytes()}
    assert b"A" * 4096 in disks["disk0"]
    resumed = lab.resume(checkpoint, scenario, blank_disks=True)
    lab.assert_goes_on(resumed, source, scenario)
    copies = sorted(Path(drive) for drive in images_of(resumed))
    assert [copy.read_bytes() for copy in copies] == [image.read_bytes() for image in images]


def images_of(vm: Vm) -> list[str]:
    drives = vm.qemu.execute("query-block")
    return [drive["inserted"]["file"] for drive in drives if "inserted" in drive]


def test_dirty_bitmaps_arrive_with_their_bits(lab: Lab) -> None:
    """Names, granularity, state and count of each bitmap are in the new QEMU as in the old one."""
    scenario = replace(DISKED, capabilities=("dirty-bitmaps",), before=add_bitmaps)
    source = lab.source(scenario)
    expected = bitmaps_of(source.qemu)
    assert [bitmap["count"] for bitmap in expected["disk0"]] == [128 << 10, 128 << 10]
    checkpoint = lab.receive(source, scenario)
    assert checkpoint.manifest.capabilities == ("dirty-bitmaps",)
    resumed = lab.resume(checkpoint, scenario)
    lab.assert_goes_on(resumed, source, scenario)
    assert bitmaps_of(resumed.qemu) == expected


def bitmaps_of(qemu: QemuProcess) -> dict[str, list[dict[str, Any]]]:
    """The dirty bitmaps of each drive."""
    return {
        drive["device"]: sorted(drive["inserted"]["dirty-bitmaps"], key=itemgetter("name"))
        for drive in qemu.execute("query-block")
        if "dirty-bitmaps" in drive.get("inserted", {})
    }
