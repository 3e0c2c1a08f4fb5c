"""The annotations that say how an attribute of a device goes over the wire.

An annotation is ``Annotated[type, kind, ...]``: the type is what Python programs see, the kind is
the encoding, of QEMU 7.2 ``migration/vmstate-types.c``, and what follows are conditions.  Aliases
such as ``U8`` carry their kind, so that ``divider: U16`` is a whole declaration, and
``thr: Annotated[U8, since(2)]`` one with a condition.  This module only names things;
:mod:`.declare` says what may be combined.

What is on the wire without being an attribute (:class:`Gap`, :class:`Temporary`) is declared as
``ClassVar[Annotated[...]]``, which neither dataclasses nor slots take for an attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Protocol, TypeAlias, TypeVar

T = TypeVar("T")


# Kinds: one of them for each field


@dataclass(frozen=True, slots=True)
class Integer:
    """A big-endian integer of 1, 2, 4 or 8 bytes."""

    size: int
    signed: bool = False


@dataclass(frozen=True, slots=True)
class Double:
    """A ``float`` as the 8 bytes of an IEEE 754 double."""


@dataclass(frozen=True, slots=True)
class Expiry:
    """A timer: the nanoseconds of its clock at which it fires, ``None`` where it is not armed."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """*size* bytes as they are, of ``bytes`` or ``bytearray``.

    Where the attribute holds more, ``of`` says how many bytes it holds and ``start`` which is the
    first to be sent; the others are left alone when loading.
    """

    size: int
    start: int = 0
    of: int | None = None


@dataclass(frozen=True, slots=True)
class VarBuffer:
    """As many bytes as the attribute *count* says, at most *bound*."""

    count: str
    bound: int


class Array:
    """A list of as many elements as the shape says: ``Array(4)``.

    ``Array(2, 3)`` is a list of two lists of three.
    Elements that may be ``None`` are what C calls pointers: a NULL pointer is one byte ``30``, and
    which of them are NULL is not up to the stream: the loading side's own list must agree.
    """

    __slots__ = ("shape",)

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __repr__(self) -> str:
        return f"Array{self.shape}"


@dataclass(frozen=True, slots=True)
class VarArray:
    """A list of as many elements as the attribute *count* says, times *multiple*; at most *bound*.

    The attribute is an integer that is declared before; saving a list of another length fails.
    """

    count: str
    bound: int
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class Queue:
    """A list of states of any length: QEMU's QTAILQ, with a mark before each and at the end."""

    bound: int = 65_536


@dataclass(frozen=True, slots=True)
class Tree:
    """A dictionary of states: QEMU's GTREE.  Keys are numbers of 64 bits, or states themselves."""

    bound: int = 65_536


@dataclass(frozen=True, slots=True)
class Bitmap:
    """An ``int`` whose bits are sent in words of 64; bit 0 is the lowest of the first word."""

    bits: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes without meaning: zeros when saved, ignored when loaded.  Only in a ``ClassVar``."""

    size: int


@dataclass(frozen=True, slots=True)
class Temporary:
    """A state that exists only while saving and loading.  Only in a ``ClassVar``.

    ``save`` names a method that returns it, ``load`` one that takes it when everything is decoded,
    before ``post_load``, and may refuse it with a ``ValueError``.
    """

    save: str
    load: str


class Codec(Protocol[T]):
    """An encoding of one's own."""

    @property
    def type(self) -> str:
        """The name of the type in the description."""

    def save(self, value: T) -> bytes:
        """The bytes of *value*; ``ValueError`` where it has none."""

    def load(self, data: memoryview) -> tuple[T, int]:
        """The value that *data* begins with, and its bytes; ``ValueError`` if there is none."""


@dataclass(frozen=True, slots=True)
class Custom:
    """Whatever *codec* makes of the attribute."""

    codec: Codec[Any]


@dataclass(frozen=True, slots=True)
class Subsection:
    """A state that is sent behind all fields, with its name, and only where it is needed.

    Without *needed* the attribute is ``X | None``: ``None`` is not sent, and what was not sent is
    ``None`` after loading.  With it, *needed* is asked with the device when saving, and what was
    not sent stays as it is.
    """

    needed: Callable[[Any], bool] | None = None


subsection: Final = Subsection()


# Conditions and names: any number of them behind the kind


@dataclass(frozen=True, slots=True)
class Since:
    """See :func:`since`."""

    version: int


@dataclass(frozen=True, slots=True)
class Before:
    """See :func:`before`."""

    version: int


@dataclass(frozen=True, slots=True)
class When:
    """See :func:`when`."""

    test: Callable[..., bool]


@dataclass(frozen=True, slots=True)
class Named:
    """See :func:`named`."""

    name: str


@dataclass(frozen=True, slots=True)
class Of:
    """See :func:`of`."""

    attribute: str


@dataclass(frozen=True, slots=True)
class AtVersion:
    """See :func:`at_version`."""

    version: int


@dataclass(frozen=True, slots=True)
class Check:
    """See :data:`equal` and :data:`at_most`."""

    exact: bool


@dataclass(frozen=True, slots=True)
class NotMigrated:
    """See :data:`Local`."""


def since(version: int) -> Since:
    """The field is there from this version of the device on."""
    return Since(version)


def before(version: int) -> Before:
    """The field was there before this version, so it is loaded and no longer saved."""
    return Before(version)


def when(test: Callable[[Any], bool] | Callable[[Any, int], bool]) -> When:
    """The field is there where *test* of the device, or of the device and the version, holds.

    When loading, the device that *test* sees has the fields before this one as they were sent.
    """
    return When(test)


def named(name: str) -> Named:
    """What the field is called in descriptions, if not as the attribute is."""
    return Named(name)


def of(attribute: str) -> Of:
    """A ``ClassVar`` that is another form of an attribute, such as that of an older version."""
    return Of(attribute)


def at_version(version: int) -> AtVersion:
    """A struct is saved and loaded as in this version of it, not as in its latest."""
    return AtVersion(version)


equal: Final = Check(exact=True)
"""Loading fails where the number is another than the device has."""

at_most: Final = Check(exact=False)
"""Loading fails where the number is negative or above what the device has."""

Local: TypeAlias = Annotated[T, NotMigrated()]
"""An attribute that is not migrated: ``bus: Local[Bus]``."""

U8: TypeAlias = Annotated[int, Integer(1)]
U16: TypeAlias = Annotated[int, Integer(2)]
U32: TypeAlias = Annotated[int, Integer(4)]
U64: TypeAlias = Annotated[int, Integer(8)]
I8: TypeAlias = Annotated[int, Integer(1, signed=True)]
I16: TypeAlias = Annotated[int, Integer(2, signed=True)]
I32: TypeAlias = Annotated[int, Integer(4, signed=True)]
I64: TypeAlias = Annotated[int, Integer(8, signed=True)]
Float64: TypeAlias = Annotated[float, Double()]
Timer: TypeAlias = Annotated[int | None, Expiry()]
