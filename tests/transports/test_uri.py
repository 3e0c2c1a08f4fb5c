"""Migration URIs: every good form, every bad one, and nothing but a UsageError for the rest."""

from __future__ import annotations

import contextlib
import socket

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmferry.errors import UsageError
from vmferry.transports import parse
from vmferry.transports.uri import (
    Address,
    CommandAddress,
    DescriptorAddress,
    FileAddress,
    StandardStreams,
    TcpAddress,
    UnixAddress,
)

GOOD: list[tuple[str, Address]] = [
    ("-", StandardStreams()),
    ("tcp:127.0.0.1:4444", TcpAddress("127.0.0.1", 4444)),
    ("tcp:0:4444", TcpAddress("0", 4444)),
    ("tcp:host-1.example.org:1", TcpAddress("host-1.example.org", 1)),
    ("tcp::4444", TcpAddress("", 4444)),
    ("tcp:localhost:0", TcpAddress("localhost", 0)),
    ("tcp:[::1]:65535", TcpAddress("::1", 65535)),
    ("tcp:[fe80::1%eth0]:1", TcpAddress("fe80::1%eth0", 1)),
    ("tcp:h:1,ipv4", TcpAddress("h", 1, ipv4=True)),
    ("tcp:h:1,ipv4=on,ipv6=off", TcpAddress("h", 1, ipv4=True, ipv6=False)),
    ("tcp::1,ipv6=on", TcpAddress("", 1, ipv6=True)),
    ("unix:/run/a socket,with=commas", UnixAddress("/run/a socket,with=commas")),
    ("unix:relative", UnixAddress("relative")),
    ("unix:" + "x" * 107, UnixAddress("x" * 107)),
    ("fd:0", DescriptorAddress(0)),
    ("fd:12", DescriptorAddress(12)),
    ("exec:gzip -c >x; echo 'a:b,c'", CommandAddress("gzip -c >x; echo 'a:b,c'")),
    ("file:/tmp/x", FileAddress("/tmp/x")),
    ("file:a,b", FileAddress("a,b")),
    ("file:x,offset=0", FileAddress("x", 0)),
    ("file:x,offset=4096", FileAddress("x", 4096)),
    ("file:x,offset=0x1000", FileAddress("x", 4096)),
    ("file:x,offset=4K", FileAddress("x", 4096)),
    ("file:x,offset=1.5m", FileAddress("x", 3 << 19)),
    ("file:x,offset=1G", FileAddress("x", 1 << 30)),
]

