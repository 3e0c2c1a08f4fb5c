"""What a class declares, as data: the one source of codec, description and declared schema.

A plan is made once for each class, by :mod:`.declare`, and never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from struct import calcsize
from typing import Any, Final, TypeAlias

from .types import Codec

PLAN: Final = "__vmstate__"
"""The attribute of a declared class that holds its plan."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number, truth value or timer: its type in descriptions and its code in ``struct``."""

    type: str
    code: str

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return calcsize(f">{self.code}")

    @property
    def range(self) -> str:
        """The values that fit, in words."""
        if self.code == "?":
            return "a bool"
        if self.code == "d":
            return "a float"
        bits = 8 * self.size
        signed = self.code.islower()
        low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
        number = f"an integer from {low} to {high - 1}"
        return f"None or {number}" if self.type == "timer" else number


@dataclass(frozen=True, slots=True)
class Struct:
    """A declared state inside another; ``version`` is the one that it is written in."""

    plan: Plan
    version: int
    type: str = "struct"


@dataclass(frozen=True, slots=True)
class Bytes:
    """``size`` bytes from ``start`` of an attribute of ``total``; or as many as ``count`` says."""

    size: int
    start: int = 0
    total: int = 0
    count: str | None = None
    mutable: bool = True
    type: str = "buffer"


@dataclass(frozen=True, slots=True)
class Elements:
    """A list of elements of one kind.

    ``shape`` is that of a fixed array.  Else ``count`` names the attribute with the length, which
    is ``multiple`` times as much and at most ``bound``.
    """

    element: Kind
    shape: tuple[int, ...] = ()
    count: str | None = None
    bound: int = 0
    multiple: int = 1
    nullable: bool = False

    @property
    def type(self) -> str:
        """That of the elements."""
        return self.element.type


@dataclass(frozen=True, slots=True)
class Queue:
    """A list with marks between its elements."""

    plan: Plan
    bound: int
    type: str = "qtailq"


@dataclass(frozen=True, slots=True)
class Tree:
    """A dictionary; keys are numbers where ``key`` is ``None``."""

    key: Plan | None
    value: Plan
    bound: int
    type: str = "gtree"


@dataclass(frozen=True, slots=True)
class Bitmap:
    """An integer of so many bits, in words of 64."""

    bits: int
    type: str = "bitmap"


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes without meaning."""

    size: int
    type: str = "unused_buffer"


@dataclass(frozen=True, slots=True)
class Temporary:
    """A state that one method makes and another takes."""

    plan: Plan
    save: str
    load: str
    type: str = "tmp"


@dataclass(frozen=True, slots=True)
class Custom:
    """An encoding of the user's."""

    codec: Codec[Any]

    @property
    def type(self) -> str:
        """As the codec calls it."""
        return self.codec.type


Kind: TypeAlias = (
    Scalar | Struct | Bytes | Elements | Queue | Tree | Bitmap | Gap | Temporary | Custom
)


@dataclass(frozen=True, slots=True)
class Field:
    """One field: ``attribute`` of the object, called ``name`` in descriptions.

    It is there from version ``since`` on, up to ``before`` (0: no end), where ``when`` holds.
    ``exact`` is ``True`` for a number that must be equal when loading, ``False`` for one that must
    not be above, ``None`` for neither.
    """

    attribute: str
    name: str
    kind: Kind
    since: int = 0
    before: int = 0
    when: Callable[[Any, int], bool] | None = None
    exact: bool | None = None

    def in_version(self, version: int) -> bool:
        """Whether *version* has the field at all."""
        return self.since <= version and not 0 < self.before <= version

    @property
    def conditional(self) -> bool:
        """Whether QEMU would need a callback to know that the field is there."""
        return self.when is not None or self.before > 0


@dataclass(frozen=True, slots=True)
class Part:
    """A subsection: a state in ``attribute``, sent where ``needed``, or not ``None``."""

    attribute: str
    plan: Plan
    needed: Callable[[Any], bool] | None


@dataclass(frozen=True, slots=True)
class Registration:
    """What the registry has to know of a device; see :func:`.declare.device`."""

    instance_id: int | None = None
    alias_id: int | None = None
    priority: int = 0
    unmigratable: str | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A declared class.

    ``hooks`` are the names of those of the four hooks that it has.  ``required`` are the arguments
    without which the class cannot be called, all of them fields; ``None`` if it cannot be called
    even so, in which case objects of it are loaded in place and never made.  ``defaults`` are the
    values of other arguments, as far as they are plain.
    """

    cls: type[Any]
    name: str
    version: int
    minimum_version: int
    fields: tuple[Field, ...]
    subsections: tuple[Part, ...]
    hooks: frozenset[str]
    required: tuple[str, ...] | None
    defaults: dict[str, Any]
    registration: Registration | None = None
    depth: int = field(init=False)
    """Brackets inside each other in the JSON that describes the state."""

    codecs: dict[int, Any] = field(default_factory=dict)
    """What :mod:`.codec` has compiled, by version."""

    def __post_init__(self) -> None:
        inside = [depth_inside(field.kind) for field in self.fields]
        inside += [part.plan.depth for part in self.subsections]
        object.__setattr__(self, "depth", 2 + max(inside, default=0))


def plans_of(kind: Kind) -> list[Plan]:
    """The declared classes that *kind* is made of."""
    if isinstance(kind, Elements):
        return plans_of(kind.element)
    found = [getattr(kind, name, None) for name in ("plan", "key", "value")]
    return [plan for plan in found if isinstance(plan, Plan)]


def depth_inside(kind: Kind) -> int:
    """Brackets inside each other in what describes a value."""
    own = int(kind.type == "struct")
    return own + max((plan.depth for plan in plans_of(kind)), default=0)


def fixed_size(kind: Kind) -> int:
    """Bytes on the wire where every value has as many, else 0."""
    match kind:
        case Scalar() | Gap() | Bytes(count=None):
            return kind.size
        case Bitmap(bits):
            return -(-bits // 64) * 8
        case Struct(plan, version):
            fields = [field for field in plan.fields if field.in_version(version)]
            sizes = [fixed_size(field.kind) for field in fields]
            fixed = all(sizes) and all(field.when is None for field in fields)
            return sum(sizes) if fixed and not plan.subsections else 0
        case Elements(element, count=None, nullable=False):
            return product(kind.shape) * fixed_size(element)
    return 0


def product(shape: tuple[int, ...]) -> int:
    """Elements of an array of that shape."""
    count = 1
    for length in shape:
        count *= length
    return count
