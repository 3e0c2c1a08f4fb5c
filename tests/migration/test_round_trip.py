"""Any machine, sent in any way, arrives as it was."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.migration.attempts import Attempt
from tests.migration.machines import PAGE_SIZE, Memory, Resting, machines, noise
from tests.transports.support import PROMPT, background
from vmferry import Checkpoint, Method, SendOptions
from vmferry.checkpoint.checkpoint import StoredPages
from vmferry.migration.source import Source
from vmferry.transports import connect
from vmferry.wire.bitmap import BitmapRecord
from vmferry.wire.devices import DeviceSection
from vmferry.wire.layout import BitmapFlag

WAYS = [
    SendOptions(),
    *(
        SendOptions(multifd=channels, method=method)
        for channels, method in itertools.product((1, 3), (Method.NONE, Method.ZLIB, Method.ZSTD))
    ),
]


def received(machine: Resting, options: SendOptions, attempt: Attempt) -> Checkpoint:
    address = attempt.destination.address
    source = Source(machine, lambda _: connect(address), options=options)
    sending = background(source.run)
    checkpoint = attempt.checkpoint()
    sending.result(PROMPT)
    return checkpoint


def bytes_of(pages: StoredPages | Memory | None, size: int) -> bytes:
    assert pages is not None
    data = bytearray(size)
    pages.read(0, memoryview(data))
    return bytes(data)


def named(record: BitmapRecord) -> BitmapRecord:
    """A record that repeats both names, whatever it did on its way."""
    return replace(record, names_sent=BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME)


def check_same(machine: Resting, checkpoint: Checkpoint) -> None:
    checkpoint.verify()
    assert checkpoint.configuration == machine.configuration
    assert checkpoint.footers == machine.footers
    assert list(checkpoint.blocks) == machine.blocks
    for block in machine.blocks:
        content = machine.memories[block.name]
        assert bytes_of(checkpoint.memory(block), block.length) == content
        assert list(checkpoint.memory(block).sums) == list(machine.memory(block).sums)
    images = {name: bytes_of(pages, pages.size) for name, pages in checkpoint.disks}
    assert images == machine.images
    assert [named(r) for r in checkpoint.bitmaps] == [named(r) for r in machine.bitmaps]
    assert checkpoint.description == machine.description
    bodies = [bytes(section.body) for section in checkpoint.device_sections]
    assert bodies == list(machine.state.bodies)
    assert all(isinstance(section, DeviceSection) for section in checkpoint.device_sections)


@given(machines(), st.sampled_from(WAYS))
@settings(max_examples=25)
def test_any_machine_arrives_as_it_was(machine: Resting, options: SendOptions) -> None:
    with Attempt() as attempt:
        check_same(machine, received(machine, options, attempt))


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_every_way_carries_a_machine_larger_than_all_buffers(options: SendOptions) -> None:
    mixed = noise(1, 20 << 20) + bytes(40 << 20) + noise(2, PAGE_SIZE) + b"\1" * (4 << 20)
    machine = Resting(memories={"pc.ram": mixed, "pc.rom": noise(3, 5 * PAGE_SIZE)})
    with Attempt() as attempt:
        check_same(machine, received(machine, options, attempt))


def test_checkpoint_is_sent_as_the_machine_that_it_was() -> None:
    machine = Resting(memories={"pc.ram": noise(1, 1 << 20) + bytes(1 << 20)})
    with Attempt() as first:
        checkpoint = received(machine, SendOptions(), first)
        check_same(machine, checkpoint)
        with Attempt() as second:
            address = second.destination.address
            source = Source(checkpoint, lambda _: connect(address), options=SendOptions(multifd=2))
            sending = background(source.run)
            check_same(machine, second.checkpoint())
            sending.result(PROMPT)
