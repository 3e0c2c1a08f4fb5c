"""Bytes of every kind of field, as QEMU 7.2's unit tests and streams have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import pytest

from vmferry.vmstate import (
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    Bitmap,
    Buffer,
    Custom,
    Float64,
    Gap,
    Queue,
    Timer,
    Tree,
    VarArray,
    VarBuffer,
    device,
    load,
    save,
    state,
)


@device("primitives")
@dataclass
class Primitives:
    b1: bool = True
    b2: bool = False
    u8: U8 = 0x82
    u16: U16 = 0x0200
    u32: U32 = 70000
    u64: U64 = 12121212
    i8_1: I8 = 65
    i8_2: I8 = -65
    i16_1: I16 = 512
    i16_2: I16 = -512
    i32_1: I32 = 70000
    i32_2: I32 = -70000
    i64_1: I64 = 12121212
    i64_2: I64 = -12121212


PRIMITIVES = bytes.fromhex(
    "01 00 82 0200 00011170 0000000000b8f47c 41 bf 0200 fe00 00011170 fffeee90 0000000000b8f47c"
    "ffffffffff470b84"
)


def test_primitives_are_saved_as_qemu_saves_them() -> None:
    assert save(Primitives()) == PRIMITIVES


def test_primitives_are_loaded_as_qemu_saved_them() -> None:
    zero = Primitives(*[False] * 2, *[0] * 12)
    load(zero, PRIMITIVES, 1)
    assert zero == Primitives()


@state("pair")
@dataclass
class Pair:
    flag: bool
    number: U8


class Text:
    """Text with a length before it."""

    type = "text"

    def save(self, value: str) -> bytes:
        raw = value.encode("ascii")
        return bytes([len(raw)]) + raw

    def load(self, data: memoryview) -> tuple[str, int]:
        if not data or data[0] >= len(data):
            raise ValueError("text that is not there")
        return bytes(data[1 : 1 + data[0]]).decode("ascii"), 1 + data[0]


KINDS: list[tuple[Any, Any, Any, str]] = [
    # annotation, value, other value to be loaded over, bytes
    (Timer, 5_000_000_000, None, "000000012a05f200"),
    (Timer, None, 7, "ffffffffffffffff"),
    (Float64, 1.5, 0.0, "3ff8000000000000"),
    (Annotated[bytes, Buffer(4)], b"abcd", b"", "61626364"),
    (Annotated[bytearray, Buffer(2, 1, of=4)], bytearray(b"abcd"), bytearray(b"axyd"), "6263"),
    (Annotated[list[U16], Array(3)], [1, 2, 3], [0, 0, 0], "000100020003"),
    (Annotated[list[bool], Array(2)], [True, False], [], "0100"),
    (Annotated[list[Timer], Array(2)], [None, 1], [], "ffffffffffffffff0000000000000001"),
    (Annotated[list[list[U8]], Array(2, 3)], [[1, 2, 3], [4, 5, 6]], [], "010203040506"),
    (Annotated[list[Pair], Array(2)], [Pair(True, 2), Pair(False, 3)], [], "01020003"),
    (
        Annotated[list[I32 | None], Array(4)],
        [0, None, 2, 3],
        [9, None, 9, 9],
        "00000000 30 00000002 00000003",
    ),
    (
        Annotated[list[Pair | None], Array(2)],
        [None, Pair(True, 2)],
        [None, Pair(False, 0)],
        "30 0102",
    ),
    (
        Annotated[list[Pair], Queue()],
        [Pair(True, 0x82), Pair(False, 0x41)],
        [Pair(True, 1)],
        "01 01 82 01 00 41 00",
    ),
    (Annotated[list[Pair], Queue()], [], [Pair(True, 1)], "00"),
    (
        Annotated[dict[int, Pair], Tree()],
        {7: Pair(True, 1), 2: Pair(False, 9)},
        {},
        "00000002 01 0000000000000002 0009 01 0000000000000007 0101 00",
    ),
    (Annotated[int, Bitmap(70)], 1 | 1 << 65, 0, "0000000000000001 0000000000000002"),
    (Annotated[int, Bitmap(64)], 1 << 63, 0, "8000000000000000"),
    (Annotated[str, Custom(Text())], "hey", "", "03 686579"),
    (Pair, Pair(True, 4), Pair(False, 0), "0104"),
]


@pytest.mark.parametrize(
    ("annotation", "wire"), [(U8, "02"), (U16, "0002"), (U32, "00000002"), (I32, "00000002")]
)
def test_a_length_may_stand_in_a_field_of_any_width(annotation: Any, wire: str) -> None:
    class Device:
        def __init__(self) -> None:
            self.n = 2
            self.words = [5, 6]

    words = Annotated[list[U16], VarArray("n", bound=4)]
    Device.__annotations__ = {"n": annotation, "words": words}
    saved = save(device("dev")(Device)())
    assert saved == bytes.fromhex(f"{wire} 0005 0006")
    loaded = Device()
    loaded.n, loaded.words = 0, []
    load(loaded, saved, 1)
    assert (loaded.n, loaded.words) == (2, [5, 6])


def declared(annotation: Any) -> Any:
    class Device:
        def __init__(self, value: Any) -> None:
            self.value = value

    Device.__annotations__ = {"value": annotation}
    return device("dev")(Device)


@pytest.mark.parametrize(("annotation", "value", "other", "wire"), KINDS)
def test_kinds_are_saved_and_loaded_as_qemu_has_them(
    annotation: Any, value: Any, other: Any, wire: str
) -> None:
    cls = declared(annotation)
    assert save(cls(value)).hex() == wire.replace(" ", "")
    loaded = cls(other)
    load(loaded, bytes.fromhex(wire), 1)
    assert loaded.value == value
    assert type(loaded.value) is type(value)


@device("counted")
@dataclass
class Counted:
    n: U16 = 0
    half: U8 = 0
    _gap: ClassVar[Annotated[None, Gap(2)]]
    words: Annotated[list[U16], VarArray("n", bound=4)] = field(default_factory=list)
    pairs: Annotated[list[Pair], VarArray("half", bound=4, multiple=2)] = field(
        default_factory=list
    )
    text: Annotated[bytes, VarBuffer("n", bound=4)] = b""


def test_counts_and_gaps_stand_where_they_are_declared() -> None:
    counted = Counted(2, 1, [5, 6], [Pair(True, 1), Pair(False, 2)], b"hi")
    wire = "0002 01 0000 0005 0006 0101 0002 6869"
    assert save(counted).hex() == wire.replace(" ", "")
    loaded = Counted()
    load(loaded, bytes.fromhex(wire.replace("01 0000", "01 beef")), 1)
    assert loaded == counted
