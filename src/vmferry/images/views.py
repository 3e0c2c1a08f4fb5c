"""Lists of buffers, cut where a request has to be."""

from __future__ import annotations

from collections.abc import Iterable

from .image import Source
from .storage import Views


def as_views(buffers: Iterable[Source]) -> list[memoryview]:
    """*buffers* as bytes, without the empty ones."""
    views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    return [view for view in views if view.nbytes]


def total(views: Views) -> int:
    """How many bytes there are."""
    return sum(view.nbytes for view in views)


def cut(views: Views, count: int) -> tuple[Views, Views]:
    """The first *count* bytes, and the rest."""
    for index, view in enumerate(views):
        if count <= view.nbytes:
            first = [*views[:index], view[:count]]
            rest = views[index + 1 :]
            return first, rest if count == view.nbytes else [view[count:], *rest]
        count -= view.nbytes
    return views, []


def copy(source: Views, target: Views) -> None:
    """Copy all of *source* to *target*, which is as long."""
    while source:
        count = min(source[0].nbytes, target[0].nbytes)
        target[0][:count] = source[0][:count]
        (_, source), (_, target) = cut(source, count), cut(target, count)
