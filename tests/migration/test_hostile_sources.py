"""A stream that was tampered with is refused, or is the stream of a machine; nothing hangs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.migration.python_machine import PythonMachine
from vmferry import VmferryError
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
