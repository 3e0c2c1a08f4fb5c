"""A QMP server: the monitor of a machine in this process, on a unix socket.

The protocol is that of QEMU's docs/interop/qmp-spec, without out-of-band commands.  QEMU talks to
one client of a socket at a time.  Here several are served at once, so that one can watch while
another gives orders; one more waits for its greeting until one leaves.  The commands of all
clients are carried out one at a time, except for questions and ``migrate_cancel``, which wait for
nobody.  Events go to all clients.

Whoever may connect may do everything with the machine: the socket is for its owner only.  But a
client that is slow, silent or senseless does not get in the machine's way.  All sockets are served
by one thread, commands have threads of their own, and whoever reports an event does not wait.  A
client that does not read its answers can give no more commands, and is left when events pile up.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vmferry.errors import UsageError, printable
from vmferry.qemu.commands import Command
from vmferry.qemu.messages import Object, write_message
from vmferry.qemu.session import Session
from vmferry.transports.failures import failure

MAX_CLIENTS: Final = 8

_FAREWELL: Final = 2.0
"""Seconds that clients get to read what they are sent last."""

_AGAIN: Final = 0.1
"""Seconds until another client is asked in when none could be."""


class QmpServer:
    """Serves *commands* at *path* from its creation until it is closed; a context manager.

    ``qmp_capabilities``, ``query-commands`` and ``quit`` need not be among them.  *greeting* is
    what stands under ``QMP`` in the greeting.  *leave* is called when a client was answered to
    ``quit``, in the server's thread: it must not wait.  *clients* are served at once.

    A socket at *path* that nobody listens at is replaced.  Raises UsageError where somebody does,
    or where another file is; TransportError where the system refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        commands: Mapping[str, Command],
        *,
        greeting: Object,
        leave: Callable[[], object],
        clients: int = MAX_CLIENTS,
    ) -> None:
        self.path = Path(path)
        names = sorted({*commands, "qmp_capabilities", "query-commands", "quit"})
        self._commands = {
            **commands,
            "query-commands": Command(lambda _: [{"name": name} for name in names], at_once=True),
            "quit": Command(lambda _: {}, at_once=True),
        }
        self._greeting = write_message({"QMP": greeting})
        self._leave = leave
        self._clients = clients
        self._listener = _listening(self.path)
        self._file = _identity(self.path)
        self._sessions: set[Session] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._turn = asyncio.Lock()
        self._thread = threading.Thread(target=self._run, name="qmp", daemon=True)
        self._thread.start()

    def emit(self, event: str, data: Mapping[str, Any] | None = None) -> None:
        """Send an event to all clients that are ready for events; from any thread, without wait."""
        seconds, rest = divmod(time.time_ns(), 1_000_000_000)
        message: Object = {
            "timestamp": {"seconds": seconds, "microseconds": rest // 1000},
            "event": event,
        }
        if data:
            message["data"] = dict(data)
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._tell, write_message(message))

    def close(self) -> None:
        """Let clients read what is on its way, within two seconds; remove the socket.  Idempotent.

        A command that is being carried out is not waited for.
        """
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # In the server's thread

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        accepting = asyncio.create_task(self._accept())
        await self._stop.wait()
        accepting.cancel()
        self._listener.close()
        with suppress(OSError):
            # Another server may have replaced it in the meantime: that one is not ours.
            if _identity(self.path) == self._file:
                self.path.unlink()
        if self._sessions:
            closing = [asyncio.create_task(session.close()) for session in self._sessions]
            await asyncio.wait(closing, timeout=_FAREWELL)
        for session in self._sessions:
            session.abandon()

    async def _accept(self) -> None:
        places = asyncio.Semaphore(self._clients)
        while True:
            await places.acquire()
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
                reader, writer = await asyncio.open_unix_connection(sock=connection)
            except OSError:  # no more descriptors, or the client is gone
                places.release()
                await asyncio.sleep(_AGAIN)
                continue
            session = Session(reader, writer, self._commands, turn=self._turn, leave=self._leave)
            self._sessions.add(session)
            serving = asyncio.create_task(session.serve(self._greeting))
            serving.add_done_callback(partial(self._ended, session, places))

    def _ended(self, session: Session, places: asyncio.Semaphore, _: object) -> None:
        self._sessions.discard(session)
        places.release()

    def _tell(self, event: bytes) -> None:
        for session in self._sessions:
            session.tell(event)


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        _clear(path)
        listener.setblocking(False)
        os.fchmod(listener.fileno(), 0o600)  # what the file will have
        listener.bind(os.fsencode(path))
        listener.listen(MAX_CLIENTS)
    except OSError as error:
        listener.close()
        raise failure(f"unix:{path}", "listening", error) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: Path) -> None:
    """Remove a socket that nobody listens at."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(
                f"{printable(str(path))}: expected a socket or nothing, found a file of another "
                "kind; remove it or choose another path"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # its queue is full
            pass
    raise UsageError(
        f"{printable(str(path))}: another process listens there; stop it or choose another path"
    )


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
