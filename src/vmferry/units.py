"""Sizes, rates and durations as people write them: ``1GiB``, ``100MB/s``, ``300ms``."""

from __future__ import annotations

import re

from .errors import UsageError

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|0x[0-9a-f]+)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|min|h)\s*")


def parse_size(text: str) -> int:
    """Bytes in *text*: a number with an optional unit.

    ``KiB MiB GiB TiB`` and the bare letters ``K M G T`` (as QEMU reads them) count in 1024s,
    ``kB MB GB TB`` in 1000s.  A hexadecimal number takes no unit.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"expected a size such as 512MiB or 1GB, found {text!r}")
    number, prefix, binary, unit = match.groups()
    if number.lower().startswith("0x"):
        if prefix or binary or unit:
            raise UsageError(f"a hexadecimal size takes no unit, found {text!r}")
        return int(number, 16)
    letter = prefix.lower()
    if binary and not letter:
        raise UsageError(f"expected a size such as 512MiB or 1GB, found {text!r}")
    factor = _BINARY[letter] if letter and (binary or not unit) else _DECIMAL[letter]
    return int(float(number) * factor) if "." in number else int(number) * factor


def parse_rate(text: str) -> int:
    """Bytes per second in *text*: a size, with ``/s`` or without."""
    return parse_size(text.strip().removesuffix("/s"))


def parse_duration(text: str) -> float:
    """Seconds in *text*: a number and ``us``, ``ms``, ``s``, ``min`` or ``h``."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"expected a duration such as 300ms or 1.5s, found {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(count: float) -> str:
    """*count* bytes with three digits and a binary unit: ``1.50 GiB``, ``17 B``."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1024:.3g} TiB"


def format_rate(per_second: float) -> str:
    """A rate in bytes per second, as :func:`format_size` writes sizes."""
    return f"{format_size(per_second)}/s"


def format_duration(seconds: float) -> str:
    """``85 ms``, ``2.41 s``, ``3 min 20 s``."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
