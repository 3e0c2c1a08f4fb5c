"""The bytes of arrays: numbers in one call, everything else one by one.

Arrays have neither length nor marks on the wire, except that a NULL pointer is one byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from vmferry.errors import StateError

from . import plan as p
from . import texts
from .staging import Frame, Kept, Loader, Saver, replace
from .values import Value, bounded, check_length, pack_one, shown

NULL: Final = b"0"
"""What stands for a NULL pointer."""


class Numbers:
    """A list or array of numbers, in one call."""

    def __init__(self, kind: p.Elements, element: p.Scalar, *, alike: bool) -> None:
        self._kind = kind
        self._element = element
        self._alike = alike
        self._text = texts.value(element.type, element.size)
        self._code = element.code
        # A bool is packed as the byte that it must be.
        self._packed = "B" if element.code == "?" else element.code
        self._timers = element.type == "timer"

    def save(self, value: Any, owner: Any, saver: Saver) -> list[str]:
        """Add the bytes of *value*, and return what describes its elements, together or each."""
        numbers = flattened(self._kind, value, owner)
        if self._timers:
            numbers = [-1 if number is None else number for number in numbers]
        try:
            packed = struct.pack(f">{len(numbers)}{self._packed}", *numbers)
        except (struct.error, OverflowError, TypeError):
            packed = b""
        if (numbers and not packed) or (self._code == "?" and packed and max(packed) > 1):
            for index, number in enumerate(numbers):
                with_path(self._kind, index, pack_one, self._element, number)
        saver.parts.append(packed)
        return texts.elements([self._text] * len(numbers), alike=self._alike)

    def load(self, loader: Loader, frame: Frame, current: Any) -> Any:
        """Take the bytes."""
        count = length(self._kind, frame)
        size = count * self._element.size
        at = loader.take(size)
        data = loader.data[at : at + size]
        if self._code == "?" and count and max(data) > 1:
            index = next(i for i, byte in enumerate(data) if byte > 1)
            raise StateError("a bool of 0 or 1", str(data[index])).inside(place(self._kind, index))
        values: list[Any] = list(struct.unpack(f">{count}{self._code}", data))
        if self._timers:
            values = [None if value == -1 else value for value in values]
        rows = shaped(self._kind.shape, values)
        if isinstance(current, list):
            loader.commits.append((replace, current, rows))
            return Kept(rows)
        return rows


class Items:
    """A list of anything else, one by one."""

    def __init__(self, kind: p.Elements, codec: Value, *, alike: bool) -> None:
        self._kind = kind
        self._codec = codec
        self._alike = alike

    def save(self, value: Any, owner: Any, saver: Saver) -> list[str]:
        """Add the bytes of *value*, and return what describes its elements, together or each."""
        found: list[str] = []
        for index, item in enumerate(flattened(self._kind, value, owner)):
            if item is None and self._kind.nullable:
                saver.parts.append(NULL)
                found.append(texts.NULL)
            else:
                found.append(with_path(self._kind, index, self._codec.save, item, owner, saver))
        return texts.elements(found, alike=self._alike)

    def load(self, loader: Loader, frame: Frame, current: Any) -> Any:
        """Take the bytes."""
        kind = self._kind
        count = length(kind, frame)
        old = current
        for _ in kind.shape[:-1]:
            rows = old if isinstance(old, list) else []
            old = [item for row in rows if isinstance(row, list) for item in row]
        old = old if isinstance(old, list) else []
        fits = len(old) == count
        if kind.nullable and not fits:
            raise StateError(f"a list of {count} that says which are None", f"{len(old)}")
        items: list[Any] = []
        seen: list[Any] = []
        for index in range(count):
            mine = old[index] if index < len(old) else None
            item = with_path(kind, index, self._item, loader, frame, mine)
            items.append(mine if isinstance(item, Kept) else item)
            seen.append(item.seen if isinstance(item, Kept) else item)
        if fits and all(item is mine for item, mine in zip(items, old, strict=True)):
            return Kept(shaped(kind.shape, seen))
        rows = shaped(kind.shape, items)
        if isinstance(current, list):
            loader.commits.append((replace, current, rows))
            return Kept(shaped(kind.shape, seen))
        return rows

    def _item(self, loader: Loader, frame: Frame, current: Any) -> Any:
        if not self._kind.nullable or current is not None:
            return self._codec.load(loader, frame, current)
        at = loader.take(1)
        if loader.data[at] != NULL[0]:
            raise StateError("the mark of a NULL pointer, 0x30", f"{loader.data[at]:#04x}")
        return None


def length(kind: p.Elements, frame: Frame) -> int:
    """Elements of the array that is being loaded, of all dimensions."""
    if kind.count is not None:
        return bounded(frame.get(kind.count), kind.count, kind.multiple, kind.bound)
    return p.product(kind.shape)


def flattened(kind: p.Elements, value: Any, owner: Any) -> Any:
    """The elements of all dimensions in a row, if they are as many as they should be."""
    if not isinstance(value, list):
        raise StateError("a list", shown(value))
    if kind.count is not None:
        count = getattr(owner, kind.count) * kind.multiple
        check_length(len(value), count, kind.count, kind.bound)
        return value
    return _flat(kind.shape, value)


def _flat(shape: tuple[int, ...], rows: Any) -> Any:
    if not isinstance(rows, list) or len(rows) != shape[0]:
        found = len(rows) if isinstance(rows, list) else shown(rows)
        raise StateError(f"{shape[0]} elements", str(found))
    if len(shape) == 1:
        return rows
    flat: list[Any] = []
    for index, row in enumerate(rows):
        try:
            flat += _flat(shape[1:], row)
        except StateError as error:
            raise error.inside(f"[{index}]") from None
    return flat


def shaped(shape: tuple[int, ...], flat: list[Any]) -> list[Any]:
    """The elements as lists of lists."""
    for n in reversed(shape[1:]):
        flat = [flat[i : i + n] for i in range(0, len(flat), n)]
    return flat


def place(kind: p.Elements, index: int) -> str:
    """An index into the elements in a row, as one for each dimension."""
    indexes: list[int] = []
    for n in reversed(kind.shape[1:]):
        index, rest = divmod(index, n)
        indexes.append(rest)
    return "".join(f"[{i}]" for i in (index, *reversed(indexes)))


def with_path(kind: p.Elements, index: int, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and say of an error which element it is about."""
    try:
        return call(*arguments)
    except StateError as error:
        raise error.inside(place(kind, index)) from error.__cause__
