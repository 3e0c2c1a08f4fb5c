"""The QMP server as a protocol: what clients of all kinds get, and that no other suffers."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.transports.support import background
from vmferry.errors import TransportError, UsageError
from vmferry.qemu import Qmp
from vmferry.qemu import session as session_module
from vmferry.qemu.commands import Command
from vmferry.qemu.server import MAX_CLIENTS, QmpServer
from vmferry.qemu.session import MAX_MESSAGE

PATIENCE = 20.0
GREETING = {
    "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""},
    "capabilities": [],
}


class Served:
    """A server with a few commands, and what happened to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = threading.Event()
        self.blocked = threading.Event()
        self.release = threading.Event()
        self.server = QmpServer(
            path,
            {
                "echo": Command(lambda arguments: arguments, more=True),
                "add": Command(
                    lambda given: {"sum": given["a"] + given.get("b", 0)},
                    required={"a": int},
                    optional={"b": int},
                ),
                "block": Command(self._block),
                "look": Command(lambda _: {"seen": True}, at_once=True),
                "fail": Command(self._fail),
                "break": Command(lambda _: {}["nothing"]),
            },
            greeting=GREETING,
            leave=self.left.set,
        )

    def _block(self, _: object) -> None:
        self.blocked.set()
        assert self.release.wait(PATIENCE)

    def _fail(self, _: object) -> None:
        raise UsageError("it cannot be done")

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(str(self.path))
        return connection

    def session(self) -> Qmp:
        return Qmp.connect(str(self.path), timeout=PATIENCE)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "qmp")
    yield served
    served.release.set()
    served.server.close()


