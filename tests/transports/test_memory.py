"""The in-memory pair: bounded, and exact for every way of cutting the parts."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmferry.transports
from tests.transports.support import PROMPT, background, blocked, receive
from vmferry.errors import TransportError
from vmferry.transports import RateLimit, limited, listen, memory_pair
from vmferry.transports.gather import IOV_MAX, Gather

PARTS = st.lists(st.one_of(st.binary(max_size=3), st.binary(max_size=300)), max_size=60)


def test_sender_waits_when_the_capacity_is_used_up() -> None:
    sender, receiver = memory_pair(capacity=10)
    sender.send([b"0123456789"])
    assert sender.unsent() == 10
    sending = blocked(lambda: sender.send([b"a"]))
    assert not sending.done()
    assert receive(receiver, 1) == b"0"
    sending.result(PROMPT)
    assert sender.unsent() == 10


def test_sending_nothing_to_a_full_pair_waits_for_nothing() -> None:
    sender, _ = memory_pair(capacity=1)
    sender.send([b"x"])
    background(lambda: sender.send([b"", b""])).result(PROMPT)


def test_what_was_sent_before_a_shutdown_still_arrives() -> None:
    sender, receiver = memory_pair()
    sender.send([b"last words"])
    sender.shutdown()
    assert receive(receiver) == b"last words"
    with pytest.raises(TransportError, match="no longer reads"):
        receiver.send([b"x"])


@settings(deadline=None)
@given(PARTS, st.integers(1, 500), st.integers(1, 500))
def test_any_parts_arrive_whole_through_any_capacity(
    parts: list[bytes], capacity: int, step: int
) -> None:
    sender, receiver = memory_pair(capacity)
    whole = b"".join(parts)
    sending = background(lambda: sender.send(parts))
    assert receive(receiver, len(whole), step) == whole
    sending.result(PROMPT)


@settings(deadline=None)
@given(PARTS, st.data())
def test_gathering_survives_any_short_writes(parts: list[bytes], data: st.DataObject) -> None:
    gather = Gather(parts)
    out = bytearray()
    while window := gather.window(data.draw(st.integers(1, 400))):
        flat = b"".join(window)
        assert len(flat) == gather.window_size > 0
        taken = data.draw(st.integers(1, len(flat)))
        out += flat[:taken]
        gather.sent(taken)
    assert out == b"".join(parts)


@pytest.mark.parametrize("count", [IOV_MAX - 1, IOV_MAX, IOV_MAX + 1, 3 * IOV_MAX])
def test_no_window_has_more_parts_than_the_kernel_takes(count: int) -> None:
    gather = Gather([b""] * count + [b"x"] * count + [b""] * count)
    total = 0
    while window := gather.window():
        assert len(window) <= IOV_MAX
        total += gather.window_size
        gather.sent(gather.window_size)
    assert total == count


def test_parts_are_lent_and_not_copied() -> None:
    part = bytearray(os.urandom(1 << 20))
    gather = Gather([b"head", part])
    assert gather.window()[1] is part
    gather.sent(10)
    (rest,) = gather.window()
    assert isinstance(rest, memoryview)
    assert rest.obj is part


def test_name_of_a_limited_channel_is_the_name_in_its_errors() -> None:
    channel = limited(memory_pair()[0], RateLimit())
    channel.name = "multifd 3"
    with pytest.raises(TransportError, match='"multifd 3": waited'):
        channel.recv_into(memoryview(bytearray(1)), 0)


def test_public_names_are_the_ones_listed() -> None:
    public = {
        name
        for name, value in vars(vmferry.transports).items()
        if not name.startswith("_") and type(value).__name__ != "module" and name != "annotations"
    }
    assert public == set(vmferry.transports.__all__)
    assert listen.__module__.startswith("vmferry.transports.")
