"""Stopped machines to a file and back: round trips, and everything that does not fit."""

from __future__ import annotations

import copy
import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmferry
from tests.migration.boards import Board, Channel, Disk, Overrun, Passthrough, Timer, Uart, board
from tests.vmstate.analyze import VARIABLE, analyze, find_script
from vmferry import LimitExceeded, StateError, StorageError, StreamError, UsageError
from vmferry.vmstate import U8, U16, U32, VarArray, device
from vmferry.vmstate import load as load_object
from vmferry.vmstate.decode import decode_device
from vmferry.wire import limits
from vmferry.wire.description import VmDescription
from vmferry.wire.devices import DeviceSection
from vmferry.wire.reader import StreamReader, Tolerate


def events(path: Path) -> list[Any]:
    reader = StreamReader(tolerate=Tolerate.NO_RAM, framed=True)
    found = [*reader.feed(path.read_bytes()), *([] if reader.finished else reader.feed(b""))]
    assert reader.finished
    assert b"".join(event.encode() for event in found) == path.read_bytes()
    return found


def devices_of(machine: Board) -> list[Any]:
    return [section.device for section in machine.registry.devices]


def full_board() -> Board:
    uart = Uart(300, bytearray(b"abcd"), 9, Overrun(77))
    timer = Timer([Channel(i, i) for i in range(3)], 2, [1, 2], [Channel(8, 9)])
    made = board(uart, Uart(2), timer, disk=Disk(bytes(range(100))))
    made.registry.register(Uart(4), path="pci/3")
    return made


def empty_board() -> Board:
    made = board(Uart(), Uart(), Timer(), disk=Disk())
    made.registry.register(Uart(), path="pci/3")
    return made


def test_machine_comes_back(tmp_path: Path) -> None:
    saved, loaded = full_board(), empty_board()
    vmferry.save(saved, tmp_path / "snapshot")
    vmferry.load(loaded, tmp_path / "snapshot")
    assert devices_of(loaded) == devices_of(saved)
    assert loaded.registry.handlers[0].handler.content == bytes(range(100))  # type: ignore[attr-defined]
    assert devices_of(loaded)[1].loaded == ["uart 300 version 2"]
    vmferry.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "snapshot").read_bytes()


def test_devices_are_in_the_order_of_priorities(tmp_path: Path) -> None:
    vmferry.save(full_board(), tmp_path / "s")
    sections = [event for event in events(tmp_path / "s") if isinstance(event, DeviceSection)]
    assert [(s.name, s.instance, s.version) for s in sections] == [
        ("timer", 0, 1),
        ("uart", 0, 2),
        ("uart", 1, 2),
        ("pci/3/uart", 0, 2),
    ]
    assert [s.number for s in sections] == [1, 2, 3, 4]
    assert all(s.described and s.footer for s in sections)


def test_description_decodes_every_device(tmp_path: Path) -> None:
    vmferry.save(full_board(), tmp_path / "s")
    *found, description = events(tmp_path / "s")
    assert isinstance(description, VmDescription)
    described = {(d.name, d.instance): d for d in description.devices}
    assert list(described) == [
        ("disk", 0),
        *[(s.name, s.instance) for s in found if isinstance(s, DeviceSection)],
    ]
    for section in found:
        if isinstance(section, DeviceSection):
            state = decode_device(described[section.name, section.instance], section.body)
            assert not [node for _, node in state.walk() if node.name == "(rest)"]


def test_open_stream_surveys_a_snapshot(tmp_path: Path) -> None:
    vmferry.save(full_board(), tmp_path / "s")
    survey = vmferry.open_stream(tmp_path / "s")
    assert survey.configuration is not None
    assert survey.configuration.machine == "board-1.0"
    assert [(s.name, s.kind, s.count) for s in survey.sections if s.name == "disk"] == [
        ("disk", "start", 1),
        ("disk", "part", 7),
        ("disk", "end", 1),
    ]
    assert str(next(survey.states("pci/3/uart"))["divider"]).startswith("Value")
    assert survey.trailing == 0


