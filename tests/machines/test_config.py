"""Machines read from files, and what is refused with the file and the key."""

from __future__ import annotations

import sys
from pathlib import Path
from uuid import UUID

import pytest

from vmferry.errors import MachineError, StorageError, UsageError
from vmferry.machines import (
    DiskConfig,
    GuestConfig,
    MachineConfig,
    OnError,
    create,
    read_config,
)
from vmferry.machines.config import to_toml
from vmferry.machines.guest.layout import Layout

MIB = 1 << 20


def read(tmp_path: Path, text: str) -> MachineConfig:
    path = tmp_path / "machine.toml"
    path.write_text(text)
    return read_config(path)


def test_every_key(tmp_path: Path) -> None:
    text = """
    kind = "unicorn"
    ram = "64MiB"
    cpus = 2
    uuid = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
    [guest]
    working-set = "16MiB"
    rate = "200MB/s"
    hot = 0.5
    changed = 0.25
    heartbeat = 1
    [[disk]]
    file = "/a/disk.qcow2"
    format = "qcow2"
    read-only = true
    direct = true
    werror = "stop"
    rerror = "ignore"
    [[disk]]
    file = "disk.raw"
    share-rw = true
    """
    assert read(tmp_path, text) == MachineConfig(
        kind="unicorn",
        ram=64 * MIB,
        cpus=2,
        uuid=UUID("1b4e28ba-2fa1-11d2-883f-0016d3cca427"),
        guest=GuestConfig(
            working_set=16 * MIB, rate=200_000_000 // 4096, hot=0.5, changed=0.25, heartbeat=1.0
        ),
        disk=(
            DiskConfig(
                file="/a/disk.qcow2",
                format="qcow2",
                read_only=True,
                direct=True,
                werror=OnError.STOP,
                rerror=OnError.IGNORE,
            ),
            DiskConfig(file=str(tmp_path / "disk.raw"), share_rw=True),
        ),
    )


def test_every_key_has_a_default(tmp_path: Path) -> None:
    assert read(tmp_path, "") == MachineConfig()
    disk = DiskConfig(file=str(tmp_path / "d"), werror=OnError.ENOSPC, rerror=OnError.REPORT)
    assert read(tmp_path, "[[disk]]\nfile = 'd'").disk == (disk,)
    assert read(tmp_path, "[guest]\nrate = 'unlimited'\n") == MachineConfig()
    assert read(tmp_path, "ram = 8388608\n[guest]\nrate = 7").guest.rate == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ram = ", "expected TOML: Invalid value"),
        (
            "rams = 1",
            "rams: no such key; there are kind, ram, cpus, preallocate, memory-file, uuid",
        ),
        ("kind = 'xen'", "kind: expected auto, kvm, unicorn, found 'xen'"),
        ("kind = 3", "kind: expected text, found 3"),
        ("ram = '1 parsec'", "ram: expected a size such as"),
        ("ram = 1.5", "ram: expected a whole number, found 1.5"),
        ("ram = 5000", "ram: expected whole pages, from 1 MiB"),
        ("ram = '1TiB'", "ram: expected whole pages"),
        ("cpus = true", "cpus: expected a whole number, found True"),
        ("cpus = 0", "cpus: expected 1 to 64, found 0"),
        ("cpus = 65", "cpus: expected 1 to 64, found 65"),
        ("uuid = 'x'", "uuid: expected a UUID, found 'x'"),
        ("guest = 1", "guest: expected a table, found 1"),
        ("[guest]\nspeed = 1", "guest.speed: no such key; there are working-set, rate, hot"),
        ("[guest]\nworking-set = 100", "guest.working-set: expected whole pages of 4096"),
        ("[guest]\nrate = 0", "guest.rate: expected 1 to 1000000000 pages per second, found 0"),
        ("[guest]\nrate = '1kB/s'", "guest.rate: expected 1 to"),
        ("[guest]\nhot = 1.5", "guest.hot: expected a share of 0 to 1, found 1.5"),
        ("[guest]\nhot = 'all'", "guest.hot: expected a number, found 'all'"),
        ("[guest]\nhot = nan", "guest.hot: expected a share of 0 to 1, found nan"),
        ("[guest]\nchanged = 0", "guest.changed: expected a share of 0.001 to 1, found 0"),
        ("[[disk]]\nfile = 'd'\nwerror = 'never'", "disk.werror: expected report, ignore, enospc"),
        ("[[disk]]\nfile = 'd'\nrerror = 'enospc'", "disk.rerror: expected report, ignore, stop"),
        ("[[disk]]\nfile = 'd'\nshare-rw = 1", "disk.share-rw: expected true or false, found 1"),
        ("[guest]\nheartbeat = 0", "guest.heartbeat: expected 0.001 to 3600 seconds, found 0"),
    ],
)
def test_what_is_no_machine_is_refused_with_file_and_key(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'machine.toml'}: {words}")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"machine\.toml: cannot be read: No such file"):
        read_config(tmp_path / "machine.toml")
    (tmp_path / "machine.toml").write_bytes(b"ram = '\xff'")
    with pytest.raises(UsageError, match=r"machine\.toml: expected UTF-8"):
        read_config(tmp_path / "machine.toml")


