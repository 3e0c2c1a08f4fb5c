"""Stream files and their contents: real ones, cut ones, hostile ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoint.saved import MACHINE, save, stream
from tests.migration.script import (
    BLOCKS,
    OLD,
    PAGE_SIZE,
    RAM,
    devices,
    end,
    head,
    page,
    part,
    start,
)
from tests.support.recorded import manifest, recorded
from tests.transports.support import PROMPT, background
from tests.wire import described
from vmferry import Checkpoint, LimitExceeded, StorageError, StreamError, open_stream
from vmferry.checkpoint.survey import Survey
from vmferry.wire.commands import Package, PostcopyAdvise, PostcopyListen, RamDiscard
from vmferry.wire.ram import RamBlock, RamBlocks

WHOLE = head() + start() + part(page(1, 7)) + end() + devices()


def write(path: Path, *parts: bytes) -> Path:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
    return path


@pytest.mark.parametrize("name", sorted(manifest()["streams"]))
def test_recorded_stream_is_read_to_its_end(tmp_path: Path, name: str) -> None:
    content = recorded(name)[0].sent
    survey = open_stream(write(tmp_path / "stream", content))
    assert survey.size + survey.trailing == len(content)
    assert survey.trailing == 0
    assert survey.machine == manifest()["streams"][name].get("machine", survey.machine)
    assert {section.name for section in survey.sections} >= {"ram"}
    json.dumps(survey.to_json())


def test_it_is_shown_in_a_few_lines_of_python(tmp_path: Path) -> None:
    survey = open_stream(write(tmp_path / "stream", recorded("q35-devices")[0].sent))
    assert len(repr(survey)) < 10_000
    assert max(len(repr(device)) for device in survey.devices) < 500
    assert repr(Checkpoint(save(tmp_path / "vm"))) == f"Checkpoint('{tmp_path}/vm')"


def test_stream_and_checkpoint_of_a_machine_have_the_same_contents(tmp_path: Path) -> None:
    source = open_stream(stream(tmp_path / "stream"))
    with Checkpoint(save(tmp_path / "vm")) as checkpoint:
        saved = checkpoint.survey()
    for field in ("configuration", "page_size", "footers", "capabilities", "disks", "bitmaps"):
        assert getattr(saved, field) == getattr(source, field), field
    for one, other in zip(source.blocks, saved.blocks, strict=True):
        assert one.block == other.block
        assert (one.data_pages, one.zero_pages) == (other.data_pages, other.zero_pages)
    assert [d.body for d in saved.devices] == [d.body for d in source.devices]
    assert saved.description == source.description
    assert [block.block for block in source.blocks] == MACHINE.blocks


@pytest.mark.parametrize("extra", [1, 1 << 20, (5 << 20) + 3])
def test_bytes_behind_the_end_are_counted(tmp_path: Path, extra: int) -> None:
    survey = open_stream(write(tmp_path / "stream", WHOLE, bytes(extra)))
    assert (survey.size, survey.trailing) == (len(WHOLE), extra)


CUT = {
    "in the header": 5,
    "in the configuration": 20,
    "in the list of blocks": len(head()) + 40,
    "in a page": len(head() + start()) + 100,
    "in the devices": len(WHOLE) - 150,
    "in the description": len(WHOLE) - 3,
}


@pytest.mark.parametrize("name", CUT)
def test_cut_stream_is_an_error_or_as_far_as_it_goes(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "stream", WHOLE[: CUT[name]])
    with pytest.raises(StreamError) as caught:
        open_stream(path)
    survey = open_stream(path, partial=True)
    assert str(survey.error) == str(caught.value)
    assert survey.size <= CUT[name]
    assert survey.machine == (OLD if CUT[name] > len(head()) else None)
    json.dumps(survey.to_json())


def test_every_cut_of_a_stream_gives_what_was_before_it(tmp_path: Path) -> None:
    for size in range(0, len(WHOLE), 7):
        survey = open_stream(write(tmp_path / "stream", WHOLE[:size]), partial=True)
        assert survey.error is not None
        assert survey.size <= size


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_what_cannot_be_read_is_an_error_of_storage(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        open_stream(tmp_path / name)


READ = "import vmferry; s = vmferry.open_stream('-'); print(s.machine, s.size, s.trailing)"


def test_standard_input_is_read_as_it_comes() -> None:
    # The pipe stays open: whoever waits for its end waits for ever.
    with subprocess.Popen(
        [sys.executable, "-c", READ], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for at in range(0, len(WHOLE), 1000):
            process.stdin.write(WHOLE[at : at + 1000])
            process.stdin.flush()
        line = background(process.stdout.readline).result(PROMPT)
        assert line.decode().split() == [OLD, str(len(WHOLE)), "0"]


def test_standard_input_from_a_file_tells_what_is_behind(tmp_path: Path) -> None:
    with write(tmp_path / "stream", WHOLE, bytes(3 << 20)).open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", READ], stdin=file, check=True, capture_output=True
        )
    assert done.stdout.decode().split() == [OLD, str(len(WHOLE)), str(3 << 20)]


def test_standard_input_that_is_closed_is_an_error_of_storage() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f'{sys.executable} -c "{READ}" <&-'], check=False, capture_output=True
    )
    assert b"StorageError: standard input is closed" in done.stderr


def test_named_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writing = threading.Thread(target=write, args=(tmp_path / "pipe", WHOLE))
    writing.start()
    assert open_stream(tmp_path / "pipe").size == len(WHOLE)
    writing.join(PROMPT)


# Hostile streams


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """What is done within takes at most so many bytes of memory."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most, peak


