"""A receiver killed at any step leaves nothing, something incomplete, or the whole checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import vmferry
from tests.checkpoint import saved

# The child counts what it asks of the file system inside the directory, as Python's audit events,
# and kills itself before a step is carried out: before the first, before the second, until one is
# beyond the end, each time in a process of its own and a directory of its own.
CHILD = """
import os, signal, sys
import vmferry, vmferry.checkpoint.transfer, vmferry.checkpoint.writer
stream, base, mode, first = *sys.argv[1:4], 1
sync = vmferry.checkpoint.writer.sync_directory

def sync_or_fail(path):
    if (path / 'manifest.json').exists():
        raise OSError(5, 'broken')
    sync(path)

if mode == 'unlucky':
    vmferry.checkpoint.writer.sync_directory = sync_or_fail

def receive(directory, last):
    step = 0
    def audit(event, arguments):
        nonlocal step
        if event.split('.')[0] not in {'open', 'os', 'shutil'} or not arguments:
            return
        if not any(str(argument).startswith(directory) for argument in arguments[:2]):
            return
        step += 1
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    try:
        vmferry.receive(f'file:{stream}', directory)
    except vmferry.VmferryError:
        assert mode != 'good'

status = signal.SIGKILL
while status == signal.SIGKILL:
    child = os.fork()
    if not child:
        receive(f'{base}{first}', first)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(f'{base}{first}', flush=True)
    first += 1
sys.exit(status)
"""


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved.stream(tmp_path_factory.mktemp("stream") / "whole")


def killed(stream: Path, base: Path, mode: str = "good") -> list[Path]:
    """What receivers left that were killed at each step, and in the end one that was not.

    The stream is *good* or broken, or the disk fails when the manifest was just renamed (unlucky).
    """
    run = [sys.executable, "-c", CHILD, str(stream), str(base), mode]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    return [Path(line) for line in done.stdout.splitlines()]


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
    *left, whole = killed(stream, tmp_path / "vm")
    assert state(whole) == "complete"
    found = [state(directory) for directory in left]
    # In this order and never back: complete only once everything else is done.
    assert found == sorted(found, key=["nothing", "incomplete", "complete"].index)
    counts = Counter(found)
    assert counts["nothing"] >= 1
    assert counts["incomplete"] >= 10
    # An incomplete directory is not written over.
    incomplete = left[found.index("incomplete")]
    with pytest.raises(vmferry.StorageError, match="exists already"):
        vmferry.receive(f"file:{stream}", incomplete)
    assert state(incomplete) == "incomplete"


def test_a_receiver_killed_while_it_clears_away_leaves_nothing_that_looks_complete(
    stream: Path, tmp_path: Path
) -> None:
    content = stream.read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) - 100])
    *left, whole = killed(tmp_path / "cut", tmp_path / "vm", "broken")
    assert state(whole) == "nothing"
    assert {state(directory) for directory in left} == {"nothing", "incomplete"}


def test_what_was_complete_too_early_becomes_incomplete_before_it_is_cleared_away(
    stream: Path, tmp_path: Path
) -> None:
    *left, whole = killed(stream, tmp_path / "vm", "unlucky")
    assert state(whole) == "nothing"
    found = [state(directory) for directory in left]
    taken_back = found[len(found) - found[::-1].index("complete") :]
    assert taken_back[0] == "incomplete"
    assert taken_back == sorted(taken_back)
