"""Which names and numbers sections get, what is refused, and what blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.migration.boards import Channel, Disk, Passthrough, Timer, Uart
from vmferry import Registry, UsageError
from vmferry.vmstate import U8, device


@device("pinned", instance_id=7, alias_id=9)
@dataclass
class Pinned:
    value: U8 = 0


def test_instances_are_given_out_from_zero() -> None:
    registry = Registry()
    assert [registry.register(Uart()).instance for _ in range(3)] == [0, 1, 2]
    assert registry.register(Uart(), path="pci").instance == 0
    assert registry.register(Timer()).name == "timer"


def test_name_begins_with_the_path() -> None:
    section = Registry().register(Uart(), path="0000:00:01.0")
    assert (section.name, section.instance) == ("0000:00:01.0/uart", 0)


def test_instance_behind_the_highest_is_next() -> None:
    registry = Registry()
    registry.register(Uart(), instance=5)
    assert registry.register(Uart()).instance == 6
    registry.register(Uart(), instance=0, alias=7)
    assert registry.register(Uart()).instance == 8


def test_instance_of_what_left_is_free_again() -> None:
    registry = Registry()
    first, last = Uart(), Uart()
    registry.register(first)
    registry.register(last)
    registry.unregister(last)
    assert registry.find("uart", 1) is None
    assert registry.register(last).instance == 1
    registry.unregister(first)
    assert registry.register(first).instance == 2


def test_class_may_give_instance_and_alias() -> None:
    registry = Registry()
    section = registry.register(Pinned())
    assert registry.find("pinned", 7) is section
    assert registry.find("pinned", 9) is section
    other = registry.register(Pinned(), instance=8, alias=10)
    assert registry.find("pinned", 10) is other
    assert registry.find("pinned", 0) is None


def test_higher_priorities_are_saved_first_and_equals_as_registered() -> None:
    registry = Registry()
    uarts = [Uart(), Uart()]
    timer = Timer()
    for item in (*uarts, timer):
        registry.register(item)
    assert [section.device for section in registry.devices] == [timer, *uarts]
    assert registry.devices[0].device is timer


def register_twice(registry: Registry) -> None:
    uart = Uart()
    registry.register(uart)
    registry.register(uart)


def handler_named(name: str, chunk: int = 20) -> Disk:
    disk = Disk()
    disk.name, disk.chunk = name, chunk  # type: ignore[misc]
    return disk


REFUSED: list[tuple[str, Any, str]] = [
    ("an instance twice", lambda r: r.register(Uart(), instance=0), 'taken by "uart" instance 0'),
    ("an alias that is taken", lambda r: r.register(Uart(), alias=0), "alias 0 is taken by"),
    (
        "an instance that is an alias",
        lambda r: (r.register(Pinned()), r.register(Pinned(), instance=9, alias=1)),
        'instance 9 is taken by "pinned" instance 7',
    ),
    ("an object twice", register_twice, "this Uart is registered already"),
    ("a large instance", lambda r: r.register(Uart(), instance=1 << 32), "instance is 0 to 42949"),
    ("a negative alias", lambda r: r.register(Uart(), alias=-1), "alias is 0 to 4294967295"),
    ("a long name", lambda r: r.register(Uart(), path="x" * 251), "1 to 255 printable bytes"),
    ("a name with a line", lambda r: r.register(Uart(), path="a\n"), r'not "a\\n/uart"'),
    ("a part", lambda r: r.register(Channel()), "Channel is part of a device"),
    ("what is not declared", lambda r: r.register(object()), "object is not declared"),
    ("a stranger", lambda r: r.unregister(Uart()), "this Uart is not registered"),
    ("a handler called ram", lambda r: r.register_iterative(handler_named("ram")), "of its own"),
    ("a handler twice", lambda r: r.register_iterative(handler_named("uart"), instance=0), "taken"),
    ("a chunk of 0", lambda r: r.register_iterative(handler_named("d", 0)), "1 to 1048576 bytes"),
    (
        "a chunk above 1 MiB",
        lambda r: r.register_iterative(handler_named("d", (1 << 20) + 1)),
        "a chunk has 1 to 1048576 bytes, not 1048577",
    ),
]


@pytest.mark.parametrize(("act", "text"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_registered_is_refused(act: Any, text: str) -> None:
    registry = Registry()
    registry.register(Uart())
    before = registry.devices
    with pytest.raises(UsageError, match=text):
        act(registry)
    assert registry.devices[:1] == before
    assert registry.register(Timer()).instance == 0


def test_blockers_come_and_go() -> None:
    registry = Registry()
    registry.check_migratable()
    standing = registry.add_blocker("a debugger is attached")
    with (
        registry.blocked("a disk is being copied"),
        pytest.raises(UsageError, match="a debugger is attached; a disk is being copied"),
    ):
        registry.check_migratable()
    with pytest.raises(UsageError, match=r"cannot be migrated: a debugger is attached$"):
        registry.check_migratable()
    registry.remove_blocker(standing)
    registry.check_migratable()
    with pytest.raises(UsageError, match="no such blocker: a debugger"):
        registry.remove_blocker(standing)


def test_blocker_goes_with_an_exception() -> None:
    registry = Registry()
    with pytest.raises(ValueError, match="oops"), registry.blocked("busy"):
        raise ValueError("oops")
    registry.check_migratable()


def test_equal_reasons_are_two_blockers() -> None:
    registry = Registry()
    first = registry.add_blocker("busy")
    second = registry.add_blocker("busy")
    registry.remove_blocker(first)
    with pytest.raises(UsageError, match="busy"):
        registry.check_migratable()
    registry.remove_blocker(second)
    registry.check_migratable()


def test_unmigratable_device_blocks_while_it_is_there() -> None:
    registry = Registry()
    card = Passthrough()
    registry.register(card)
    with pytest.raises(UsageError, match='"passthrough" instance 0: it holds a card of this host'):
        registry.check_migratable()
    registry.unregister(card)
    registry.check_migratable()