def test_qemus_script_reads_all_of_it(tmp_path: Path) -> None:
    script = find_script()
    if script is None:
        pytest.skip(f"{VARIABLE} does not say where analyze-migration.py is, nor to fetch it")
    vmferry.save(full_board(), tmp_path / "s")
    tree = analyze(script, tmp_path / "s")
    assert list(tree) == ["disk (0)", "timer (1)", "uart (2)", "uart (3)", "pci/3/uart (4)"]
    assert tree["uart (2)"] == {
        "divider": "0x012c",
        "fifo": "61 62 63 64",
        "speed": "0x09",
        "uart/overrun": {"lost": "0x0000004d"},
    }
    assert tree["timer (1)"]["channels"][2] == {"count": "0x00000002", "mode": "0x02"}
    assert tree["timer (1)"]["log"] == ["0x0001", "0x0002"]
    assert tree["disk (0)"]["capacity"] == "0x00000014"


def test_empty_machine_is_saved_and_loaded(tmp_path: Path) -> None:
    vmferry.save(board(), tmp_path / "s")
    vmferry.load(board(), tmp_path / "s")
    assert [type(event).__name__ for event in events(tmp_path / "s")][-2:] == [
        "EndOfStream",
        "VmDescription",
    ]


def test_stream_may_call_a_device_by_its_alias(tmp_path: Path) -> None:
    old, new = board(), board()
    old.registry.register(Uart(5), instance=3)
    renamed = Uart()
    new.registry.register(renamed, instance=0, alias=3)
    vmferry.save(old, tmp_path / "s")
    vmferry.load(new, tmp_path / "s")
    assert renamed.divider == 5


def test_old_version_loads_in_a_new_class(tmp_path: Path) -> None:
    @device("uart")
    @dataclass
    class OldUart:
        divider: U16 = 6
        low: U16 = 0x6162
        high: U16 = 0x6364

    vmferry.save(board(OldUart()), tmp_path / "s")
    new = Uart(speed=9)
    vmferry.load(board(new), tmp_path / "s")
    assert (new.divider, new.fifo, new.speed) == (6, b"abcd", 9)
    assert new.loaded == ["uart 6 version 1"]


# Iterative handlers


def test_handler_is_asked_in_order(tmp_path: Path) -> None:
    disk, other = Disk(bytes(range(100))), Disk()
    vmferry.save(board(disk=disk), tmp_path / "s")
    assert disk.calls == ["setup", "complete 20", "cleanup"]
    vmferry.load(board(disk=other), tmp_path / "s")
    assert other.content == disk.content
    assert other.calls == ["load 3: 4", *["load 3: 20"] * 6, "load 3: 8", "load 3: 0"]


def test_handlers_of_one_name_differ_by_instance(tmp_path: Path) -> None:
    disks, others = [Disk(b"a" * 40), Disk(b"b" * 40)], [Disk(bytes(40)), Disk(bytes(40))]
    saved, loaded = board(disk=disks[0]), board(disk=others[0])
    saved.registry.register_iterative(disks[1])
    loaded.registry.register_iterative(others[1])
    vmferry.save(saved, tmp_path / "s")
    vmferry.load(loaded, tmp_path / "s")
    assert [disk.content for disk in others] == [disk.content for disk in disks]


class TooMuch(Disk):
    def iterate(self, piece: Any) -> None:
        piece.write(bytes(21))


class Stuck(Disk):
    def iterate(self, piece: Any) -> None:
        pass


class Endless(Disk):
    def pending(self) -> int:
        return 1 << 60

    def iterate(self, piece: Any) -> None:
        piece.write(b"more")


class Failing(Disk):
    def setup(self, piece: Any) -> None:
        raise ValueError(f"no such disk of {piece.room}")


class Sloppy(Disk):
    def load(self, piece: Any, version: int) -> None:  # noqa: ARG002
        if len(piece):
            piece.read(1)


class Greedy(Disk):
    def load(self, piece: Any, version: int) -> None:  # noqa: ARG002
        piece.read(50)


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (TooMuch, r'at most 20 bytes, found 21 or more \(section "disk"\)'),
        (Stuck, r"some of what is pending, found a piece without a byte"),
        (Endless, r'less than \d+ bytes pending .*, found \d+ \(section "disk"\)'),
        (Failing, "a state that setup accepts, found no such disk of 20"),
    ],
)
def test_handler_that_cannot_go_on_is_cleaned_up(
    tmp_path: Path, handler: type[Disk], text: str
) -> None:
    disk = handler()
    with pytest.raises(StateError, match=text):
        vmferry.save(board(disk=disk), tmp_path / "s")
    assert disk.calls[-1:] == ["cleanup"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("disk", "text"),
    [
        (Sloppy(), '"disk" instance 0 to take all 4 bytes of a piece, found 3'),
        (Greedy(), "50 bytes, found 4, and the end of the piece"),
        (Disk(bytes(99)), "a state that load accepts, found a disk of another size"),
    ],
)
def test_handler_that_refuses_leaves_the_devices(tmp_path: Path, disk: Disk, text: str) -> None:
    vmferry.save(board(Uart(5), disk=Disk()), tmp_path / "s")
    uart = Uart(6)
    with pytest.raises(StateError, match=rf'{text}.*section "disk".*in part: do not run it'):
        vmferry.load(board(uart, disk=disk), tmp_path / "s")
    assert uart == Uart(6)


