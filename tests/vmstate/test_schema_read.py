"""Reading dumps: what is refused and where, and that nothing but our own errors comes of any."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmstate.schemas import SCHEMAS, Json, dump, field, state
from tests.vmstate.tails import recorded
from vmferry.errors import LimitExceeded, StorageError, StreamError, VmferryError
from vmferry.vmstate.schema import Schema, check, check_stream, parse_schema, read_schema
from vmferry.vmstate.schema.read import DEPTH, PARTS, SIZE


def small() -> Json:
    fifo = state("fifo", field("data", 16, num=3))
    sub = state("serial/sub", field("x", 4))
    return dump(
        state("serial", field("thr"), field("fifo", 20, Description=fifo), subsections=[sub])
    )


def parsed(dumped: Any) -> Schema:
    return parse_schema(json.dumps(dumped).encode())


def test_dump_is_read_whole() -> None:
    (device,) = parsed(small()).devices
    thr, fifo = device.state.fields
    assert (device.type, device.state.name, device.state.version) == ("serial", "serial", 1)
    assert (thr.name, thr.size, thr.count, thr.struct) == ("thr", 1, None, None)
    assert fifo.struct is not None
    assert fifo.struct.fields[0].count == 3
    assert [sub.name for sub in device.state.subsections] == ["serial/sub"]
    assert parsed(small()).machine == "none"


def test_unknown_keys_and_missing_lists_are_legal() -> None:
    dumped = dump(state("empty") | {"later": [1]})
    assert parsed(dumped).devices[0].state.fields == ()


SERIAL = ("serial", "Description")
FIELD = (*SERIAL, "Fields", 0)
INNER = (*SERIAL, "Fields", 1, "Description", "Fields", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "expected the schema to be an object, found an array"),
        (("serial",), 1, 'expected "serial" to be an object, found 1'),
        (SERIAL, None, 'expected "serial".Description to be an object, found nothing'),
        ((*SERIAL, "name"), "", '"serial".Description.name to be printable text of 1 to 255'),
        ((*SERIAL, "name"), "a\nb", r'found "a\nb"'),
        ((*SERIAL, "name"), "x" * 256, "1 to 255 bytes"),
        ((*SERIAL, "version_id"), -1, ".version_id to be a whole number, found -1"),
        ((*SERIAL, "version_id"), True, ".version_id to be a whole number, found True"),
        ((*SERIAL, "version_id"), 1 << 32, ".version_id to be at most 4294967295"),
        ((*SERIAL, "minimum_version_id"), None, ".minimum_version_id to be a whole number"),
        ((*SERIAL, "Fields"), {}, ".Fields to be an array, found an object"),
        ((*SERIAL, "Subsections"), "", '.Subsections to be an array, found ""'),
        (FIELD, 5, '"serial".Description.Fields[0] to be an object, found 5'),
        ((*FIELD, "field"), 5, "Fields[0].field to be printable text"),
        ((*FIELD, "field_exists"), 1, "Fields[0].field_exists to be true or false, found 1"),
        ((*FIELD, "size"), 1 << 41, "Fields[0].size to be at most"),
        ((*FIELD, "before"), "x", 'Fields[0].before to be a whole number, found "x"'),
        ((*FIELD, "type"), 1, "Fields[0].type to be printable text"),
        ((*INNER, "num"), -2, ".Fields[1].Description.Fields[0].num to be a whole number"),
        (("vmschkmachine",), {"Name": 1}, "vmschkmachine.Name to be printable text"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(
    path: tuple[str | int, ...], value: object, message: str
) -> None:
    dumped: Any = [small()]
    target, last = dumped, 0
    for step in path:
        target, last = target[last], step
    target[last] = value
    with pytest.raises(StreamError) as caught:
        parsed(dumped[0])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b'{"x": 1.5}',
        b'{"x": NaN}',
        b'{"\\ud800": {}}',
        b'{"\\n": {}}',
        b'{"x": 1' + b"0" * 5000 + b"}",
    ],
)
def test_what_is_no_json_of_ours_is_refused(text: bytes) -> None:
    with pytest.raises(StreamError):
        parse_schema(text)


@pytest.mark.parametrize(
    "text",
    [
        b" " * (SIZE + 1),
        b"[" * (PARTS + 1),
        b"[" * (PARTS - 1),
        b'{"a":' * (PARTS - 1),
    ],
    ids=["size", "brackets", "arrays inside each other", "objects inside each other"],
)
def test_bombs_are_refused(text: bytes) -> None:
    with pytest.raises(LimitExceeded):
        parse_schema(text)


@pytest.mark.parametrize("through", ["fields", "subsections"])
def test_states_inside_each_other_have_a_limit(through: str) -> None:
    inner = state("s")
    for _ in range(DEPTH):
        if through == "fields":
            inner = state("s", field("f", Description=inner))
        else:
            inner = state("s", subsections=[inner])
    with pytest.raises(LimitExceeded, match="inside each other"):
        parsed(dump(inner))


def test_subsections_of_one_name_are_refused() -> None:
    with pytest.raises(StreamError, match="to differ in name"):
        parsed(dump(state("s", subsections=[state("s/x"), state("s/x")])))


def test_file_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(StorageError, match=r"x\.json: cannot be read: No such file"):
        read_schema(path)
    path.write_text("[]")
    with pytest.raises(StorageError, match=r"x\.json: not declared state as .*found an array"):
        read_schema(path)
    path.write_text(json.dumps(small()))
    assert read_schema(path) == parsed(small())


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every container with each key in it."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    found = [(node, key) for key in keys]
    for key in keys:
        if isinstance(node[key], dict | list):
            found += places(node[key])
    return found


VALUES = [None, True, -1, 0, 1, 2, 7, 1 << 40, 1 << 70, 0.5, "", "x", "unused", "\u202e", [], {}]


@functools.cache
def stream_description() -> Any:
    return recorded("pc-many").description


@settings(max_examples=300)
@given(st.data())
def test_nothing_but_our_errors_comes_of_a_changed_dump(data: st.DataObject) -> None:
    changed = small()
    for _ in range(data.draw(st.integers(1, 4))):
        target, key = data.draw(st.sampled_from(places([changed])))
        match data.draw(st.sampled_from(["put", "put", "drop", "copy"])):
            case "put":
                target[key] = data.draw(st.sampled_from(VALUES))
            case "drop":
                del target[key]
            case "copy":
                source, other = data.draw(st.sampled_from(places([changed])))
                target[key] = json.loads(json.dumps(source[other]))
    try:
        schema = parsed(changed)
    except VmferryError:
        return
    check(schema, parsed(small()))
    check_stream(stream_description(), schema)


@settings(max_examples=300)
@given(st.data())
def test_nothing_but_our_errors_comes_of_changed_bytes(data: st.DataObject) -> None:
    text = bytearray(json.dumps(small()).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=4))
    try:
        parse_schema(bytes(text))
    except VmferryError:
        return


@given(SCHEMAS)
def test_any_schema_can_be_held_against_a_stream(schema: Schema) -> None:
    check_stream(stream_description(), schema)