def survey_of(path: Path, *parts: bytes) -> Survey:
    return open_stream(write(path, *parts), partial=True)


def test_many_empty_parts_are_counted_in_little_memory(tmp_path: Path) -> None:
    many = 30_000
    path = write(tmp_path / "stream", head(), start(), part() * many, end(), devices())
    with bounded(16 << 20):
        survey = open_stream(path)
    (parts,) = [section for section in survey.sections if section.kind == "part"]
    assert (parts.count, parts.size) == (many, many * len(part()))


def test_many_pages_of_one_block_are_counted_in_little_memory(tmp_path: Path) -> None:
    records = part(*(page(n % 64, 1 + n % 7) for n in range(64))) * 300
    path = write(tmp_path / "stream", head(), start(), records, end(), devices())
    with bounded(16 << 20):
        survey = open_stream(path)
    assert survey.blocks[0].records["normal"] == 64 * 300
    assert survey.blocks[0].data_pages == 64


def test_thousands_of_devices_are_listed(tmp_path: Path) -> None:
    many = 5000
    sections = b"".join(described.section(n, "timer", b"abc", instance=n) for n in range(many))
    text = described.description(*(described.device("timer", 3, n) for n in range(many)))
    path = write(
        tmp_path / "stream", head(), start(), part(), end(), described.tail(sections, text)
    )
    assert len(open_stream(path).devices) == many


def test_devices_before_memory_are_bounded(tmp_path: Path) -> None:
    early = b"".join(described.section(n, "early", b"abc", instance=n) for n in range(3, 33_000))
    survey = survey_of(tmp_path / "stream", head(), start(), early)
    assert isinstance(survey.error, LimitExceeded)
    assert survey.error.place.channel == "main"


def test_memory_above_the_limit_is_refused_before_it_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "stream", head(), start(blocks=RamBlocks((RamBlock("a", 1 << 60),))))
    with bounded(16 << 20), pytest.raises(LimitExceeded, match="--max-ram"):
        open_stream(path)
    assert open_stream(write(tmp_path / "stream", WHOLE), max_ram=BLOCKS.total).error is None
    with pytest.raises(LimitExceeded):
        open_stream(tmp_path / "stream", max_ram=RAM.length)


def test_error_in_a_package_names_its_channel(tmp_path: Path) -> None:
    discard = RamDiscard("pc.ram", ((0, PAGE_SIZE),)).encode()
    package = Package(PostcopyListen().encode() + b"\4" + bytes(40)).encode()
    advise = PostcopyAdvise(PAGE_SIZE, PAGE_SIZE).encode()
    survey = survey_of(tmp_path / "stream", head(), advise, start(), part(), discard, package)
    assert survey.error is not None
    assert survey.error.place.channel == "main"
    assert survey.error.place.offset is not None