BAD = [
    ("", "expected tcp:HOST:PORT"),
    ("tcp", "expected tcp:HOST:PORT"),
    ("/tmp/file", "expected tcp:HOST:PORT"),
    ("localhost:4444", "expected tcp:HOST:PORT"),
    ("TCP:localhost:4444", "expected tcp:HOST:PORT"),
    ("vsock:2:1234", "expected tcp:HOST:PORT"),
    ("rdma:host:1", "expected tcp:HOST:PORT"),
    ("--", "expected tcp:HOST:PORT"),
    ("tcp:", "nothing follows tcp:"),
    ("tcp:host", "expected tcp:HOST:PORT with a number as port"),
    ("tcp:host:", "expected tcp:HOST:PORT with a number as port"),
    ("tcp:host:http", "expected tcp:HOST:PORT with a number as port"),
    ("tcp:host:-1", "expected tcp:HOST:PORT with a number as port"),
    ("tcp:host:65536", "at most 65535, found 65536"),
    ("tcp:host:999999", "expected tcp:HOST:PORT with a number as port"),
    ("tcp:::1:4444", "an IPv6 address as"),
    ("tcp:[::1]", "expected tcp:HOST:PORT"),
    ("tcp:[::1:4444", "expected tcp:HOST:PORT"),
    ("tcp:[host]:4444", '"host" is not an IPv6 address'),
    ("tcp:[]:4444", '"" is not an IPv6 address'),
    ("tcp:ho st:4444", '"ho st" is not a host name'),
    ("tcp:hôte:4444", "is not a host name"),
    ("tcp:host:1,to=9", 'option "to=9" is not one of ipv4'),
    ("tcp:host:1,ipv4=yes", 'option "ipv4=yes" is not one of'),
    ("tcp:host:1,", 'option "" is not one of'),
    ("tcp:host:1,ipv4=off,ipv6=off", "cannot both be off"),
    ("tcp:host:1,ipv4=on,ipv4=off", "option ipv4 is given twice"),
    ("unix:", "nothing follows unix:"),
    ("unix:" + "x" * 108, "at most 107 bytes, this one has 108"),
    ("unix:a\0b", "a zero byte"),
    ("unix:\ud800", "characters that no path"),
    ("fd:", "nothing follows fd:"),
    ("fd:migration", 'expected the number of a descriptor, found "migration"'),
    ("fd:-1", 'expected the number of a descriptor, found "-1"'),
    ("fd:²", "expected the number of a descriptor"),
    ("fd:" + "9" * 5000, "expected the number of a descriptor"),
    ("exec:", "nothing follows exec:"),
    ("exec:a\0b", "a zero byte"),
    ("file:", "nothing follows file:"),
    ("file:,offset=1", "it names no file"),
    ("file:x,offset=", "expected a number of bytes"),
    ("file:x,offset=-1", "expected a number of bytes"),
    ("file:x,offset=1 K", "expected a number of bytes"),
    ("file:x,offset=1KiB", "expected a number of bytes"),
    ("file:x,offset=0x10K", "expected a number of bytes"),
    ("file:x,offset=1,offset=2", "expected a number of bytes"),
    ("file:x,offset=0x8000000000000000", "below 2 to the 63rd"),
    ("file:x,offset=" + "9" * 5000, "expected a number of bytes"),
]


@pytest.mark.parametrize(("uri", "address"), GOOD)
def test_good_uri_names_what_it_says(uri: str, address: Address) -> None:
    assert parse(uri) == address


@pytest.mark.parametrize(("uri", "why"), BAD)
def test_bad_uri_is_refused_with_its_reason_and_the_forms(uri: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(uri)
    assert why in str(caught.value)
    assert "unix:PATH, fd:NUMBER, exec:COMMAND, file:PATH[,offset=BYTES] or -" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("options", "family"),
    [
        ("", socket.AF_UNSPEC),
        (",ipv4", socket.AF_INET),
        (",ipv6", socket.AF_INET6),
        (",ipv4=off", socket.AF_INET6),
        (",ipv6=off", socket.AF_INET),
        (",ipv4,ipv6", socket.AF_UNSPEC),
        (",ipv4=on,ipv6=off", socket.AF_INET),
        (",ipv4=off,ipv6=on", socket.AF_INET6),
    ],
)
def test_options_choose_the_address_family(options: str, family: socket.AddressFamily) -> None:
    address = parse(f"tcp:host:1{options}")
    assert isinstance(address, TcpAddress)
    assert address.family == family


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:1", "tcp:[::1]:2", "tcp::3"])
def test_tcp_address_is_written_as_it_is_read(uri: str) -> None:
    assert str(parse(uri)) == uri


PIECES = st.sampled_from(
    [f"{scheme}:" for scheme in ("tcp", "unix", "fd", "exec", "file")]
    + [":", "::1", "[", "]", ",", ",offset=", "0x", "9" * 30, "K", "=on", ",ipv4", "\0", "-", "e"]
)


@settings(deadline=None)
@given(
    st.one_of(
        st.text(st.characters()),
        st.lists(st.one_of(PIECES, st.text(st.characters(), max_size=3))).map("".join),
    )
)
@example("file:x,offset=1.e")
@example("tcp:[1::%\ud800]:1")
def test_parser_raises_nothing_but_usage_errors(uri: str) -> None:
    with contextlib.suppress(UsageError):
        parse(uri)
