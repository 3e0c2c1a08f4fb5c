"""What the checks say is what loading does: one made-up class saves, another one loads."""

from __future__ import annotations

import json
from dataclasses import dataclass, make_dataclass
from dataclasses import field as default
from typing import Annotated, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.errors import StateError
from vmferry.vmstate import (
    U8,
    U16,
    U32,
    Array,
    VarArray,
    before,
    describe,
    device,
    load,
    named,
    save,
    since,
    state,
    subsection,
)
from vmferry.vmstate.schema import (
    Direction,
    Finding,
    Schema,
    Severity,
    check,
    check_stream,
    dump_schema,
    parse_schema,
)
from vmferry.wire.description import VmDescription, parse_description

INTEGERS = {"U8": U8, "U16": U16, "U32": U32}


@dataclass(frozen=True)
class Made:
    """A field of a made-up class."""

    name: str
    kind: str
    condition: tuple[str, int] | None = None
    inner: tuple[Made, ...] = ()

    def annotation(self, version: int) -> Any:
        """What the attribute is annotated with; conditions only as far as *version* goes."""
        conditions = {"since": since, "before": before}
        what, bound = self.condition or ("", version + 1)
        more = [conditions[what](bound)] if bound <= version else []
        match self.kind:
            case "array" | "long":
                kind: Any = list[U8], Array(3 if self.kind == "array" else 4)
            case "counted" | "wide":
                kind = list[U8], VarArray("count", bound=4 if self.kind == "counted" else 9)
            case "struct":
                kind = make(self.inner, None), named(self.name)
            case "subsection":
                kind = make(self.inner, f"dev/{self.name}") | None, subsection
            case _:
                kind = INTEGERS[self.kind], named(self.name)
        return Annotated[*kind, *more]

    def value(self, number: int, count: int) -> Any:
        """A value that no other field has."""
        match self.kind:
            case "array" | "long":
                return [number] * (3 if self.kind == "array" else 4)
            case "counted" | "wide":
                return [number] * count
            case "struct" | "subsection":
                inner = make(self.inner, f"dev/{self.name}" if self.kind == "subsection" else None)
                return fill(inner, self.inner, number, 1 + number % 4)
        return number


def make(fields: tuple[Made, ...], name: str | None, versions: tuple[int, int] = (3, 1)) -> Any:
    """A class of these fields: a device ``dev``, or a struct or subsection of that name."""
    if (fields, name, versions) not in CLASSES:
        members = [
            (made.name, made.annotation(versions[0]), default(default=None)) for made in fields
        ]
        plain = make_dataclass("Made", [("count", U8, default(default=0)), *members])
        plain.__module__ = __name__
        version, minimum = versions
        declare = (
            device("dev", version=version, minimum_version=minimum)
            if name == "dev"
            else state(name or "struct", version=version, minimum_version=minimum)
        )
        CLASSES[fields, name, versions] = declare(plain)
    return CLASSES[fields, name, versions]


CLASSES: dict[Any, Any] = {}


def fill(cls: Any, fields: tuple[Made, ...], start: int, count: int) -> Any:
    """An object whose fields differ in value from each other."""
    values = {made.name: made.value(start + 7 * at, count) for at, made in enumerate(fields, 1)}
    return cls(count=count, **values)


PLAIN = st.sampled_from(["U8", "U16", "U32", "array", "long", "counted", "wide"])
CONDITIONS = st.sampled_from([None, None, ("since", 2), ("before", 2), ("since", 3)])
INNER = st.lists(
    st.builds(Made, st.sampled_from("pqr"), PLAIN, CONDITIONS),
    unique_by=lambda made: made.name,
    max_size=3,
).map(tuple)
FIELDS = st.lists(
    st.builds(Made, st.sampled_from("abcde"), PLAIN, CONDITIONS)
    | st.builds(Made, st.sampled_from("st"), st.just("struct"), CONDITIONS, INNER)
    | st.builds(Made, st.sampled_from("uv"), st.just("subsection"), st.none(), INNER),
    unique_by=lambda made: made.name,
    max_size=6,
).map(tuple)
VERSIONS = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)])


