"""Streams against declarations, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.vmstate.schemas import Json, field, schema, state
from vmferry.vmstate.schema import Finding, Kind, Schema, Severity, check_stream
from vmferry.wire.description import VmDescription, parse_description

BREAKS, MAY_BREAK, NOTE = Severity.BREAKS, Severity.MAY_BREAK, Severity.NOTE


def sent(name: str, size: int = 1, kind: str = "uint8", **more: Any) -> Json:
    return {"name": name, "type": kind, "size": size} | more


def body(name: str, *fields: Json, version: int = 1, **more: Any) -> Json:
    return {"vmsd_name": name, "version": version, "fields": list(fields)} | more


def struct(name: str, inner: Json, size: int, kind: str = "struct", **more: Any) -> Json:
    return sent(name, size, kind, struct=inner, **more)


def described(*bodies: Json, **named: Json) -> VmDescription:
    devices = [{"name": one.get("vmsd_name", "x"), "instance_id": 0} | one for one in bodies]
    devices += [{"name": name, "instance_id": 1} | one for name, one in named.items()]
    return parse_description(json.dumps({"page_size": 4096, "devices": devices}).encode())


THR = sent("thr")
FIFO = body("fifo", sent("head"), sent("data", 16, "buffer"))
DECLARED_FIFO = state("fifo", field("head"), field("data", 16))

CASES: dict[str, tuple[Json, Json, list[tuple[Kind, Severity, str]]]] = {
    "the same": (body("serial", THR), state("serial", field("thr")), []),
    "version too new": (
        body("serial", THR, version=2),
        state("serial", field("thr")),
        [(Kind.VERSION_TOO_NEW, BREAKS, "serial")],
    ),
    "version too old": (
        body("serial", THR),
        state("serial", field("thr"), version=3, minimum=2),
        [(Kind.VERSION_TOO_OLD, BREAKS, "serial")],
    ),
    "field of a later version": (
        body("serial", THR),
        state("serial", field("thr"), field("lcr", 2, 2), version=2),
        [],
    ),
    "field missing": (
        body("serial", THR),
        state("serial", field("thr"), field("lcr", 2)),
        [(Kind.FIELD_MISSING, BREAKS, "serial.lcr")],
    ),
    "field under a condition that does not hold": (
        body("serial", THR),
        state("serial", field("thr"), field("lcr", 2, maybe=True)),
        [],
    ),
    "field unknown": (
        body("serial", THR, sent("lcr", 2, "uint16")),
        state("serial", field("thr")),
        [(Kind.FIELD_UNKNOWN, BREAKS, "serial.lcr")],
    ),
    "array of structs that may be empty": (
        body("serial", THR),
        state("serial", field("thr"), field("fifo", 17, Description=DECLARED_FIFO)),
        [(Kind.FIELD_MISSING, MAY_BREAK, "serial.fifo")],
    ),
    "variants under one name": (
        body("serial", sent("x[1]", 4, "uint32")),
        state("serial", field("x", maybe=True), field("x", 4, maybe=True)),
        [],
    ),
    "size": (
        body("serial", sent("thr", 2, "uint16")),
        state("serial", field("thr", 4)),
        [(Kind.SIZE_CHANGED, BREAKS, "serial.thr")],
    ),
    "type of its own, whose size in memory says nothing": (
        body("serial", sent("timer", 8, "timer")),
        state("serial", field("timer", 48)),
        [],
    ),
    "buffer whose length is told elsewhere": (
        body("serial", sent("a", 64, "buffer"), sent("b", 64, "buffer")),
        state("serial", field("a", 0), field("b", 16)),
        [],
    ),
    "buffer": (
        body("serial", sent("a", 64, "buffer")),
        state("serial", field("a", 48)),
        [(Kind.SIZE_CHANGED, BREAKS, "serial.a")],
    ),
    "array in one": (
        body("serial", sent("a", array_len=3)),
        state("serial", field("a", num=4)),
        [(Kind.ARRAY_LENGTH_CHANGED, BREAKS, "serial.a")],
    ),
    "array one by one": (
        body("serial", *(struct("a", FIFO, 17, index=index) for index in range(3))),
        state("serial", field("a", 24, num=3, Description=DECLARED_FIFO)),
        [],
    ),
    "array with a pointer that is NULL": (
        body(
            "serial",
            sent("a", 1, "nullptr", index=0),
            struct("a", FIFO, 17, index=1),
            sent("a", 1, "uint64", index=2),
        ),
        state("serial", field("a", 24, num=3, Description=DECLARED_FIFO)),
        [],
    ),
    "field in a struct": (
        body("serial", struct("f", FIFO, 17)),
        state(
            "serial", field("f", 24, Description=state("q", field("head", 2), field("data", 16)))
        ),
        [(Kind.SIZE_CHANGED, BREAKS, "serial.f.head")],
    ),
    "struct of fixed version": (
        body("serial", {"name": "f", "type": "vstruct", "size": 17} | FIFO),
        state(
            "serial",
            field(
                "f",
                24,
                Description=state("fifo", *DECLARED_FIFO["Fields"], field("tail", 1, 2), version=2),
            ),
        ),
        [],
    ),
    "struct for bytes": (
        body("serial", struct("f", FIFO, 17)),
        state("serial", field("f", 17)),
        [(Kind.TYPE_CHANGED, BREAKS, "serial.f")],
    ),
    "value for a struct": (
        body("serial", sent("f", 4, "uint32")),
        state("serial", field("f", 17, Description=DECLARED_FIFO)),
        [(Kind.TYPE_CHANGED, BREAKS, "serial.f")],
    ),
    "another type of the same size": (
        body("serial", sent("f", 4, "uint32")),
        state("serial", field("f", 4, type="int32")),
        [(Kind.TYPE_CHANGED, MAY_BREAK, "serial.f")],
    ),
    "more elements than the bound": (
        body("serial", sent("f", 1, array_len=5)),
        state("serial", field("f", num=4, num_field="n")),
        [(Kind.ARRAY_LENGTH_CHANGED, BREAKS, "serial.f")],
    ),
    "no elements": (
        body("serial", THR),
        state("serial", field("thr"), field("f", num=4, num_field="n")),
        [(Kind.FIELD_MISSING, MAY_BREAK, "serial.f")],
    ),
    "other names": (
        body("serial", sent("a"), sent("b", 2, "uint16")),
        state("serial", field("unused", 3)),
        [(Kind.FIELDS_REGROUPED, NOTE, "serial.a")],
    ),
    "gap under a condition": (
        body("serial", sent("unused[0]", 4, "unused_buffer"), THR),
        state(
            "serial", field("unused", 4, maybe=True), field("unused", 2, maybe=True), field("thr")
        ),
        [(Kind.FIELD_UNKNOWN, MAY_BREAK, "serial.unused[0]")],
    ),
    "gap under a condition that holds": (
        body("serial", sent("unused", 4, "unused_buffer"), THR),
        state("serial", field("unused", 4, maybe=True), field("thr")),
        [],
    ),
    "order": (
        body("serial", sent("a"), sent("b", 2, "uint16")),
        state("serial", field("b", 2), field("a")),
        [(Kind.ORDER_CHANGED, BREAKS, "serial.a")],
    ),
    "subsection": (
        body("serial", THR, subsections=[body("serial/a", sent("x")), body("serial/b", sent("x"))]),
        state("serial", field("thr"), subsections=[state("serial/b", field("x", 2))]),
        [
            (Kind.SUBSECTION_UNKNOWN, BREAKS, "serial.serial/a"),
            (Kind.SIZE_CHANGED, BREAKS, "serial.serial/b.x"),
        ],
    ),
    "subsection that was not needed": (
        body("serial", THR),
        state("serial", field("thr"), subsections=[state("serial/b")]),
        [],
    ),
    "name that repeats": (
        body("serial", THR, THR),
        state("serial", field("thr")),
        [(Kind.FIELD_UNKNOWN, BREAKS, "serial.thr")],
    ),
}


def told(findings: list[Finding]) -> list[tuple[Kind, Severity, str]]:
    return [(finding.kind, finding.severity, finding.path) for finding in findings]


@pytest.mark.parametrize("case", CASES)
def test_each_difference_is_found(case: str) -> None:
    stream, declared, expected = CASES[case]
    assert told(check_stream(described(stream), schema(declared))) == expected


def test_device_is_found_by_the_name_of_its_state_and_the_best_type_counts() -> None:
    declared = schema(
        one=state("serial", field("lcr", 2)), other=state("serial", field("thr")), third=state("x")
    )
    assert check_stream(described(**{"0000:00:02.0/serial": body("serial", THR)}), declared) == []


def test_device_that_is_not_declared_breaks() -> None:
    (finding,) = check_stream(described(isa=body("serial", THR)), schema(state("timer")))
    assert (finding.kind, finding.device, finding.path) == (
        Kind.DEVICE_UNKNOWN,
        "isa:1",
        "serial",
    )
    assert finding.breaks


def test_what_cannot_be_judged_is_said() -> None:
    by_code = {"name": "slirp", "size": 9, "fields": []}
    stream = described(by_code, body("timer", THR))
    findings = check_stream(stream, schema(), ["ram", "ram"])
    assert told(findings) == [
        (Kind.NOT_JUDGED, NOTE, "slirp"),
        (Kind.NOT_JUDGED, NOTE, "timer"),
        (Kind.NOT_JUDGED, NOTE, "ram"),
    ]
    assert told(check_stream(described(body("timer", THR)), Schema((), complete=True))) == [
        (Kind.DEVICE_UNKNOWN, BREAKS, "timer")
    ]


def test_many_fields_of_one_name_take_no_time() -> None:
    stream = described(body("serial", *[THR] * 20_000))
    assert len(check_stream(stream, schema(state("serial", field("thr"))))) == 1
