"""Declared classes, made up by hypothesis, and objects of them, made up by a random generator."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from random import Random
from typing import Annotated, Any, ClassVar, TypeAlias

from hypothesis import strategies as st

from vmferry.vmstate import (
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    Bitmap,
    Buffer,
    Float64,
    Gap,
    Queue,
    Subsection,
    Timer,
    Tree,
    VarArray,
    VarBuffer,
    before,
    device,
    named,
    since,
    state,
    subsection,
    when,
)

Values: TypeAlias = Callable[[Random], Any]
"""Makes a value that fits."""


def between(low: int, high: int) -> Values:
    return lambda rng: rng.choice([low, high, rng.randint(low, high)])


NUMBERS: list[tuple[Any, Values]] = [
    (U8, between(0, 2**8 - 1)),
    (U16, between(0, 2**16 - 1)),
    (U32, between(0, 2**32 - 1)),
    (U64, between(0, 2**64 - 1)),
    (I8, between(-(2**7), 2**7 - 1)),
    (I16, between(-(2**15), 2**15 - 1)),
    (I32, between(-(2**31), 2**31 - 1)),
    (I64, between(-(2**63), 2**63 - 1)),
    (bool, lambda rng: rng.random() < 0.5),
    (Timer, lambda rng: rng.choice([None, 0, rng.getrandbits(63)])),
    (Float64, lambda rng: rng.choice([0.0, -1.5, rng.gauss(0, 1e300), float("inf")])),
]

OPTIONAL: dict[str, Any] = {"maybe": 0, "sub": None, "always": None}
"""Attributes that need not be given when an object is made, as they are not always sent."""


@dataclass
class Member:
    """One attribute: how it is declared, and the values of the objects that are made of it."""

    annotation: Any
    values: Values


@dataclass
class Made:
    """A declared class, and how objects of it are made."""

    cls: type[Any]
    members: dict[str, Member]

    def make(self, rng: Random) -> Any:
        return self.cls(**{name: member.values(rng) for name, member in self.members.items()})


def several(values: Values, length: int) -> Values:
    return lambda rng: [values(rng) for _ in range(length)]


def some(values: Values, most: int) -> Values:
    return lambda rng: [values(rng) for _ in range(rng.randint(0, most))]


def made(
    decorator: Any, members: dict[str, Member], gaps: dict[str, Any], shape: str, order: list[str]
) -> Made:
    """The class in one of three shapes: plain, dataclass, dataclass with slots."""
    hints = {name: member.annotation for name, member in members.items()} | gaps
    hints = {name: hints[name] for name in order}
    optional = {name: OPTIONAL[name] for name in members if name in OPTIONAL}
    if shape == "plain":

        def fill(namespace: dict[str, Any]) -> None:
            def init(self: Any, **values: Any) -> None:
                self.__dict__.update(optional | values)

            def equal(self: Any, other: Any) -> bool:
                return vars(self) == vars(other)

            namespace |= {"__init__": init, "__eq__": equal, "__hash__": None}
            namespace["__annotations__"] = hints

        cls = types.new_class("Plain", (), {}, fill)
    else:
        fields: list[Any] = []
        for name, hint in hints.items():
            default = {"default": optional[name]} if name in optional else {}
            fields.append(
                (name, hint, field(kw_only=True, **default)) if name in members else (name, hint)
            )
        cls = make_dataclass("Data", fields, slots=shape == "slots")
    return Made(decorator(cls), members)


SIMPLE = ["number", "named", "array", "matrix", "buffer", "bytes", "bitmap"]
NESTED = ["struct", "structs", "queue", "tree"]


@st.composite
def attributes(draw: st.DrawFn, depth: int) -> Member:
    """An attribute of any kind that does not depend on another."""
    kind = draw(st.sampled_from(SIMPLE + NESTED * (depth > 0)))
    n = draw(st.integers(1, 4))
    if kind in NESTED:
        inner = draw(classes(depth=depth - 1, name=f"inner{depth}"))
        cls = inner.cls
        return {
            "struct": lambda: Member(cls, inner.make),
            "structs": lambda: Member(Annotated[list[cls], Array(n)], several(inner.make, n)),
            "queue": lambda: Member(Annotated[list[cls], Queue()], some(inner.make, 3)),
            "tree": lambda: Member(
                Annotated[dict[int, cls], Tree()],
                lambda rng: {rng.getrandbits(64): inner.make(rng) for _ in range(n)},
            ),
        }[kind]()
    hint, values = draw(st.sampled_from(NUMBERS))
    row = several(values, n)
    return {
        "number": Member(hint, values),
        "named": Member(Annotated[hint, named("x.y")], values),
        "array": Member(Annotated[list[hint], Array(n)], row),
        "matrix": Member(Annotated[list[list[hint]], Array(2, n)], several(row, 2)),
        "buffer": Member(Annotated[bytearray, Buffer(n)], lambda rng: bytearray(rng.randbytes(n))),
        "bytes": Member(Annotated[bytes, Buffer(n)], lambda rng: rng.randbytes(n)),
        "bitmap": Member(Annotated[int, Bitmap(30 * n)], between(0, 2 ** (30 * n) - 1)),
    }[kind]


@st.composite
def counted(draw: st.DrawFn) -> dict[str, Member]:
    """A count, what it counts, and what is only there for some counts."""
    length = draw(st.integers(0, 5))
    hint, values = draw(st.sampled_from(NUMBERS))
    counter = draw(st.sampled_from([U8, U16, U32, I32]))
    return {
        "n": Member(counter, lambda _: length),
        "items": Member(Annotated[list[hint], VarArray("n", bound=5)], several(values, length)),
        "text": Member(
            Annotated[bytes, VarBuffer("n", bound=5)], lambda rng: rng.randbytes(length)
        ),
        "maybe": Member(
            Annotated[U8, when(lambda obj: obj.n > 2)], between(0, 255 if length > 2 else 0)
        ),
    }


@st.composite
def classes(draw: st.DrawFn, depth: int = 2, name: str = "dev") -> Made:
    """A class of up to four fields, with gaps, counted fields, conditions and subsections."""
    members: dict[str, Member] = {}
    gaps: dict[str, Any] = {}
    order: list[str] = []
    for index in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            gaps[f"gap{index}"] = ClassVar[Annotated[None, Gap(index + 1)]]
            order.append(f"gap{index}")
        members[f"f{index}"] = draw(attributes(depth))
        order.append(f"f{index}")
    if draw(st.booleans()):
        members |= draw(counted())
    if depth and draw(st.booleans()):
        inner = draw(classes(depth=depth - 1, name=f"{name}/sub"))
        make = inner.make
        members["sub"] = Member(
            Annotated[inner.cls | None, subsection],
            lambda rng: make(rng) if rng.random() < 0.5 else None,
        )
        other = draw(classes(depth=0, name=f"{name}/always"))
        members["always"] = Member(Annotated[other.cls, Subsection(lambda _: True)], other.make)
    order += [key for key in members if key not in order]
    shape = draw(st.sampled_from(["plain", "data", "slots"]))
    return made((device if depth == 2 else state)(name), members, gaps, shape, order)


@dataclass
class History:
    """A class in each version of it, oldest first, and how objects of the oldest are made."""

    versions: list[type[Any]]
    make: Values


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Classes where each version adds numbers and drops others, and loads all before it."""
    last = draw(st.integers(2, 4))
    numbers = draw(
        st.lists(
            st.tuples(st.sampled_from(NUMBERS), st.integers(1, last), st.integers(0, last)),
            min_size=1,
            max_size=8,
        )
    )
    versions = []
    for version in range(1, last + 1):
        fields: list[Any] = []
        for index, ((hint, _), begun, ended) in enumerate(numbers):
            if begun > version:
                continue
            conditions = [since(begun)] if begun > 1 else []
            if begun < ended <= version:
                conditions.append(before(ended))
            annotation = hint
            for condition in conditions:
                annotation = Annotated[annotation, condition]
            fields.append((f"f{index}", annotation, None))
        cls = make_dataclass(f"V{version}", fields)
        versions.append(device("dev", version=version, minimum_version=1)(cls))
    values = {
        f"f{index}": values for index, ((_, values), begun, _) in enumerate(numbers) if begun == 1
    }
    first = versions[0]
    return History(
        versions, lambda rng: first(**{name: make(rng) for name, make in values.items()})
    )
