"""A receiver killed at any step leaves nothing, something incomplete, or the whole checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import vmferry
from tests.support.recorded import recorded

# The child counts what it asks of the file system inside the directory, as Python's audit events,
# and kills itself before step number LAST is carried out.
CHILD = """
import os, signal, sys
import vmferry, vmferry.checkpoint.transfer
stream, directory, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
step = 0
def audit(event, arguments):
    global step
    if event.split('.')[0] not in {'open', 'os', 'shutil'} or not arguments:
        return
    if not any(str(argument).startswith(directory) for argument in arguments[:2]):
        return
    step += 1
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
vmferry.receive(f'file:{stream}', directory)
"""


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (channel,) = recorded("pc-block")
    path = tmp_path_factory.mktemp("stream") / "recorded"
    path.write_bytes(channel.sent)
    return path


def killed_at(step: int, stream: Path, directory: Path) -> bool:
    """Receive in a child that dies before *step*; false where it got to its end."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(stream), str(directory), str(step)], check=False
    )
    assert done.returncode in {0, -signal.SIGKILL}
    return done.returncode != 0


def state(directory: Path) -> str:
    """What a user finds in *directory*."""
    try:
        with vmferry.Checkpoint(directory, verify=True):
            return "complete"
    except vmferry.CheckpointIncomplete:
        return "incomplete"
    except vmferry.StorageError:
        assert not directory.exists() or not list(directory.iterdir())
        return "nothing"


def test_a_receiver_killed_at_any_step_leaves_nothing_that_looks_complete(
    stream: Path, tmp_path: Path
) -> None:
    found: list[str] = []
    while killed_at(len(found) + 1, stream, directory := tmp_path / f"vm{len(found)}"):
        found.append(state(directory))
    assert state(directory) == "complete"
    # In this order and never back: complete only once everything else is done.
    assert found == sorted(found, key=["nothing", "incomplete", "complete"].index)
    counts = Counter(found)
    assert counts["nothing"] >= 1
    assert counts["incomplete"] >= 10


def test_an_incomplete_directory_is_not_written_over(stream: Path, tmp_path: Path) -> None:
    directory = tmp_path / "vm"
    assert killed_at(5, stream, directory)
    with pytest.raises(vmferry.StorageError, match="exists already"):
        vmferry.receive(f"file:{stream}", directory)
    assert state(directory) == "incomplete"