def test_newer_version_of_a_handler_is_refused(tmp_path: Path) -> None:
    vmferry.save(board(disk=Disk()), tmp_path / "s")
    old = Disk()
    old.version = 2  # type: ignore[misc]
    with pytest.raises(StateError, match=r'version 2 of "disk" instance 0, or an older, found 3'):
        vmferry.load(board(disk=old), tmp_path / "s")
    assert old.calls == []


# What does not fit


@device("uart", version=3, minimum_version=3)
@dataclass
class NewUart:
    divider: U16 = 0


@device("uart", version=2)
@dataclass
class ShortUart:
    divider: U16 = 0


@device("uart", version=2)
@dataclass
class LongUart:
    divider: U32 = 0
    more: U32 = 0


@device("rtc")
@dataclass
class Rtc:
    second: U8 = 0


UNFIT: list[tuple[str, Board, str]] = [
    ("another machine", board(Uart(), name="board"), '"board", found "board-1.0" .*byte 0x8'),
    (
        "no such device",
        board(),
        r'this machine has, found "uart" instance 0 .byte 0x16, section "uart".$',
    ),
    ("another instance", board(), "see below"),
    ("a lacking device", board(Uart(), Rtc()), 'nothing of "rtc" instance 0; allow by name'),
    ("a lacking handler", board(Uart(), disk=Disk()), 'nothing of "disk" instance 0; allow'),
    ("too old a version", board(NewUart()), r"uart: expected version 3 to 3 of uart, found 2"),
    ("bytes left", board(ShortUart()), "end of the state after 2 bytes, found 5 more"),
    ("bytes missing", board(LongUart()), "uart.more: expected 4 bytes, found 3"),
]
UNFIT[2][1].registry.register(Uart(), instance=4)
UNFIT[2] = (UNFIT[2][0], UNFIT[2][1], '"uart" instance 0 .*; of that name it has instance 4')


@pytest.mark.parametrize(("machine", "text"), [r[1:] for r in UNFIT], ids=[r[0] for r in UNFIT])
def test_what_does_not_fit_changes_nothing(tmp_path: Path, machine: Board, text: str) -> None:
    vmferry.save(board(Uart(300, bytearray(b"abcd"), 9)), tmp_path / "s")
    before = copy.deepcopy(devices_of(machine))
    with pytest.raises(StreamError, match=text):
        vmferry.load(machine, tmp_path / "s")
    assert devices_of(machine) == before


def test_bad_device_behind_good_ones_changes_none(tmp_path: Path) -> None:
    vmferry.save(board(Timer(size=1, log=[5]), Uart(5)), tmp_path / "s")
    timer, uart = Timer(), LongUart()
    with pytest.raises(StateError, match=r"uart.more: .*section \"uart\""):
        vmferry.load(board(timer, uart), tmp_path / "s")
    assert timer == Timer()


def test_lacking_section_may_be_allowed(tmp_path: Path) -> None:
    vmferry.save(board(Uart(5)), tmp_path / "s")
    uart, rtc = Uart(), Rtc(30)
    vmferry.load(board(uart, rtc), tmp_path / "s", may_lack={"rtc"})
    assert (uart.divider, rtc.second) == (5, 30)


def test_failing_post_load_stops_the_load(tmp_path: Path) -> None:
    vmferry.save(board(Uart(0), Rtc(30), Timer(size=1, log=[5])), tmp_path / "s")
    timer, uart, rtc = Timer(), Uart(), Rtc()
    with pytest.raises(StateError, match=r"a divider of 0.*section \"uart\".*in part: do not run"):
        vmferry.load(board(timer, uart, rtc), tmp_path / "s")
    assert timer.log == [5]
    assert rtc == Rtc()


def test_fault_in_a_post_load_leaves_no_doubt_of_the_machine(tmp_path: Path) -> None:
    @device("faulty")
    @dataclass
    class Faulty:
        x: U8 = 0

        def post_load(self, version: int) -> None:
            raise KeyError(version)

    vmferry.save(board(Faulty()), tmp_path / "s")
    with pytest.raises(KeyError) as failed:
        vmferry.load(board(Faulty()), tmp_path / "s")
    assert failed.value.__notes__ == [
        '"faulty" instance 0: the machine is loaded in part: do not run it'
    ]


