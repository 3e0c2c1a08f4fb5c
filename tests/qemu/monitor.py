"""A monitor that says what a test has written down, in place of a machine's."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

GREETING = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}\n'

Answer = Callable[[dict[str, object]], bytes]


def returns(value: object) -> Answer:
    """An answer with a result."""
    return lambda request: json.dumps({"return": value, "id": request["id"]}).encode() + b"\n"


@contextmanager
def server(*answers: Answer | bytes, greeting: bytes = GREETING) -> Iterator[socket.socket]:
    """The client's end of a connection whose other end greets and gives one answer a command."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, theirs.makefile("rb") as lines:
            theirs.sendall(greeting)
            for answer in answers:
                line = lines.readline()
                if not line:
                    return
                theirs.sendall(answer if isinstance(answer, bytes) else answer(json.loads(line)))
            lines.read()

    thread = threading.Thread(target=serve)
    thread.start()
    with ours:
        yield ours
    thread.join(10)


class Machine:
    """A monitor on a unix socket at *path*; ``says`` has the answer to each command by its name.

    A list has one answer for each time, and its last for ever; an exception closes the connection,
    ``{"error": ...}`` is an error.  ``heard`` has the commands that came, with their arguments.
    """

    def __init__(self, path: Path, **says: object) -> None:
        self.address = str(path)
        self.heard: list[tuple[str, object]] = []
        self.says: dict[str, object] = {
            "query-status": {"status": "running", "running": True},
            "query-name": {},
            "query-migrate": {},
            "query-migrate-capabilities": [],
            "query-migrate-parameters": {"max-bandwidth": 0, "downtime-limit": 300},
        }
        self.says |= {name.replace("_", "-"): answer for name, answer in says.items()}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines, suppress(OSError):
                connection.sendall(GREETING)
                for line in lines:
                    request = json.loads(line)
                    answer = self._answer(request["execute"], request.get("arguments"))
                    if isinstance(answer, Exception):
                        break
                    failed = isinstance(answer, dict) and "error" in answer
                    content = answer if failed else {"return": answer}
                    connection.sendall(json.dumps(content | {"id": request["id"]}).encode() + b"\n")

    def _answer(self, command: str, arguments: object) -> object:
        self.heard.append((command, arguments))
        answer = self.says.get(command, {})
        if isinstance(answer, list) and command != "query-migrate-capabilities":
            return answer.pop(0) if len(answer) > 1 else answer[0]
        return answer() if callable(answer) else answer
