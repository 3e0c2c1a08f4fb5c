from __future__ import annotations

import pytest

from tests.wire.feeding import Steps, check_round_trip, check_truncation, read, read_in_every_way
from vmferry.errors import LimitExceeded, StreamError
from vmferry.wire.foreign import hash_table, hash_table_start, storage_attributes

ATTRIBUTES = (
    bytes.fromhex("0000000000001002 0000000000000003 aabbcc")
    + bytes.fromhex("0000000000002002 0000000000000000")
    + bytes.fromhex("0000000000000008 0000000000000001")
)
TABLE = (
    bytes.fromhex("00000000 00000010 0002 0001")
    + bytes(range(32))
    + bytes.fromhex("00000020 0000 0005 00000000 0000 0000")
)

# The section, its bodies, how many pieces they have.
BODIES = [
    ("attributes", (storage_attributes,), ATTRIBUTES, 4),
    ("attributes: nothing", (storage_attributes,), bytes.fromhex("0000000000000001"), 1),
    ("hash table", (hash_table_start, hash_table), bytes.fromhex("00000018") + TABLE, 5),
    (
        "no hash table",
        (hash_table_start, hash_table),
        bytes.fromhex("ffffffff ffffffff"),
        2,
    ),
]


@pytest.mark.parametrize(("name", "steps", "data", "pieces"), BODIES, ids=[b[0] for b in BODIES])
def test_body_is_kept_as_it_came(name, steps, data, pieces):
    events = check_round_trip(lambda: Steps(*steps), data)
    assert len(events) == pieces
    check_truncation(lambda: Steps(*steps), data)


BAD = [
    ("no flag", storage_attributes, "0000000000001000", StreamError, "more, done or end"),
    ("an error", storage_attributes, "0000000000001004", StreamError, "word 0x0000000000001004"),
    (
        "attributes of 16 MiB + 1",
        storage_attributes,
        "0000000000001002 0000000001000001",
        LimitExceeded,
        "at most 16777216 bytes, found 16777217",
    ),
    (
        "attributes of 2^64 - 1",
        storage_attributes,
        "0000000000001002 ffffffffffffffff",
        LimitExceeded,
        "found 18446744073709551615",
    ),
]


@pytest.mark.parametrize(("wrong", "step", "wire", "kind", "message"), BAD, ids=[b[0] for b in BAD])
def test_piece_is_refused_with(wrong, step, wire, kind, message):
    data = bytes.fromhex("0000000000000008" + wire)
    outcome = read(Steps(step), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert type(outcome.error) is kind
    assert outcome.place.offset == 8
    assert read_in_every_way(lambda: Steps(step), data).error is not None
