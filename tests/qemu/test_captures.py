"""The streams that other tests feed on: recorded ones are intact, fresh ones can be resumed."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from guests import Serial, check_ram
from tests.data.record import SCENARIOS
from tests.support.capture import Scenario, capture, migrated
from tests.support.recorded import manifest, recorded
from tests.support.recorder import Recorder
from vmferry.qemu import QemuProcess

FIRMWARE = Scenario(
    memory=2, guest=(("pages", 64), ("hot", 24)), start="firmware", bandwidth=1 << 20
)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_recorded_stream_is_intact(name: str) -> None:
    main, *others = recorded(name)
    assert main.sent.startswith(b"QEVM\0\0\0\3")
    assert all(not other.sent.startswith(b"QEVM") for other in others)
    assert "/" not in manifest()["streams"][name]["command"]


def test_recorder_passes_both_directions_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "target"))
        listener.listen()
        with (
            Recorder(tmp_path / "front", tmp_path / "target") as recorder,
            socket.socket(socket.AF_UNIX) as source,
        ):
            source.connect(str(tmp_path / "front"))
            target, _ = listener.accept()
            with target:
                source.sendall(b"question")
                source.shutdown(socket.SHUT_WR)
                assert target.makefile("rb").read() == b"question"
                target.sendall(b"answer")
                target.shutdown(socket.SHUT_WR)
                assert source.makefile("rb").read() == b"answer"
            recorder.join()
        [channel] = recorder.channels
        assert bytes(channel.sent) == b"question"
        assert bytes(channel.answered) == b"answer"


@pytest.mark.qemu
@pytest.mark.parametrize("name", ["pc", "pc-xbzrle", "microvm", "q35-devices"])
def test_recorded_guest_counts_on_in_a_new_qemu(
    start_qemu: Callable[..., QemuProcess], tmp_path: Path, name: str
) -> None:
    saved = tmp_path / "saved"
    saved.write_bytes(recorded(name)[0].sent)
    scenario = SCENARIOS[name]
    vm = start_qemu(*scenario.arguments(tmp_path), "-incoming", f"exec:cat {saved}")
    serial = Serial(vm.serial)
    serial.wait_beat(after=serial.wait_beat())
    assert "R" not in serial.lines


@pytest.mark.qemu
def test_capture_is_made_once() -> None:
    assert capture(FIRMWARE) is capture(FIRMWARE)
    assert len(capture(FIRMWARE)) == 1


@pytest.mark.qemu
def test_busy_guest_arrives_whole_after_many_rounds() -> None:
    scenario = replace(FIRMWARE, rounds=5, destination=True)
    with migrated(scenario) as done:
        assert done.destination is not None
        assert done.source.query_migrate()["ram"]["dirty-sync-count"] > 5
        stopped_at = done.serial.drain()
        serial = Serial(done.destination.serial)
        assert serial.wait_beat(after=stopped_at) > stopped_at
        done.destination.execute("stop")
        memory = done.destination.directory / "memory"
        done.destination.save_memory(memory, 0, scenario.ram_size)
        assert check_ram(memory.read_bytes(), **dict(scenario.guest)) == []