@st.composite
def changed(draw: st.DrawFn, fields: tuple[Made, ...]) -> tuple[Made, ...]:
    """The fields as the next release may have them."""
    out = list(fields)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        more = draw(FIELDS)
        match draw(st.sampled_from(["add", "drop", "swap"])):
            case "add":
                out[at:at] = [made for made in more if made.name not in {one.name for one in out}]
            case "drop":
                del out[at : at + 1]
            case "swap":
                out[at:] = out[at:][::-1]
    return tuple(out)


def schema_of(cls: Any) -> Schema:
    return parse_schema(json.dumps(dump_schema(cls)).encode())


def description_of(obj: Any) -> VmDescription:
    one = {"name": "dev", "instance_id": 0} | describe(obj)
    return parse_description(json.dumps({"page_size": 4096, "devices": [one]}).encode())


def loaded(sent: Any, data: bytes, version: int, cls: Any) -> tuple[bool, bool]:
    """Whether *cls* takes the bytes with every field that it shares having the value it had; and
    whether besides no other field got one.
    """
    fields, _, (latest, minimum) = key_of(cls)
    if not minimum <= version <= latest:
        return False, False  # whoever finds the section refuses it
    made, fresh = (fill(cls, fields, 100, 0) for _ in range(2))
    try:
        load(made, data, version)
    except StateError:
        return False, False
    right = same(sent, made, version)
    return right, right and untouched(sent, made, fresh, version)


def key_of(cls: Any) -> Any:
    return next(key for key, made in CLASSES.items() if made is cls)


def same(one: Any, other: Any, version: int = 3) -> bool:
    """Whether two objects, maybe of two classes, agree in what both have in *version*."""
    shared = set.intersection(*(there(type(made), version) for made in (one, other)))
    return all(equal(getattr(one, name), getattr(other, name)) for name in shared)


def untouched(one: Any, other: Any, fresh: Any, version: int = 3) -> bool:
    """Whether what *one* has not is in *other* as in *fresh*."""
    theirs, ours = (there(type(made), version) for made in (one, other))
    return all(equal(getattr(other, name), getattr(fresh, name)) for name in ours - theirs) and all(
        untouched(*(getattr(made, name) for made in (one, other, fresh)))
        for name in ours & theirs
        if all(type(getattr(made, name)).__name__ == "Made" for made in (one, other, fresh))
    )


def there(cls: Any, version: int) -> set[str]:
    fields, _, (latest, _) = key_of(cls)
    found = {"count"}
    for made in fields:
        kind, bound = made.condition or ("", latest + 1)
        if bound > latest or (kind == "since") == (version >= bound):
            found.add(made.name)
    return found


def equal(one: Any, other: Any) -> bool:
    if type(one).__name__ == type(other).__name__ == "Made":
        return same(one, other)
    return bool(one == other)


def worst(findings: list[Finding]) -> Severity:
    """What the findings come to, conditions being what may be."""
    if any(finding.breaks and not finding.condition for finding in findings):
        return Severity.BREAKS
    harmless = all(finding.severity is Severity.NOTE for finding in findings)
    return Severity.NOTE if harmless else Severity.MAY_BREAK


@settings(max_examples=500)
@given(st.data(), FIELDS, VERSIONS, VERSIONS, st.integers(0, 4))
def test_what_is_said_is_what_loading_does(
    data: st.DataObject,
    fields: tuple[Made, ...],
    old_versions: tuple[int, int],
    new_versions: tuple[int, int],
    count: int,
) -> None:
    old = make(fields, "dev", old_versions)
    new = make(data.draw(changed(fields)), "dev", new_versions)
    sent = fill(old, fields, 1, count)
    stream = save(sent)
    forward = [
        finding
        for finding in check(schema_of(old), schema_of(new))
        if finding.direction is Direction.OLD_TO_NEW
    ]
    right, exact = loaded(sent, stream, old_versions[0], new)
    of_stream = check_stream(description_of(sent), schema_of(new))
    for findings in (forward, of_stream):
        verdict = worst(findings)
        if verdict is Severity.NOTE:
            assert right, findings
        elif verdict is Severity.BREAKS and count:  # what has no bytes may stand anywhere
            assert not exact, findings
