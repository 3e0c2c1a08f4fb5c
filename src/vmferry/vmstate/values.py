"""The bytes of one attribute: a codec for each kind that is more than a number.

Encodings are those of QEMU 7.2 ``migration/vmstate-types.c`` and ``migration/vmstate.c``.  A codec
says how an attribute looks once loaded (its value, or :class:`Kept` where an object, list or buffer
stays the same and only its content is going to change).
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass
from typing import Any, Protocol

from vmferry.errors import StateError

from . import plan as p
from . import texts
from .staging import Frame, Kept, Loader, Saver, run_hook


class Value(Protocol):
    """Saves and loads the value of an attribute of *owner*, or of the object in *frame*."""

    def save(self, value: Any, owner: Any, saver: Saver, /) -> str:
        """Add the bytes of *value*, and return what describes them."""

    def load(self, loader: Loader, frame: Frame, current: Any, /) -> Any:
        """Take the bytes; *current* is what the attribute is, ``None`` if there is nothing."""


class States(Protocol):
    """Saves and loads the objects of one declared class."""

    plan: p.Plan

    def save(self, obj: Any, saver: Saver) -> str:
        """Add the bytes of *obj*, and return what describes them."""

    def load_into(self, loader: Loader, obj: Any) -> Any:
        """Take the bytes, stage what they assign to *obj*, and say how it will look."""

    def load_new(self, loader: Loader) -> Any:
        """Take the bytes, and make an object of them."""


@dataclass(frozen=True, slots=True)
class Number:
    """A single number, where it does not stand in a run of them."""

    kind: p.Scalar
    packing: struct.Struct
    text: str

    def save(self, value: Any, _owner: Any, saver: Saver) -> str:
        """Add the bytes of *value*."""
        saver.parts.append(pack_one(self.kind, value))
        return self.text

    def load(self, loader: Loader, _frame: Frame, _current: Any) -> Any:
        """Take the bytes."""
        at = loader.take(self.packing.size)
        if self.kind.code == "?" and loader.data[at] > 1:
            raise StateError("a bool of 0 or 1", str(loader.data[at]))
        (value,) = self.packing.unpack_from(loader.data, at)
        return None if self.kind.type == "timer" and value == -1 else value


def pack_one(kind: p.Scalar, value: Any) -> bytes:
    """The bytes of one number."""
    number = -1 if value is None and kind.type == "timer" else value
    # A bool is packed as the byte that it must be.
    code = "B" if kind.code == "?" else kind.code
    try:
        packed = struct.pack(f">{code}", number)
    except (struct.error, OverflowError, TypeError):
        packed = b""
    if not packed or (kind.code == "?" and packed > b"\1"):
        raise StateError(kind.range, shown(value))
    return packed


@dataclass(frozen=True, slots=True)
class One:
    """A declared state in an attribute."""

    kind: p.Struct
    states: States

    def save(self, value: Any, _owner: Any, saver: Saver) -> str:
        """Add the bytes of *value*."""
        check_class(value, self.states.plan)
        since = len(saver.parts)
        inner = self.states.save(value, saver)
        if self.kind.type == "struct":
            inner = f'"struct": {{{inner}}}'
        return texts.value(self.kind.type, saver.size(since), inner)

    def load(self, loader: Loader, _frame: Frame, current: Any) -> Any:
        """Take the bytes."""
        if isinstance(current, self.states.plan.cls):
            return Kept(self.states.load_into(loader, current))
        return self.states.load_new(loader)


@dataclass(frozen=True, slots=True)
class Bytes:
    """A buffer, or a part of one."""

    kind: p.Bytes

    def save(self, value: Any, owner: Any, saver: Saver) -> str:
        """Add the bytes of *value*."""
        kind = self.kind
        if not isinstance(value, bytes | bytearray | memoryview):
            raise StateError("bytes", shown(value))
        view = flat(value)
        if kind.count is not None:
            check_length(len(view), getattr(owner, kind.count), kind.count, kind.size)
        elif len(view) != kind.total:
            raise StateError(f"{kind.total} bytes", str(len(view)))
        else:
            view = view[kind.start : kind.start + kind.size]
        saver.parts.append(view)
        return texts.value(kind.type, len(view))

    def load(self, loader: Loader, frame: Frame, current: Any) -> Any:
        """Take the bytes."""
        kind = self.kind
        size = kind.size
        if kind.count is not None:
            size = bounded(frame.get(kind.count), kind.count, 1, kind.size)
        at = loader.take(size)
        data = loader.data[at : at + size]
        if not kind.mutable:
            return bytes(data)
        fixed = kind.count is None
        if isinstance(current, bytearray) and len(current) == (kind.total if fixed else size):
            loader.commits.append((self._replace, current, data))
            return Kept(data)
        if fixed and size != kind.total:
            raise StateError(f"a bytearray of {kind.total} to load into", shown(current))
        return bytearray(data)

    def _replace(self, buffer: bytearray, data: Any) -> None:
        # Of a view, as a bytearray takes a copy first of what it is assigned.
        with memoryview(buffer) as view:
            view[self.kind.start : self.kind.start + len(data)] = data


@dataclass(frozen=True, slots=True)
class Bits:
    """A bitmap, as an int."""

    bits: int
    size: int
    text: str

    def save(self, value: Any, _owner: Any, saver: Saver) -> str:
        """Add the bytes of *value*."""
        if not isinstance(value, int) or value < 0 or value.bit_length() > self.bits:
            raise StateError(f"an integer of at most {self.bits} bits", shown(value))
        words = array("Q", value.to_bytes(self.size, sys.byteorder))
        saver.parts.append(swapped(words if sys.byteorder == "little" else words[::-1]))
        return self.text

    def load(self, loader: Loader, _frame: Frame, _current: Any) -> Any:
        """Take the bytes."""
        at = loader.take(self.size)
        words = array("Q", bytes(loader.data[at : at + self.size]))
        value = int.from_bytes(words[::-1].tobytes(), "big")
        if value.bit_length() > self.bits:
            raise StateError(f"at most {self.bits} bits", f"bit {value.bit_length() - 1} set")
        return value


@dataclass(frozen=True, slots=True)
class Custom:
    """An encoding of the user's."""

    kind: p.Custom

    def save(self, value: Any, _owner: Any, saver: Saver) -> str:
        """Add the bytes of *value*."""
        data = run_hook(self.name("save"), self.kind.codec.save, value)
        if not isinstance(data, bytes | bytearray):
            raise StateError(f"bytes of {self.name('save')}", shown(data))
        saver.parts.append(data)
        return texts.value(self.kind.type, len(data))

    def load(self, loader: Loader, _frame: Frame, _current: Any) -> Any:
        """Take the bytes."""
        name = self.name("load")
        try:
            value, size = run_hook(name, self.kind.codec.load, loader.data[loader.at :])
        except (LookupError, struct.error) as error:
            # What reading behind the end comes to.
            raise StateError(f"a state that {name} accepts", str(error)) from error
        if size < 0:
            raise StateError(f"a value and its bytes from {name}", f"{size} bytes")
        loader.take(size)
        return value

    def name(self, method: str) -> str:
        """What errors call a method of the codec."""
        return f"{type(self.kind.codec).__qualname__}.{method}"


def flat(value: bytes | bytearray | memoryview) -> memoryview:
    """A view of the bytes, or of a copy where they do not lie one behind the other."""
    view = memoryview(value)
    return view.cast("B") if view.contiguous else memoryview(view.tobytes())


def check_length(found: int, count: Any, name: str, bound: int) -> None:
    """Refuse to save as many elements as the count does not say."""
    if found != count or found > bound:
        raise StateError(f"as many as {name} says, {count}, at most {bound}", str(found))


def bounded(count: int, name: str, multiple: int, bound: int) -> int:
    """The elements to load, by a count from the stream."""
    if not 0 <= count <= bound // multiple:
        times = f", times {multiple}" if multiple > 1 else ""
        raise StateError(f"at most {bound} elements", f"{name} of {count}{times}")
    return count * multiple


# Small things


def check_class(value: Any, plan: p.Plan) -> None:
    """Refuse to save an object of another class."""
    if not isinstance(value, plan.cls):
        raise StateError(f"an object of {plan.cls.__qualname__}", shown(value))


def swapped(numbers: array[Any]) -> bytes:
    """The big-endian bytes of *numbers*, which are not the same afterwards."""
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
