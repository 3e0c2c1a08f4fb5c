"""Any class that can be declared: it round-trips, is described, and refuses what does not fit."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmstate.classes import History, Made, classes, histories
from vmferry.errors import StateError
from vmferry.vmstate import describe, load, save
from vmferry.wire.description import parse_description

SEEDS = st.integers(0, 2**32 - 1).map(Random)


def damaged(rng: Random, body: bytes) -> bytes:
    """*body* with a few bytes changed, cut, or put in."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(body))
        end = min(len(body), at + rng.randint(0, 4))
        body = body[:at] + rng.randbytes(rng.randint(0, 4)) + body[end:]
    return body


@settings(max_examples=150, deadline=None)
@given(classes(), SEEDS)
def test_any_class_round_trips(made: Made, rng: Random) -> None:
    source, target = made.make(rng), made.make(rng)
    body = save(source)
    load(target, body, 1)
    assert target == source
    assert save(target) == body


@settings(max_examples=100, deadline=None)
@given(classes(), SEEDS)
def test_any_class_is_described_to_the_last_byte(made: Made, rng: Random) -> None:
    obj = made.make(rng)
    body = save(obj)
    described = {"name": "dev", "instance_id": 0} | describe(obj)
    text = json.dumps({"page_size": 4096, "devices": [described]}).encode()
    (parsed,) = parse_description(text).devices
    assert parsed.size == len(body)
    assert taken(described, body, 0) == len(body)


def taken(state: dict[str, Any], body: bytes, at: int) -> int:
    """Where *state* ends in *body*, by the rules of the format and nothing else."""
    for entry in state["fields"]:
        for _ in range(entry.get("array_len", 1)):
            start = at
            at = taken(entry["struct"], body, at) if "struct" in entry else at + entry["size"]
            assert at - start == entry["size"], entry
    for part in state.get("subsections", ()):
        name = part["vmsd_name"].encode()
        head = b"\5" + bytes([len(name)]) + name + part["version"].to_bytes(4)
        assert body.startswith(head, at)
        at = taken(part, body, at + len(head))
    return at


@settings(max_examples=150, deadline=None)
@given(classes(), SEEDS)
def test_damaged_bytes_load_whole_or_change_nothing(made: Made, rng: Random) -> None:
    whole = save(made.make(rng))
    for _ in range(20):
        body = damaged(rng, whole)
        target = made.make(rng)
        untouched = copy.deepcopy(target)
        try:
            load(target, body, 1)
        except StateError:
            assert target == untouched
        else:
            # What was not sent is as it was, so it may have more bytes; it is whole all the same.
            again = made.make(rng)
            load(again, save(target), 1)
            assert save(again) == save(target)


@settings(max_examples=100, deadline=None)
@given(histories(), SEEDS)
def test_an_older_version_loads_in_every_newer(history: History, rng: Random) -> None:
    old = history.make(rng)
    body = save(old)
    for cls in history.versions:
        new = cls(**dict.fromkeys(cls.__annotations__))
        load(new, body, 1)
        for name in vars(old):
            assert getattr(new, name) == getattr(old, name)
        assert all(value is None for name, value in vars(new).items() if not hasattr(old, name))
