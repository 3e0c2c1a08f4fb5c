"""What happens to pages, in batches: scanning and packing their records, storing, summing them.

The work is done by compiled kernels without the interpreter lock, or by their plain-Python twins
where no compiler was at hand.  ``VMFERRY_KERNELS=compiled`` or ``=plain`` demands one of the two.
``KERNELS`` says which is in use.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import _plain
from .rows import (
    COMPRESS,
    CONTINUE,
    KINDS,
    MAX_PAGE_SIZE,
    PAGE,
    ROW,
    XBZRLE,
    ZERO,
    Rows,
    compress_bound,
    rows_of,
)

_wanted = os.environ.get("VMFERRY_KERNELS", "")

if TYPE_CHECKING:
    _chosen = _plain
else:
    try:
        from . import _kernels as _compiled
    except ImportError:
        _compiled = None
    _known = {"plain": _plain} | ({"compiled": _compiled} if _compiled else {})
    if _wanted and _wanted not in _known:
        raise _plain.unavailable(_wanted, sorted(_known))
    _chosen = _known[_wanted] if _wanted else (_compiled or _plain)

KERNELS = "plain" if _chosen is _plain else "compiled"

page_sums = _chosen.page_sums
scan_records = _chosen.scan_records
pack_records = _chosen.pack_records
store_records = _chosen.store_records
xbzrle_decode = _chosen.xbzrle_decode

__all__ = [
    "COMPRESS",
    "CONTINUE",
    "KERNELS",
    "KINDS",
    "MAX_PAGE_SIZE",
    "PAGE",
    "ROW",
    "XBZRLE",
    "ZERO",
    "Rows",
    "compress_bound",
    "pack_records",
    "page_sums",
    "rows_of",
    "scan_records",
    "store_records",
    "xbzrle_decode",
]
