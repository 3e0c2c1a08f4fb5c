"""The working set of a checkpoint: what is learned, and what a stranger may have put there."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vmferry.checkpoint import working_set
from vmferry.checkpoint.working_set import WorkingSet

PAGES = [100, 50]
PAGE = st.tuples(st.sampled_from([0, 1]), st.integers(0, 49))


def empty(path: Path) -> WorkingSet:
    return working_set.read(path, PAGES)


def test_what_was_asked_for_comes_first_the_next_time(tmp_path: Path) -> None:
    known = empty(tmp_path)
    assert known.split() == ([], set())
    working_set.write(tmp_path, known.after([(0, 7, 0.002), (1, 3, 0.5), (0, 7, 9e9)], set()))
    again = empty(tmp_path)
    assert again.split() == ([(0, 7), (1, 3)], set())
    assert again.entries["when"].tolist() == [2000, 500_000]
    assert (again.restores, again.asked, again.coverage) == (1, 2, None)


def test_pages_that_are_not_wanted_any_more_leave_the_set() -> None:
    known = WorkingSet(np.zeros(0, working_set.read(Path("/nonexistent"), []).entries.dtype))
    known = known.after([(0, page, page) for page in range(40)], set())
    for _ in range(400):
        _, held = known.split()
        known = known.after([(*page, 9e9) for page in held if page[1] < 10], held)
    assert {page for _, page, _, _ in known.entries.tolist()} == set(range(10))


@given(st.binary(max_size=200))
def test_anything_else_is_as_good_as_nothing(data: bytes) -> None:
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as place:
        path = Path(place)
        known = empty(path).after([(0, 1, 0), (1, 2, 0)], set())
        working_set.write(path, known)
        file = path / working_set.NAME
        whole = file.read_bytes()
        for broken in (data, whole[: len(data)], data + whole, whole + b"x"):
            file.write_bytes(broken)
            found = empty(path)
            assert len(found.entries) in {0, 2}


def test_a_link_leads_nowhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / working_set.NAME).symlink_to(victim)
    assert len(empty(tmp_path).entries) == 0
    working_set.write(tmp_path, empty(tmp_path).after([(0, 1, 0)], set()))
    assert victim.read_text() == "mine"
    assert len(empty(tmp_path).entries) == 1


def test_restores_that_end_at_the_same_time_leave_a_whole_set(tmp_path: Path) -> None:
    known = empty(tmp_path).after([(0, page, 0) for page in range(100)], set())
    working_set.write(tmp_path, known)
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            working_set.write(tmp_path, known)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert all(len(empty(tmp_path).entries) == 100 for _ in range(200))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert [path.name for path in tmp_path.iterdir()] == [working_set.NAME]