class Raw:
    """A connection on which messages are told apart by line, as this server sends them."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.lines = connection.makefile("rb")

    def receive(self) -> dict[str, Any]:
        line = self.lines.readline()
        assert line.endswith(b"\r\n"), line
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, data: bytes) -> dict[str, Any]:
        self.socket.sendall(data)
        return self.receive()

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@pytest.fixture
def raw(served: Served) -> Iterator[Raw]:
    """A client that was greeted, and has not negotiated."""
    client = Raw(served.connect())
    assert client.receive() == {"QMP": GREETING}
    yield client
    client.close()


@pytest.fixture
def ready(raw: Raw) -> Raw:
    """One that has negotiated."""
    assert raw.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}
    return raw


def error_of(answer: dict[str, Any]) -> tuple[str, str]:
    assert answer.keys() <= {"error", "id"}, answer
    assert answer["error"].keys() == {"class", "desc"}
    return answer["error"]["class"], answer["error"]["desc"]


def test_command_is_answered(served: Served) -> None:
    with served.session() as session:
        assert session.execute("echo", {"a": [1]}) == {"a": [1]}
        assert session.execute("add", {"a": 1, "b": 2}) == {"sum": 3}


def test_before_negotiation_nothing_is_carried_out(raw: Raw) -> None:
    kind, text = error_of(raw.ask(b'{"execute": "echo", "id": 1}'))
    assert kind == "CommandNotFound"
    assert "expected qmp_capabilities first" in text


def test_negotiation_is_once(ready: Raw) -> None:
    kind, _ = error_of(ready.ask(b'{"execute": "qmp_capabilities"}'))
    assert kind == "CommandNotFound"


def test_there_is_nothing_to_enable(raw: Raw) -> None:
    enable = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
    assert error_of(raw.ask(enable))[0] == "GenericError"
    # And it may try again.
    assert raw.ask(b'{"execute": "qmp_capabilities", "arguments": {"enable": []}}') == {
        "return": {}
    }


@pytest.mark.parametrize("identity", ["1", '"x"', "null", '{"a": [1, 2.5]}'])
def test_id_comes_back(identity: str, ready: Raw) -> None:
    answer = ready.ask(f'{{"execute": "look", "id": {identity}}}'.encode())
    assert answer == {"return": {"seen": True}, "id": json.loads(identity)}
    failed = ready.ask(f'{{"execute": "nothing", "id": {identity}}}'.encode())
    assert failed["id"] == json.loads(identity)


@pytest.mark.parametrize(
    ("request_", "kind", "text"),
    [
        ('{"execute": "nothing"}', "CommandNotFound", 'no command "nothing"'),
        ('{"execute": "fail"}', "GenericError", "it cannot be done"),
        ('{"execute": "break"}', "GenericError", "this is a bug in vmferry: KeyError"),
        ('{"execute": 3}', "GenericError", "expected the name of a command"),
        ('{"arguments": {}}', "GenericError", "expected the name of a command"),
        ('{"execute": "echo", "arguments": 3}', "GenericError", "expected an object"),
        ('{"execute": "echo", "more": 3}', "GenericError", 'found "more"'),
        ('{"exec-oob": "echo"}', "GenericError", 'found "exec-oob"'),
        ('{"execute": "add"}', "GenericError", "expected an argument a, found none"),
        ('{"execute": "add", "arguments": {"a": "1"}}', "GenericError", "a whole number as a"),
        ('{"execute": "add", "arguments": {"a": true}}', "GenericError", "a whole number as a"),
        ('{"execute": "add", "arguments": {"a": 1, "c": 1}}', "GenericError", "no argument"),
        ("[1]", "GenericError", "expected a QMP message, found"),
        ("GET / HTTP/1.1\r\n", "GenericError", "expected a QMP message in JSON"),
        ('{"a": NaN}', "GenericError", "expected a QMP message in JSON"),
        ('{"execute": "\x1b[2J"}', "GenericError", "expected a QMP message in JSON"),
        ('{"execute": "\\u001b[2J"}', "CommandNotFound", r'no command "\x1b[2J"'),
    ],
)
def test_error_has_class_and_description(request_: str, kind: str, text: str, ready: Raw) -> None:
    found, description = error_of(ready.ask(request_.encode()))
    assert found == kind
    assert text in description
    assert description.isprintable()
    # And the client goes on.
    assert ready.ask(b'{"execute": "look"}') == {"return": {"seen": True}}


def test_objects_need_no_lines(ready: Raw) -> None:
    ready.socket.sendall(b'{"execute":\n "look"\n}{"execute": "echo"} ')
    assert ready.receive() == {"return": {"seen": True}}
    assert ready.receive() == {"return": {}}


def test_commands_are_listed(served: Served) -> None:
    with served.session() as session:
        names = {entry["name"] for entry in session.execute("query-commands")}
    assert names == {
        *("add", "block", "break", "echo", "fail", "look"),
        *("qmp_capabilities", "query-commands", "quit"),
    }


def test_event_goes_to_all_who_are_ready(served: Served, raw: Raw) -> None:
    with served.session() as first, served.session() as second:
        before = time.time()
        served.server.emit("STOP")
        served.server.emit("MIGRATION", {"status": "active"})
        for session in (first, second):
            event = session.wait_event("STOP")
            assert event.keys() == {"event", "timestamp"}
            stamp = event["timestamp"]
            assert 0 <= stamp["microseconds"] < 1_000_000
            assert stamp["seconds"] >= int(before)
            assert session.wait_event()["data"] == {"status": "active"}
    # Not to one that has not negotiated.
    assert raw.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}


def test_event_of_a_command_comes_before_its_answer(tmp_path: Path) -> None:
    servers: list[QmpServer] = []
    stop = Command(lambda _: servers[0].emit("STOP"))
    with QmpServer(tmp_path / "q", {"stop": stop}, greeting=GREETING, leave=lambda: None) as server:
        servers.append(server)
        with Qmp.connect(str(tmp_path / "q")) as session:
            for _ in range(20):
                session.execute("stop")
                # Already received: no other answer can have brought it.
                assert session.wait_event("STOP", timeout=PATIENCE)


def test_quit_is_answered_before_anyone_leaves(served: Served, ready: Raw) -> None:
    assert ready.ask(b'{"execute": "quit", "id": 7}') == {"return": {}, "id": 7}
    assert served.left.wait(PATIENCE)
    served.server.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    served.server.close()
    assert ready.receive()["event"] == "SHUTDOWN"
    assert ready.lines.readline() == b""
    assert not served.path.exists()


# Several clients


def test_clients_come_one_after_the_other(served: Served) -> None:
    for number in range(3 * MAX_CLIENTS):
        with served.session() as session:
            assert session.execute("add", {"a": number}) == {"sum": number}


def test_clients_are_served_at_the_same_time(served: Served) -> None:
    with ExitStack() as stack:
        sessions = [stack.enter_context(served.session()) for _ in range(MAX_CLIENTS)]
        for number, session in enumerate(sessions):
            assert session.execute("add", {"a": number}) == {"sum": number}


def test_one_client_too_many_waits_until_another_leaves(served: Served) -> None:
    with ExitStack() as stack:
        first = served.session()
        for _ in range(MAX_CLIENTS - 1):
            stack.enter_context(served.session())
        late = stack.enter_context(served.connect())
        late.settimeout(0.05)
        with pytest.raises(TimeoutError):
            late.recv(1)
        first.close()
        late.settimeout(PATIENCE)
        assert late.recv(1) == b"{"


def test_question_does_not_wait_for_a_command(served: Served) -> None:
    with served.session() as busy, served.session() as other:
        blocking = background(lambda: busy.execute("block"))
        assert served.blocked.wait(PATIENCE)
        assert other.execute("look") == {"seen": True}
        waiting = background(lambda: other.execute("echo"))
        assert not waiting.done()
        served.release.set()
        assert blocking.result(PATIENCE) == {}
        assert waiting.result(PATIENCE) == {}


# Clients that mean no good


def test_flood_of_one_client_does_not_keep_others_waiting(served: Served) -> None:
    with served.connect() as flooding:
        flooding.settimeout(0.2)
        with suppress(TimeoutError):  # as it does not read its answers
            while True:
                flooding.sendall(b"nonsense\n" * 1000)
        with served.session() as session:
            assert session.execute("look") == {"seen": True}


def test_client_that_reads_nothing_is_left_when_events_pile_up(
    served: Served, ready: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_UNREAD", 1000)
    with served.session() as session:
        deadline = time.monotonic() + PATIENCE
        while not is_hung_up(ready.socket):
            assert time.monotonic() < deadline
            served.server.emit("RTC_CHANGE", {"padding": "x" * 1000})
            session.wait_event("RTC_CHANGE")
        assert session.execute("look") == {"seen": True}


def is_hung_up(connection: socket.socket) -> bool:
    """Whether the other side has closed it, which shows behind everything that was not read."""
    try:
        connection.send(b" ")
    except OSError:
        return True
    return False


@pytest.mark.parametrize("data", [b'{"a": [1,', b'{"a": "x', b" ", b"x"])
def test_too_much_for_a_command_ends_the_session(data: bytes, ready: Raw, served: Served) -> None:
    ready.socket.sendall(data.ljust(MAX_MESSAGE + 1, data[-1:]))
    assert "at most 65536 bytes" in error_of(ready.receive())[1]
    assert ready.lines.read() == b""
    with served.session() as session:
        assert session.execute("look") == {"seen": True}


@pytest.mark.parametrize("goodbye", [b"", b'{"execute": "block"}', b'{"execute": "lo'])
def test_client_may_leave_at_any_moment(goodbye: bytes, ready: Raw, served: Served) -> None:
    ready.socket.sendall(goodbye)
    ready.close()
    served.release.set()
    with served.session() as session:
        assert session.execute("echo") == {}


def test_close_does_not_wait_for_a_command_nor_for_who_does_not_read(served: Served) -> None:
    silent = served.connect()
    session = served.session()
    with silent, session:
        background(lambda: session.execute("block"))
        assert served.blocked.wait(PATIENCE)
        background(served.server.close).result(PATIENCE)
        served.server.close()
        served.server.emit("STOP")


# The socket


def test_socket_is_for_its_owner_only(served: Served) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600


def test_socket_of_a_process_that_died_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "q"))
        dead.listen()
    with QmpServer(tmp_path / "q", {}, greeting=GREETING, leave=lambda: None):
        Qmp.connect(str(tmp_path / "q")).close()


def test_socket_of_another_process_is_left_alone(served: Served) -> None:
    with pytest.raises(UsageError, match="another process listens there"):
        QmpServer(served.path, {}, greeting=GREETING, leave=lambda: None)
    served.session().close()


def test_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "q").write_text("precious")
    with pytest.raises(UsageError, match="found a file of another kind"):
        QmpServer(tmp_path / "q", {}, greeting=GREETING, leave=lambda: None)
    assert (tmp_path / "q").read_text() == "precious"


def test_place_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="listening failed: No such file"):
        QmpServer(tmp_path / "no" / "q", {}, greeting=GREETING, leave=lambda: None)


def test_socket_that_replaced_it_stays(served: Served, tmp_path: Path) -> None:
    served.path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(served.path))
        served.server.close()
        assert served.path.exists()


# Real clients


def test_qemus_own_client_can_talk_to_it(served: Served) -> None:
    async def talk() -> list[object]:
        client = QMPClient("test")
        await client.connect(str(served.path))
        answers: list[object] = [await client.execute("add", {"a": 1})]
        served.server.emit("STOP")
        event = await asyncio.wait_for(client.events.get(), PATIENCE)
        answers.append(event["event"])
        await client.disconnect()
        return answers

    assert asyncio.run(talk()) == [{"sum": 1}, "STOP"]
