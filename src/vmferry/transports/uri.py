"""Migration URIs, read as QEMU reads them, without touching what they name.

::

    tcp:HOST:PORT[,ipv4[=on|off]][,ipv6[=on|off]]   tcp:[::1]:4444   tcp::4444 (listening: any)
    unix:PATH          the rest of the text is the path, commas included
    fd:NUMBER          a descriptor of this process
    exec:COMMAND       for /bin/sh -c
    file:PATH[,offset=BYTES]
    -                  standard input or output (vmferry's own addition)

The forms are those of QEMU's ``inet_parse`` and ``file_parse_offset``.  Where QEMU ignores what
it does not know, such as an unknown option of ``tcp:``, this refuses it.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from vmferry.errors import UsageError, printable
from vmferry.units import parse_size

FORMS: Final = (
    "tcp:HOST:PORT, unix:PATH, fd:NUMBER, exec:COMMAND, file:PATH[,offset=BYTES] "
    "or - for the standard streams"
)

_TCP: Final = re.compile(r"(?:\[([^\]]*)\]|([^:\[\],]*)):([0-9]{1,5})((?:,[^,]*)*)")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{0,255}")
_FLAG: Final = {"": True, "=on": True, "=off": False}
_OFFSET: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}(\.[0-9]{1,20})?[bBkKmMgGtT]?")
_SOCKET_PATH_MAX: Final = 107
"""``sun_path`` holds 108 bytes, one of them for the zero at the end."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, empty for any of this machine's addresses, and a port, 0 for a free one."""

    host: str
    port: int
    ipv4: bool | None = None
    ipv6: bool | None = None

    @property
    def family(self) -> socket.AddressFamily:
        """Which kinds of address may be used; both unless an option leaves only one."""
        if self.ipv4 == self.ipv6:
            return socket.AF_UNSPEC
        return socket.AF_INET6 if self.ipv6 or self.ipv4 is False else socket.AF_INET

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The path of a socket."""

    path: str


@dataclass(frozen=True, slots=True)
class DescriptorAddress:
    """The number of an open descriptor of this process."""

    number: int


@dataclass(frozen=True, slots=True)
class CommandAddress:
    """A command for the shell."""

    command: str


@dataclass(frozen=True, slots=True)
class FileAddress:
    """The path of a file, and where in it the stream starts, in bytes."""

    path: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class StandardStreams:
    """Standard input for what listens, standard output for what connects."""


Address: TypeAlias = (
    TcpAddress | UnixAddress | DescriptorAddress | CommandAddress | FileAddress | StandardStreams
)


def _shown(text: str) -> str:
    """What may be anything at all, briefly."""
    return printable(text, 80)


def parse(uri: str) -> Address:
    """What *uri* names.  Raises :class:`UsageError`, and nothing else, if it is not a URI."""
    if uri == "-":
        return StandardStreams()
    scheme, colon, rest = uri.partition(":")
    reader = _READERS.get(scheme) if colon else None
    if reader is None:
        raise UsageError(f"expected {FORMS}; found {_shown(uri)}")
    if not rest:
        raise _wrong(uri, f"nothing follows {scheme}:")
    if "\0" in rest:
        raise _wrong(uri, "it contains a zero byte")
    try:
        os.fsencode(rest)
    except UnicodeEncodeError:
        raise _wrong(uri, "it contains characters that no path or command can have") from None
    return reader(uri, rest)


def _wrong(uri: str, why: str) -> UsageError:
    return UsageError(f"{_shown(uri)} cannot be used: {why}; the forms are {FORMS}")


def _tcp(uri: str, rest: str) -> TcpAddress:
    match = _TCP.fullmatch(rest)
    if match is None:
        raise _wrong(uri, "expected tcp:HOST:PORT with a number as port, an IPv6 address as [::1]")
    literal, name, digits, options = match.groups()
    if literal is not None and not _is_ipv6(literal):
        raise _wrong(uri, f"{_shown(literal)} is not an IPv6 address")
    if literal is None and not _HOST.fullmatch(name):
        raise _wrong(uri, f"{_shown(name)} is not a host name")
    port = int(digits)
    if port > 65535:
        raise _wrong(uri, f"expected a port of at most 65535, found {port}")
    flags = _flags(uri, options)
    if flags.get("ipv4") is False and flags.get("ipv6") is False:
        raise _wrong(uri, "ipv4 and ipv6 cannot both be off")
    host = name if literal is None else literal
    return TcpAddress(host, port, flags.get("ipv4"), flags.get("ipv6"))


def _is_ipv6(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    except (OSError, UnicodeEncodeError):
        return False
    return text.isascii() and text.isprintable()


def _flags(uri: str, options: str) -> dict[str, bool]:
    flags: dict[str, bool] = {}
    for option in options.split(",")[1:]:
        name, value = option[:4], option[4:]
        if name not in ("ipv4", "ipv6") or value not in _FLAG:
            known = "ipv4, ipv6, ipv4=on, ipv4=off, ipv6=on and ipv6=off"
            raise _wrong(uri, f"option {_shown(option)} is not one of {known}")
        if name in flags:
            raise _wrong(uri, f"option {name} is given twice")
        flags[name] = _FLAG[value]
    return flags


def _unix(uri: str, path: str) -> UnixAddress:
    length = len(os.fsencode(path))
    if length > _SOCKET_PATH_MAX:
        limit = f"the path of a socket has at most {_SOCKET_PATH_MAX} bytes"
        raise _wrong(uri, f"{limit}, this one has {length}")
    return UnixAddress(path)


def _descriptor(uri: str, number: str) -> DescriptorAddress:
    if not re.fullmatch(r"[0-9]{1,9}", number):
        raise _wrong(uri, f"expected the number of a descriptor, found {_shown(number)}")
    return DescriptorAddress(int(number))


def _command(_uri: str, command: str) -> CommandAddress:
    return CommandAddress(command)


def _file(uri: str, rest: str) -> FileAddress:
    path, option, number = rest.partition(",offset=")
    if not path:
        raise _wrong(uri, "it names no file")
    if not option:
        return FileAddress(path)
    if not _OFFSET.fullmatch(number):
        example = "such as 4096, 0x1000 or 4K"
        raise _wrong(uri, f"expected a number of bytes {example}, found {_shown(number)}")
    offset = parse_size(number)
    if offset >= 1 << 63:
        raise _wrong(uri, "expected an offset below 2 to the 63rd")
    return FileAddress(path, offset)


_READERS: Final[dict[str, Callable[[str, str], Address]]] = {
    "tcp": _tcp,
    "unix": _unix,
    "fd": _descriptor,
    "exec": _command,
    "file": _file,
}
