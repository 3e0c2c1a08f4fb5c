from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire import described
from tests.wire import strategies as some
from tests.wire.feeding import (
    check_invariant,
    check_round_trip,
    check_truncation,
    read,
    read_in_every_way,
)
from tests.wire.streams import (
    BLOCKS,
    CONFIGURATION,
    DESCRIPTION,
    EARLY,
    END,
    EOF,
    HEADER,
    OPEN_STREAMS,
    PACKAGE,
    PAGES,
    RAM,
    STATE,
    STREAMS,
    TAIL,
    K,
    devices,
    end,
    join,
    part,
    start,
)
from vmferry.errors import LimitExceeded, StreamError, TruncatedStream, UsageError
from vmferry.wire.commands import (
    EnableColo,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    ReceivedBitmap,
    SwitchoverStart,
)
from vmferry.wire.configuration import Configuration
from vmferry.wire.devices import DeviceSection
from vmferry.wire.ram import RamBlock, RamBlocks
from vmferry.wire.reader import StreamReader, Tolerate, physical_memory
from vmferry.wire.sections import SectionFooter, SectionStart

ALL = STREAMS | OPEN_STREAMS
streams = pytest.mark.parametrize("data", ALL.values(), ids=ALL.keys())
closed = pytest.mark.parametrize("data", STREAMS.values(), ids=STREAMS.keys())


@streams
def test_stream_comes_back_however_it_is_read(data):
    check_round_trip(StreamReader, data)


@settings(max_examples=150)
@given(some.whole_streams(), st.integers(0, 99))
def test_any_stream_comes_back(stream, cut):
    data, devices, page_size = stream
    outcome = check_invariant(StreamReader, data, cut)
    assert (outcome.error, outcome.finished, outcome.consumed) == (None, True, len(data))
    sections = [event[1] for event in outcome.events if event[0] == "DeviceSection"]
    assert [(parts["name"], parts["body"]) for parts in sections] == devices
    assert outcome.events[-1][1]["page_size"] == page_size


@closed
def test_what_stands_behind_a_stream_is_left_alone(data):
    whole = read(StreamReader(), [data])
    for junk in (b"\0", b"\6", data, b"\xff" * 4000):
        outcome = read(StreamReader(), [data + junk], end=False)
        assert outcome.result() == whole.result()
        assert outcome.finished
        assert outcome.consumed == len(data)


@closed
def test_end_is_found_while_the_channel_stays_open(data):
    outcome = read(StreamReader(), [data[:-1]], end=False)
    assert not outcome.finished
    assert read(StreamReader(), [data], end=False).finished


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "no footers"])
def test_stream_cut_short_is_refused_as_cut_off(name):
    # Without footers any zero byte among the devices may be the end, with no description behind it.
    check_truncation(StreamReader, STREAMS[name])


def events(data, kind, **options):
    return [event for event in StreamReader(**options).feed(data) if isinstance(event, kind)]


def test_reader_tells_what_it_learned():
    reader = StreamReader()
    assert reader.page_size == 4096
    list(reader.feed(STREAMS["postcopy announced"]))
    assert reader.configuration == Configuration("board-7.2", page_bits=10)
    assert reader.page_size == K
    assert reader.footers
    assert reader.return_path
    assert not reader.postcopy
    assert reader.description is not None
    assert reader.description.text == DESCRIPTION


def test_reader_tells_of_a_switch_to_postcopy():
    reader = StreamReader()
    list(reader.feed(STREAMS["postcopy"]))
    assert reader.postcopy
    (package,) = events(STREAMS["postcopy"], Package)
    assert package.content == PACKAGE.content
    assert STREAMS["postcopy"][package.offset :].startswith(PACKAGE.content)


def test_devices_are_cut_apart_where_they_are_described():
    sections = events(STREAMS["plain"], DeviceSection)
    assert [(s.number, s.name, s.described) for s in sections] == [
        (0, "timer", True),
        (9, "fw_cfg", True),
    ]
    for found in sections:
        assert STREAMS["plain"][found.offset :].startswith(found.encode())


