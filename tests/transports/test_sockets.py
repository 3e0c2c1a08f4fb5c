"""What is particular to TCP and UNIX sockets, and to listening."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.transports.support import PROMPT, accepted, blocked, need_ipv6, receive, wait_until
from vmferry.errors import ChannelClosed, TransportError, UsageError
from vmferry.transports import Listener, connect, listen, parse
from vmferry.transports.uri import TcpAddress


def port_of(listener: Listener) -> int:
    address = parse(listener.address)
    assert isinstance(address, TcpAddress)
    return address.port


def test_port_zero_becomes_a_real_one_in_the_address() -> None:
    with listen("tcp:127.0.0.1:0") as listener:
        assert listener.address == f"tcp:127.0.0.1:{port_of(listener)}"
        assert port_of(listener) > 0


def test_any_address_takes_both_families_on_one_port() -> None:
    need_ipv6()
    with listen("tcp::0") as listener:
        port = port_of(listener)
        for host in ("127.0.0.1", "[::1]"):
            with connect(f"tcp:{host}:{port}"), accepted(listener.accept(PROMPT)) as receiver:
                assert receiver.name.startswith(f"tcp:{host}:")


def test_address_of_any_is_one_that_can_be_reached() -> None:
    with listen("tcp:0:0") as listener, connect(listener.address):
        assert listener.address.startswith("tcp:127.0.0.1:")
        accepted(listener.accept(PROMPT)).close()


@pytest.mark.parametrize(("option", "other"), [("ipv4", "[::1]"), ("ipv6", "127.0.0.1")])
def test_option_leaves_one_family_only(option: str, other: str) -> None:
    need_ipv6()
    with (
        listen(f"tcp::0,{option}=on") as listener,
        pytest.raises(TransportError, match="Connection refused"),
    ):
        connect(f"tcp:{other}:{port_of(listener)}")


def test_name_is_looked_up() -> None:
    with listen("tcp:localhost:0") as listener, connect(f"tcp:localhost:{port_of(listener)}"):
        accepted(listener.accept(PROMPT)).close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "1.2.3.4.5"])
def test_unknown_host_is_a_transport_error(host: str) -> None:
    with pytest.raises(TransportError, match="looking up"):
        connect(f"tcp:{host}:1")


@pytest.mark.parametrize("uri", ["tcp::4444", "tcp:127.0.0.1:0"])
def test_connecting_needs_host_and_port(uri: str) -> None:
    with pytest.raises(UsageError, match="needs a host and a port"):
        connect(uri)


def test_refused_connection_asks_for_the_destination() -> None:
    uri = f"tcp:127.0.0.1:{free_port()}"
    with pytest.raises(TransportError, match=rf'"{uri}": connecting failed.*-incoming'):
        connect(uri)


def test_port_in_use_is_refused_with_advice() -> None:
    with (
        listen("tcp:127.0.0.1:0") as listener,
        pytest.raises(TransportError, match="Address already in use; something else listens"),
    ):
        listen(listener.address)


def test_port_in_use_on_one_of_two_addresses_is_refused() -> None:
    need_ipv6()
    with (
        listen("tcp:[::]:0") as listener,
        pytest.raises(TransportError, match="Address already in use"),
    ):
        listen(f"tcp::{port_of(listener)}")


def test_port_is_free_again_after_a_connection() -> None:
    with listen("tcp:127.0.0.1:0") as listener:
        uri = listener.address
        with connect(uri), accepted(listener.accept(PROMPT)) as receiver:
            receiver.close()
    listen(uri).close()


def test_foreign_address_cannot_be_listened_on() -> None:
    with pytest.raises(TransportError, match="this machine has no such address"):
        listen("tcp:192.0.2.1:0")


def test_tcp_channel_does_not_hold_small_sends_back() -> None:
    with listen("tcp:127.0.0.1:0") as listener:
        sock = socket.create_connection(("127.0.0.1", port_of(listener)))
        with connect(f"fd:{sock.fileno()}"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            sock.detach()


def test_reset_by_the_peer_is_an_error_and_no_end() -> None:
    with listen("tcp:127.0.0.1:0") as listener:
        peer = socket.create_connection(("127.0.0.1", port_of(listener)))
        with accepted(listener.accept(PROMPT)) as receiver:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            with pytest.raises(TransportError, match="reset by peer; the other side broke off"):
                receiver.recv_into(memoryview(bytearray(1)), PROMPT)


def test_connecting_gives_up_after_its_timeout(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket(socket.AF_UNIX))
        full.bind(str(tmp_path / "full"))
        full.listen(0)
        stack.enter_context(connect(f"unix:{tmp_path}/full"))
        with pytest.raises(TransportError, match="waited 50 ms for room in the listener's queue"):
            connect(f"unix:{tmp_path}/full", timeout=0.05)


def test_tcp_connecting_gives_up_after_its_timeout() -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        uri = f"tcp:127.0.0.1:{full.getsockname()[1]}"
        stack.enter_context(connect(uri))
        with pytest.raises(TransportError, match="waited 50 ms for an answer"):
            connect(uri, timeout=0.05)


def test_connected_channel_has_no_limit_of_time_on_sends(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/s"
    with (
        listen(uri) as listener,
        connect(uri, timeout=0.01) as sender,
        accepted(listener.accept(PROMPT)) as receiver,
    ):
        sending = blocked(lambda: sender.send([bytes(8 << 20)]))
        assert len(receive(receiver, 8 << 20)) == 8 << 20
        sending.result(PROMPT)


def test_accept_waits_only_so_long(tmp_path: Path) -> None:
    with listen(f"unix:{tmp_path}/s") as listener:
        with pytest.raises(TransportError, match=r'/s": waited 10 ms for a connection'):
            listener.accept(0.01)
        with pytest.raises(TransportError):
            listener.accept(0)


def test_pending_tells_of_the_backlog(tmp_path: Path) -> None:
    with listen(f"unix:{tmp_path}/s") as listener:
        assert not listener.pending()
        with connect(listener.address), connect(listener.address):
            for _ in range(2):
                assert listener.pending()
                accepted(listener.accept(0)).close()
            assert not listener.pending()


def test_channels_are_accepted_in_the_order_of_connecting() -> None:
    with listen("tcp:127.0.0.1:0") as listener, contextlib.ExitStack() as stack:
        senders = [stack.enter_context(connect(listener.address)) for _ in range(20)]
        for number, sender in reversed(list(enumerate(senders))):
            sender.send([bytes([number])])
        for number in range(len(senders)):
            receiver = stack.enter_context(accepted(listener.accept(PROMPT)))
            assert receive(receiver, 1) == bytes([number])


@pytest.mark.parametrize("uri", ["tcp::0", "unix:{}/s"])
def test_waiting_accept_is_released_by_a_shutdown(uri: str, tmp_path: Path) -> None:
    listener = listen(uri.format(tmp_path))
    waiting = blocked(listener.accept)
    listener.shutdown()
    with pytest.raises(ChannelClosed):
        waiting.result(PROMPT)
    for call in (listener.accept, listener.pending):
        with pytest.raises(ChannelClosed):
            call()
    listener.close()
    listener.close()


def test_accepted_channel_outlives_its_listener(tmp_path: Path) -> None:
    with listen(f"unix:{tmp_path}/s") as listener:
        sender = connect(listener.address)
        receiver = accepted(listener.accept(PROMPT))
    with sender, receiver:
        sender.send([b"still here"])
        assert receive(receiver, 10) == b"still here"


def test_socket_file_goes_away_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen(f"unix:{path}"):
        assert stat.S_ISSOCK(path.stat().st_mode)
    assert not path.exists()


def test_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listen(f"unix:{path}") as listener, connect(listener.address):
        accepted(listener.accept(PROMPT)).close()


def test_listener_leaves_the_socket_of_its_successor_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen(f"unix:{path}")
    with listen(f"unix:{path}") as second:
        first.close()
        with connect(f"unix:{path}"):
            accepted(second.accept(PROMPT)).close()


def test_file_that_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(b"data")
    with pytest.raises(UsageError, match="expected a socket or nothing at that path"):
        listen(f"unix:{path}")
    assert path.read_bytes() == b"data"


def test_missing_socket_and_directory_are_transport_errors(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="No such file or directory; check the path"):
        connect(f"unix:{tmp_path}/nobody")
    with pytest.raises(TransportError, match="No such file or directory; check the path"):
        listen(f"unix:{tmp_path}/no/where")


def test_socket_nobody_listens_on_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
        with pytest.raises(TransportError, match="Connection refused; nothing listens there"):
            connect(f"unix:{tmp_path}/s")


def test_no_descriptor_is_left_or_handed_to_children(tmp_path: Path) -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = descriptors()
    with listen(f"unix:{tmp_path}/s") as listener, connect(listener.address):
        receiver = accepted(listener.accept(PROMPT))
        for name in descriptors() - before:
            with contextlib.suppress(OSError):  # the directory's own
                assert not os.get_inheritable(int(name))
        waiting = blocked(lambda: receiver.recv_into(memoryview(bytearray(1))))
        receiver.shutdown()
        assert isinstance(waiting.exception(PROMPT), ChannelClosed)
    wait_until(lambda: descriptors() == before)
