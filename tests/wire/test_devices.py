"""Device sections: cut apart by description or footers, and their end found while they come in."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmstate.tails import Tail, manifest, recorded
from tests.wire import described as d
from vmferry.errors import LimitExceeded, StreamError, TruncatedStream
from vmferry.wire import limits
from vmferry.wire.description import UnreadDescription, VmDescription, parse_description
from vmferry.wire.devices import (
    CANDIDATES,
    Decode,
    DecodedDevices,
    DeviceRegion,
    DeviceSection,
    EarlyFinder,
    TailFinder,
    split_by_footers,
    split_devices,
)
from vmferry.wire.sections import SectionStart

TAILS = sorted(manifest())
I2C = bytes.fromhex("04 0000001e 07 6932635f627573 00000000 00000001 ff 7e 0000001e")


def finder(tail: Tail, offset: int = 0) -> TailFinder:
    return TailFinder(footers=tail.footers, offset=offset, early=tail.early_devices)


# Splitting by description


def test_a_section_knows_its_parts() -> None:
    description = parse_description(
        d.description(d.device("i2c_bus", d.vmsd("i2c_bus", d.field("saved_address", "uint8", 1))))
    )
    (section,) = split_devices(I2C, description, footers=True, offset=0x100)
    assert section == DeviceSection(0x1E, "i2c_bus", 0, 1, 0x100, b"\xff", footer=True)
    assert (section.body_offset, section.size) == (0x100 + 21, len(I2C))
    assert section.encode() == I2C
    assert section.described


@settings(deadline=None)
@given(d.streams())
def test_described_sections_are_cut_exactly(stream: d.Stream) -> None:
    sections = split_devices(
        stream.sections, parse_description(stream.text), footers=stream.footers, offset=7
    )
    assert [bytes(section.body) for section in sections] == list(stream.bodies)
    assert all(section.described for section in sections)
    assert b"".join(section.encode() for section in sections) == stream.sections
    assert [section.offset + section.size for section in sections[:-1]] == [
        section.offset for section in sections[1:]
    ]


@pytest.mark.parametrize("name", TAILS)
def test_recorded_sections_are_cut_exactly(name: str) -> None:
    tail = recorded(name)
    lies = [section.name for section in tail.sections if not section.described]
    assert lies == (["s390_css"] if name == "s390x" else [])
    joined = b"".join(section.encode() for section in tail.sections)
    assert joined == tail.data[: tail.devices_size]


@pytest.mark.parametrize("name", [name for name in TAILS if recorded(name).footers])
def test_footers_alone_find_the_same_sections(name: str) -> None:
    tail = recorded(name)
    sections = split_by_footers(tail.data[: tail.devices_size])
    assert [section.encode() for section in sections] == [
        section.encode() for section in tail.sections
    ]
    assert not any(section.described for section in sections)


A, B, C = (d.device(name, d.vmsd(name, d.field("f", "buffer", 8))) for name in "abc")
BODIES = {"a": b"A" * 8, "b": b"B" * 8, "c": b"C" * 8}


def three(*, footer: bool = True, **bodies: bytes) -> bytes:
    return b"".join(
        d.section(number, name, body, footer=footer)
        for number, (name, body) in enumerate((BODIES | bodies).items(), 5)
    )


def split_three(data: bytes, *, footers: bool = True) -> tuple[DeviceSection, ...]:
    description = parse_description(d.description(A, B, C))
    return split_devices(data, description, footers=footers, offset=0)


@pytest.mark.parametrize(
    "lie", [b"", b"x", b"x" * 300, b"\x7e\0\0\0\6\4\0\0\0\7\1", b"\x7e\0\0\0\6"]
)
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_false_size_costs_one_body(name: str, lie: bytes) -> None:
    sections = split_three(three(**{name: lie}))
    bodies = {section.name: bytes(section.body) for section in sections}
    assert bodies == BODIES | {name: lie}
    assert {section.name: section.described for section in sections} == {
        other: other != name for other in "abc"
    }
    (reason,) = (section.reason for section in sections if section.reason)
    assert "does not hold" in reason


def test_a_false_subsection_costs_one_body() -> None:
    sub = d.vmsd("a/sub", d.field("y", "uint8", 1))
    state = d.vmsd("a", d.field("f", "uint8", 1), subsections=(sub,))
    body = d.fill(state).replace(b"sub", b"sud")
    description = parse_description(d.description(d.device("a", state), B))
    data = d.section(1, "a", body) + d.section(2, "b", BODIES["b"])
    first, second = split_devices(data, description, footers=True, offset=0)
    assert (bytes(first.body), first.described, second.described) == (body, False, True)
    assert "a/sub" in str(first.reason)


@pytest.mark.parametrize("lie", [b"", b"x", b"x" * 30])
def test_a_false_size_without_footers_is_refused(lie: bytes) -> None:
    with pytest.raises(StreamError):
        split_three(three(footer=False, a=lie), footers=False)


REFUSED = {
    "a device is missing": three()[: -len(d.section(7, "c", BODIES["c"]))],
    "a device is too many": three() + d.section(8, "d", b""),
    "bytes behind the last": three() + b"\0",
    "nothing": b"",
    "another name": three().replace(b"\1b", b"\1x"),
    "another instance": d.section(5, "a", BODIES["a"], instance=1) + three()[28:],
    "a command between": three().replace(b"\4\0\0\0\6", b"\x08\0\5\0\0\4\0\0\0\6"),
    "another footer": three().replace(b"\x7e\0\0\0\6", b"\x7e\0\0\0\7"),
    "a name that is no text": three().replace(b"\1a", b"\1\xff"),
    "an empty name": three().replace(b"\1a", b"\0"),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_devices_other_than_described_are_refused(data: bytes) -> None:
    with pytest.raises(StreamError):
        split_three(data)


def test_an_error_says_where_and_in_which_section() -> None:
    description = parse_description(d.description(A, B))
    data = d.section(1, "a", BODIES["a"]) + d.section(2, "x", b"")
    with pytest.raises(StreamError) as caught:
        split_devices(data, description, footers=True, offset=1000)
    assert caught.value.place.offset == 1000 + 28
    assert caught.value.place.section == "b"


# Splitting by footers


def test_the_commands_that_end_a_package_end_the_sections() -> None:
    ping, run = bytes.fromhex("08 0002 0004 00000003"), bytes.fromhex("08 0005 0000")
    for rest in (ping + run, run):
        sections = split_by_footers(three() + rest, 50)
        assert [section.name for section in sections] == ["a", "b", "c"]
        assert sections[-1].offset + sections[-1].size == 50 + len(three())


def test_a_footer_within_a_body_needs_a_section_behind_it() -> None:
    body = b"\x7e\0\0\0\6 \x7e\0\0\0\6\4\0\0\0\0\xffname"
    assert bytes(split_by_footers(three(b=body))[1].body) == body


NOT_SPLIT = [
    three()[:-1],
    three()[: len(three()) // 2],
    three()[:3],
    three() + b"\4\0\0",
    b"\x08\0\5\0\0",
    d.section(1, "a", b"", footer=False),
    (d.section(1, "a", b"") * (limits.DEVICE_COUNT + 1)),
    # Ten thousand footers, none of which ends anything.
    d.section(1, "a", b"\x7e\0\0\0\1\4" * 10_000, footer=False),
]


@pytest.mark.parametrize("data", NOT_SPLIT, ids=range(len(NOT_SPLIT)))
def test_sections_without_a_certain_end_are_refused(data: bytes) -> None:
    with pytest.raises(StreamError):
        split_by_footers(data)


# The end, found while the bytes come in


def ends(tail: Tail) -> tuple[int, int]:
    return tail.devices_size, len(tail.data) - tail.devices_size - 1


@pytest.mark.parametrize("name", TAILS)
def test_the_end_of_a_recorded_stream_is_found_before_it_closes(name: str) -> None:
    tail = recorded(name)
    found = finder(tail, 90).search(memoryview(tail.data), ended=False)
    assert found is not None
    assert (found.devices_size, found.description_size) == ends(tail)
    assert found.description == tail.description
    sections = found.sections
    assert b"".join(s.encode() for s in sections) == tail.data[: tail.devices_size]
    assert sections[0].offset == 90


@pytest.mark.parametrize("name", ["microvm", "pc-2.3"])
def test_byte_by_byte_the_end_is_found_at_the_last_byte(name: str) -> None:
    tail = recorded(name)
    search, view = finder(tail).search, memoryview(tail.data)
    assert all(search(view[:size], ended=False) is None for size in range(1, len(view)))
    found = search(view, ended=False)
    assert found is not None
    assert (found.devices_size, found.description_size) == ends(tail)


def test_what_follows_the_description_does_not_matter() -> None:
    tail = recorded("microvm")
    found = finder(tail).search(tail.data + b"\0\6\0\0\0\2{}" * 100, ended=False)
    assert found is not None
    assert (found.devices_size, found.description_size) == ends(tail)


def test_a_stream_cut_anywhere_is_truncated() -> None:
    tail = recorded("microvm")
    closed = tail.devices_size + 1
    for size in range(len(tail.data)):
        if size == closed:
            continue
        with pytest.raises(StreamError):
            finder(tail).search(memoryview(tail.data)[:size], ended=True)
    found = finder(tail).search(memoryview(tail.data)[:closed], ended=True)
    assert found is not None
    assert (found.devices_size, found.description) == (tail.devices_size, None)
    sections = found.sections
    assert [s.encode() for s in sections] == [s.encode() for s in tail.sections]


def test_without_footers_and_description_the_devices_stay_one_region() -> None:
    tail = recorded("pc-2.3")
    found = finder(tail, 4).search(tail.data[: tail.devices_size + 1], ended=True)
    assert found is not None
    (region,) = found.sections
    assert isinstance(region, DeviceRegion)
    assert (region.offset, region.size) == (4, tail.devices_size)
    assert region.encode() == tail.data[: tail.devices_size]


FALSE_ENDS = [
    b"\x7e\0\0\0\1\0\6\0\xff\xff\xff{",  # waits for 16 MiB that never come
    b"\x7e\0\0\0\1\0\6\0\0\0\2{}",
    b"\x7e\0\0\0\1\0\6\0\0\0\0{",
    b"\x7e\0\0\0\1\0\6\0\0\0\1{",
    b"\x7e\0\0\0\1\0\6\0\0\0\x10{" + b" " * 15,
    b"\x7e\0\0\0\1" + d.tail(b"", d.description()),
    b"\x7e\0\0\0\0" + d.tail(b"", d.description(A)),
    b"\x7e\0\0\0\1\0\6\0\6\0\x7b{{{{{{{",
]


@pytest.mark.parametrize("footers", [True, False])
@pytest.mark.parametrize("false", FALSE_ENDS)
def test_a_false_end_within_a_body_is_passed_over(false: bytes, footers: bool) -> None:
    state = d.vmsd("x", d.field("f", "buffer", len(false) + 9))
    stream = d.Stream((d.device("x", state), A), (false + bytes(9), BODIES["a"]), footers)
    search = TailFinder(footers=footers, offset=0).search
    found = search(stream.data, ended=False)
    assert found is not None
    assert found.devices_size == len(stream.sections)


def test_a_description_that_is_not_true_is_the_reason_in_the_end() -> None:
    data = d.tail(three(), d.description(A, B))
    search = TailFinder(footers=True, offset=10)
    assert search.search(data, ended=False) is None
    assert search.rejection(len(data) - 1) is None
    assert "last device described" in str(search.rejection(len(data)))
    with pytest.raises(StreamError, match="last device described"):
        search.search(data, ended=True)


def test_too_many_false_ends_are_refused() -> None:
    data = b"\4" + FALSE_ENDS[1] * (CANDIDATES + 1)
    search = TailFinder(footers=True, offset=0)
    assert search.search(data[: -len(FALSE_ENDS[1])], ended=False) is None
    with pytest.raises(LimitExceeded):
        search.search(data, ended=False)


@pytest.mark.parametrize("footers", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_devices_without_end_are_refused(
    footers: bool, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DEVICES", 1000)
    search = TailFinder(footers=footers, offset=0)
    assert search.search(bytes(1000), ended=False) is None
    with pytest.raises(LimitExceeded):
        search.search(bytes(1100), ended=ended)


_PIECES = [*FALSE_ENDS, b"\0", b"\x7e\0\0\0\5", b"\0\6\0\0\0\x09{", b"}", three(), bytes(40)]


def _verdict(
    data: bytes, cuts: list[int], footers: bool, decode: Decode | None = None
) -> tuple[object, ...]:
    search = TailFinder(footers=footers, offset=0, decode=decode).search
    try:
        for size in cuts:
            if (found := search(data[:size], ended=False)) is not None:
                return found.devices_size, found.description_size
        found = search(data, ended=True)
    except StreamError as error:
        return type(error), str(error)
    assert found is not None
    return found.devices_size, found.description_size


@settings(deadline=None)
@given(st.lists(st.sampled_from(_PIECES), max_size=6), st.booleans(), st.booleans(), st.data())
def test_the_verdict_does_not_depend_on_the_sizes_of_reads(
    pieces: list[bytes], valid: bool, footers: bool, data: st.DataObject
) -> None:
    noise = b"".join(pieces)
    state = d.vmsd("x", d.field("f", "buffer", len(noise)))
    stream = d.Stream((d.device("x", state), A), (noise, BODIES["a"]), footers)
    whole = (stream.data if valid else b"\4" + noise) + data.draw(st.sampled_from([b"", *_PIECES]))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(whole))), max_size=5)))
    at_once = _verdict(whole, [len(whole)], footers)
    assert _verdict(whole, cuts, footers) == at_once
    assert _verdict(whole, list(range(1, len(whole) + 1)), footers) == at_once
    if valid:
        assert at_once[0] == len(stream.sections)
    decode = decoder({"x": len(noise), "a": len(BODIES["a"])})
    decoded = _verdict(whole, [len(whole)], footers, decode)
    assert _verdict(whole, cuts, footers, decode) == decoded
    assert decoded == at_once or not valid


def decoder(sizes: dict[str, int]) -> Decode:
    """A decoder of bodies of these *sizes*, that makes their bytes of them."""

    def decode(head: SectionStart, data: memoryview, offset: int) -> tuple[int, Any]:
        if len(data) < sizes.get(head.name, len(data) + 1):
            raise StreamError("the body of a device that is known", head.name, offset=offset)
        size = sizes[head.name]
        return size, bytes(data[:size])

    return decode


@pytest.mark.parametrize("footers", [True, False])
def test_devices_that_can_be_decoded_need_no_description(footers: bool) -> None:
    sections = three(footer=footers)
    # One that does not describe these devices, and cannot be read either.
    data = d.tail(sections, b'{"page_size": nothing}')
    decode = decoder({name: len(body) for name, body in BODIES.items()})
    search = TailFinder(footers=footers, offset=7, decode=decode).search
    assert all(search(data[:size], ended=False) is None for size in range(len(data)))
    found = search(data, ended=False)
    assert found is not None
    assert found.sections == (DecodedDevices(7, sections, tuple(BODIES.values())),)
    assert found.description == UnreadDescription(b'{"page_size": nothing}')
    found = TailFinder(footers=footers, offset=7, decode=decode).search(
        sections + b"\0", ended=True
    )
    assert found is not None
    assert found.sections == (DecodedDevices(7, sections, tuple(BODIES.values())),)


@pytest.mark.parametrize("sizes", [{"a": 8, "b": 7, "c": 8}, {"a": 8, "b": 9, "c": 8}, {"a": 8}])
def test_devices_that_cannot_be_decoded_are_split_as_described(sizes: dict[str, int]) -> None:
    data = d.tail(three(), d.description(A, B, C))
    found = TailFinder(footers=True, offset=0, decode=decoder(sizes)).search(data, ended=False)
    assert found is not None
    assert [type(section) for section in found.sections] == [DeviceSection] * 3
    assert isinstance(found.description, VmDescription)


@settings(deadline=None)
@given(st.data())
def test_mutated_streams_raise_nothing_else(data: st.DataObject) -> None:
    tail = recorded(data.draw(st.sampled_from(["microvm", "virt", "s390x", "pc-2.3"])))
    whole = bytearray(tail.data)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            whole[at] ^= data.draw(st.integers(1, 255))
        else:
            del whole[at : at + data.draw(st.integers(1, 50))]
    with contextlib.suppress(StreamError):
        found = finder(tail).search(bytes(whole), ended=True)
        assert found is not None
        sections = found.sections
        assert b"".join(s.encode() for s in sections) == bytes(whole[: found.devices_size])


# No devices at all


@pytest.mark.parametrize("early", [0, 1])
def test_a_description_can_stand_alone(early: int) -> None:
    rest = d.tail(b"", d.description(*[A] * early))[1:]
    search = TailFinder(footers=True, offset=0, early=early).search_description
    assert all(search(rest[:size], ended=False) is None for size in range(len(rest)))
    found = search(rest, ended=False)
    assert found is not None
    assert (found.devices_size, found.description_size) == (0, len(rest))
    assert found.sections == ()


def test_nothing_behind_the_end_is_no_description() -> None:
    found = TailFinder(footers=True, offset=0).search_description(b"", ended=True)
    assert found is not None
    assert found.description is None


ALONE = [b"\7", b"\6", b"\6\0\0\0", b"\6\0\0\0\2{", b"\6\xff\xff\xff\xff{", b"\6\0\0\0\2{}"]


@pytest.mark.parametrize("rest", [*ALONE, d.tail(b"", d.description(A))[1:]])
def test_what_is_no_description_behind_the_end_is_refused(rest: bytes) -> None:
    with pytest.raises(StreamError):
        TailFinder(footers=True, offset=0).search_description(rest, ended=True)


# Early devices

PART = b"\2\0\0\0\2"


def early(body: bytes, behind: bytes = PART) -> bytes:
    return d.section(9, "v/virtio-mem-device-early", body) + behind


EARLY = [
    early(b"body"),
    early(b""),
    early(b"\x7e\0\0\0\x09\2\0\0\0\3"),
    early(b"\x7e\0\0\0\x09\4\0\0\0\0\2a\n"),
    early(b"body", d.section(10, "next", b"")),
    early(b"body", b"\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4"),
    early(b"body", bytes.fromhex("08 0002 0004")),
]


@pytest.mark.parametrize("data", EARLY)
def test_an_early_device_ends_where_something_follows_its_footer(data: bytes) -> None:
    assert [
        section
        for size in range(len(data))
        if (section := EarlyFinder(3, {2}).search(data[:size], ended=False)) is not None
        and not data.startswith(section.encode())
    ] == []
    section = EarlyFinder(3, {2}).search(data, ended=False)
    assert section is not None
    assert (section.number, section.offset) == (9, 3)
    assert data.startswith(section.encode())
    stepwise = EarlyFinder(3, {2})
    found = [stepwise.search(data[:size], ended=False) for size in range(1, len(data) + 1)]
    assert found[-1] == section
    assert all(a is None or a == b for a, b in pairwise(found))


def test_the_recorded_early_device_is_found() -> None:
    tail = recorded("q35-10.0-early")
    section = EarlyFinder(0, {2}).search(tail.early + PART, ended=False)
    assert section is not None
    assert section.encode() == tail.early
    assert len(section.body) == tail.description.devices[0].size == 44


@pytest.mark.parametrize("data", [b"\4", b"\4\0\0\0\1\3na", early(b"x", b""), early(b"x", b"\2\0")])
def test_an_early_device_that_ends_the_input_is_truncated(data: bytes) -> None:
    search = EarlyFinder(0, {2}).search
    assert search(data, ended=False) is None
    with pytest.raises(TruncatedStream):
        search(data, ended=True)


def test_an_early_device_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DEVICE_SECTION", 100)
    with pytest.raises(LimitExceeded):
        EarlyFinder(0, {2}).search(early(bytes(150)), ended=False)
    monkeypatch.undo()
    with pytest.raises(LimitExceeded):
        EarlyFinder(0, {2}).search(early(b"\x7e\0\0\0\x09\0" * 2000), ended=False)
