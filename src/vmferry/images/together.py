"""The images of a machine change sides together."""

from __future__ import annotations

from collections.abc import Iterable

from vmferry.errors import StorageError

from .image import Image


def inactivate_all(images: Iterable[Image]) -> None:
    """Inactivate *images*, all or none.

    If one fails, those that were active are activated again and its error is raised.  Notes on it
    name the images that could not be had back: somebody else took them meanwhile.
    """
    before = [image for image in images if image.active]
    try:
        for image in before:
            image.inactivate()
    except BaseException as error:
        for image in before:
            try:
                image.activate()
            except StorageError as other:
                error.add_note(f"not active again: {other}")
        raise


def activate_all(images: Iterable[Image]) -> None:
    """Activate *images*, all or none; if one fails, those that were inactive are so again."""
    before = [image for image in images if not image.active]
    try:
        for image in before:
            image.activate()
    except BaseException as error:
        for image in before:
            try:
                image.inactivate()
            except StorageError as other:
                error.add_note(f"let go of without being flushed: {other}")
        raise
