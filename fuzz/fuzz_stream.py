"""For any bytes: only a VmferryError, the same however they are cut, and written back as read.

The first byte of an input chooses the reader, the second how the rest is cut; see README.md here.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:  # one input can be run again without it
    atheris = None

sys.path.insert(0, str(Path(__file__).parent.parent))

with atheris.instrument_imports(include=["vmferry"]) if atheris else nullcontext():
    from tests.pages.twins import compiled, plain
    from tests.wire import test_multifd as multifd
    from tests.wire import test_return_path as return_path
    from tests.wire.feeding import Steps, check_invariant
    from tests.wire.streams import OPEN_STREAMS, STREAMS
    from vmferry.errors import VmferryError
    from vmferry.pages.compression import Inflate, ZstdExpand, inflate_page
    from vmferry.vmstate.decode import decode_device
    from vmferry.wire.bitmap import BitmapReader
    from vmferry.wire.disk import DiskReader
    from vmferry.wire.foreign import hash_table, storage_attributes
    from vmferry.wire.multifd import MultifdReader
    from vmferry.wire.ram import RamBlock, RamReader
    from vmferry.wire.reader import StreamReader, Tolerate
    from vmferry.wire.return_path import ReturnPathReader

BLOCKS = {
    "a": RamBlock("a", 4096),
    "pc.ram": RamBlock("pc.ram", 0x2000000),
    "s": RamBlock("s", 4096),
}
READERS = [
    lambda: StreamReader(max_ram=1 << 30),
    lambda: StreamReader(
        max_ram=1 << 40, page_size=1024, tolerate=Tolerate.NO_RAM | Tolerate.NO_END
    ),
    lambda: MultifdReader(BLOCKS),
    lambda: MultifdReader(BLOCKS, page_size=65536),
    lambda: ReturnPathReader(max_bitmap=4096),
    lambda: Steps(RamReader(1024, 1 << 30, huge_pages=True).body),
    lambda: Steps(RamReader(1024, 1 << 30, addresses=True, postcopy=True).body),
    lambda: Steps(BitmapReader().body),
    lambda: Steps(DiskReader().body),
    lambda: Steps(storage_attributes),
    lambda: Steps(hash_table),
]


def check(data: bytes) -> None:
    """Raise where *data* breaks the invariant."""
    if len(data) < 2:
        return
    choice, cut, data = data[0], data[1], data[2:]
    if choice < len(READERS):
        outcome = check_invariant(READERS[choice], data, cut)
        if choice < 2 and outcome.error is None:
            check_devices(READERS[choice](), data)
    elif choice % 2:
        check_compression(data)
    else:
        check_xbzrle(data, 64 + cut)


def check_devices(reader: StreamReader, data: bytes) -> None:
    """The device sections of a stream that can be read can be decoded."""
    sections = [event for event in reader.feed(data) if type(event).__name__ == "DeviceSection"]
    if reader.description is None:
        return
    for section, device in zip(sections, reader.description.devices, strict=True):
        if section.described:
            decode_device(device, section.body)


def check_compression(data: bytes) -> None:
    """Nothing but a VmferryError comes out of junk, and no more bytes than asked for."""
    for expand in (inflate_page, Inflate().expand, ZstdExpand().expand):
        try:
            page = expand(data, 4096)
        except VmferryError:
            continue
        assert len(page) == 4096


def check_xbzrle(data: bytes, size: int) -> None:
    """Both forms of the decoder do the same."""
    if compiled is not None:
        pages = bytearray(size), bytearray(size)
        assert compiled.xbzrle_decode(data, pages[0]) == plain.xbzrle_decode(data, pages[1])
        assert pages[0] == pages[1]


def seeds() -> list[bytes]:
    """An input for each reader."""
    whole = [bytes([0, 1]) + stream for stream in (STREAMS | OPEN_STREAMS).values()]
    packets = multifd.HELLO.encode() + multifd.header([0x1000], size=40, method=2) + bytes(40)
    answers = b"".join(bytes.fromhex(wire) for _, wire in return_path.GOLDEN)
    bodies = [bytes([choice, 3]) + bytes.fromhex("0000000000000010") for choice in range(5, 11)]
    return [
        *whole,
        b"\2\1" + packets,
        b"\4\1" + answers,
        *bodies,
        b"\x0b\1x\x9c",
        b"\x0c\1\0\1\x90",
    ]


def main() -> None:
    arguments = sys.argv[1:]
    files = [Path(argument) for argument in arguments if Path(argument).is_file()]
    if files:
        for file in files:
            check(file.read_bytes())
        return
    if atheris is None:
        sys.exit("fuzzing needs atheris: pip install atheris (see fuzz/README.md)")
    with tempfile.TemporaryDirectory(prefix="vmferry-fuzz-") as corpus:
        for number, seed in enumerate(seeds()):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        # New inputs go to the first directory; the seeds are read besides.
        atheris.Setup([*sys.argv, corpus], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
