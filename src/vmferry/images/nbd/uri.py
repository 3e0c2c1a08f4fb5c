"""NBD URIs, by doc/uri.md of the NBD project.

::

    nbd://HOST[:PORT]/EXPORT            nbd://[::1]:10809/disk   port 10809 if not given
    nbd+unix:///EXPORT?socket=PATH      the name of the export may be empty
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from vmferry.errors import UsageError, printable

SCHEMES: Final = ("nbd:", "nbd+unix:")
_PORT: Final = 10809


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """An export of a server; *socket* is a path, or a host and a port."""

    socket: str | tuple[str, int]
    export: str


def parse(uri: str) -> NbdAddress:
    """What *uri* names.  Raises UsageError."""
    try:
        parts = urlsplit(uri)
        port = parts.port
        host = parts.hostname
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise _wrong(uri) from error
    export = unquote(parts.path.removeprefix("/"))
    if parts.fragment or parts.username or len(export.encode()) > 4096:
        raise _wrong(uri)
    if parts.scheme == "nbd" and host and not options:
        return NbdAddress((host, port or _PORT), export)
    if parts.scheme == "nbd+unix" and not parts.netloc and options.keys() == {"socket"}:
        return NbdAddress(options["socket"][-1], export)
    raise _wrong(uri)


def _wrong(uri: str) -> UsageError:
    return UsageError(
        "expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, "
        f"found {printable(uri)}"
    )
