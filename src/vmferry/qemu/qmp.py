"""A QMP client: commands, their answers and events, over a unix or TCP socket.

The protocol is that of QEMU's docs/interop/qmp-spec: JSON objects, a greeting first,
``qmp_capabilities`` before anything else, an ``id`` that comes back with the answer, and events
between any two objects.  Every wait has a deadline.  What the other side sends is bounded (a
message has at most 16 MiB) and checked; it can be garbled or silent, but not harmful.

Only the Python standard library is used: the ``qemu.qmp`` package is asynchronous, and its
synchronous wrapper is bound to the thread that made it and licensed under the GPL.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

from vmferry.errors import PeerError, TransportError, UsageError, printable
from vmferry.qemu.messages import Object, Splitter, read_message, write_message
from vmferry.transports.sockets import peer_pid

MAX_MESSAGE: Final = 16 << 20  # the largest answer of QEMU 7.2, query-qmp-schema, has 200 kB
MAX_EVENTS: Final = 10_000  # events kept for wait_event(); the oldest go first
_GREETING: Final = "the greeting"


class QmpError(PeerError):
    """The machine answered a command with an error.

    ``kind`` is its class, e.g. ``CommandNotFound``.
    """

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"the machine refuses {command}: {description}")
        self.kind = kind
        self.description = description


class Qmp:
    """A QMP session, ready for commands.

    Any thread may call it; commands are executed one after the other.  *connection* is a connected
    stream socket, owned by the session from here on.  *timeout* (seconds) applies to the greeting
    and, unless another one is given, to each command.

    Raises TransportError when the connection breaks or a deadline passes, PeerError when the other
    side does not speak QMP.
    """

    def __init__(self, connection: socket.socket, *, timeout: float = 30.0) -> None:
        self._socket = connection
        self._timeout = timeout
        self._lock = threading.Lock()
        self._splitter = Splitter(MAX_MESSAGE)
        self._received: deque[bytes] = deque()
        self._events: deque[Object] = deque(maxlen=MAX_EVENTS)
        self._commands = 0
        try:
            self.greeting: Object = _greeting(self._next(self._deadline(None), _GREETING))
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(cls, address: str, *, timeout: float = 30.0) -> Self:
        """A session with the QMP server at ``tcp:host:port``, ``unix:path`` or a plain path."""
        try:
            connection = _connect(address, timeout)
        except OSError as exc:
            raise TransportError(
                f"cannot connect to QMP at {printable(address)}: {exc.strerror or exc}"
            ) from exc
        return cls(connection, timeout=timeout)

    @property
    def peer_pid(self) -> int | None:
        """The process that made the other end, if that is known."""
        return peer_pid(self._socket)

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """The answer to *command*: what stands under ``return``.

        Raises QmpError when the machine refuses.  After a TransportError for a passed deadline the
        session is still good: a late answer is dropped.
        """
        deadline = self._deadline(timeout)
        with self._turn(deadline, command):
            self._commands += 1
            request: Object = {"execute": command, "id": self._commands}
            if arguments:
                request["arguments"] = dict(arguments)
            self._send(write_message(request), deadline, command)
            while True:
                answer = self._next(deadline, f"the answer to {command}")
                if "event" in answer:
                    self._events.append(answer)
                elif answer.get("id") == self._commands or (
                    "error" in answer and "id" not in answer
                ):
                    return _result(command, answer)

    def wait_event(self, *names: str, timeout: float | None = None) -> Object:
        """The oldest event not yet taken whose name is in *names* (any event without names).

        Older events with other names stay for later calls.
        """
        deadline = self._deadline(timeout)
        wanted = f"the event {' or '.join(names) or '(any)'}"
        with self._turn(deadline, wanted):
            for event in self._events:
                if not names or event["event"] in names:
                    self._events.remove(event)
                    return event
            while True:
                message = self._next(deadline, wanted)
                if "event" not in message:
                    continue
                if not names or message["event"] in names:
                    return message
                self._events.append(message)

    def close(self) -> None:
        """End the session.  Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._timeout if timeout is None else timeout)

    @contextmanager
    def _turn(self, deadline: float, wanted: str) -> Iterator[None]:
        if not self._lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise TransportError(f"QMP is busy with another thread: no turn for {wanted} in time")
        try:
            yield
        finally:
            self._lock.release()

    def _send(self, data: bytes, deadline: float, command: str) -> None:
        try:
            self._socket.settimeout(_remaining(deadline, command))
            self._socket.sendall(data)
        except TimeoutError as exc:
            self.close()  # half a command may be out
            raise TransportError(f"QMP does not take the command {command}") from exc
        except OSError as exc:
            raise TransportError(f"the QMP connection broke: {exc.strerror or exc}") from exc

    def _next(self, deadline: float, wanted: str) -> Object:
        """The next message, whatever it is."""
        while not self._received:
            self._received.extend(self._splitter.feed(self._receive(deadline, wanted)))
        return read_message(self._received.popleft())

    def _receive(self, deadline: float, wanted: str) -> bytes:
        try:
            self._socket.settimeout(_remaining(deadline, wanted))
            data = self._socket.recv(65536)
        except TimeoutError as exc:
            raise _late(wanted) from exc
        except OSError as exc:
            raise TransportError(f"the QMP connection broke: {exc.strerror or exc}") from exc
        if not data:
            raise TransportError(f"QMP closed the connection; expected {wanted}")
        return data


def _remaining(deadline: float, wanted: str) -> float:
    """Seconds until *deadline*; an error when it has passed, however busy the connection is."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise _late(wanted)
    return seconds


def _late(wanted: str) -> TransportError:
    hint = "; QEMU talks to one client at a time, is there another?" if wanted == _GREETING else ""
    return TransportError(f"QMP stayed silent: no sign of {wanted} in time{hint}")


def _connect(address: str, timeout: float) -> socket.socket:
    if address.startswith("tcp:"):
        host, separator, port = address.removeprefix("tcp:").rpartition(":")
        if not separator or not port.isdecimal():
            raise UsageError(f"expected tcp:host:port for QMP, found {printable(address)}")
        return socket.create_connection((host.strip("[]") or "localhost", int(port)), timeout)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(address.removeprefix("unix:"))
    except BaseException:
        connection.close()
        raise
    return connection


def _greeting(message: Object) -> Object:
    greeting = message.get("QMP")
    if not isinstance(greeting, dict):
        raise PeerError(f"expected a QMP greeting, found {_shown(message)}")
    return greeting


def _result(command: str, answer: Object) -> Any:
    if "return" in answer:
        return answer["return"]
    error = answer.get("error")
    if not isinstance(error, dict):
        raise PeerError(f"expected an answer to {command}, found {_shown(answer)}")
    raise QmpError(command, str(error.get("class", "")), str(error.get("desc", "no reason given")))


def _shown(message: Object) -> str:
    return printable(json.dumps(message))
