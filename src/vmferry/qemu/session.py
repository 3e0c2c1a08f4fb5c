"""One client of a QMP server: its commands are read, carried out and answered in their order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final, TypeVar

from vmferry.errors import PeerError, UsageError, VmferryError, printable
from vmferry.qemu.commands import Command, CommandError
from vmferry.qemu.messages import Object, Splitter, read_message, write_message

MAX_MESSAGE: Final = 1 << 16
"""Bytes of a command; those there are have a few hundred."""

MAX_UNREAD: Final = 1 << 20
"""Bytes that a client may leave unread until the next event is the last thing it misses."""

_KNOWN: Final = frozenset({"execute", "arguments", "id"})
_NEGOTIATE: Final = Command(lambda _: {}, optional={"enable": list})

T = TypeVar("T")


class Session:
    """A connection, from the greeting on.

    *turn* is held for a command that does not run at once.  *leave* is called when the answer to
    ``quit`` is on its way.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        commands: Mapping[str, Command],
        *,
        turn: asyncio.Lock,
        leave: Callable[[], object],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._commands = commands
        self._turn = turn
        self._leave = leave
        self._is_ready = False

    async def serve(self, greeting: bytes) -> None:
        """Talk to it until it leaves, or sends what is too long to be read."""
        splitter = Splitter(MAX_MESSAGE)
        try:
            self._writer.write(greeting)
            while data := await self._reader.read(MAX_MESSAGE):
                for text in splitter.feed(data):
                    self._writer.write(write_message(await self._answer(text)))
                    await self._writer.drain()
        except PeerError as error:
            self._writer.write(write_message(_error(error)))
        except OSError:
            pass  # gone
        finally:
            self._writer.close()

    def tell(self, event: bytes) -> None:
        """Send an event, if the client is ready for events; one that does not read is left."""
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD:
            self.abandon()
        elif self._is_ready:
            self._writer.write(event)

    async def close(self) -> None:
        """Close the connection when everything was sent."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    def abandon(self) -> None:
        """Close the connection now."""
        self._writer.transport.abort()

    async def _answer(self, text: bytes) -> Object:
        try:
            message = read_message(text)
        except PeerError as error:
            return _error(error)
        identity = {"id": message["id"]} if "id" in message else {}
        try:
            result = await self._result(message)
            return {"return": {} if result is None else result} | identity
        except Exception as error:  # noqa: BLE001 - the machine goes on, whatever it is
            return _error(error) | identity

    async def _result(self, message: Object) -> object:
        if unknown := message.keys() - _KNOWN:
            raise UsageError(f"expected execute, arguments and id, found {printable(min(unknown))}")
        name, arguments = message.get("execute"), message.get("arguments", {})
        if not isinstance(name, str):
            raise UsageError("expected the name of a command as execute")
        if not isinstance(arguments, dict):
            raise UsageError("expected an object as arguments")
        if not self._is_ready or name == "qmp_capabilities":
            return self._negotiated(name, arguments)
        command = self._commands.get(name)
        if command is None:
            raise CommandError("CommandNotFound", f"there is no command {printable(name)}")
        command.check(arguments)
        result = await self._executed(command, arguments)
        if name == "quit":
            # Behind the answer, which is written before anything else gets its turn here.
            asyncio.get_running_loop().call_soon(self._leave)
        return result

    def _negotiated(self, name: str, arguments: Object) -> object:
        if self._is_ready:
            raise CommandError("CommandNotFound", "qmp_capabilities is for the beginning only")
        if name != "qmp_capabilities":
            raise CommandError(
                "CommandNotFound", f"expected qmp_capabilities first, found {printable(name)}"
            )
        _NEGOTIATE.check(arguments)
        if arguments.get("enable"):
            raise UsageError("expected no capabilities to enable, as none are offered")
        self._is_ready = True
        return {}

    async def _executed(self, command: Command, arguments: Object) -> object:
        if command.at_once:
            return await _in_thread(lambda: command.run(arguments))
        async with self._turn:
            return await _in_thread(lambda: command.run(arguments))


async def _in_thread(call: Callable[[], T]) -> T:
    """What *call* returns or raises in a thread that nobody waits for when the process ends."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the server was closed
            loop.call_soon_threadsafe(lambda: None if outcome.done() else settle())

    def run() -> None:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits
            caught = error
            tell(lambda: outcome.set_exception(caught))
        else:
            tell(lambda: outcome.set_result(result))

    threading.Thread(target=run, name="qmp-command", daemon=True).start()
    return await outcome


def _error(error: Exception) -> Object:
    match error:
        case CommandError():
            kind, description = error.kind, str(error)
        case VmferryError():
            kind, description = "GenericError", str(error)
        case _:
            kind = "GenericError"
            description = f"this is a bug in vmferry: {type(error).__name__}: {error}"
    return {"error": {"class": kind, "desc": description}}