def test_walk_that_does_not_fit_is_refused_before_anything_is_made() -> None:
    config = MachineConfig(ram=2 * MIB, guest=GuestConfig(working_set=2 * MIB))
    with pytest.raises(UsageError, match=r"guest.working-set: expected at most 1.9\d MiB in 2 MiB"):
        create(config, serial=lambda _: None)


@pytest.mark.parametrize("cpus", [1, 2, 3, 64])
@pytest.mark.parametrize("hot", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pages", [1, 2, 63, 1000])
def test_vcpus_share_the_pages(cpus: int, hot: float, pages: int) -> None:
    guest = GuestConfig(working_set=pages * 4096, hot=hot)
    layout = Layout.of(MachineConfig(ram=16 * MIB, cpus=cpus, guest=guest))
    walked: list[int] = []
    for vcpu in range(cpus):
        share = layout.share(vcpu)
        walked += range(share.hot_first, share.hot_first + share.hot_count)
        walked += range(share.cold_first, share.cold_first + share.cold_count)
    assert sorted(walked) == list(range(pages))


def without_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise MachineError("no /dev/kvm")

    monkeypatch.setattr("vmferry.machines.kvm.KvmHost", refuse)


def test_auto_is_unicorn_where_there_is_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kvm(monkeypatch)
    with create(MachineConfig(ram=8 * MIB), serial=lambda _: None) as machine:
        machine.start()
        machine.pause()
    with pytest.raises(MachineError, match="no /dev/kvm"):
        create(MachineConfig(kind="kvm"), serial=lambda _: None)


def test_host_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kvm(monkeypatch)
    monkeypatch.setitem(sys.modules, "vmferry.machines.unicorn", None)
    with pytest.raises(MachineError, match=r"pip install vmferry\[unicorn\]"):
        create(MachineConfig(kind="unicorn"), serial=lambda _: None)
    with pytest.raises(MachineError, match=r"no /dev/kvm; .*pip install vmferry\[unicorn\]"):
        create(MachineConfig(), serial=lambda _: None)


@pytest.mark.parametrize(
    "config",
    [
        MachineConfig(),
        MachineConfig(
            kind="unicorn",
            ram=64 * MIB,
            cpus=3,
            preallocate=True,
            memory_file="/dev/shm/vm",
            uuid=UUID("1b4e28ba-2fa1-11d2-883f-0016d3cca427"),
            guest=GuestConfig(working_set=MIB, rate=7, hot=0.1, changed=1 / 3, heartbeat=0.02),
        ),
    ],
)
def test_what_is_written_is_read_as_it_was(tmp_path: Path, config: MachineConfig) -> None:
    assert read(tmp_path, to_toml(config)) == config
