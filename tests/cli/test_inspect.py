"""``inspect``: what it shows of real streams, of broken ones, and of hostile ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import vmferry as package
from tests.cli.command import COMMAND, environment, vmferry
from tests.support.recorded import recorded
from tests.wire import described
from tests.wire.streams import BLOCKS, END, HEADER, K, end, join, part, start
from vmferry.errors import StreamError
from vmferry.wire.configuration import Configuration
from vmferry.wire.ram import RamBlock, RamBlocks


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    """A recorded stream as a file."""
    path = tmp_path / "stream"
    path.write_bytes(recorded("pc")[0].sent)
    return path


def body(text: str, title: str) -> list[list[str]]:
    """The words of each line below *title*, up to the next empty line."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(title))
    last = next((n for n in range(first, len(lines)) if not lines[n]), len(lines))
    return [line.split() for line in lines[first + 1 : last]]


def test_overview_is_what_the_stream_is(stream: Path) -> None:
    done = vmferry("inspect", stream)
    survey = package.open_stream(stream)
    assert (done.returncode, done.stderr) == (0, "")
    head = body(done.stdout, str(stream))
    assert head == [
        ["machine", "pc-i440fx-7.2"],
        ["page", "size", "4", "KiB"],
        ["size", "628", "KiB", "(642,649", "bytes)"],
    ]
    columns, *blocks = body(done.stdout, "RAM: ")
    assert " ".join(columns) == "block size data zero zero % sent normal sent zero"
    assert [block[0] for block in blocks] == [block.block.name for block in survey.blocks]
    counts = [[int(word.replace(",", "")) for word in row[3:5]] for row in blocks]
    assert counts == [[block.data_pages, block.zero_pages] for block in survey.blocks]


def test_sections_stand_in_order_with_offset_and_size(stream: Path) -> None:
    rows = body(vmferry("inspect", stream, "--sections").stdout, "Sections")[1:]
    survey = package.open_stream(stream)
    assert [int(row[0], 16) for row in rows] == [section.offset for section in survey.sections]
    assert rows[0][3:] == ["ram", "v4", "start"]
    assert rows[2][3:] == ["ram", "v4", "end"]
    (state,) = survey.states("timer")
    timer = next(row for row in rows if row[3] == "timer")
    ticks = state["cpu_ticks_offset"].value  # type: ignore[union-attr]
    assert timer[4:8] == ["v2", "3", "fields:", f"cpu_ticks_offset={ticks:#x},"]


def test_parts_are_shown_alone_where_asked_for(stream: Path) -> None:
    assert vmferry("inspect", stream, "--ram").stdout.startswith("RAM: ")
    both = vmferry("inspect", stream, "--ram", "--device", "timer").stdout
    assert "\n\ntimer:0, version 2, 48 bytes at 0x" in both
    assert "machine" not in both


def test_device_shows_every_field(stream: Path) -> None:
    done = vmferry("inspect", stream, "--device", "cpu", "--device", "mc146*")
    (state,) = package.open_stream(stream).states("cpu")
    shown = done.stdout
    assert done.returncode == 0
    assert "mc146818rtc:0, version 3, " in shown
    eip = state["env.eip"].value  # type: ignore[union-attr]
    assert f"  env.eip  {eip} ({eip:#x})\n" in shown
    assert "    [0]  selector=" in shown
    for field in state.root.fields:
        assert f"\n  {field.name}" in shown


def test_device_of_no_such_name_is_an_error(stream: Path) -> None:
    done = vmferry("inspect", stream, "--device", "cpu", "--device", "gpu")
    assert done.returncode == 2
    assert done.stderr == "vmferry: no device is named gpu; --sections lists them\n"


def test_standard_input_is_read(stream: Path) -> None:
    done = vmferry("inspect", "-", stdin=stream.read_bytes())
    assert done.returncode == 0
    assert done.stdout.splitlines()[1:] == vmferry("inspect", stream).stdout.splitlines()[1:]


