"""Bodies decoded by their descriptions: each type, each shape, and what does not fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmstate.encode import encode
from tests.vmstate.tails import manifest, recorded
from tests.wire import described as d
from vmferry.errors import StreamError
from vmferry.vmstate.decode import NODES, decode_device
from vmferry.vmstate.tree import Array, DeviceState, Elements, Node, Raw, Struct, Value
from vmferry.wire.description import DeviceDescription, parse_description


def decode(state: d.Json | int, body: bytes, offset: int = 0) -> DeviceState:
    (device,) = parse_description(d.description(d.device("dev", state))).devices
    return decode_device(device, body, offset)


def decode_fields(*fields: d.Json, body: bytes) -> tuple[Node, ...]:
    return decode(d.vmsd("dev", *fields), body).root.fields


# Values and bytes as QEMU's own unit tests have them.
GOLDEN: list[tuple[str, int | bool, str]] = [
    ("bool", True, "01"),
    ("bool", False, "00"),
    ("uint8", 0x82, "82"),
    ("uint16", 0x0200, "0200"),
    ("uint32", 70000, "00011170"),
    ("uint64", 12121212, "0000000000b8f47c"),
    ("int8", 65, "41"),
    ("int8", -65, "bf"),
    ("int16", 512, "0200"),
    ("int16", -512, "fe00"),
    ("int32", 70000, "00011170"),
    ("int32", -70000, "fffeee90"),
    ("int64", 12121212, "0000000000b8f47c"),
    ("int64", -12121212, "ffffffffff470b84"),
    ("int32 le", 1, "00000001"),
    ("int32 equal", -1, "ffffffff"),
    ("uint8 equal", 0xFF, "ff"),
    ("uint16 equal", 0xFFFE, "fffe"),
    ("uint32 equal", 0xFFFFFFFF, "ffffffff"),
    ("int64 equal", 2**64 - 1, "ffffffffffffffff"),
    ("timer", 5_000_000_000, "000000012a05f200"),
    ("CPU_Double_U", 0x3FF8000000000000, "3ff8000000000000"),
    ("float64", 0x3FF8000000000000, "3ff8000000000000"),
]


@pytest.mark.parametrize(("type_name", "value", "wire"), GOLDEN)
def test_numbers_decode(type_name: str, value: int | bool, wire: str) -> None:
    body = bytes.fromhex(wire)
    (node,) = decode_fields(d.field("f", type_name, len(body)), body=body)
    assert node == Value("f", type_name, 0, len(body), value)
    assert isinstance(node, Value)
    assert type(node.value) is type(value)


def test_golden_values_decode_in_a_row() -> None:
    fields = [d.field(f"f{i}", name, len(wire) // 2) for i, (name, _, wire) in enumerate(GOLDEN)]
    nodes = decode_fields(*fields, body=bytes.fromhex("".join(wire for _, _, wire in GOLDEN)))
    assert [node.value for node in nodes if isinstance(node, Value)] == [v for _, v, _ in GOLDEN]


def test_a_timer_that_is_not_armed_is_none() -> None:
    (node,) = decode_fields(d.field("t", "timer", 8), body=b"\xff" * 8)
    assert node == Value("t", "timer", 0, 8, None, "not armed")


def test_a_bool_that_is_neither_stays_bytes() -> None:
    (node,) = decode_fields(d.field("b", "bool", 1), body=b"\7")
    assert node == Raw("b", "bool", 0, 1, b"\7", "a bool of 7")


@pytest.mark.parametrize(
    ("type_name", "size", "wire", "values"),
    [
        ("uint8", 1, "00ff", [0, 255]),
        ("int16", 2, "0001fffe", [1, -2]),
        ("uint32", 4, "0000000180000000", [1, 2**31]),
        ("int64", 8, "ffffffffffffffff0000000000000005", [-1, 5]),
        ("bool", 1, "010002", [1, 0, 2]),
        ("timer", 8, "ffffffffffffffff0000000000000005", [-1, 5]),
        ("bitmap", 16, "00000000000000018000000000000000", [1, 2**63]),
        ("pci irq state", 8, "0000000100000002", [1, 2]),
    ],
)
def test_arrays_are_one_node(type_name: str, size: int, wire: str, values: list[int]) -> None:
    body = bytes.fromhex(wire)
    length = {"array_len": len(body) // size} if len(body) != size else {}
    (node,) = decode_fields(d.field("a", type_name, size, **length), body=body)
    assert isinstance(node, Array)
    assert node.values.tolist() == values
    assert (node.type, node.size) == (type_name, len(body))


@pytest.mark.parametrize("indexes", [(0, 1, 2), (0, None, None)], ids=["7.2", "10.0"])
def test_elements_described_one_by_one_are_one_array(indexes: tuple[int | None, ...]) -> None:
    fields = [
        d.field("a", "int16", 2) | ({} if index is None else {"index": index}) for index in indexes
    ]
    other = d.field("a[1]", "int16", 2)
    array, single = decode_fields(*fields, other, body=bytes.fromhex("0001 0002 ffff 0007"))
    assert isinstance(array, Array)
    assert array.values.tolist() == [1, 2, -1]
    assert single == Value("a[1]", "int16", 6, 2, 7)


def test_an_array_of_one_element_is_a_value() -> None:
    (node,) = decode_fields(d.field("a", "uint8", 1, index=0), body=b"\7")
    assert node == Value("a", "uint8", 0, 1, 7)


def test_an_array_begins_anew_at_index_0() -> None:
    fields = [d.field("a", "uint8", 1, index=index) for index in (0, 1, 0, 1)]
    nodes = decode_fields(*fields, body=b"\1\2\3\4")
    assert [node.values.tolist() for node in nodes if isinstance(node, Array)] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("type_name", ["buffer", "unused_buffer", "pci config", "msix state"])
def test_types_that_are_bytes_need_no_reason(type_name: str) -> None:
    (node,) = decode_fields(d.field("b", type_name, 3), body=b"abc")
    assert node == Raw("b", type_name, 0, 3, b"abc")


@pytest.mark.parametrize("type_name", ["virtio", "slbe", "tmp", "qlist", "gtree", "uint32", ""])
def test_bytes_that_are_not_decoded_have_a_reason(type_name: str) -> None:
    (node,) = decode_fields(d.field("b", type_name, 3), body=b"abc")
    assert isinstance(node, Raw)
    assert (node.data, node.offset, bool(node.reason)) == (b"abc", 0, True)


def test_structs_nest() -> None:
    inner = d.vmsd("point", d.field("x", "uint8", 1), d.field("y", "uint8", 1), version=3)
    one, many, first = (
        d.struct("one", inner),
        d.struct("many", inner, array_len=2),
        d.struct("each", inner, index=0),
    )
    each = [first, d.struct("each", inner, index=1)]
    struct, compressed, expanded = decode_fields(one, many, *each, body=bytes(range(10)))
    assert isinstance(struct, Struct)
    assert (struct.vmsd, struct.version, struct.type) == ("point", 3, "struct")
    assert struct.fields == (Value("x", "uint8", 0, 1, 0), Value("y", "uint8", 1, 1, 1))
    for array, start in ((compressed, 2), (expanded, 6)):
        assert isinstance(array, Elements)
        assert (array.offset, array.size) == (start, 4)
        offsets = [item.offset for item in array.items]
        assert offsets == [start, start + 2]


@pytest.mark.parametrize("type_name", ["tmp", "vstruct"])
def test_inline_states_are_structs(type_name: str) -> None:
    state = d.vmsd("inner", d.field("x", "uint16", 2))
    (node,) = decode_fields(d.field("t", type_name, 2) | state, body=b"\1\2")
    assert isinstance(node, Struct)
    assert node.fields == (Value("x", "uint16", 0, 2, 0x102),)


def test_an_empty_list_has_no_items() -> None:
    (node,) = decode_fields(d.field("l", "qtailq", 1), body=b"\0")
    assert node == Elements("l", "qtailq", 0, 1, ())


def test_subsections_follow_the_fields_of_their_owner() -> None:
    sub = d.vmsd("dev/sub", d.field("y", "uint8", 1), version=2)
    body = b"\1\5\7dev/sub\0\0\0\2\x09"
    state = decode(d.vmsd("dev", d.field("x", "uint8", 1), subsections=(sub,)), body, 100)
    _, node = state.root.fields
    assert isinstance(node, Struct)
    assert (node.name, node.type, node.vmsd, node.version) == (
        "dev/sub",
        "subsection",
        "dev/sub",
        2,
    )
    assert (node.offset, node.size) == (101, 14)
    assert state["dev/sub.y"] == Value("y", "uint8", 114, 1, 9)


def test_a_device_saved_by_hand_is_bytes() -> None:
    state = decode(4, b"abcd", 50)
    assert state["data"] == Raw("data", "", 50, 4, b"abcd", "nothing is known of it but its size")


# NULL pointers


def test_null_pointers_are_none() -> None:
    null = Value("p", "struct", 0, 1, None, "NULL pointer")
    assert decode_fields(d.field("p", "struct", 1, struct={}), body=b"0") == (null,)
    (number,) = decode_fields(d.field("p", "uint64", 1), body=b"0")
    assert isinstance(number, Value)
    assert number.value is None
    assert decode_fields(d.field("p", "uint8", 1), body=b"0") == (Value("p", "uint8", 0, 1, 48),)


def test_an_array_of_pointers_with_a_null_among_them() -> None:
    # Four pointers to numbers, the second NULL, as QEMU's own unit test has them.
    sizes = (4, 1, 4, 4)
    fields = [d.field("p", "int32", size, index=index) for index, size in enumerate(sizes)]
    (node,) = decode_fields(*fields, body=bytes.fromhex("00000000 30 00000002 00000003"))
    assert isinstance(node, Elements)
    assert [item.value for item in node.items if isinstance(item, Value)] == [0, None, 2, 3]


def test_an_array_of_nothing_but_null_pointers() -> None:
    (node,) = decode_fields(d.field("p", "struct", 1, struct={}, array_len=3), body=b"000")
    assert isinstance(node, Elements)
    assert [item.offset for item in node.items] == [0, 1, 2]
    (raw,) = decode_fields(d.field("p", "struct", 1, struct={}, array_len=3), body=b"0x0")
    assert isinstance(raw, Raw)


def test_runs_of_null_pointers_are_part_of_their_array() -> None:
    inner = d.vmsd("in", d.field("x", "uint8", 1))
    nulls = d.field("p", "nullptr", 1)
    fields = (nulls | {"array_len": 3}, d.struct("p", inner), nulls, d.field("q", "uint8", 1))
    array, _ = decode_fields(*fields, body=b"000\x050\1")
    assert isinstance(array, Elements)
    assert [type(item) for item in array.items] == [Value, Value, Value, Struct, Value]


# What does not fit

ARRAY = d.struct("a", d.vmsd("in", d.field("x", "uint8", 1)), array_len=3)
BEFORE, BEHIND = d.field("before", "uint16", 2), d.field("behind", "uint16", 2)


def rest(node: Node) -> Raw:
    assert isinstance(node, Raw)
    assert node.name == "(rest)"
    assert node.reason
    return node


@pytest.mark.parametrize("size", [6, 8, 100])
def test_everything_from_the_first_doubtful_array_on_stays_bytes(size: int) -> None:
    body = bytes(range(size))
    before, kept = decode_fields(BEFORE, ARRAY, BEHIND, body=body)
    assert before == Value("before", "uint16", 0, 2, 1)
    assert rest(kept).data == body[2:]
    assert kept.offset == 2


def test_a_doubtful_array_within_a_struct_does_not_reach_beyond_it() -> None:
    inner = d.vmsd("in", BEFORE, ARRAY)
    fields = (d.field("s", "struct", 9, struct=inner), BEHIND)
    struct, behind = decode_fields(*fields, body=bytes(range(11)))
    assert behind == Value("behind", "uint16", 9, 2, 0x090A)
    assert isinstance(struct, Struct)
    assert rest(struct.fields[1]).data == bytes(range(2, 9))


def test_bytes_behind_the_described_ones_are_kept() -> None:
    before, kept = decode_fields(BEFORE, body=b"\0\1\2\3")
    assert before == Value("before", "uint16", 0, 2, 1)
    assert rest(kept).data == b"\2\3"


def test_a_body_that_is_too_short_decodes_as_far_as_it_goes() -> None:
    before, kept = decode_fields(BEFORE, BEHIND, body=b"\0\1\2")
    assert before == Value("before", "uint16", 0, 2, 1)
    assert rest(kept).data == b"\2"


@pytest.mark.parametrize("extra", [b"", b"\0"])
def test_a_subsection_that_does_not_begin_is_the_rest(extra: bytes) -> None:
    sub = d.vmsd("dev/sub", d.field("y", "uint8", 1))
    body = b"\1" + b"\5\7dev/SUB\0\0\0\1\x09" + extra
    x, kept = decode(d.vmsd("dev", d.field("x", "uint8", 1), subsections=(sub,)), body).root.fields
    assert x == Value("x", "uint8", 0, 1, 1)
    assert rest(kept).data == body[1:]
    assert "dev/sub" in str(rest(kept).reason)


def test_a_doubtful_subsection_keeps_what_is_certain() -> None:
    sub = d.vmsd("dev/sub", d.field("y", "uint8", 1), ARRAY)
    again = d.vmsd("dev/again", d.field("z", "uint8", 1))
    body = d.fill(d.vmsd("dev", subsections=(sub, again))) + b"!"
    first, kept = decode(d.vmsd("dev", subsections=(sub, again)), body).root.fields
    assert isinstance(first, Struct)
    assert [field.name for field in first.fields] == ["y"]
    assert rest(kept).data == body[first.size :]


# Bounds


@pytest.mark.parametrize("length", [NODES, 2**32 - 1])
def test_elements_of_no_bytes_are_not_unfolded(length: int) -> None:
    inner = d.vmsd("in", d.field("x", "buffer", 0))
    (node,) = decode_fields(d.struct("a", inner, array_len=length), body=b"")
    assert isinstance(node, Raw)


def test_the_number_of_nodes_is_bounded() -> None:
    inner = d.vmsd("in", d.field("x", "uint8", 1))
    (node,) = decode_fields(d.struct("a", inner, array_len=1 << 20), body=bytes(1 << 20))
    assert isinstance(node, Elements)
    assert len(node.items) <= NODES
    assert rest(node.items[-1]).size == (1 << 20) - len(node.items) + 1


def test_a_small_body_in_deep_arrays_is_decoded_whole() -> None:
    state = d.vmsd("in", d.field("x", "uint8", 1))
    for level in range(8):
        state = d.vmsd(f"level{level}", d.struct("a", state, array_len=1))
    root = decode(state, b"\7")
    path = "a[0]." * 8 + "x"
    assert root[path] == Value("x", "uint8", 0, 1, 7)


# Everything together


def check_covered(state: DeviceState, body: bytes, offset: int) -> None:
    """Leaves and heads are the body, and each node stands where it says."""
    assert encode(state.root) == body
    assert (state.root.offset, state.root.size) == (offset, len(body))
    for path, node in state.walk():
        at = node.offset - offset
        assert encode(node) == body[at : at + node.size], path
        assert state.get(path) is not None
    json.dumps(state.to_json())


@settings(deadline=None)
@given(d.streams())
def test_described_bodies_decode_whole(stream: d.Stream) -> None:
    devices = parse_description(stream.text).devices
    for device, body in zip(devices, stream.bodies, strict=True):
        state = decode_device(device, body, 1000)
        check_covered(state, body, 1000)
        names = [node.name for _, node in state.walk()]
        assert "(rest)" not in names


@settings(deadline=None)
@given(d.streams(), st.binary(max_size=60), st.integers(0, 60))
def test_other_bodies_are_covered_too(stream: d.Stream, noise: bytes, at: int) -> None:
    devices = parse_description(stream.text).devices
    for device, body in zip(devices, stream.bodies, strict=True):
        wrong = body[:at] + noise + body[at + len(noise) :]
        check_covered(decode_device(device, wrong), wrong, 0)


@pytest.mark.parametrize("name", sorted(manifest()))
def test_recorded_devices_decode_whole(name: str) -> None:
    tail = recorded(name)
    devices = tail.description.devices[tail.early_devices :]
    for device, section in zip(devices, tail.sections, strict=True):
        body = bytes(section.body)
        state = decode_device(device, section.body, section.body_offset)
        check_covered(state, body, section.body_offset)
        if section.described:
            assert not [path for path, node in state.walk() if node.name == "(rest)"]


@settings(deadline=None)
@given(st.data())
def test_recorded_bodies_under_mutated_descriptions_are_covered(data: st.DataObject) -> None:
    tail = recorded("virt")
    number = data.draw(st.integers(0, len(tail.sections) - 1))
    body = bytes(tail.sections[number].body)
    root: dict[str, Any] = json.loads(tail.description.text)
    nodes = [root["devices"][number]]
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [v for v in nodes[-1].values() if isinstance(v, dict)]
        for values in (v for v in nodes[-1].values() if isinstance(v, list)):
            inner += values
        if inner:
            nodes.append(data.draw(st.sampled_from(inner)))
    keys = [*nodes[-1], "array_len", "index", "struct", "vmsd_name", "type", "size"]
    value = st.sampled_from([0, 1, 2, 300, 2**32 - 1, "uint32", "struct", "tmp", "x", {}, []])
    nodes[-1][data.draw(st.sampled_from(keys))] = data.draw(value)
    try:
        device = parse_description(json.dumps(root).encode()).devices[number]
    except StreamError:
        return
    check_covered(decode_device(device, body), body, 0)


def test_values_in_recorded_devices() -> None:
    states: dict[tuple[str, int], DeviceState] = {}
    tail = recorded("q35-many")
    devices: dict[tuple[str, int], DeviceDescription] = {
        (device.name, device.instance): device for device in tail.description.devices
    }
    for section in tail.sections:
        key = section.name, section.instance
        states[key] = decode_device(devices[key], section.body, section.body_offset)
    cpu = states["cpu", 0]
    assert [node.value for node in (cpu["env.eip"],) if isinstance(node, Value)] == [0xFFF0]
    run_state = states["globalstate", 0]["runstate"]
    assert isinstance(run_state, Raw)
    assert run_state.data.rstrip(b"\0") == b"prelaunch"
    nmi = states["ipmi-interface", 0]
    assert isinstance(nmi["kcs[1]"], Struct)
