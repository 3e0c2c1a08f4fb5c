"""A saved machine in forms that other programs read: a memory image, a core file, a stream."""

from __future__ import annotations

from .convert import FORMS, Exported, convert
from .layout import Layout, Segment, layout_of

__all__ = ["FORMS", "Exported", "Layout", "Segment", "convert", "layout_of"]