def test_section_twice_is_refused(tmp_path: Path) -> None:
    two, alias = board(), board()
    two.registry.register(Uart(), instance=0)
    two.registry.register(Uart(), instance=1)
    alias.registry.register(Uart(), instance=0, alias=1)
    vmferry.save(two, tmp_path / "s")
    with pytest.raises(StreamError, match='"uart" instance 0 once, found it again'):
        vmferry.load(alias, tmp_path / "s")


def test_iterable_section_of_a_device_is_refused(tmp_path: Path) -> None:
    @device("disk")
    @dataclass
    class DiskDevice:
        size: U8 = 0

    vmferry.save(board(disk=Disk()), tmp_path / "s")
    with pytest.raises(StreamError, match="the section of a device, found that of a handler"):
        vmferry.load(board(DiskDevice()), tmp_path / "s")
    vmferry.save(board(DiskDevice()), tmp_path / "s")
    with pytest.raises(StreamError, match="the section of a handler, found that of a device"):
        vmferry.load(board(disk=Disk()), tmp_path / "s")


def test_every_cut_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    vmferry.save(full_board(), tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    machine = empty_board()
    before = copy.deepcopy(devices_of(machine))
    description = whole.index(b'{"page_size"') - 5
    for size in [*range(0, description, 7), *range(description + 1, len(whole), 331)]:
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(StreamError):
            vmferry.load(machine, tmp_path / "cut")
    assert devices_of(machine) == before
    (tmp_path / "long").write_bytes(whole + b"\0")
    with pytest.raises(StreamError, match="the end of the file behind the stream"):
        vmferry.load(machine, tmp_path / "long")
    assert devices_of(machine) == before


def test_own_declarations_do_where_there_is_no_description(tmp_path: Path) -> None:
    saved = board(Uart(5), Timer(size=1, log=[3]))
    vmferry.save(saved, tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(whole[: whole.index(b'{"page_size"') - 5])
    loaded = board(Uart(), Timer())
    vmferry.load(loaded, tmp_path / "s")
    assert devices_of(loaded) == devices_of(saved)


def test_own_declarations_do_where_the_description_is_wrong(tmp_path: Path) -> None:
    saved = board(Uart(5), Rtc(3))
    vmferry.save(saved, tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    right, wrong = b'"type": "uint16", "size": 2', b'"type": "uint16", "size": 3'
    (tmp_path / "s").write_bytes(whole.replace(right, wrong))
    loaded = board(Uart(), Rtc())
    vmferry.load(loaded, tmp_path / "s")
    assert devices_of(loaded) == devices_of(saved)


def test_wrong_footer_is_refused(tmp_path: Path) -> None:
    vmferry.save(board(Uart(5)), tmp_path / "s")
    whole = bytearray((tmp_path / "s").read_bytes())
    whole[whole.index(b"\0\x06\0\0") - 1] ^= 1
    (tmp_path / "s").write_bytes(whole)
    with pytest.raises(StreamError):
        vmferry.load(board(Uart()), tmp_path / "s")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_stream_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    vmferry.save(full_board(), path)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    machine = empty_board()
    before = copy.deepcopy(devices_of(machine))
    try:
        vmferry.load(machine, path)
    except StreamError as error:
        partly = error.advice is not None and "in part" in error.advice
        assert partly or devices_of(machine) == before


# The file


@pytest.mark.parametrize(
    ("limit", "value"),
    [("DEVICE_SECTION", 6), ("DEVICES", 40), ("DEVICE_COUNT", 1), ("DESCRIPTION", 400)],
)
def test_what_no_reader_would_take_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    machine = board(Uart(), Uart())
    vmferry.save(machine, tmp_path / "s")
    monkeypatch.setattr(limits, limit, value)
    with pytest.raises(StreamError):
        vmferry.open_stream(tmp_path / "s")
    monkeypatch.setattr("vmferry.migration.saving._SURELY_READABLE", 0)
    with pytest.raises(LimitExceeded, match="at most"):
        vmferry.save(machine, tmp_path / "again")


def test_blocked_machine_is_not_saved(tmp_path: Path) -> None:
    machine = board(Uart())
    with (
        machine.registry.blocked("it burns"),
        pytest.raises(UsageError, match="cannot be migrated: it burns"),
    ):
        vmferry.save(machine, tmp_path / "s")
    card = board(Passthrough())
    with pytest.raises(UsageError, match="it holds a card of this host"):
        vmferry.save(card, tmp_path / "s")
    assert not list(tmp_path.iterdir())
    vmferry.save(machine, tmp_path / "s")


def test_failed_save_leaves_the_file_before(tmp_path: Path) -> None:
    vmferry.save(board(Uart(5)), tmp_path / "s")
    with pytest.raises(StateError, match=r"uart.divider: expected an integer from 0 .*70000.*uart"):
        vmferry.save(board(Uart(70000)), tmp_path / "s")
    uart = Uart()
    vmferry.load(board(uart), tmp_path / "s")
    assert uart.divider == 5
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_file_is_replaced_and_private(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"old")
    vmferry.save(board(Uart(5)), tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    vmferry.load(board(Uart()), os.fspath(tmp_path / "s"))


def test_hooks_are_called_once_and_what_they_change_is_described(tmp_path: Path) -> None:
    @device("restless")
    class Restless:
        size: U8
        log: Annotated[list[U8], VarArray("size", 8)]

        def __init__(self) -> None:
            self.size, self.log = 0, []

        def pre_save(self) -> None:
            self.size += 1
            self.log.append(7)

        def post_save(self) -> None:
            self.log[0] += 1

    restless, loaded = Restless(), Restless()
    vmferry.save(board(restless), tmp_path / "s")
    assert restless.log == [8]
    vmferry.load(board(loaded), tmp_path / "s")
    assert loaded.log == [7]
    survey = vmferry.open_stream(tmp_path / "s")
    (state,) = survey.states("restless")
    assert [path for path, _ in state.walk()] == ["size", "log"]


def test_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere/s: cannot be saved: No such file"):
        vmferry.save(board(), tmp_path / "nowhere" / "s")
    with pytest.raises(StorageError, match="nowhere: cannot be loaded: No such file"):
        vmferry.load(board(), tmp_path / "nowhere")
    with pytest.raises(StorageError, match="cannot be saved"):
        vmferry.save(board(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_errors_of_devices_are_not_taken_for_those_of_the_file(tmp_path: Path) -> None:
    class Torn(Disk):
        def iterate(self, piece: Any) -> None:
            raise OSError(5, f"disk of {piece.room} is gone")

    with pytest.raises(OSError, match="disk of 20 is gone"):
        vmferry.save(board(disk=Torn()), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"old")
    disk = Disk(bytes(200_000))
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, allowed[1]))
    try:
        with pytest.raises(StorageError, match="s: cannot be saved: File too large"):
            vmferry.save(board(disk=disk), tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        signal.signal(signal.SIGXFSZ, handler)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("s", b"old")]


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb"])
def test_machine_needs_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="1 to 255 printable bytes"):
        vmferry.save(board(name=name), tmp_path / "s")


# Any machine

U8S, U16S, U32S = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32))
CHANNELS = st.builds(Channel, U32S, U8S)
UARTS = st.builds(
    Uart,
    st.integers(1, 65535),
    st.binary(min_size=4, max_size=4).map(bytearray),
    U8S,
    st.none() | st.builds(Overrun, U32S),
)
TIMERS = st.lists(U16S, max_size=8).flatmap(
    lambda log: st.builds(
        Timer,
        st.lists(CHANNELS, min_size=3, max_size=3),
        st.just(len(log)),
        st.just(log),
        st.lists(CHANNELS, max_size=8),
    )
)
DEVICES = st.lists(st.tuples(st.sampled_from(["", "pci/0", "usb"]), UARTS | TIMERS), max_size=8)


@settings(max_examples=40, deadline=None)
@given(DEVICES, st.none() | st.binary(max_size=80))
def test_any_machine_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    devices: list[tuple[str, Any]],
    content: bytes | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    saved = board(disk=None if content is None else Disk(content))
    loaded = board(disk=None if content is None else Disk(bytes(len(content))))
    for place, item in devices:
        saved.registry.register(item, path=place)
        loaded.registry.register(type(item)(), path=place)
    vmferry.save(saved, path)
    vmferry.load(loaded, path)
    assert devices_of(loaded) == devices_of(saved)
    found = [event for event in events(path) if isinstance(event, DeviceSection)]
    for section, original in zip(found, devices_of(saved), strict=True):
        alone = type(original)()
        load_object(alone, section.body, section.version)
        assert alone == original
