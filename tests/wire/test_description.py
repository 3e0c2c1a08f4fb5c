"""The closing description: read, bounded, and held against bodies."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmstate.tails import manifest, recorded
from tests.wire import described as d
from vmferry.errors import LimitExceeded, StreamError, TruncatedStream
from vmferry.wire import limits
from vmferry.wire.description import VmDescription, body_size, parse_description


def parse(*devices: d.Json) -> VmDescription:
    return parse_description(d.description(*devices))


# What QEMU 2.3 to 5.2 and 6.0 on write; whitespace is all that differs.
OLD = b'{ "page_size" : 4096, "devices" : [ { "name" : "a", "instance_id" : 2, "size" : 3 } ] }'
NEW = b'{"page_size": 4096, "devices": [{"name": "a", "instance_id": 2, "size": 3}]}'


@pytest.mark.parametrize("text", [OLD, NEW])
def test_both_styles_of_text_read_the_same(text: bytes) -> None:
    found = parse_description(memoryview(text))
    (device,) = found.devices
    assert (found.page_size, device.name, device.instance, device.size) == (4096, "a", 2, 3)
    assert device.vmsd is None
    assert found.text == text
    assert found.encode() == b"\6" + len(text).to_bytes(4) + text


def test_fields_keep_their_shapes() -> None:
    inner = d.vmsd("in", d.field("x", "uint8", 1))
    fields = (
        d.field("plain", "uint32", 4),
        d.field("many", "uint16", 2, array_len=5),
        d.struct("element", inner, index=3),
        d.field("null", "struct", 1, struct={}),
        d.field("inline", "tmp", 1) | inner,
    )
    (device,) = parse(d.device("dev", d.vmsd("dev", *fields, version=0))).devices
    assert device.vmsd is not None
    plain, many, element, null, inline = device.vmsd.fields
    assert (plain.array_len, plain.index, plain.struct, plain.wire_size) == (None, None, None, 4)
    assert (many.array_len, many.wire_size) == (5, 10)
    assert element.index == 3
    assert element.struct == inline.struct
    assert null.struct is None
    assert (device.vmsd.version, device.size) == (0, 4 + 10 + 1 + 1 + 1)


def test_subsections_count_with_their_heads() -> None:
    sub = d.vmsd("dev/sub", d.field("y", "uint64", 8), version=3)
    (device,) = parse(d.device("dev", d.vmsd("dev", subsections=(sub,)))).devices
    assert device.size == 1 + 1 + 7 + 4 + 8


def test_the_last_of_two_equal_keys_counts() -> None:
    twice = d.description().replace(b'{"page_size": 4096', b'{"page_size": 1024, "page_size": 4096')
    assert parse_description(twice).page_size == 4096


def test_keys_of_later_versions_are_left_alone() -> None:
    text = b'{"new": {"a": [null, true]}, "page_size": 4096, "devices": []}'
    assert parse_description(text).devices == ()


def test_configuration_of_82_is_kept() -> None:
    state = d.vmsd("configuration", d.field("len", "uint32", 4), d.field("name", "buffer", 13))
    text = json.dumps({"configuration": state, "page_size": 4096, "devices": []}).encode()
    configuration = parse_description(text).configuration
    assert configuration is not None
    assert configuration.size == 17


@pytest.mark.parametrize("name", sorted(manifest()))
def test_recorded_descriptions_add_up_to_their_devices(name: str) -> None:
    tail = recorded(name)
    devices = tail.description.devices[tail.early_devices :]
    pairs = list(zip(devices, tail.sections, strict=True))
    wrong = [device.name for device, section in pairs if device.size != len(section.body)]
    # QEMU before 10.0 describes an array of pointers, most of them NULL, by its first element.
    assert wrong == (["s390_css"] if name == "s390x" else [])


# Refused, and the place that the message names.

_FIELD = d.field("f", "uint32", 4)


def _in_field(**wrong: Any) -> d.Json:
    return {"devices": [d.device("a", d.vmsd("v", _FIELD, _FIELD | wrong))]}


def _in_device(**wrong: Any) -> d.Json:
    return {"devices": [d.device("a", d.vmsd("v", _FIELD)) | wrong]}


WRONG: list[tuple[d.Json, str]] = [
    ({"page_size": None}, "page_size"),
    ({"page_size": 0}, "page_size"),
    ({"page_size": 4095}, "page_size"),
    ({"page_size": 128}, "page_size"),
    ({"page_size": 1 << 40}, "page_size"),
    ({"page_size": "4096"}, "page_size"),
    ({"page_size": True}, "page_size"),
    ({"devices": {}}, "devices"),
    ({"devices": [3]}, "devices[0]"),
    ({"devices": [{}]}, "devices[0].name"),
    ({"devices": [{"name": "a", "instance_id": 0}]}, "devices[0].size"),
    ({"devices": [d.device("a", limits.DEVICE_SECTION + 1)]}, "devices[0].size"),
    ({"configuration": []}, "configuration"),
    (_in_device(name=""), "devices[0].name"),
    (_in_device(name="é" * 128), "devices[0].name"),
    (_in_device(name="a\n"), "devices[0].name"),
    (_in_device(name="\ud800"), "devices[0].name"),
    (_in_device(instance_id=-1), "devices[0].instance_id"),
    (_in_device(instance_id=1 << 32), "devices[0].instance_id"),
    (_in_device(version=1 << 32), "devices[0].version"),
    (_in_device(fields=None), "devices[0].fields"),
    (_in_device(subsections=[[]]), "devices[0].subsections[0]"),
    (_in_device(subsections=[{"vmsd_name": ""}]), "devices[0].subsections[0].vmsd_name"),
    (_in_field(size=-1), "devices[0].fields[1].size"),
    (_in_field(size=True), "devices[0].fields[1].size"),
    (_in_field(size=None), "devices[0].fields[1].size"),
    (_in_field(size=limits.DEVICE_SECTION + 1), "devices[0].fields[1].size"),
    (_in_field(array_len=-1), "devices[0].fields[1].array_len"),
    (_in_field(array_len=1 << 31), "devices[0].fields[1]"),
    (_in_field(array_len=1 << 64), "19 digits"),
    (_in_field(index="0"), "devices[0].fields[1].index"),
    (_in_field(type=7), "devices[0].fields[1].type"),
    (_in_field(type="t" * 256), "devices[0].fields[1].type"),
    (_in_field(struct=5), "devices[0].fields[1].struct"),
    (_in_field(struct={"vmsd_name": "x"}), "devices[0].fields[1].struct.version"),
]


@pytest.mark.parametrize(("change", "place"), WRONG)
def test_wrong_values_are_refused_with_their_place(change: d.Json, place: str) -> None:
    root = {"page_size": 4096, "devices": []} | change
    with pytest.raises(StreamError) as caught:
        parse_description(json.dumps(root).encode())
    assert place in str(caught.value)


TEXTS = [
    b"",
    b"[]",
    b"{",
    b"null",
    b'{"page_size": 4096, "devices": []} x',
    b'{"page_size": 4096.0, "devices": []}',
    b'{"page_size": 1e3, "devices": []}',
    b'{"page_size": NaN, "devices": []}',
    b'{"page_size": -Infinity, "devices": []}',
    b'{"page_size": ' + b"9" * 5000 + b', "devices": []}',
    b'{"page_size": 4096, "devices": [\xff]}',
    b'{"page_size": 4096, "devices": [}',
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_such_json_is_refused(text: bytes) -> None:
    with pytest.raises(StreamError):
        parse_description(text)


_SIZE = limits.DESCRIPTION

BOMBS = {
    "one byte too long": b" " * (_SIZE + 1),
    "too deep": b"[" * 33 + b"]" * 33,
    "open brackets": b"[" * _SIZE,
    "objects": b'{"a":' * (_SIZE // 5),
    "empty objects": b"{}" * (_SIZE // 2),
    "strings": b'"' * _SIZE,
    "numbers": b"[" + b"1," * (_SIZE // 2 - 1) + b"1]",
    "one number": b"1" * _SIZE,
    "brackets behind an escaped quote": b'["\\""' + b"," + b"[" * 40 + b"]" * 40 + b"]",
    "many devices": d.description(*[d.device("a", 0)] * (limits.DEVICE_COUNT + 1)),
    "large devices": d.description(*[d.device("a", limits.DEVICE_SECTION)] * 5),
    "large arrays": d.description(
        d.device("a", d.vmsd("v", *[d.field("f", "x", 1 << 20, array_len=64)] * 2))
    ),
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_refused_by_a_limit(text: bytes) -> None:
    with pytest.raises(LimitExceeded):
        parse_description(text)


@pytest.mark.parametrize("text", [b"\\" * _SIZE, b'\\"' * (_SIZE // 2), b'"' + b"a" * (_SIZE - 2)])
def test_other_large_texts_are_refused(text: bytes) -> None:
    with pytest.raises(StreamError):
        parse_description(text)


def test_what_looks_like_brackets_in_strings_does_not_count() -> None:
    name = "[{" * 40 + '\\"' * 3
    (device,) = parse(d.device(name, 1)).devices
    assert device.name == name


def test_depth_of_32_is_allowed() -> None:
    text = b'{"page_size": 4096, "devices": [], "deep": ' + b"[" * 31 + b"]" * 31 + b"}"
    assert parse_description(text).devices == ()


# Bodies


@settings(deadline=None)
@given(d.streams())
def test_the_size_of_a_body_is_what_its_description_says(stream: d.Stream) -> None:
    found = parse_description(stream.text)
    for device, body in zip(found.devices, stream.bodies, strict=True):
        assert body_size(device, body) == len(body)
        assert body_size(device, b"--" + body + b"-", 2) == len(body)


@settings(deadline=None)
@given(d.streams(), st.data())
def test_a_body_that_is_cut_short_is_truncated(stream: d.Stream, data: st.DataObject) -> None:
    found = parse_description(stream.text)
    for device, body in zip(found.devices, stream.bodies, strict=True):
        if body:
            with pytest.raises(TruncatedStream):
                body_size(device, body[: data.draw(st.integers(0, len(body) - 1))])


SUB = d.vmsd("dev/sub", d.field("y", "uint8", 1))
NESTED = d.vmsd("dev", d.struct("in", d.vmsd("in", subsections=(SUB,))), subsections=(SUB,))


@pytest.mark.parametrize("offset", [0, 1, 2, 8, 12, 14, 15])
def test_a_subsection_that_is_not_where_it_is_described_is_refused(offset: int) -> None:
    body = bytearray(d.fill(NESTED, 1))
    body[offset] ^= 1
    (device,) = parse(d.device("dev", NESTED)).devices
    with pytest.raises(StreamError, match="dev/sub"):
        body_size(device, bytes(body))


def test_huge_arrays_cost_nothing() -> None:
    inner = d.vmsd("in", d.field("x", "uint8", 0))
    arrays = [d.struct("a", inner, array_len=2**32 - 1) for _ in range(3)]
    (device,) = parse(d.device("dev", d.vmsd("dev", *arrays))).devices
    assert body_size(device, b"") == 0


@settings(deadline=None)
@given(st.data())
def test_mutated_descriptions_raise_nothing_else(data: st.DataObject) -> None:
    text = bytearray(recorded("microvm").description.text)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        match data.draw(st.sampled_from(["byte", "cut", "copy", "digits"])):
            case "byte":
                text[at] = data.draw(st.sampled_from(b'{}[],:"\\0-9.tnx \0\xff'))
            case "cut":
                del text[at : at + data.draw(st.integers(1, 40))]
            case "copy":
                text[at:at] = text[at : at + data.draw(st.integers(1, 200))]
            case _:
                text[at:at] = data.draw(st.sampled_from([b"0", b"99999999", b"-1", b"1e9"]))
        if not text:
            break
    with contextlib.suppress(StreamError):
        for device in parse_description(bytes(text)).devices:
            body_size(device, bytes(1000))
