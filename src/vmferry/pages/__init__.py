"""What happens to pages, in batches.

Scanning and packing their records, storing and summing them; between the memory of a guest and
wire buffers; and sets of them as bitmaps.  The work is done by compiled kernels without the
interpreter lock, or by their plain-Python twins where no compiler was at hand.
``VMFERRY_KERNELS=compiled`` or ``=plain`` demands one of the two.  ``KERNELS`` says which is in
use.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmferry.errors import VmferryError

from . import _plain
from .cache import XbzrleCache, XbzrlePacked
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
        from . import _compiled
    except ModuleNotFoundError:
        _compiled = None
    _known = {"plain": _plain} | ({"compiled": _compiled} if _compiled else {})
    if _wanted and _wanted not in _known:
        raise VmferryError(
            f"VMFERRY_KERNELS asks for {_wanted!r}; here are: {', '.join(sorted(_known))}."
            " The compiled kernels are built by pip when a C compiler is present"
        )
    _chosen = _known[_wanted] if _wanted else (_compiled or _plain)

KERNELS = "plain" if _chosen is _plain else "compiled"

apply_records = _chosen.apply_records
count_pages = _chosen.count_pages
gather_pages = _chosen.gather_pages
pack_pages = _chosen.pack_pages
pack_pages_xbzrle = _chosen.pack_pages_xbzrle
pack_records = _chosen.pack_records
page_sums = _chosen.page_sums
scan_records = _chosen.scan_records
set_range = _chosen.set_range
store_records = _chosen.store_records
take_pages = _chosen.take_pages
xbzrle_decode = _chosen.xbzrle_decode
xbzrle_encode = _chosen.xbzrle_encode
zero_pages = _chosen.zero_pages

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
    "XbzrleCache",
    "XbzrlePacked",
    "apply_records",
    "compress_bound",
    "count_pages",
    "gather_pages",
    "pack_pages",
    "pack_pages_xbzrle",
    "pack_records",
    "page_sums",
    "rows_of",
    "scan_records",
    "set_range",
    "store_records",
    "take_pages",
    "xbzrle_decode",
    "xbzrle_encode",
    "zero_pages",
]
