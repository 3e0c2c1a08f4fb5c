"""What keeps a record: compare and swap, by several at once, and what it says of the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.migration.races import at_once
from tests.ownership.etcd import Etcd
from vmferry import StorageError, UsageError
from vmferry.ownership.names import new_name
from vmferry.ownership.protocol import Swap
from vmferry.ownership.record import Entry, Phase, Record, decode
from vmferry.ownership.store import Outcome, Store, StoreSilent, open_store

FREE = Record(vm="vm")


def held(by: str, generation: int = 1) -> Record:
    return Record(vm="vm", generation=generation, phase=Phase.HELD, owner=by)


@pytest.fixture(params=["file", "etcd"])
def store(request: pytest.FixtureRequest, tmp_path: Path, etcd: Etcd) -> Store:
    if request.param == "file":
        return open_store(f"file:{tmp_path}/owner")
    return open_store(etcd.uri(tmp_path.name))


def test_swap_lands_once(store: Store) -> None:
    empty = store.read()
    assert empty.record is None
    assert store.swap(empty, Swap(held("a"))) is Outcome.LANDED
    assert store.swap(empty, Swap(held("b"))) is Outcome.LOST
    seen = store.read()
    assert seen.record == held("a")
    assert store.swap(seen, Swap(held("b", 2))) is Outcome.LANDED
    assert store.swap(seen, Swap(held("c", 2))) is Outcome.LOST
    assert store.read().record == held("b", 2)


def test_one_of_many_wins(store: Store) -> None:
    for generation in range(1, 20):
        seen = store.read()
        swaps = [partial(store.swap, seen, Swap(held(who, generation))) for who in "abcd"]
        outcomes = at_once(*swaps)
        assert sorted(outcomes) == [Outcome.LANDED, *[Outcome.LOST] * 3]


def test_who_lives_is_not_gone(store: Store) -> None:
    me = new_name()
    assert store.keep(me, None)
    seen = store.read()
    assert store.swap(seen, Swap(held("b"), gone=me)) is Outcome.NOT_GONE
    assert not store.gone(me)
    assert store.read().mark == seen.mark


def test_lease_tells_who_is_dead(etcd: Etcd, tmp_path: Path) -> None:
    store = open_store(etcd.uri(tmp_path.name, term=2))
    assert store.keep("a", None)
    seen = store.read()
    deadline = time.monotonic() + 20
    while not store.gone("a"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert store.swap(seen, Swap(held("b"), gone="a")) is Outcome.LANDED
    # It comes back only where the record is still the one that it knows.
    assert not store.keep("a", seen)
    assert store.gone("a")


def test_process_of_this_host_that_is_dead_is_gone(tmp_path: Path) -> None:
    code = "from vmferry.ownership.names import new_name; print(new_name())"
    name = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    store = open_store(f"file:{tmp_path}/owner")
    assert store.gone(name)
    assert not store.gone(new_name())
    host, *rest = name.split(":")
    assert not store.gone(":".join([host, "0" * 16, *rest[1:]])), "of another host nothing is known"


def test_silent_store_is_no_answer(etcd: Etcd, tmp_path: Path) -> None:
    store = open_store(etcd.uri(tmp_path.name))
    seen = store.read()
    with etcd.frozen():
        with pytest.raises(StoreSilent):
            store.read()
        assert store.swap(seen, Swap(held("a"))) is Outcome.UNKNOWN


def test_full_disk_is_no_answer_and_the_old_record_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"file:{tmp_path}/owner")
    store.swap(store.read(), Swap(held("a")))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    assert store.swap(store.read(), Swap(held("b", 2))) is Outcome.UNKNOWN
    assert store.read().record == held("a")


@pytest.mark.parametrize(
    "uri",
    [
        "file:",
        "nfs:x",
        "etcd://",
        "etcd://h",
        "etcd://h/k?x=1",
        "etcd://h/k?term=0",
        "etcd://h:p/k",
    ],
)
def test_store_that_cannot_be(uri: str) -> None:
    with pytest.raises(UsageError):
        open_store(uri)


names = st.text("abc:-0", min_size=1, max_size=9)


@given(
    st.builds(
        Record,
        vm=names,
        images=names,
        generation=st.integers(0, 1 << 60),
        phase=st.just(Phase.TAKEN),
        owner=names,
        nominee=names,
        fenced=st.lists(names, max_size=3).map(tuple),
        history=st.lists(
            st.builds(Entry, generation=st.integers(0, 9), act=names, by=names), max_size=5
        ).map(tuple),
    )
)
def test_text_of_a_record(record: Record) -> None:
    assert decode(record.encode(), "here") == record


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": True},
        {"generation": -1},
        {"generation": "1"},
        {"generation": 1.0},
        {"phase": "mine"},
        {"phase": ["held"]},
        {"owner": ""},
        {"owner": "a\n"},
        {"owner": "a" * 300},
        {"nominee": "b"},
        {"history": [{}]},
        {"history": {}},
        {"fenced": ["x"] * 9},
        {"more": 1},
    ],
)
def test_hostile_record_is_refused(change: dict[str, object]) -> None:
    values = json.loads(held("a").encode()) | change
    with pytest.raises(StorageError, match="expected the record"):
        decode(json.dumps(values).encode(), "here")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 60000, b"\xff", b" " * 70000])
def test_what_is_no_record_is_refused(text: bytes) -> None:
    with pytest.raises(StorageError, match="expected the record"):
        decode(text, "here")


def test_history_keeps_what_was_forced() -> None:
    record = FREE
    for generation in range(1, 200):
        entry = Entry(generation, "x", "me", forced=generation == 3)
        record = replace(record, generation=generation, history=record.remembering(entry))
    assert len(record.history) == 64
    assert [entry.generation for entry in record.history[:2]] == [3, 137]
