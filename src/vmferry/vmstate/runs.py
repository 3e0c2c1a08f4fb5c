"""Numbers in a row: as many as follow one another are one call of ``struct``."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from vmferry.errors import StateError

from . import plan as p
from . import texts
from .access import assigner, getter
from .staging import Frame, Loader, Saver
from .values import pack_one


class Run:
    """Numbers, truth values, timers and gaps in a row, and what they are called."""

    def __init__(self, fields: list[p.Field], names: list[str]) -> None:
        numbers = [f for f in fields if isinstance(f.kind, p.Scalar)]
        self._fields = tuple((f.attribute, f.kind) for f in numbers if isinstance(f.kind, p.Scalar))
        self._names = tuple(name for name, _ in self._fields)
        codes = [f.kind.code if isinstance(f.kind, p.Scalar) else f"{_size(f)}x" for f in fields]
        self._unpacking = struct.Struct(">" + "".join(codes))
        # A bool is packed as the byte that it must be.
        self._packing = struct.Struct(self._unpacking.format.replace("?", "B"))
        self._get = getter(self._names)
        self._assign = assigner(self._names)
        self._timers = tuple(i for i, (_, k) in enumerate(self._fields) if k.type == "timer")
        self._ends = [0]
        for field in fields:
            self._ends.append(self._ends[-1] + _size(field))
        starts = [s for f, s in zip(fields, self._ends, strict=False) if f in numbers]
        self._bools = tuple(
            start for (_, k), start in zip(self._fields, starts, strict=True) if k.code == "?"
        )
        self._truths = _getter_of_items(self._bools)
        self._checks = tuple(
            (i, f.attribute, f.exact) for i, f in enumerate(numbers) if f.exact is not None
        )
        self._places = tuple(f.attribute for f in fields)
        self.text = texts.together(
            texts.entry(name, texts.number(f, f.kind))
            for f, name in zip(fields, names, strict=True)
            if isinstance(f.kind, p.Scalar | p.Gap)
        )

    def save(self, obj: Any, saver: Saver) -> str:
        """Add the bytes, and return what describes them."""
        try:
            values = self._get(obj)
            if self._timers:
                values = list(values)
                for i in self._timers:
                    if values[i] is None:
                        values[i] = -1
            packed = self._packing.pack(*values)
        except (struct.error, OverflowError, TypeError, AttributeError):
            self._diagnose(obj)
            raise
        if self._bools and max(self._truths(packed)) > 1:
            self._diagnose(obj)
        saver.parts.append(packed)
        return self.text

    def _diagnose(self, obj: Any) -> None:
        """Raise for the first field that cannot be saved."""
        for name, kind in self._fields:
            try:
                value = getattr(obj, name)
            except AttributeError:
                raise StateError(kind.range, "no such attribute", field=name) from None
            try:
                pack_one(kind, value)
            except StateError as error:
                raise error.inside(name) from None

    def load(self, loader: Loader, frame: Frame) -> None:
        """Take the bytes, and stage what they assign."""
        values = self.stage(loader, frame.obj)
        if frame.recording:
            frame.seen.update(zip(self._names, values, strict=True))

    def stage(self, loader: Loader, obj: Any) -> Sequence[Any]:
        """Take the bytes, stage what they assign to *obj*, and return it."""
        data, at = loader.data, loader.at
        end = at + self._unpacking.size
        if end > len(data):
            self._refuse_end(loader)
        values: Sequence[Any] = self._unpacking.unpack_from(data, at)
        if self._bools and max(self._truths(data[at:end])) > 1:
            self._refuse_bool(data, at)
        if self._timers:
            values = list(values)
            for i in self._timers:
                if values[i] == -1:
                    values[i] = None
        for i, name, exact in self._checks:
            _check(values[i], getattr(obj, name, values[i]), name, exact=exact)
        loader.at = end
        loader.commits.append((self._assign, obj, values))
        return values

    def _refuse_end(self, loader: Loader) -> None:
        """Raise for the first field that is not there."""
        left = len(loader.data) - loader.at
        index = next(i for i, end in enumerate(self._ends[1:]) if end > left)
        loader.at += self._ends[index]
        try:
            loader.take(self._ends[index + 1] - self._ends[index])
        except StateError as error:
            raise error.inside(self._places[index]) from None

    def _refuse_bool(self, data: memoryview, at: int) -> None:
        for start in self._bools:
            if data[at + start] > 1:
                name = self._places[self._ends.index(start)]
                raise StateError("a bool of 0 or 1", str(data[at + start]), field=name)


def _size(field: p.Field) -> int:
    return field.kind.size if isinstance(field.kind, p.Scalar | p.Gap) else 0


def _getter_of_items(places: tuple[int, ...]) -> Callable[[Any], Any]:
    if not places:
        return lambda _: ()
    get = itemgetter(*places)
    return (lambda data: (get(data),)) if len(places) == 1 else get


def _check(value: Any, own: Any, name: str, *, exact: bool | None) -> None:
    if exact and value != own:
        raise StateError(f"{own}, as this device has", str(value), field=name)
    if not exact and not 0 <= value <= own:
        raise StateError(f"0 to {own}, which this device has", str(value), field=name)
