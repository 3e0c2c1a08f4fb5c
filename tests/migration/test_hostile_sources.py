"""A stream that was tampered with is refused, or is the stream of a machine; nothing hangs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.migration.python_machine import PythonMachine
from vmferry import VmferryError
from vmferry.images import open_image
from vmferry.migration.control import Control, RunState
from vmferry.migration.status import Status

LONG = 60.0
PAGES, HOT = 12, 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The stream of a machine with two blocks and a shared one, which is left out."""
    path = tmp_path_factory.mktemp("saved") / "stream"
    with ExitStack() as stack:
        source = _side(stack)
        machine = source.machine
        assert isinstance(machine, PythonMachine)
        machine.fill().resume()
        source.migrate(f"file:{path}")
        assert source.wait(LONG) == Status.SENT
    return path.read_bytes()


def _side(stack: ExitStack) -> Control:
    machine = stack.enter_context(PythonMachine(PAGES, HOT))
    machine.memory.add("odd", 3 * 4096, read_only=True)
    machine.memory.add("shared", 4096, shared=True)
    control = Control(machine)
    stack.callback(control.close)
    control.set_capabilities({"x-ignore-shared": True})
    return control


def _load(path: Path, stream: bytes) -> Status:
    path.write_bytes(stream)
    with ExitStack() as stack:
        destination = _side(stack)
        destination.incoming(f"file:{path}")
        status = destination.wait(LONG)
        if status == Status.COMPLETED:
            assert destination.run_state in {RunState.RUNNING, RunState.PAUSED}
        else:
            assert status == Status.FAILED
            assert isinstance(destination.error, VmferryError)
            assert destination.run_state == RunState.INMIGRATE
            with pytest.raises(VmferryError):
                destination.cont()
        return status


def test_stream_as_it_is_is_loaded(saved: bytes, tmp_path: Path) -> None:
    assert _load(tmp_path / "stream", saved) == Status.COMPLETED


@pytest.mark.parametrize("extra", [b"\0", b"\7", b"QEVM", bytes(5000)], ids=repr)
def test_bytes_behind_the_end_are_refused(saved: bytes, tmp_path: Path, extra: bytes) -> None:
    assert _load(tmp_path / "stream", saved + extra) == Status.FAILED


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_stream_that_ends_early_is_refused(
    saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    end = data.draw(st.integers(0, len(saved) - 1))
    # Only the description may be missing: some sources have none.
    whole = end == saved.index(b'{"page_size"') - 5
    status = _load(tmp_path_factory.mktemp("cut") / "stream", saved[:end])
    assert status == (Status.COMPLETED if whole else Status.FAILED)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_stream_with_other_bytes_ends_somehow(
    saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The bytes of structure are few, so they are met often: most lie at both ends."""
    at = data.draw(st.integers(0, 400) | st.integers(0, len(saved) - 1))
    at = data.draw(st.sampled_from([at, len(saved) - 1 - at]))
    size = data.draw(st.integers(0, 4))
    new = data.draw(st.binary(max_size=8))
    _load(tmp_path_factory.mktemp("other") / "stream", saved[:at] + new + saved[at + size :])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_piece_that_comes_twice_or_not_ends_somehow(
    saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    places = st.integers(0, len(saved))
    first, last, to = data.draw(places), data.draw(places), data.draw(places)
    stream = saved[:to] + saved[min(first, last) : max(first, last)] + saved[to:]
    _load(tmp_path_factory.mktemp("piece") / "stream", stream)


# Disks in the stream

DISK = (2 << 20) + 512
"""Bytes of a disk that ends within its third chunk."""


@pytest.fixture(scope="module")
def saved_disk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The stream of a machine with a disk, whose second chunk alone has content."""
    path = tmp_path_factory.mktemp("saved")
    (path / "disk").write_bytes(bytes(1 << 20) + b"content" * 10 + bytes((1 << 20) + 512 - 70))
    with ExitStack() as stack:
        source = _side_with_disk(stack, path / "disk", active=True)
        source.machine.resume()
        source.migrate(f"file:{path}/stream")
        assert source.wait(LONG) == Status.SENT
    return (path / "stream").read_bytes()


def _side_with_disk(stack: ExitStack, path: Path, *, active: bool) -> Control:
    machine = stack.enter_context(PythonMachine(PAGES, HOT))
    machine.images = (stack.enter_context(open_image(path, active=active)),)
    control = Control(machine)
    stack.callback(control.close)
    control.set_capabilities({"block": True, "zero-blocks": True})
    return control


def _load_disk(path: Path, stream: bytes) -> tuple[str, bytes]:
    """Why the stream was refused, or nothing; and what is on the disk then."""
    (path / "stream").write_bytes(stream)
    (path / "disk").write_bytes(bytes(DISK))
    with ExitStack() as stack:
        destination = _side_with_disk(stack, path / "disk", active=False)
        destination.incoming(f"file:{path}/stream")
        status = destination.wait(LONG)
        assert (status == Status.COMPLETED) == destination.machine.images[0].active
        assert status == Status.COMPLETED or isinstance(destination.error, VmferryError)
        return str(destination.error or ""), (path / "disk").read_bytes()


def _chunk(sector: int, name: bytes = b"disk0", flags: int = 9) -> bytes:
    return (sector << 9 | flags).to_bytes(8) + bytes([len(name)]) + name


END_OF_DISKS = (2).to_bytes(8)


def test_stream_with_a_disk_is_loaded(saved_disk: bytes, tmp_path: Path) -> None:
    reason, disk = _load_disk(tmp_path, saved_disk)
    assert not reason
    assert disk[1 << 20 :].startswith(b"content" * 10 + bytes(1))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (_chunk(0), _chunk(0, b"disk1"), 'a disk that this machine has (disk0), found "disk1"'),
        (_chunk(0), _chunk(6144), "a sector of"),
        (_chunk(0), _chunk((1 << 54) - 2048), "a sector of"),
        (_chunk(0), _chunk(1), "multiple of 2048"),
        (_chunk(0), b"", "all chunks of each disk, found none at 0x0"),
        (_chunk(4096), b"", "all chunks of each disk, found none at 0x200000"),
        (_chunk(0), _chunk(0, flags=8), "a disk record"),
        (_chunk(0), _chunk(0, flags=1), "a disk record"),  # without data
    ],
)
def test_chunk_that_cannot_be_is_refused(
    saved_disk: bytes, tmp_path: Path, old: bytes, new: bytes, reason: str
) -> None:
    assert saved_disk.count(old) == 1
    assert reason in _load_disk(tmp_path, saved_disk.replace(old, new))[0]


def test_chunk_before_the_machine_is_known_is_not_written(
    saved_disk: bytes, tmp_path: Path
) -> None:
    full = _chunk(0, flags=1) + b"x" * (1 << 20)
    stream = saved_disk.replace(END_OF_DISKS, full + END_OF_DISKS, 1)
    reason, disk = _load_disk(tmp_path, stream)
    assert "disks behind the list of guest memory" in reason
    assert not any(disk)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_disks_with_other_bytes_end_somehow(
    saved_disk: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    first = saved_disk.index(_chunk(4096)) - 8
    places = st.integers(first, first + 100) | st.integers(0, len(saved_disk) - 1)
    at, size = data.draw(places), data.draw(st.integers(0, 4))
    stream = saved_disk[:at] + data.draw(st.binary(max_size=8)) + saved_disk[at + size :]
    _load_disk(tmp_path_factory.mktemp("other"), stream)
