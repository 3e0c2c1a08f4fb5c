"""The bytes of lists and maps that carry marks between their elements: queues and trees."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from vmferry.errors import StateError

from . import plan as p
from . import texts
from .staging import Frame, Kept, Loader, Saver, replace
from .values import States, check_class, pack_one, shown

_MORE: Final = b"\1"
_END: Final = b"\0"
_COUNT: Final = struct.Struct(">I")
_KEY: Final = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Queue:
    """A list with a mark before each element, and one for the end."""

    states: States
    bound: int

    def save(self, value: Any, _owner: Any, saver: Saver) -> str:
        """Add the bytes of *value*; of what describes its elements, that of the last one stays."""
        since, inner = len(saver.parts), ""
        if not isinstance(value, list) or len(value) > self.bound:
            raise StateError(f"a list of at most {self.bound}", shown(value))
        for index, item in enumerate(value):
            saver.parts.append(_MORE)
            try:
                check_class(item, self.states.plan)
                inner = self.states.save(item, saver)
            except StateError as error:
                raise error.inside(f"[{index}]") from error.__cause__
        saver.parts.append(_END)
        return texts.value("qtailq", saver.size(since), inner)

    def load(self, loader: Loader, _frame: Frame, current: Any) -> Any:
        """Take the bytes."""
        items: list[Any] = []
        while _more(loader):
            index = len(items)
            if index == self.bound:
                raise StateError(f"at most {self.bound} elements", "one more")
            try:
                items.append(self.states.load_new(loader))
            except StateError as error:
                raise error.inside(f"[{index}]") from error.__cause__
        if isinstance(current, list):
            loader.commits.append((replace, current, items))
            return Kept(items)
        return items


@dataclass(frozen=True, slots=True)
class Tree:
    """A dictionary: its length, then a mark, key and value for each."""

    keys: States | None
    values: States
    bound: int

    def save(self, value: Any, _owner: Any, saver: Saver) -> str:
        """Add the bytes of *value*; of what describes its nodes, that of the last one stays."""
        since, inner = len(saver.parts), ""
        if not isinstance(value, dict) or len(value) > self.bound:
            raise StateError(f"a dict of at most {self.bound}", shown(value))
        saver.parts.append(_COUNT.pack(len(value)))
        for key in value if self.keys is not None else sorted(value):
            saver.parts.append(_MORE)
            try:
                self._save_key(key, saver)
                check_class(value[key], self.values.plan)
                inner = self.values.save(value[key], saver)
            except StateError as error:
                raise error.inside(f"[{shown(key)}]") from error.__cause__
        saver.parts.append(_END)
        return texts.value("gtree", saver.size(since), inner)

    def _save_key(self, key: Any, saver: Saver) -> None:
        if self.keys is None:
            saver.parts.append(pack_one(p.Scalar("uint64", "Q"), key))
        else:
            check_class(key, self.keys.plan)
            self.keys.save(key, saver)

    def load(self, loader: Loader, _frame: Frame, _current: Any) -> Any:
        """Take the bytes."""
        at = loader.take(_COUNT.size)
        (count,) = _COUNT.unpack_from(loader.data, at)
        if count > self.bound:
            raise StateError(f"at most {self.bound} nodes", str(count))
        tree: dict[Any, Any] = {}
        for index in range(count):
            try:
                self._load_node(loader, tree, count)
            except StateError as error:
                raise error.inside(f"[{index}]") from error.__cause__
        if _more(loader):
            raise StateError(f"{count} nodes", "one more")
        return tree

    def _load_node(self, loader: Loader, tree: dict[Any, Any], count: int) -> None:
        if not _more(loader):
            raise StateError(f"{count} nodes", str(len(tree)))
        key = self._load_key(loader)
        if key in tree:
            raise StateError("each key once", shown(key))
        tree[key] = self.values.load_new(loader)

    def _load_key(self, loader: Loader) -> Any:
        if self.keys is not None:
            return self.keys.load_new(loader)
        return _KEY.unpack_from(loader.data, loader.take(_KEY.size))[0]


def _more(loader: Loader) -> bool:
    mark = loader.data[loader.take(1)]
    if mark > 1:
        raise StateError("the mark of an element (1) or of the end (0)", str(mark))
    return mark == 1
