"""What breaks between two declarations: each kind by hand, and what holds of all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from tests.vmstate.schemas import SCHEMAS, Json, field, schema, state
from vmferry.vmstate.schema import Direction, Finding, Kind, Schema, Severity, check

THR, LCR = field("thr"), field("lcr", 2)
FIFO = state("fifo", field("head"), field("data", 16))
SUB = state("serial/sub", field("x", 4))

BREAKS, MAY_BREAK, NOTE = Severity.BREAKS, Severity.MAY_BREAK, Severity.NOTE

Expected = list[tuple[Kind, Severity, str]]


def serial(*fields: Json, **more: Any) -> Json:
    return state("serial", *fields, **more)


def nested(inner: Json, **more: Any) -> Json:
    return serial(field("fifo", 24, Description=inner), LCR, **more)


CASES: dict[str, tuple[Json, Json, Expected, Expected]] = {
    # Name: OLD, NEW, what is found of OLD in NEW, and of NEW in OLD.
    "field at the end": (
        serial(THR),
        serial(THR, LCR),
        [(Kind.FIELD_MISSING, BREAKS, "serial.lcr")],
        [(Kind.FIELD_UNKNOWN, BREAKS, "serial.lcr")],
    ),
    "field in the middle": (
        serial(THR, field("x", 8), LCR),
        serial(THR, LCR),
        [(Kind.FIELD_UNKNOWN, BREAKS, "serial.x")],
        [(Kind.FIELD_MISSING, BREAKS, "serial.x")],
    ),
    "field of later version": (
        serial(THR),
        serial(THR, field("lcr", 2, 2), version=2),
        [(Kind.FIELD_IN_LATER_VERSION, NOTE, "serial.lcr")],
        [(Kind.VERSION_TOO_NEW, BREAKS, "serial")],
    ),
    "field of later version than the device": (
        serial(THR),
        serial(THR, field("lcr", 2, 2)),
        [(Kind.FIELD_IN_LATER_VERSION, NOTE, "serial.lcr")],
        [],
    ),
    "field moved to a later version": (
        serial(THR, LCR),
        serial(THR, field("lcr", 2, 2), version=2),
        [
            (Kind.MINIMUM_NOT_RAISED, BREAKS, "serial"),
            (Kind.FIELD_UNKNOWN, BREAKS, "serial.lcr"),
        ],
        [(Kind.VERSION_TOO_NEW, BREAKS, "serial")],
    ),
    "version raised, field without version": (
        serial(THR),
        serial(THR, LCR, version=2),
        [
            (Kind.MINIMUM_NOT_RAISED, BREAKS, "serial"),
            (Kind.FIELD_MISSING, BREAKS, "serial.lcr"),
        ],
        [(Kind.VERSION_TOO_NEW, BREAKS, "serial")],
    ),
    "minimum raised": (
        serial(THR),
        serial(THR, version=2, minimum=2),
        [(Kind.VERSION_TOO_OLD, BREAKS, "serial")],
        [(Kind.VERSION_TOO_NEW, BREAKS, "serial")],
    ),
    "field under a condition": (
        serial(THR),
        serial(THR, field("lcr", 2, maybe=True)),
        [(Kind.FIELD_MISSING, MAY_BREAK, "serial.lcr")],
        [(Kind.FIELD_UNKNOWN, MAY_BREAK, "serial.lcr")],
    ),
    "condition on a field": (
        serial(THR),
        serial(field("thr", maybe=True)),
        [(Kind.FIELD_CONDITION, MAY_BREAK, "serial.thr")],
        [(Kind.FIELD_CONDITION, MAY_BREAK, "serial.thr")],
    ),
    "conditions on both": (serial(field("x", maybe=True)), serial(field("x", maybe=True)), [], []),
    "size": (
        serial(THR, LCR),
        serial(THR, field("lcr", 4)),
        [(Kind.SIZE_CHANGED, BREAKS, "serial.lcr")],
        [(Kind.SIZE_CHANGED, BREAKS, "serial.lcr")],
    ),
    "size that is not fixed": (
        serial(LCR),
        serial(field("lcr", 0)),
        [(Kind.SIZE_CHANGED, MAY_BREAK, "serial.lcr")],
        [(Kind.SIZE_CHANGED, MAY_BREAK, "serial.lcr")],
    ),
    "length of an array": (
        serial(field("x", num=2)),
        serial(field("x", num=3)),
        [(Kind.ARRAY_LENGTH_CHANGED, BREAKS, "serial.x")],
        [(Kind.ARRAY_LENGTH_CHANGED, BREAKS, "serial.x")],
    ),
    "array instead of a value": (
        serial(field("x"), field("y", num=2)),
        serial(field("x", num=4), field("y", num=2)),
        [(Kind.ARRAY_LENGTH_CHANGED, BREAKS, "serial.x")],
        [(Kind.ARRAY_LENGTH_CHANGED, BREAKS, "serial.x")],
    ),
    "lengths that one side tells": (
        serial(field("x"), THR, field("z")),
        serial(field("x", num=4), THR, field("z", num=8)),
        [(Kind.ARRAY_LENGTH_UNKNOWN, NOTE, "2 arrays")],
        [(Kind.ARRAY_LENGTH_UNKNOWN, NOTE, "2 arrays")],
    ),
    "gap for an array of untold length": (
        serial(field("x"), THR, field("z")),
        serial(field("unused", 5), THR, field("z", num=8)),
        [
            (Kind.ARRAY_LENGTH_UNKNOWN, MAY_BREAK, "serial.x"),
            (Kind.ARRAY_LENGTH_UNKNOWN, NOTE, "1 array"),
        ],
        [
            (Kind.ARRAY_LENGTH_UNKNOWN, MAY_BREAK, "serial.unused"),
            (Kind.ARRAY_LENGTH_UNKNOWN, NOTE, "1 array"),
        ],
    ),
    "order": (
        serial(THR, LCR, field("x", 4)),
        serial(LCR, field("x", 4), THR),
        [(Kind.ORDER_CHANGED, BREAKS, "serial.thr")],
        [(Kind.ORDER_CHANGED, BREAKS, "serial.thr")],
    ),
    "another name": (
        serial(THR),
        serial(field("transmit")),
        [(Kind.FIELD_RENAMED, NOTE, "serial.thr")],
        [(Kind.FIELD_RENAMED, NOTE, "serial.transmit")],
    ),
    "another name under a condition": (
        serial(field("thr", maybe=True)),
        serial(field("transmit", maybe=True)),
        [(Kind.FIELD_RENAMED, MAY_BREAK, "serial.thr")],
        [(Kind.FIELD_RENAMED, MAY_BREAK, "serial.transmit")],
    ),
    "another name and another size": (
        serial(THR),
        serial(field("transmit", 2)),
        [
            (Kind.FIELD_UNKNOWN, BREAKS, "serial.thr"),
            (Kind.FIELD_MISSING, BREAKS, "serial.transmit"),
        ],
        [
            (Kind.FIELD_UNKNOWN, BREAKS, "serial.transmit"),
            (Kind.FIELD_MISSING, BREAKS, "serial.thr"),
        ],
    ),
    "gap of the same size": (
        serial(THR, LCR, field("x")),
        serial(field("unused", 3), field("x")),
        [(Kind.FIELDS_REGROUPED, NOTE, "serial.thr")],
        [(Kind.FIELDS_REGROUPED, NOTE, "serial.unused")],
    ),
    "gap of another size": (
        serial(field("y", num=2), LCR, field("x")),
        serial(field("y", num=2), field("unused", 3), field("x")),
        [
            (Kind.FIELD_UNKNOWN, BREAKS, "serial.lcr"),
            (Kind.FIELD_MISSING, BREAKS, "serial.unused"),
        ],
        [
            (Kind.FIELD_UNKNOWN, BREAKS, "serial.unused"),
            (Kind.FIELD_MISSING, BREAKS, "serial.lcr"),
        ],
    ),
    "fields moved into a struct": (
        serial(field("head"), field("data", 16), LCR),
        nested(FIFO),
        [(Kind.FIELDS_REGROUPED, NOTE, "serial.head")],
        [(Kind.FIELDS_REGROUPED, NOTE, "serial.fifo")],
    ),
    "struct for bytes": (
        serial(field("fifo", 17), LCR),
        nested(FIFO),
        [(Kind.TYPE_CHANGED, BREAKS, "serial.fifo")],
        [(Kind.TYPE_CHANGED, BREAKS, "serial.fifo")],
    ),
    "struct around the same value": (
        serial(field("fifo", 1), LCR),
        nested(state("fifo", field("x", 1))),
        [],
        [],
    ),
    "field in a struct, with the version of the struct": (
        nested(FIFO),
        nested(state("fifo", *FIFO["Fields"], field("tail", 1, 2), version=2)),
        [(Kind.FIELD_MISSING, BREAKS, "serial.fifo.tail")],
        [(Kind.FIELD_UNKNOWN, BREAKS, "serial.fifo.tail")],
    ),
    "version, name and size of a struct": (
        nested(FIFO),
        serial(
            field("fifo", 99, Description=state("q", *FIFO["Fields"], version=7, minimum=7)), LCR
        ),
        [],
        [],
    ),
    "variants under one name": (
        serial(field("x", 1, maybe=True), field("x", 4, maybe=True)),
        serial(field("x", 1, maybe=True), field("x", 8, maybe=True)),
        [(Kind.SIZE_CHANGED, BREAKS, "serial.x")],
        [(Kind.SIZE_CHANGED, BREAKS, "serial.x")],
    ),
    "subsection": (
        serial(THR),
        serial(THR, subsections=[SUB]),
        [(Kind.SUBSECTION_MISSING, NOTE, "serial.serial/sub")],
        [(Kind.SUBSECTION_UNKNOWN, BREAKS, "serial.serial/sub")],
    ),
    "order of subsections": (
        serial(THR, subsections=[SUB, state("serial/other")]),
        serial(THR, subsections=[state("serial/other"), SUB]),
        [],
        [],
    ),
    "field in a subsection": (
        serial(THR, subsections=[SUB]),
        serial(THR, subsections=[state("serial/sub", field("x", 8))]),
        [(Kind.SIZE_CHANGED, BREAKS, "serial.serial/sub.x")],
        [(Kind.SIZE_CHANGED, BREAKS, "serial.serial/sub.x")],
    ),
    "version of a subsection": (
        serial(THR, subsections=[SUB]),
        serial(THR, subsections=[state("serial/sub", field("x", 4), version=2, minimum=2)]),
        [(Kind.VERSION_TOO_OLD, BREAKS, "serial.serial/sub")],
        [(Kind.VERSION_TOO_NEW, BREAKS, "serial.serial/sub")],
    ),
    "subsection of a struct in a subsection": (
        serial(subsections=[state("serial/sub", field("f", 9, Description=FIFO))]),
        serial(
            subsections=[
                state(
                    "serial/sub",
                    field("f", 9, Description=FIFO | {"Subsections": [state("fifo/more")]}),
                )
            ]
        ),
        [(Kind.SUBSECTION_MISSING, NOTE, "serial.serial/sub.f.fifo/more")],
        [(Kind.SUBSECTION_UNKNOWN, BREAKS, "serial.serial/sub.f.fifo/more")],
    ),
}


def told(findings: list[Finding], direction: Direction) -> Expected:
    return [
        (finding.kind, finding.severity, finding.path)
        for finding in findings
        if finding.direction is direction
    ]


@pytest.mark.parametrize("case", CASES)
def test_each_difference_is_found(case: str) -> None:
    old, new, forward, backward = CASES[case]
    findings = check(schema(old), schema(new))
    assert told(findings, Direction.OLD_TO_NEW) == forward
    assert told(findings, Direction.NEW_TO_OLD) == backward
    assert {finding.device for finding in findings} <= {"serial", ""}


def test_device_that_is_not_there_breaks_where_the_machine_has_it() -> None:
    (finding,) = check(schema(serial(THR), state("timer")), schema(serial(THR)))
    assert (finding.kind, finding.device, finding.direction) == (
        Kind.DEVICE_UNKNOWN,
        "timer",
        Direction.OLD_TO_NEW,
    )
    assert finding.condition == "when the machine has it"


def test_device_of_another_type_with_the_same_state_may_load() -> None:
    old, new = schema(isa=serial(THR)), schema(mapped=serial(THR), far=serial(LCR))
    forward = [finding for finding in check(old, new) if finding.direction is Direction.OLD_TO_NEW]
    assert told(forward, Direction.OLD_TO_NEW) == [(Kind.DEVICE_RENAMED, MAY_BREAK, "serial")]
    assert "mapped, far" in forward[0].expected


def test_type_whose_state_got_another_name_is_unknown() -> None:
    findings = check(schema(isa=serial(THR)), schema(isa=state("uart", THR)))
    assert [finding.kind for finding in findings] == [Kind.DEVICE_UNKNOWN] * 2
    assert findings[0].expected == "state uart"


def test_what_is_in_a_subsection_matters_when_it_is_sent() -> None:
    old, new = (serial(THR, subsections=[state("serial/s", field("x", n))]) for n in (1, 2))
    assert {finding.condition for finding in check(schema(old), schema(new))} == {
        "when serial/s is sent"
    }


def test_minimum_is_not_to_be_raised_for_what_a_subsection_holds() -> None:
    inner = [FIFO | {"Subsections": [state("fifo/more", field("x", n))]} for n in (1, 2)]
    old, new = nested(inner[0]), nested(inner[1], version=2)
    found = told(check(schema(old), schema(new)), Direction.OLD_TO_NEW)
    assert found == [(Kind.SIZE_CHANGED, BREAKS, "serial.fifo.fifo/more.x")]


def test_finding_is_plain_data_and_a_line() -> None:
    finding = check(schema(serial(LCR)), schema(serial(field("lcr", 4))))[0]
    assert str(finding) == "serial.lcr: size changed: expected 4 bytes, found 2 bytes"
    assert finding.to_json() == {
        "kind": "size-changed",
        "severity": "breaks",
        "direction": "old-to-new",
        "device": "serial",
        "path": "serial.lcr",
        "expected": "4 bytes",
        "found": "2 bytes",
        "condition": "",
        "advice": finding.advice,
    }


@given(SCHEMAS)
def test_nothing_is_found_between_a_schema_and_itself(one: Schema) -> None:
    assert check(one, one) == []


@given(SCHEMAS, SCHEMAS)
def test_directions_are_each_others_mirror(old: Schema, new: Schema) -> None:
    mirror = {
        Direction.OLD_TO_NEW: Direction.NEW_TO_OLD,
        Direction.NEW_TO_OLD: Direction.OLD_TO_NEW,
    }
    turned = Counter(
        replace(finding, direction=mirror[finding.direction]) for finding in check(new, old)
    )
    assert turned == Counter(check(old, new))
