from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given

from tests.wire import strategies as some
from tests.wire.feeding import Steps, check_truncation, read
from vmferry.errors import LimitExceeded, StreamError
from vmferry.wire.buffer import Cursor, Parse
from vmferry.wire.configuration import Configuration, parse_configuration
from vmferry.wire.machine import machine_version, target_page_size

UUID_OF_THE_VM = UUID("00112233-4455-6677-8899-aabbccddeeff")
HEAD = "07 0000000d 70632d6934343066782d372e32"
PAGE_BITS = b"\x05\x1econfiguration/target-page-bits".hex() + "00000001 0000000c"
CAPABILITIES = b"\x05\x1aconfiguration/capabilities".hex() + "00000001"
IGNORE_SHARED = "00000001 0e" + b"x-ignore-shared".hex()
UUID_SECTION = b"\x05\x12configuration/uuid".hex() + "00000001"


def following(at: Cursor) -> Parse[None]:
    """What stands behind the section: it has no end of its own."""
    yield from at.number(1, "a section")


def steps() -> Steps:
    return Steps(parse_configuration, following)


GOLDEN = [
    (Configuration("pc-i440fx-7.2"), HEAD),
    (Configuration("virt-7.2", page_bits=12), "07 00000008" + b"virt-7.2".hex() + PAGE_BITS),
    (
        Configuration("pc-i440fx-7.2", capabilities=("x-ignore-shared",)),
        HEAD + CAPABILITIES + "00000001 0f" + b"x-ignore-shared".hex(),
    ),
    (
        Configuration("pc-i440fx-7.2", uuid=UUID_OF_THE_VM),
        HEAD + UUID_SECTION + "00112233445566778899aabbccddeeff",
    ),
    (
        Configuration("pc-i440fx-7.2", 12, ("a", "b"), UUID_OF_THE_VM),
        HEAD
        + PAGE_BITS
        + CAPABILITIES
        + "00000002 0161 0162"
        + UUID_SECTION
        + "00112233445566778899aabbccddeeff",
    ),
]


@pytest.mark.parametrize(("event", "wire"), GOLDEN)
def test_configuration_is_read_and_written_as_captured(event, wire):
    data = bytes.fromhex(wire)
    assert event.encode() == data
    assert list(steps().feed(data + b"\1")) == [event]
    check_truncation(steps, data + b"\1")


@given(some.configurations)
def test_any_configuration_comes_back(event):
    reader = steps()
    assert list(reader.feed(event.encode() + b"\1")) == [event]


BAD = [
    # What is wrong, the bytes up to the one that shows it, the error, its text, its offset.
    ("no name", "07 00000000", StreamError, "printable text of 1 to 255 bytes, found an empty", 1),
    ("a name of 256 bytes", "07 00000100", LimitExceeded, "at most 255 bytes, found 256", 1),
    ("a name of 4 GiB", "07 ffffffff", LimitExceeded, "255 bytes, found 4294967295", 1),
    ("a name with NUL", "07 00000002 6100", StreamError, r'the machine type .*"a\\x00"', 1),
    (
        "an unknown subsection",
        HEAD + b"\x05\x11configuration/foo".hex(),
        StreamError,
        'found "configuration/foo"',
        18,
    ),
    (
        "a subsection of another owner",
        HEAD + b"\x05\x03abc".hex(),
        StreamError,
        'expected "configuration/target-page-bits" or .*, found "abc"',
        18,
    ),
    ("a subsection twice", HEAD + PAGE_BITS * 2, StreamError, "expected .*uuid.*, found", 58),
    (
        "subsections in another order",
        HEAD + CAPABILITIES + "00000001 0161" + PAGE_BITS,
        StreamError,
        'expected "configuration/uuid", found "configuration/target-page-bits"',
        56,
    ),
    (
        "a subsection behind the last",
        HEAD + UUID_SECTION + "00" * 16 + PAGE_BITS,
        StreamError,
        "expected no further subsection",
        58,
    ),
    (
        "another version",
        HEAD + PAGE_BITS.replace("00000001 0000000c", "00000002"),
        StreamError,
        "expected version 1 of configuration/target-page-bits, found 2",
        18,
    ),
    ("9 page bits", HEAD + PAGE_BITS[:-2] + "09", StreamError, "10 to 16 bits .*, found 9", 54),
    ("17 page bits", HEAD + PAGE_BITS[:-2] + "11", StreamError, "1 to 64 KiB.*, found 17", 54),
    ("no capability", HEAD + CAPABILITIES + "00000000", LimitExceeded, "1 to 64 cap.* 0", 50),
    ("65 capabilities", HEAD + CAPABILITIES + "00000041", LimitExceeded, "found 65", 50),
    ("an empty capability", HEAD + CAPABILITIES + "00000001 00", StreamError, "a capability", 54),
    (
        "a capability twice",
        HEAD + CAPABILITIES + "00000002 0161 0161",
        StreamError,
        'each capability once, found "a"',
        56,
    ),
]


@pytest.mark.parametrize(
    ("wrong", "wire", "kind", "message", "offset"), BAD, ids=[b[0] for b in BAD]
)
def test_configuration_is_refused_with(wrong, wire, kind, message, offset):
    data = bytes.fromhex(wire)
    outcome = read(steps(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError
    assert type(outcome.error) is kind
    assert (outcome.place.offset, outcome.place.section) == (offset, "configuration")


@pytest.mark.parametrize(
    ("configuration", "size"),
    [
        (None, 4096),
        (Configuration("pc-i440fx-7.2"), 4096),
        (Configuration("virt-7.2", page_bits=12), 4096),
        (Configuration("virt-7.2", page_bits=16), 65536),
        (Configuration("lm3s811evb", page_bits=10), 1024),
        (Configuration("clipper"), 8192),
        (Configuration("SUN4U"), 8192),
    ],
)
def test_page_size_is_told_by_the_stream_or_the_machine(configuration, size):
    assert target_page_size(configuration) == size


@pytest.mark.parametrize(
    ("machine", "version"),
    [
        ("pc-i440fx-7.2", (7, 2)),
        ("pc-q35-10.0", (10, 0)),
        ("s390-ccw-virtio-8.2", (8, 2)),
        ("microvm", None),
        ("pc-7.2-rhel", None),
    ],
)
def test_version_is_told_by_the_name_of_the_machine(machine, version):
    assert machine_version(machine) == version
