"""zlib and zstd, bounded: what comes out is as many bytes as were announced, or an error.

One page at a time for `compress` (a complete zlib stream each), and one endless stream a channel
for multifd, flushed after each packet (QEMU 7.2 ``migration/multifd-zlib.c``, ``multifd-zstd.c``).
"""

from __future__ import annotations

import zlib
from typing import Final, Protocol

import zstandard

from vmferry.errors import StreamError

Bytes = bytes | memoryview

_WINDOW: Final = 1 << 25
"""Bytes of zstd window accepted: what QEMU's highest level, 20, uses; its default needs 2^19."""


class Decompressor(Protocol):
    """The receiving end of one channel's stream; keeps its state from packet to packet."""

    def expand(self, payload: Bytes, size: int) -> Bytes:
        """The *size* bytes that *payload* holds; :class:`StreamError` where it holds others."""


class Compressor(Protocol):
    """The sending end of one channel's stream."""

    def pack(self, data: Bytes) -> bytes:
        """*data* compressed and flushed, to be expanded on its own by the other end."""


def inflate_page(payload: Bytes, page_size: int) -> bytes:
    """The page in a complete zlib stream."""
    inflater = zlib.decompressobj()
    page = _inflate(inflater, payload, page_size)
    if not inflater.eof or inflater.unused_data:
        raise StreamError("one complete zlib stream", "one that does not end with its page")
    return page


def _inflate(inflater: zlib._Decompress, payload: Bytes, size: int) -> bytes:
    try:
        data = inflater.decompress(payload, size + 1)
    except zlib.error as error:
        raise StreamError("a zlib stream", f"{error}") from None
    if len(data) != size or inflater.unconsumed_tail:
        more = " or more" if inflater.unconsumed_tail else ""
        raise StreamError(f"{size} bytes after decompression", f"{len(data)}{more}")
    return data


class Plain:
    """No compression: the payload is the pages."""

    def expand(self, payload: Bytes, size: int) -> Bytes:
        """*payload* itself."""
        if len(payload) != size:
            raise StreamError(f"{size} bytes of pages", f"{len(payload)}")
        return payload

    def pack(self, data: Bytes) -> bytes:
        """*data* itself, copied."""
        return bytes(data)


class Inflate:
    """zlib, receiving."""

    def __init__(self) -> None:
        self._inflater = zlib.decompressobj()

    def expand(self, payload: Bytes, size: int) -> bytes:
        """The pages in *payload*."""
        data = _inflate(self._inflater, payload, size)
        if self._inflater.eof:
            raise StreamError("a zlib stream without end", "its end")
        return data


class Deflate:
    """zlib, sending; *level* from 0 (none) to 9."""

    def __init__(self, level: int = 1) -> None:
        self._deflater = zlib.compressobj(level)

    def pack(self, data: Bytes) -> bytes:
        """*data* deflated up to a sync flush."""
        return self._deflater.compress(data) + self._deflater.flush(zlib.Z_SYNC_FLUSH)


class _Drained(Exception):
    """The decompressor wants more than the packet holds."""


class _Packets:
    """What a zstd reader reads from: the payload of the current packet, never an end."""

    def __init__(self) -> None:
        self.payload: Bytes = b""

    def read(self, _size: int = -1) -> Bytes:
        payload, self.payload = self.payload, b""
        if not payload:
            raise _Drained
        return payload


class ZstdExpand:
    """zstd, receiving."""

    def __init__(self) -> None:
        self._packets = _Packets()
        context = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        self._reader = context.stream_reader(self._packets)  # type: ignore[arg-type]

    def expand(self, payload: Bytes, size: int) -> bytes:
        """The pages in *payload*."""
        self._packets.payload = bytes(payload)
        data = self._read(size + 1)
        if len(data) != size:
            more = " or more" if len(data) > size else ""
            raise StreamError(f"{size} bytes after decompression", f"{len(data)}{more}")
        return data

    def _read(self, size: int) -> bytes:
        pieces: list[bytes] = []
        have = 0
        try:
            while have < size:
                piece = self._reader.read1(size - have)
                if not piece:
                    break
                pieces.append(piece)
                have += len(piece)
        except _Drained:
            pass
        except zstandard.ZstdError as error:
            raise StreamError("a zstd stream", f"{error}") from None
        return b"".join(pieces)


class ZstdPack:
    """zstd, sending; *level* from 1 to 20, or 0 for its own choice."""

    def __init__(self, level: int = 1) -> None:
        self._stream = zstandard.ZstdCompressor(level=level).compressobj()

    def pack(self, data: Bytes) -> bytes:
        """*data* compressed up to a flushed block."""
        flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK
        return self._stream.compress(data) + self._stream.flush(flush)
