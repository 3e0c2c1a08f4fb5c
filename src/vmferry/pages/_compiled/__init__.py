"""The kernels, compiled; each has a twin in ``_plain``, which is its specification.

Every one checks its arguments, then works without the interpreter lock.
"""

from .bitmaps import count_pages, set_range, take_pages
from .delta import pack_pages_xbzrle
from .live import apply_records, gather_pages, pack_pages, zero_pages
from .records import pack_records, scan_records
from .store import store_records
from .sums import page_sums
from .xbzrle import xbzrle_decode, xbzrle_encode

__all__ = [
    "apply_records",
    "count_pages",
    "gather_pages",
    "pack_pages",
    "pack_pages_xbzrle",
    "pack_records",
    "page_sums",
    "scan_records",
    "set_range",
    "store_records",
    "take_pages",
    "xbzrle_decode",
    "xbzrle_encode",
    "zero_pages",
]
