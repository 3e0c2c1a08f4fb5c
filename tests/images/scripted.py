"""An NBD server that says what it was told to say, whatever it hears."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
SIZE = 1 << 20
FLAGS = 1 | 4 | 8 | 32 | 64
"""HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES."""


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


STRUCTURED = option_reply(8, 1)
NOT_STRUCTURED = option_reply(8, 0x80000001)
CONTEXT = option_reply(10, 4, struct.pack(">I", 7) + b"base:allocation") + option_reply(10, 1)


def export(size: int = SIZE, flags: int = FLAGS) -> bytes:
    return option_reply(7, 3, struct.pack(">HQH", 0, size, flags))


def blocks(least: int, most: int = 1 << 25) -> bytes:
    return option_reply(7, 3, struct.pack(">HIII", 3, least, 4096, most))


DONE = option_reply(7, 1)
OPENED = GREETING + STRUCTURED + CONTEXT + export() + DONE
OPENED_SIMPLE = GREETING + NOT_STRUCTURED + export() + DONE


def simple(error: int = 0, cookie: int = 1) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def chunk(kind: int, data: bytes = b"", *, flags: int = 1, cookie: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(data)) + data


def data(offset: int, content: bytes, **options: int) -> bytes:
    return chunk(1, struct.pack(">Q", offset) + content, **options)


def hole(offset: int, size: int, **options: int) -> bytes:
    return chunk(2, struct.pack(">QI", offset, size), **options)


def status(*extents: tuple[int, int], context: int = 7, **options: int) -> bytes:
    packed = b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(5, struct.pack(">I", context) + packed, **options)


def failure(number: int, text: bytes = b"", **options: int) -> bytes:
    return chunk(32769, struct.pack(">IH", number, len(text)) + text, **options)


@contextlib.contextmanager
def saying(script: bytes, directory: Path) -> Iterator[str]:
    """The URI of a server that sends *script* to each client and hangs up on it."""
    path = directory / "scripted"
    with socket.socket(socket.AF_UNIX) as listener:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client, contextlib.suppress(OSError):
                    client.sendall(script)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(1 << 16):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"nbd+unix:///disk?socket={path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
