"""Saving and loading declared devices: versions, conditions, subsections, hooks, and refusals."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Any, ClassVar

import pytest

from vmferry.errors import StateError, StreamError
from vmferry.vmstate import (
    I32,
    U8,
    U16,
    U32,
    Array,
    Bitmap,
    Buffer,
    Custom,
    Gap,
    Local,
    Queue,
    Subsection,
    Temporary,
    Timer,
    Tree,
    VarArray,
    VarBuffer,
    at_most,
    at_version,
    before,
    describe,
    device,
    equal,
    load,
    of,
    save,
    since,
    stage,
    state,
    subsection,
    when,
)


@state("channel", version=2)
@dataclass
class Channel:
    mode: U8 = 0
    count: Annotated[U16, since(2)] = 0


@state("timer/extra", version=3, minimum_version=2)
@dataclass
class Extra:
    a: U8 = 0
    b: Annotated[U8, since(3)] = 0


@state("timer/more")
@dataclass
class More:
    z: U8 = 9


@device("timer", version=3, minimum_version=1)
@dataclass
class Clock:
    kind: Annotated[U8, equal] = 7
    level: Annotated[I32, at_most] = 2
    armed: bool = False
    expires: Timer = None
    n: U8 = 0
    channels: Annotated[list[Channel], Array(4)] = field(
        default_factory=lambda: [Channel() for _ in range(4)]
    )
    some: Annotated[list[U16], VarArray("n", bound=3)] = field(default_factory=list)
    text: Annotated[bytes, VarBuffer("n", bound=3)] = b""
    flags: Annotated[list[bool], Array(2)] = field(default_factory=lambda: [False, False])
    pointers: Annotated[list[Channel | None], Array(2)] = field(
        default_factory=lambda: [None, Channel()]
    )
    queue: Annotated[list[Channel], Queue(bound=2)] = field(default_factory=list)
    tree: Annotated[dict[int, Channel], Tree(bound=2)] = field(default_factory=dict)
    bits: Annotated[int, Bitmap(3)] = 0
    buffer: Annotated[bytearray, Buffer(2)] = field(default_factory=lambda: bytearray(2))
    late: Annotated[U8, since(3)] = 0
    extra: Annotated[Extra | None, subsection] = None
    more: Annotated[More, Subsection(lambda clock: clock.more.z != 9)] = field(default_factory=More)


def full() -> Clock:
    return Clock(
        armed=True,
        expires=5,
        n=2,
        channels=[Channel(i, 2 * i) for i in range(4)],
        some=[1, 2],
        text=b"hi",
        flags=[True, False],
        pointers=[None, Channel(1, 1)],
        queue=[Channel(2, 2)],
        tree={3: Channel(3, 3), 1: Channel()},
        bits=5,
        buffer=bytearray(b"yo"),
        late=4,
        extra=Extra(1, 2),
        more=More(8),
    )


def test_a_state_comes_back() -> None:
    clock = Clock()
    load(clock, save(full()), 3)
    assert clock == full()


def test_objects_lists_and_buffers_that_are_there_stay_the_same() -> None:
    clock = full()
    before_loading = [clock.channels, clock.channels[3], clock.some, clock.buffer, clock.queue]
    load(clock, save(Clock()), 3)
    assert clock == Clock(more=More(8))
    after = [clock.channels, clock.channels[3], clock.some, clock.buffer, clock.queue]
    assert all(now is then for now, then in zip(after, before_loading, strict=True))


def test_every_cut_is_refused_and_changes_nothing() -> None:
    body = save(full())
    # Where a subsection begins, what came before it is a whole state.
    ends = {body.index(b"\5\x0btimer/extra"), body.index(b"\5\x0atimer/more")}
    for cut in range(len(body)):
        clock = Clock()
        if cut in ends:
            load(clock, body[:cut], 3)
            continue
        with pytest.raises(StateError) as refused:
            load(clock, body[:cut], 3)
        assert str(refused.value).startswith("timer")
        assert clock == Clock(), cut


def broken(change: Callable[[Clock], None]) -> Clock:
    clock = full()
    change(clock)
    return clock


def setter(path: str, value: Any) -> Callable[[Clock], None]:
    def change(clock: Clock) -> None:
        exec(f"clock.{path} = value", {"clock": clock, "value": value})  # noqa: S102

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("kind", 256, "timer.kind: expected an integer from 0 to 255, found 256"),
        ("kind", -1, "timer.kind: expected an integer from 0 to 255, found -1"),
        ("kind", None, "timer.kind: expected an integer from 0 to 255, found None"),
        ("kind", "x", "timer.kind: expected an integer from 0 to 255, found 'x'"),
        ("level", 2**31, "timer.level: expected an integer from -2147483648 to 2147483647, "),
        ("armed", 2, "timer.armed: expected a bool, found 2"),
        ("armed", None, "timer.armed: expected a bool, found None"),
        ("armed", Decimal(1), "timer.armed: expected a bool, found Decimal"),
        ("expires", 2**63, "timer.expires: expected None or an integer from -92233"),
        ("channels[3].mode", 300, "timer.channels[3].mode: expected an integer from 0 to 255"),
        ("channels[1]", None, "timer.channels[1]: expected an object of Channel, found None"),
        ("channels", [], "timer.channels: expected 4 elements, found 0"),
        ("channels", None, "timer.channels: expected a list, found None"),
        ("some", [1], "timer.some: expected as many as n says, 2, at most 3, found 1"),
        ("some", [1, 70000], "timer.some[1]: expected an integer from 0 to 65535, found 70000"),
        ("text", b"abc", "timer.text: expected as many as n says, 2, at most 3, found 3"),
        ("text", "ab", "timer.text: expected bytes, found 'ab'"),
        ("flags[1]", 3, "timer.flags[1]: expected a bool, found 3"),
        ("queue", [Channel()] * 3, "timer.queue: expected a list of at most 2"),
        ("queue[0].count", -1, "timer.queue[0].count: expected an integer from 0 to 65535"),
        ("tree[3].mode", -1, "timer.tree[3].mode: expected an integer from 0 to 255"),
        ("tree", {-1: Channel()}, "timer.tree[-1]: expected an integer from 0 to 18446744073709"),
        ("bits", 8, "timer.bits: expected an integer of at most 3 bits, found 8"),
        ("bits", -1, "timer.bits: expected an integer of at most 3 bits, found -1"),
        ("buffer", b"abc", "timer.buffer: expected 2 bytes, found 3"),
        ("extra.b", 256, "timer.extra.b: expected an integer from 0 to 255, found 256"),
        ("extra", 7, "timer.extra: expected an object of Extra, found 7"),
    ],
)
def test_values_that_do_not_fit_are_not_saved(path: str, value: Any, message: str) -> None:
    with pytest.raises(StateError) as refused:
        save(broken(setter(path, value)))
    assert str(refused.value).startswith(message)
    assert isinstance(refused.value, StreamError)
    assert refused.value.to_json()["field"] == message.partition(":")[0]


def test_a_missing_attribute_is_not_saved() -> None:
    @device("bare")
    class Bare:
        x: U8

    with pytest.raises(StateError, match=r"bare\.x: expected .*, found no such attribute"):
        save(Bare())


EXTRA = b"\5\x0btimer/extra"
NODE = b"\1" + bytes(7) + b"\1"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"\7", b"\6", "timer.kind: expected 7, as this device has, found 6"),
        (b"\7\0\0\0\2", b"\7\0\0\0\3", "timer.level: expected 0 to 2, which this device has"),
        (b"\7\0\0\0\2", b"\7\xff\xff\xff\xff", "timer.level: expected 0 to 2"),
        (b"\0\0\0\2\1", b"\0\0\0\2\2", "timer.armed: expected a bool of 0 or 1, found 2"),
        (b"\0\5\2", b"\0\5\4", "timer.some: expected at most 3 elements, found n of 4"),
        (b"hi\1\0", b"hi\1\2", "timer.flags[1]: expected a bool of 0 or 1, found 2"),
        (b"\x30\1", b"\x31\1", "timer.pointers[0]: expected the mark of a NULL pointer, 0x30"),
        (b"\1\2\0\2\0", b"\2\2\0\2\0", "timer.queue: expected the mark of an element (1)"),
        (
            b"\1\2\0\2\0",
            b"\1\2\0\2\1\2\0\2\1\2\0\2\0",
            "timer.queue: expected at most 2 elements, found one more",
        ),
        (b"\0\0\0\2" + NODE, b"\0\0\0\3" + NODE, "timer.tree: expected at most 2 nodes, found 3"),
        (b"\0\0\0\2" + NODE, b"\xff\xff\xff\xff" + NODE, "timer.tree: expected at most 2 nodes"),
        (b"\0\0\0\2" + NODE, b"\0\0\0\1" + NODE, "timer.tree: expected 1 nodes, found one more"),
        (b"\0\3\3\0\3\0", b"\0\1\3\0\3\0", "timer.tree[1]: expected each key once, found 1"),
        (b"\5yo", b"\x0dyo", "timer.bits: expected at most 3 bits, found bit 3 set"),
        (EXTRA, b"\5\x0btimer/extrb", 'timer: expected a subsection of timer, found "timer/extrb"'),
        (EXTRA + b"\0\0\0\3", EXTRA + b"\0\0\0\4", "timer.extra: expected version 2 to 3 of"),
        (EXTRA + b"\0\0\0\3", EXTRA + b"\0\0\0\1", "timer.extra: expected version 2 to 3 of"),
        (b"\5\x0atimer/more", EXTRA, 'timer: expected a subsection of timer, found "timer/extra"'),
    ],
)
def test_bytes_that_do_not_fit_are_not_loaded(old: bytes, new: bytes, message: str) -> None:
    body = save(full())
    assert old in body
    clock = Clock()
    with pytest.raises(StateError) as refused:
        load(clock, body.replace(old, new, 1), 3)
    assert str(refused.value).startswith(message)
    assert clock == Clock()


def test_a_buffer_stays_free_to_grow_where_loading_failed() -> None:
    clock = Clock()
    with pytest.raises(StateError) as refused:
        load(clock, save(full()) + b"x", 3)
    clock.buffer.extend(b"more")
    assert refused.value.field == "timer"


@pytest.mark.parametrize("path", ["queue", "tree", "text", "channels", "pointers[1]"])
def test_a_state_that_cannot_be_saved_is_not_described(path: str) -> None:
    clock = broken(setter(path, 7))
    with pytest.raises(StateError, match="timer"):
        describe(clock)


def test_bytes_behind_the_state_are_not_loaded() -> None:
    body = save(full()) + b"\0"
    clock = Clock()
    with pytest.raises(StateError, match=f"timer: expected a state of {len(body)} bytes"):
        load(clock, body, 3)
    assert clock == Clock()


@pytest.mark.parametrize("version", [0, 4, 2**32 - 1])
def test_other_versions_are_not_loaded(version: int) -> None:
    with pytest.raises(StateError, match=f"expected version 1 to 3 of timer, found {version}"):
        load(Clock(), save(full()), version)


def test_an_older_version_lacks_its_fields() -> None:
    body = save(Clock(late=1)).removesuffix(b"\1")
    clock = Clock(late=5)
    load(clock, body, 2)
    assert clock == Clock(late=5)


def test_an_older_subsection_lacks_its_fields() -> None:
    clock = Clock(extra=Extra(0, 6))
    body = save(Clock()) + EXTRA + b"\0\0\0\2\1"
    load(clock, body, 3)
    assert clock.extra == Extra(1, 6)


def test_what_was_not_sent_is_none_or_as_it_was() -> None:
    clock = Clock(extra=Extra(1), more=More(3))
    load(clock, save(Clock()), 3)
    assert (clock.extra, clock.more) == (None, More(3))


def test_a_staged_state_is_assigned_by_commit_and_says_its_size() -> None:
    body = save(full())
    clock = Clock()
    staged = stage(clock, body + b"\x7e\0\0\0\1", 3)
    assert (clock, staged.size) == (Clock(), len(body))
    staged.commit()
    assert clock == full()


# Conditions


@device("wide", version=3, minimum_version=1)
@dataclass
class Wide:
    long: bool = False
    mask: Annotated[U8, when(lambda wide: wide.is_long() and wide.both)] = 0
    _narrow: ClassVar[Annotated[U16, of("value"), before(2)]]
    value: Annotated[U32, since(2)] = 0
    odd: Annotated[U8, when(lambda _, version: version == 3)] = 0
    inner: Channel = field(default_factory=Channel)
    follow: Annotated[U8, when(lambda wide: wide.inner.mode == 1)] = 0
    _gap: ClassVar[Annotated[None, Gap(1), before(3)]]

    def is_long(self) -> bool:
        return self.long

    @property
    def both(self) -> bool:
        return self.long


@pytest.mark.parametrize(
    ("version", "wire", "loaded"),
    [
        (3, "00 00000005 06 00 0000", Wide(value=5, odd=6)),
        (3, "01 09 00000005 06 00 0000", Wide(long=True, mask=9, value=5, odd=6)),
        (3, "00 00000005 06 01 0002 07", Wide(False, 0, 5, 6, Channel(1, 2), 7)),
        (2, "00 00000005 00 0000 ff", Wide(value=5)),
        (1, "00 0005 00 0000 ff", Wide(value=5)),
    ],
)
def test_conditions_hold_for_the_state_that_is_loaded(
    version: int, wire: str, loaded: Wide
) -> None:
    wide = Wide()
    load(wide, bytes.fromhex(wire), version)
    assert wide == loaded
    if version == 3:
        assert save(wide) == bytes.fromhex(wire)


def test_a_struct_is_kept_at_the_version_that_is_asked_for() -> None:
    @state("pair", version=2, minimum_version=1)
    @dataclass
    class Pair:
        a: U8 = 1
        b: Annotated[U8, since(2)] = 2

    @device("dev")
    @dataclass
    class Device:
        new: Pair = field(default_factory=Pair)
        old: Annotated[Pair, at_version(1)] = field(default_factory=Pair)

    assert save(Device()) == b"\1\2\1"
    dev = Device()
    load(dev, b"\3\4\5", 1)
    assert dev == Device(Pair(3, 4), Pair(5, 2))
    old = describe(dev)["fields"][1]
    assert (old["type"], old["version"], old["size"], len(old["fields"])) == ("vstruct", 1, 1, 1)


# Hooks


@state("part")
@dataclass
class Part:
    x: U8
    log: Local[list[str]] = field(default_factory=list)

    def post_load(self, version: int) -> None:
        self.log.append(f"part {version}")
        if self.x == 13:
            raise ValueError("an unlucky number")


@state("total")
@dataclass
class Total:
    sum: U8


@device("hooked", version=2, minimum_version=1)
class Hooked:
    part: Part
    items: Annotated[list[Part], Queue()]
    _total: ClassVar[Annotated[Total, Temporary(save="make_total", load="take_total")]]
    raw: U8

    def __init__(self) -> None:
        self.log: list[str] = []
        self.part = Part(1, self.log)
        self.items = [Part(2), Part(3)]
        self.value = 0
        self.raw = 0

    def pre_save(self) -> None:
        if self.value < 0:
            raise ValueError("it is broken")
        self.raw = self.value

    def post_save(self) -> None:
        self.log.append("saved")
        self.raw = 0

    def pre_load(self) -> None:
        if self.value == 99:
            raise StateError("an idle device", "a busy one")
        self.log.append("loading")

    def post_load(self, version: int) -> None:
        self.log.append(f"loaded {version}")
        self.value = self.raw

    def make_total(self) -> Total:
        return Total(sum(item.x for item in self.items))

    def take_total(self, total: Total) -> None:
        if total != self.make_total():
            raise ValueError(f"a total of {total.sum}")
        self.log.append("total")


def test_hooks_run_in_order_innermost_first() -> None:
    source = Hooked()
    source.value = 6
    body = save(source)
    assert body == b"\1\1\2\1\3\0\5\6"
    assert (source.log, source.raw) == (["saved"], 0)
    target = Hooked()
    load(target, body, 2)
    assert target.value == 6
    assert target.log == ["loading", "part 1", "total", "loaded 2"]
    assert [item.log for item in target.items] == [["part 1"], ["part 1"]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"\1\1", b"\x0d\1", "hooked.part: expected a state that Part.post_load accepts, found an"),
        (b"\1\3", b"\1\x0d", "hooked.items[1]: expected a state that Part.post_load accepts, fo"),
        (b"\5", b"\4", "hooked: expected a state that take_total accepts, found a total of 4"),
    ],
)
def test_hooks_may_refuse_what_was_loaded(old: bytes, new: bytes, message: str) -> None:
    with pytest.raises(StateError) as refused:
        load(Hooked(), save(Hooked()).replace(old, new, 1), 2)
    assert str(refused.value).startswith(message)


def test_hooks_may_refuse_to_save_and_to_load() -> None:
    hooked = Hooked()
    hooked.value = -1
    with pytest.raises(StateError, match=r"that Hooked\.pre_save accepts, found it is broken"):
        save(hooked)
    hooked.value = 99
    with pytest.raises(StateError, match="hooked: expected an idle device, found a busy one"):
        load(hooked, save(Hooked()), 2)


def test_post_save_runs_where_saving_failed() -> None:
    hooked = Hooked()
    hooked.items[1].x = 300
    with pytest.raises(StateError, match=r"hooked\.items\[1\]\.x"):
        save(hooked)
    assert hooked.log == ["saved"]


@state("logging")
@dataclass
class Logging:
    name: Local[str]
    log: Local[list[str]]
    x: U8 = 0

    def pre_save(self) -> None:
        self.log.append(f"before {self.name}")

    def post_save(self) -> None:
        self.log.append(f"after {self.name}")
        raise ValueError(f"{self.name} cannot go on")


def test_every_post_save_runs_innermost_first_whatever_the_others_do() -> None:
    log: list[str] = []

    @device("outer")
    class Outer(Logging):
        inner: Logging

    outer = Outer("outer", log)
    outer.inner = Logging("inner", log)
    with pytest.raises(StateError, match=r"Outer\.post_save accepts, found outer cannot go on"):
        save(outer)
    assert log == ["before outer", "before inner", "after inner", "after outer"]


def test_describing_runs_the_hooks_of_saving() -> None:
    hooked = Hooked()
    described = describe(hooked)
    assert hooked.log == ["saved"]
    (queue,) = [entry for entry in described["fields"] if entry["type"] == "qtailq"]
    (total,) = [entry for entry in described["fields"] if entry["type"] == "tmp"]
    assert (queue["size"], total["name"], total["vmsd_name"]) == (5, "tmp", "total")


def test_an_unmigratable_device_says_why() -> None:
    @device("passthrough", unmigratable="it holds a physical function")
    class Device:
        pass

    with pytest.raises(StateError, match=r"passthrough: .*found it holds a physical function"):
        save(Device())


class Careless:
    """A codec that does as it is told, whatever that is."""

    type = "careless"

    def save(self, value: Any) -> Any:
        return value

    def load(self, data: memoryview) -> Any:
        """What stands behind a length, or whatever goes wrong where it does not."""
        if data[0] == 99:
            return struct.unpack(">I", data[1:3])
        if data[0] > 99:
            return b"", data[0] - 256
        return bytes(data[1 : 1 + data[0]]), 1 + data[0]


@device("careless")
@dataclass
class Coded:
    text: Annotated[Any, Custom(Careless())] = b"\0"
    x: U8 = 0


@pytest.mark.parametrize("value", ["text", None, 3, [1], memoryview(b"abcd").cast("H")])
def test_what_a_codec_gives_has_to_be_bytes(value: Any) -> None:
    with pytest.raises(StateError, match=r"careless\.text: expected bytes of .*Careless\.save,"):
        save(Coded(value))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a state that .*Careless.load accepts, found index out of bounds"),
        (b"\x05ab", "6 bytes, found 3, and the end of the state"),
        (b"\x63abcd", "a state that .*Careless.load accepts, found unpack requires a buffer of 4"),
        (b"\xff", "a value and its bytes from .*Careless.load, found -1 bytes"),
    ],
)
def test_a_codec_need_not_look_where_the_state_ends(data: bytes, message: str) -> None:
    with pytest.raises(StateError, match=rf"careless\.text: expected {message}"):
        load(Coded(), data, 1)


def test_bytes_may_be_any_view_of_bytes() -> None:
    @device("viewed")
    @dataclass
    class Viewed:
        data: Annotated[bytes, Buffer(4)] = bytes(4)

    every_other: Any = memoryview(b"a.b.c.d.")[::2]
    assert save(Viewed(every_other)) == b"abcd"


def test_setters_may_refuse_what_was_loaded() -> None:
    @device("strict")
    class Strict:
        mode: U8
        level: U8

        def __init__(self) -> None:
            self.level = 0
            self._mode = 0

        @property  # type: ignore[no-redef]
        def mode(self) -> int:
            return self._mode

        @mode.setter
        def mode(self, mode: int) -> None:
            if mode > 3:
                raise ValueError(f"no mode {mode}")
            self._mode = mode

    load(Strict(), b"\3\0", 1)
    with pytest.raises(StateError, match=r"strict: .* that .*Strict accepts, found no mode"):
        load(Strict(), b"\4\0", 1)


def test_saving_does_not_change_what_is_saved() -> None:
    clock = full()
    untouched = copy.deepcopy(clock)
    save(clock)
    describe(clock)
    assert clock == untouched
