"""What is particular to inherited descriptors and to the standard streams."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.transports.support import COPIER, PROMPT, accepted, receive
from vmferry.errors import ChannelClosed, StorageError, TransportError, UsageError
from vmferry.transports import connect, listen


def test_listener_of_one_channel_gives_it_once_and_then_none() -> None:
    readable, writable = os.pipe()
    os.close(writable)
    with listen(f"fd:{readable}") as listener:
        assert listener.address == f"fd:{readable}"
        assert listener.pending()
        accepted(listener.accept()).close()
        assert not listener.pending()
        assert listener.accept() is None
        listener.shutdown()
        with pytest.raises(ChannelClosed):
            listener.accept()


def test_channel_nobody_accepted_is_closed_with_its_listener() -> None:
    readable, writable = os.pipe()
    listen(f"fd:{readable}").close()
    with connect(f"fd:{writable}") as sender, pytest.raises(TransportError, match="Broken pipe"):
        sender.send([b"x"])


def test_accepted_channel_outlives_its_listener() -> None:
    readable, writable = os.pipe()
    with listen(f"fd:{readable}") as listener:
        receiver = accepted(listener.accept())
    with receiver, connect(f"fd:{writable}") as sender:
        sender.send([b"x"])
        assert receive(receiver, 1) == b"x"


def test_descriptor_belongs_to_the_channel() -> None:
    readable, writable = os.pipe()
    with connect(f"fd:{writable}"):
        assert not os.get_inheritable(writable)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writable)
    os.close(readable)


def test_mode_of_an_inherited_descriptor_is_put_back() -> None:
    readable, writable = os.pipe()
    shared = os.dup(writable)
    with connect(f"fd:{writable}"):
        assert not os.get_blocking(shared)
    assert os.get_blocking(shared)
    os.close(readable)
    os.close(shared)


def test_closed_descriptor_is_a_transport_error() -> None:
    with pytest.raises(TransportError, match="Bad file descriptor; the descriptor must be open"):
        connect("fd:987654")


def test_descriptor_for_the_other_direction_is_a_usage_error() -> None:
    readable, writable = os.pipe()
    with pytest.raises(UsageError, match="open for writing, found one that is only for reading"):
        connect(f"fd:{readable}")
    with pytest.raises(UsageError, match="open for reading, found one that is only for writing"):
        listen(f"fd:{writable}")
    os.close(readable)
    os.close(writable)


def test_terminal_is_refused() -> None:
    control, terminal = os.openpty()
    with pytest.raises(UsageError, match="found a terminal; redirect it"):
        listen(f"fd:{terminal}")
    os.close(control)
    os.close(terminal)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_socket_that_is_no_stream_is_refused(kind: socket.SocketKind) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    with one, two, pytest.raises(UsageError, match="expected a connected stream socket"):
        connect(f"fd:{one.fileno()}")


def test_listening_socket_is_refused_as_a_channel() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(UsageError, match="expected a connected stream socket"),
    ):
        listen(f"fd:{server.fileno()}")


def test_socket_that_did_not_block_does_as_a_channel() -> None:
    one, two = socket.socketpair()
    one.setblocking(False)
    with two, connect(f"fd:{one.detach()}") as channel:
        with pytest.raises(TransportError, match="waited"):
            channel.recv_into(memoryview(bytearray(1)), 0.01)
        two.send(b"x")
        assert receive(channel, 1) == b"x"


def test_descriptor_of_a_file_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    with listen(f"fd:{os.open(tmp_path / 'f', os.O_RDONLY)}") as listener:
        assert receive(accepted(listener.accept())) == b"abc" * 1000


def test_full_disk_behind_a_descriptor_is_a_storage_error() -> None:
    with (
        connect(f"fd:{os.open('/dev/full', os.O_WRONLY)}") as sender,
        pytest.raises(StorageError, match="No space left on device; free some space"),
    ):
        sender.send([b"x"])


def test_sending_to_a_closed_pipe_is_an_error_even_where_sigpipe_kills() -> None:
    one, two = socket.socketpair()
    two.close()
    with connect(f"fd:{one.detach()}") as sender, Path(sys.executable).open("rb") as program:
        handler = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            with pytest.raises(TransportError, match="Broken pipe"):
                sender.send([b"x"])
            with pytest.raises(TransportError, match="Broken pipe"):
                sender.send_file(b"", program.fileno(), 0, 1)
        finally:
            signal.signal(signal.SIGPIPE, handler)


def run(program: str, given: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", program], input=given, capture_output=True, timeout=60, check=False
    )


def test_what_is_printed_does_not_get_into_the_stream() -> None:
    done = run(COPIER, b"stream" * 100_000)
    assert done.stdout == b"stream" * 100_000
    assert done.stderr == b"not part of the stream\n"


def test_children_do_not_read_the_stream() -> None:
    done = run(
        """
import subprocess
from vmferry.transports import listen
with listen("-") as listener, listener.accept() as source:
    print(subprocess.run(["cat"], capture_output=True).stdout)
    buffer = memoryview(bytearray(100))
    print(bytes(buffer[:source.recv_into(buffer)]))
""",
        b"stream",
    )
    assert done.stdout == b"b''\nb'stream'\n"


def test_standard_stream_is_taken_once() -> None:
    done = run(
        """
import sys
from vmferry.errors import UsageError
from vmferry.transports import connect
connect("-").close()
try:
    connect("-")
except UsageError as error:
    print(error, file=sys.stderr)
""",
        b"",
    )
    assert done.stderr == b"standard output can carry one stream only\n"


def test_terminal_as_standard_input_is_refused() -> None:
    control, terminal = os.openpty()
    program = "from vmferry.transports import listen; listen('-')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=terminal,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (
        b'UsageError: "standard input": expected a pipe or a file, found a terminal' in done.stderr
    )
    os.close(control)
    os.close(terminal)


def test_closed_standard_input_is_a_transport_error() -> None:
    program = "from vmferry.transports import listen; import os; os.close(0); listen('-')"
    assert b'TransportError: "standard input": opening failed: Bad file' in run(program, b"").stderr


def test_silent_pipe_times_out() -> None:
    readable, writable = os.pipe()
    with (
        listen(f"fd:{readable}") as listener,
        accepted(listener.accept()) as receiver,
        pytest.raises(TransportError, match="waited 5 ms for data"),
    ):
        receiver.recv_into(memoryview(bytearray(1)), 0.005)
    os.close(writable)


def test_peer_that_sends_single_bytes_is_heard() -> None:
    readable, writable = os.pipe()
    with listen(f"fd:{readable}") as listener, accepted(listener.accept()) as receiver:
        for byte in b"drip":
            os.write(writable, bytes([byte]))
            assert receiver.recv_into(memoryview(bytearray(100)), PROMPT) == 1
    os.close(writable)
