"""Migration parameters as people write them, for a machine that wants numbers.

Which parameters there are, and of which kind, the machine says itself; only that some are sizes and
some are milliseconds has to be known here (QEMU's ``qapi/migration.json``, MigrationParameters).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vmferry.errors import UsageError
from vmferry.migration.names import unknown
from vmferry.units import parse_duration, parse_rate, parse_size

_SIZES: Final = frozenset({"xbzrle-cache-size"})
_RATES: Final = frozenset({"max-bandwidth", "max-postcopy-bandwidth", "avail-switchover-bandwidth"})
_MILLISECONDS: Final = frozenset(
    {
        *("downtime-limit", "x-vmferry-downtime-step", "x-vmferry-downtime-ceiling"),
        *("x-checkpoint-delay", "announce-initial", "announce-max", "announce-step"),
    }
)
_FLAGS: Final = {"on": True, "true": True, "off": False, "false": False}


def read_parameters(wanted: Mapping[str, object], current: Mapping[str, Any]) -> dict[str, object]:
    """*wanted* with texts read as the kind of value that *current* has under the name.

    *current* is the answer to ``query-migrate-parameters``.  Sizes and rates take units as in
    ``1GiB`` and ``100MB/s``, times as in ``300ms``; bare numbers count as the machine counts them:
    bytes and milliseconds, and seconds where it has fractions.  What is not a text stays as it is.
    Raises :class:`UsageError`.
    """
    return {name: _read(name, value, current) for name, value in wanted.items()}


def _read(name: str, value: object, current: Mapping[str, Any]) -> object:
    if name not in current:
        raise unknown("parameter", name, current)
    if not isinstance(value, str):
        return value
    try:
        return _from_text(name, value, current[name])
    except UsageError as error:
        raise UsageError(f"parameter {name}: {error}") from None


def _from_text(name: str, text: str, like: object) -> object:
    match like:
        case bool():
            if text.lower() not in _FLAGS:
                raise UsageError(f"expected on or off, found {text!r}")
            return _FLAGS[text.lower()]
        case int():
            return _integer(name, text)
        case float():
            return _seconds(text)
        case _:
            return text


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return parse_duration(text)


def _integer(name: str, text: str) -> int:
    if name in _SIZES:
        return parse_size(text)
    if name in _RATES:
        return parse_rate(text)
    if text.isascii() and text.isdecimal():
        return int(text)
    if name in _MILLISECONDS:
        return round(parse_duration(text) * 1000)
    raise UsageError(f"expected a whole number, found {text!r}")