def test_footers_are_expected_of_a_machine_with_a_configuration():
    data = join(HEADER, CONFIGURATION, TAIL)
    reader = StreamReader(tolerate=Tolerate.NO_RAM)
    assert len([e for e in reader.feed(data) if isinstance(e, DeviceSection)]) == 2
    bare = join(HEADER, described.tail(devices(footer=False), DESCRIPTION))
    assert len(events(bare, DeviceSection, tolerate=Tolerate.NO_RAM, page_size=K)) == 2


def test_machine_without_configuration_has_the_page_size_asked_for():
    data = join(HEADER, RAM, TAIL)
    assert read(StreamReader(page_size=K), [data]).error is None
    assert "the word 0x0000000000001804" in str(read(StreamReader(), [data]).error)


@pytest.mark.parametrize("size", [0, 1, 512, 1000, 4097, 131072])
def test_page_size_that_cannot_be_is_refused(size):
    with pytest.raises(UsageError, match="1024 to 65536 bytes, a power of two; not"):
        StreamReader(page_size=size)


def test_ram_is_bounded_by_the_machine_that_reads():
    assert physical_memory() > 1 << 28
    too_much = RamBlocks((RamBlock("a", physical_memory() // K * K + K),))
    data = join(HEADER, CONFIGURATION, start(2, too_much, END))
    error = read(StreamReader(), [data], end=False).error
    assert isinstance(error, LimitExceeded)
    assert read(StreamReader(max_ram=1 << 62), [data], end=False).error is None


def test_background_snapshot_has_no_end_of_ram():
    data = join(HEADER, CONFIGURATION, start(2, BLOCKS, END), part(2, PAGES, END), TAIL)
    error = read(StreamReader(), [data]).error
    assert "the end of section ram" in str(error)
    check_round_trip(lambda: StreamReader(tolerate=Tolerate.NO_END), data)


def test_commands_without_rules_of_order_may_stand_anywhere():
    data = join(
        *(HEADER, CONFIGURATION, OpenReturnPath(), OpenReturnPath(), EnableColo()),
        *(start(2, BLOCKS, END), Ping(7), end(2, END), SwitchoverStart(), TAIL),
    )
    check_round_trip(StreamReader, data)


START = join(HEADER, CONFIGURATION, start(2, BLOCKS, END))
ADVISED = join(HEADER, CONFIGURATION, PostcopyAdvise(K, K), start(2, BLOCKS, END))
SWITCHED = join(ADVISED, PACKAGE)
IGNORE = Configuration("board-7.2", 10, ("x-ignore-shared",))
MAPPED = Configuration("board-7.2", 10, ("mapped-ram",))
BAD = [
    # What is wrong, what stands before, the bytes that show it, the error's text.
    ("a type of 9", START, "09", "expected a section: .*, found the type byte 0x09"),
    ("a type of 0xff", HEADER, "ff", "found the type byte 0xff"),
    ("a subsection", START, "05", "found the type byte 0x05"),
    ("a description", START, "06", "found the type byte 0x06"),
    ("a second configuration", START, "07", "found the type byte 0x07"),
    ("a footer alone", START, "7e", "found the type byte 0x7e"),
    (
        "a file for mapped RAM",
        HEADER,
        MAPPED.encode() + b"\1",
        "expected a stream, found a file with the pages",
    ),
    ("a part of nothing", HEADER, "02 00000000", "a section that was started, found 0"),
    ("a part of section 9", START, "02 00000009", "a section that was started, found 9"),
    ("an end of section 2^32 - 1", START, "03 ffffffff", "was started, found 4294967295"),
    ("a part behind the end", START + end(2, END), "02 00000002", "nothing more of section ram"),
    ("a second end", START + end(2, END), "03 00000002", "nothing more of section ram after its"),
    (
        "a second section ram",
        START,
        SectionStart(9, "ram", 0, 4),
        "one section ram, found a second one",
    ),
    ("a number in use", START, SectionStart(2, "block", 0, 1), "not in use, found number 2 again"),
    ("ram of version 3", HEADER, SectionStart(2, "ram", 0, 3), "version 4 of section ram, found 3"),
    ("ram of version 5", HEADER, SectionStart(2, "ram", 0, 5), "version 4 of section ram, found 5"),
    ("a second instance", HEADER, SectionStart(2, "ram", 1, 4), "instance 0 of section ram, .* 1"),
    ("an unknown section", HEADER, SectionStart(2, "vfio", 0, 1), 'found "vfio" .*have no length'),
    ("a section without a name", HEADER, "01 00000002 00", "a section's name as printable text"),
    ("a ping without an answer", START, Ping(1), "behind the opening of a return path"),
    ("postcopy announced late", START, PostcopyAdvise(K, K), "announced once, before guest memory"),
    (
        "postcopy announced twice",
        join(HEADER, CONFIGURATION, PostcopyAdvise()),
        PostcopyAdvise(),
        "postcopy announced once, before guest memory, found command 3",
    ),
    (
        "other pages in postcopy",
        join(HEADER, CONFIGURATION),
        PostcopyAdvise(0x1000, 0x1000),
        "target pages of 1024 bytes, found 4096 .*; read it with page_size=4096",
    ),
    ("LISTEN alone", ADVISED, PostcopyListen(), "this command inside a package, found command 4"),
    ("RUN alone", ADVISED, PostcopyRun(), "this command inside a package, found command 5"),
    ("a package out of the blue", START, PACKAGE, "postcopy announced, and begun once"),
    ("a discard out of the blue", START, RamDiscard("a", ((0, K),)), "announced, and begun once"),
    ("a second package", SWITCHED, PACKAGE, "announced, and begun once, found command 7"),
    ("a discard of nothing known", ADVISED, RamDiscard("c", ((0, K),)), 'list before, found "c"'),
    ("a discard behind", ADVISED, RamDiscard("a", ((3 * K, 2 * K),)), "pages up to 0x1000, found"),
    ("a discard far behind", ADVISED, RamDiscard("a", ((5 * K, K),)), "found 0x1400.0x400"),
    ("a discard of half a page", ADVISED, RamDiscard("a", ((0, 512),)), "found 0x0.0x200"),
    ("an odd discard", ADVISED, RamDiscard("a", ((0, K), (1, K))), "found 0x1.0x400"),
    (
        "a discard before RAM",
        join(HEADER, CONFIGURATION, PostcopyAdvise(K, K)),
        RamDiscard("a", ((0, K),)),
        'a RAM block from the list before, found "a"',
    ),
    ("a discard too late", SWITCHED, RamDiscard("a", ((0, K),)), "announced, and begun once"),
    ("a bitmap asked for", ADVISED, ReceivedBitmap("a"), "in the recovery of a postcopy alone"),
    ("a resume", ADVISED, PostcopyResume(), "in the recovery of a postcopy alone"),
    ("a start in postcopy", SWITCHED, "01", "no new section in postcopy, found the type byte 0x01"),
    ("a device in postcopy", SWITCHED, "04", "no new section in postcopy, found the type byte"),
    ("an end without RAM", join(HEADER, CONFIGURATION), "00", "guest memory before .*no-ram"),
    ("a device without RAM", join(HEADER, CONFIGURATION), "04", "guest memory before the devices"),
    (
        "RAM without blocks",
        join(HEADER, CONFIGURATION, start(2, END), end(2, END)),
        "00",
        "guest memory before the devices and the end, found none",
    ),
    ("an end without RAM's end", START + part(2, END), "00", "the end of section ram.*no-end"),
    ("a device without RAM's end", START + part(2, END), "04", "the end of section ram"),
    ("an end in postcopy without RAM's", SWITCHED, "00", "the end of section ram"),
    (
        "something behind the end",
        join(HEADER, CONFIGURATION, RAM, EOF),
        "07",
        "a description .06. or nothing behind the end, found 0x07",
    ),
]


@pytest.mark.parametrize(("wrong", "before", "bad", "message"), BAD, ids=[b[0] for b in BAD])
def test_stream_is_refused_with(wrong, before, bad, message):
    data = before + (bytes.fromhex(bad) if isinstance(bad, str) else join(bad))
    outcome = read(StreamReader(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    in_front = {"a section without a name": 5}.get(wrong, 0)
    assert outcome.place.offset == len(before) + in_front
    assert outcome.place.channel == "main"
    assert read_in_every_way(StreamReader, data).error is not None


TWICE = described.section(0, "timer", described.fill(STATE)) * 2
REPEATED = {
    "described": described.tail(
        TWICE, described.description(*2 * [described.device("timer", STATE)], page_size=K)
    ),
    "not described": TWICE + EOF,
}


@pytest.mark.parametrize("tail", REPEATED.values(), ids=REPEATED)
def test_device_that_comes_again_is_refused(tail):
    before = join(HEADER, CONFIGURATION, RAM)
    outcome = read_in_every_way(StreamReader, before + tail)
    with pytest.raises(StreamError, match="expected each device once, found instance 0 again"):
        raise outcome.error or AssertionError("not refused")
    place = outcome.place
    assert (place.offset, place.section) == (len(before) + len(TWICE) // 2, "timer")


def test_device_that_comes_early_and_again_is_refused():
    before = join(HEADER, CONFIGURATION, start(2, BLOCKS, END), EARLY)
    outcome = read_in_every_way(StreamReader, join(before, EARLY, part(2, END), end(2, END)))
    with pytest.raises(StreamError, match="each device once, found instance 0 again"):
        raise outcome.error or AssertionError("not refused")
    assert outcome.place.offset == len(before)


BAD_FOOTERS = [
    ("another number", "7e 00000003", "expected the footer 7e 00 00 00 02, found 7e 00 00 00 03"),
    ("none", "02 00000002", "expected the footer 7e 00 00 00 02, found 02 00 00 00 02"),
]


@pytest.mark.parametrize(("wrong", "wire", "message"), BAD_FOOTERS)
def test_footer_is_refused_with(wrong, wire, message):
    before = join(START, part(2, END), b"02 00000002"[:0], part(2, END, footer=False))
    data = before + bytes.fromhex(wire)
    outcome = read(StreamReader(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert (outcome.place.offset, outcome.place.section) == (len(before), "ram")


def test_footer_where_there_were_none_is_refused():
    data = join(HEADER, CONFIGURATION, start(2, BLOCKS, END, footer=False), SectionFooter(2))
    first = read(StreamReader(), [data], end=False)
    assert first.error is None, "that was one, though"
    data = join(data[:-5], part(2, END, footer=False), SectionFooter(2))
    assert "the type byte 0x7e" in str(read(StreamReader(), [data], end=False).error)


def test_error_in_a_section_names_it_and_its_block():
    data = START + part(2, PAGES, b"\0" * 6 + b"\x10\x28", footer=False)
    outcome = read(StreamReader(), [data], end=False)
    assert str(outcome.error) == (
        'expected a page below 0x1000, the end of its block, found one at 0x1000 (channel "main",'
        f' byte {len(data) - 8:#x}, section "ram", block "a")'
    )


def test_guest_addresses_are_read_where_a_capability_announces_them():
    blocks = RamBlocks((RamBlock("a", K, address=0xFFFC0000),))
    data = join(HEADER, IGNORE, start(2, blocks, END), end(2, END), TAIL)
    assert events(data, RamBlocks) == [blocks]


def test_page_sizes_are_read_where_postcopy_announces_several():
    blocks = RamBlocks((RamBlock("m", 2 << 20, page_size=2 << 20), RamBlock("r", 4096)))
    advice = PostcopyAdvise(0x201000, 0x1000)
    data = join(HEADER, Configuration("pc-7.2"), advice, start(2, blocks, END), end(2, END))
    assert events(data, RamBlocks) == [blocks]
    one = join(HEADER, Configuration("pc-7.2"), PostcopyAdvise(0x1000, 0x1000))
    plain = RamBlocks((RamBlock("m", 2 << 20), RamBlock("r", 4096)))
    assert events(join(one, start(2, plain, END)), RamBlocks) == [plain]


def test_description_of_other_pages_is_refused():
    text = DESCRIPTION.replace(b"1024", b"4096")
    data = join(HEADER, CONFIGURATION, RAM, described.tail(devices(), text))
    outcome = read(StreamReader(), [data])
    assert "expected target pages of 1024 bytes, found 4096" in str(outcome.error)
    assert outcome.place.offset == len(data) - len(text) - 5


def test_input_that_ends_at_once_is_cut_off():
    assert isinstance(read(StreamReader(), []).error, TruncatedStream)
