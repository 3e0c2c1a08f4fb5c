from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.qemu.monitor import GREETING, returns, server
from vmferry.errors import PeerError, TransportError, UsageError
from vmferry.qemu import Qmp, QmpError, qmp


def test_execute_returns_what_the_answer_holds() -> None:
    with server(returns({}), returns({"status": "running"})) as connection:
        session = Qmp(connection)
        assert session.greeting["version"]["qemu"]["major"] == 7
        assert session.execute("query-status") == {"status": "running"}


def test_arguments_are_sent_under_their_names() -> None:
    def echo(request: dict[str, object]) -> bytes:
        return returns([request["execute"], request["arguments"]])(request)

    with server(returns({}), echo) as connection:
        assert Qmp(connection).execute("pmemsave", {"val": 0, "size": 16}) == [
            "pmemsave",
            {"val": 0, "size": 16},
        ]


def test_error_answer_carries_class_and_description() -> None:
    def refuse(request: dict[str, object]) -> bytes:
        error = {"class": "CommandNotFound", "desc": "The command x has not been found"}
        return json.dumps({"error": error, "id": request["id"]}).encode() + b"\n"

    with server(returns({}), refuse) as connection:
        session = Qmp(connection)
        with pytest.raises(QmpError, match="refuses x: The command x has not been found") as caught:
            session.execute("x")
        assert caught.value.kind == "CommandNotFound"


def test_events_between_answers_are_kept_for_later() -> None:
    def with_events(request: dict[str, object]) -> bytes:
        return b'{"event": "STOP"}\n{"event": "RESUME"}\n' + returns({})(request)

    with server(returns({}), with_events) as connection:
        session = Qmp(connection)
        session.execute("cont")
        assert session.wait_event("RESUME")["event"] == "RESUME"
        assert session.wait_event()["event"] == "STOP"


def test_late_answer_is_dropped_and_the_session_goes_on() -> None:
    late: list[dict[str, object]] = []

    def both(request: dict[str, object]) -> bytes:
        return returns("late")(late[0]) + returns("in time")(request)

    def nothing(request: dict[str, object]) -> bytes:
        late.append(request)
        return b""

    with server(returns({}), nothing, both) as connection:
        session = Qmp(connection)
        with pytest.raises(TransportError, match="no sign of the answer to slow"):
            session.execute("slow", timeout=0.02)
        assert session.execute("quick") == "in time"


def test_flood_of_events_does_not_move_the_deadline() -> None:
    flooding = threading.Event()

    def flood() -> None:
        with theirs, suppress(OSError):
            theirs.sendall(GREETING + b'{"return": {}, "id": 1}\n')
            flooding.wait(10)
            while True:
                theirs.sendall(b'{"event": "RTC_CHANGE"}\n' * 100)

    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=flood)
    thread.start()
    with Qmp(ours) as session:
        flooding.set()
        with pytest.raises(TransportError, match="no sign of the answer to query-status"):
            session.execute("query-status", timeout=0.1)
    thread.join(10)


@pytest.mark.parametrize(
    ("greeting", "complaint"),
    [
        (b"HTTP/1.1 400 Bad Request\n", "expected a QMP message in JSON"),
        (b"[1]\n", "expected a QMP message, found"),
        (b'{"QMP": 3}\n', "expected a QMP greeting"),
        (b'{"a":' * 2_000 + b"\n", "expected a QMP message in JSON"),
    ],
)
def test_other_protocols_are_refused(greeting: bytes, complaint: str) -> None:
    with server(greeting=greeting) as connection, pytest.raises(PeerError, match=complaint):
        Qmp(connection)


def test_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "MAX_MESSAGE", 1000)
    with (
        server(greeting=b"x" * 2000) as connection,
        pytest.raises(PeerError, match="at most 1000 bytes"),
    ):
        Qmp(connection)


def test_closed_connection_names_what_was_expected() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(TransportError, match=r"expected the greeting|broke"):
        Qmp(ours)


def test_missing_socket_is_a_transport_error(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"cannot connect to QMP .* No such file"):
        Qmp.connect(f"unix:{tmp_path / 'none'}")


def test_address_without_port_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="expected tcp:host:port"):
        Qmp.connect("tcp:localhost")


def test_tcp_address_is_connected_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer, peer.makefile("rb") as lines:
                peer.sendall(GREETING)
                peer.sendall(returns({})(json.loads(lines.readline())))

        thread = threading.Thread(target=serve)
        thread.start()
        with Qmp.connect(f"tcp:127.0.0.1:{listener.getsockname()[1]}") as session:
            assert session.greeting["capabilities"] == []
        thread.join(10)


def test_busy_session_has_a_deadline_too() -> None:
    with server(returns({})) as connection:
        session = Qmp(connection)
        waiting = threading.Event()

        def wait() -> None:
            waiting.set()
            with pytest.raises(TransportError, match="no sign of the event NEVER"):
                session.wait_event("NEVER", timeout=0.5)

        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait(10)
        with pytest.raises(TransportError, match=r"busy with another thread|no sign of"):
            session.execute("query-status", timeout=0.05)
        thread.join(10)


@pytest.mark.qemu
def test_real_qemu_on_a_unix_socket(start_qemu: Callable[..., object], tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    start_qemu("-machine", "none", "-qmp", f"unix:{path},server=on,wait=off")
    with Qmp.connect(f"unix:{path}") as session:
        assert session.execute("query-status")["status"] in {"running", "prelaunch"}
        assert len(session.execute("query-qmp-schema")) > 100