def test_checkpoint_is_shown_and_verified(stream: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    package.receive(f"file:{stream}", saved).close()
    done = vmferry("inspect", saved, "--verify")
    assert done.returncode == 0
    assert ["checksums", "all", "hold"] in body(done.stdout, str(saved))
    assert ["machine", "pc-i440fx-7.2"] in body(done.stdout, str(saved))
    memory = saved / "ram" / "00-pc.ram.raw"
    with memory.open("r+b") as file:
        file.seek(0x1000)
        file.write(b"\xee")
    done = vmferry("inspect", saved, "--verify")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith(f"vmferry: {memory}: the page at 0x1000 is damaged")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "capability"), [("pc-bitmaps", "dirty-bitmaps"), ("pc-block", "")]
)
def test_what_else_a_stream_carries_is_shown(name: str, capability: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(recorded(name)[0].sent)
    shown = vmferry("inspect", path).stdout
    survey = package.open_stream(path)
    assert capability in shown
    disks = body(shown, "Disks")[1:] if survey.disks else []
    assert [row[0] for row in disks] == list(survey.disks)
    bitmaps = body(shown, "Dirty bitmaps")[1:] if survey.bitmaps else []
    assert [row[:2] for row in bitmaps] == [[one.node, one.name] for one in survey.bitmaps]
    assert disks or bitmaps


@pytest.mark.parametrize("size", [0, 3, 30, 5000, 640_000])
def test_broken_stream_is_shown_as_far_as_it_goes(stream: Path, size: int) -> None:
    stream.write_bytes(stream.read_bytes()[:size])
    with pytest.raises(StreamError) as raised:
        package.open_stream(stream)
    done = vmferry("inspect", stream)
    assert done.returncode == 3
    assert done.stderr == f"vmferry: {raised.value}\n"
    assert ("read, then it breaks off" in done.stdout) == (size >= 8)
    assert ("pc-i440fx-7.2" in done.stdout) == (size >= 30)
    assert ("RAM: 2.33 MiB" in done.stdout) == (size >= 5000)


def test_device_in_a_broken_stream_is_no_second_error(stream: Path) -> None:
    stream.write_bytes(stream.read_bytes()[:5000])
    done = vmferry("inspect", stream, "--device", "cpu")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, world", "expected the magic"),
        (b"QEVM\0\0\0\2", "expected version 3"),
    ],
)
def test_other_files_are_refused_for_what_they_are(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    done = vmferry("inspect", path)
    assert (done.returncode, done.stdout) == (3, "")
    assert message in done.stderr


@pytest.mark.parametrize("source", ["/nonexistent", "/dev/null/x"])
def test_source_that_cannot_be_read_is_a_storage_error(source: str) -> None:
    done = vmferry("inspect", source)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith(f"vmferry: {source}: cannot be read: ")


def test_directory_that_is_no_checkpoint_is_a_storage_error(tmp_path: Path) -> None:
    done = vmferry("inspect", tmp_path)
    assert done.returncode == 5
    assert "not a checkpoint" in done.stderr


# What a stream calls its parts, and a terminal or a log must never see.
HOSTILE = "\x1b[2J\r\n\x9b1m\u202e\u2028\x7f\\\"' end"


def hostile_stream() -> bytes:
    blocks = RamBlocks((RamBlock(HOSTILE, 4 * K), RamBlock("plain", 2 * K)))
    ram = join(start(2, blocks, END), part(2, END), end(2, END))
    device = described.section(0, HOSTILE, b"x" * 24, footer=True)
    head = Configuration(HOSTILE, page_bits=10)
    return join(HEADER, head, ram, device, b"\0")


@pytest.mark.parametrize("arguments", [[], ["--device", "*"], ["--sections"], ["--json"]])
def test_names_from_the_stream_cannot_move_the_cursor(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(hostile_stream())
    done = vmferry("inspect", path, *arguments)
    for text in (done.stdout, done.stderr):
        assert all(char.isprintable() or char == "\n" for char in text), arguments


@pytest.mark.parametrize(
    "more",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "C.UTF-8"},
    ],
)
def test_any_encoding_will_do(more: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "stream"
    blocks = RamBlocks((RamBlock("größe→1", 4 * K),))
    ram = join(start(2, blocks, END), part(2, END), end(2, END))
    path.write_bytes(join(HEADER, Configuration("m", page_bits=10), ram, b"\0"))
    done = subprocess.run(
        [*COMMAND, "inspect", str(path)],
        env=environment(**more),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"e" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_reader_that_goes_away_is_no_traceback(stream: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [*COMMAND, "inspect", str(stream), *arguments],
            env=environment(),
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_output_that_cannot_be_written_is_a_storage_error(stream: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "inspect", str(stream)],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 5
    assert done.stderr == "vmferry: standard output: cannot be written: No space left on device\n"


def test_memory_above_the_limit_is_refused(stream: Path) -> None:
    done = vmferry("inspect", stream, "--max-ram", "1MiB")
    assert done.returncode == 3
    assert "RAM" in done.stderr or "memory" in done.stderr


def test_page_size_is_taken_where_nothing_tells(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    ram = join(start(2, BLOCKS, END), part(2, END), end(2, END))
    path.write_bytes(join(HEADER, Configuration("board-1.0"), ram, b"\0"))
    assert vmferry("inspect", path).returncode == 3
    done = vmferry("inspect", path, "--page-size", "1K")
    assert done.returncode == 0
    assert ["page", "size", "1", "KiB"] in body(done.stdout, str(path))
