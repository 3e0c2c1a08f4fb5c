"""What an operator sees and states, by the command."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmferry import UsageError
from vmferry.cli import main
from vmferry.ownership import protocol
from vmferry.ownership.engine import Ownership
from vmferry.ownership.protocol import Party, Swap
from vmferry.ownership.record import Phase, Record
from vmferry.ownership.store import Store, open_store


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command leaves signals ignored at its end, which is not that of this process."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def engine(store: Store) -> Ownership:
    return Ownership(store, vm="vm", pause=lambda: False, resume=lambda: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A machine whose owner is on another host, and was never heard of again."""
    store = open_store(f"file:{tmp_path}/owner")
    record = Record(vm="vm", generation=1, phase=Phase.HELD, owner="far:away")
    store.swap(store.read(), Swap(record))
    return store


def shown(store: Store, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["owner", "show", store.uri, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_silence_is_no_death(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="vmferry owner fence"):
        engine(store).claim()
    assert main(["owner", "release", store.uri, "--generation", "1"]) == 2
    assert main(["owner", "claim", store.uri, "--generation", "1"]) == 2
    assert shown(store, capsys)["generation"] == 1


def test_statement_is_of_one_generation_and_is_kept(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    stated = ["--i-have-fenced-it", "--note", "power is off"]
    assert main(["owner", "claim", store.uri, "--generation", "7", *stated]) == 2
    assert main(["owner", "claim", store.uri, "--generation", "1", *stated]) == 0
    record = shown(store, capsys)
    assert record["phase"] == "free"
    forced = [entry for entry in record["history"] if entry["forced"]]
    assert [(entry["act"], entry["note"]) for entry in forced] == [
        ("fence", "power is off"),
        ("claim", "power is off"),
    ]
    one = engine(store)
    one.claim()
    assert one.may_run
    one.close()
    assert shown(store, capsys)["phase"] == "free"


def test_fenced_engine_is_told_so(store: Store) -> None:
    name = "far:away"
    stated = ["--engine", name, "--generation", "1", "--i-have-fenced-it"]
    assert main(["owner", "fence", store.uri, *stated]) == 0
    record = store.read().record
    assert record is not None
    for act in protocol.Act:
        assert protocol.judge(act, record, Party(name, "token")) is protocol.Verdict.NEVER


def test_history_for_people(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    stated = ["--generation", "1", "--i-have-fenced-it", "--note", "burnt"]
    assert main(["owner", "claim", store.uri, *stated]) == 0
    capsys.readouterr()
    assert main(["owner", "history", store.uri]) == 0
    assert "burnt" in capsys.readouterr().out
