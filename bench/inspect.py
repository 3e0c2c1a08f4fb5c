"""Reading a stream: ``vmferry inspect`` beside QEMU's ``analyze-migration.py -d state``."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from bench.machines import EMPTY, FULL, QUICK, source
from bench.measure import Row, Sample, Samples, Target, Unmeasured, milliseconds, pace
from bench.places import Places
from bench.processes import TIMEOUT, Process, run, vmferry
from bench.receive import megabytes
from vmferry.wire.reader import StreamReader
from vmferry.wire.sections import SectionEnd, SectionPart

_TIMES = 4
_LIMIT_MB = 150


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    full, empty = QUICK if quick else (FULL, EMPTY)
    streams = {}
    for guest in (full, empty):
        streams[guest] = where.work / f"{guest.name}.stream"
        with source(guest, where.work) as qemu:
            qemu.migrate(f"exec:cat >{streams[guest]}")
    script, stream = _script(where.work), str(streams[full])
    samples = Samples(
        {
            "analyze": lambda: run(
                [sys.executable, str(script()), "-f", stream, "-d", "state"],
            ),
            "inspect": lambda: run(vmferry("inspect", stream)),
            "json": lambda: run(vmferry("inspect", "--json", stream)),
            "open_stream": lambda: _within_python(stream),
            "dd": lambda: run(["dd", f"if={stream}", "of=/dev/null", "bs=1M", "status=none"]),
            "empty": lambda: run(vmferry("inspect", str(streams[empty]))),
            "long": lambda: _repeated(streams[full]),
        },
        rounds,
    )
    yield from _times(samples, full.name)
    yield from _memory(samples, full.name, empty.name)
    for path in streams.values():
        path.unlink()


def _within_python(stream: str) -> Sample:
    """``open_stream`` by itself, after everything is imported."""
    script = (
        "import sys, time; from vmferry import open_stream; start = time.perf_counter();"
        " open_stream(sys.argv[1]); print(time.perf_counter() - start)"
    )
    with Process([sys.executable, "-c", script, stream]) as process:
        seconds = float(process.line())
        process.wait()
        return {"seconds": seconds}


def _times(samples: Samples, title: str) -> Iterator[Row]:
    shown = {
        "analyze": "analyze-migration.py -d state",
        "inspect": "inspect",
        "json": "inspect --json",
        "open_stream": "open_stream() without the start of Python",
        "dd": "dd to /dev/null, to read the file and no more",
    }
    for case, what in shown.items():
        yield samples.row(
            f"inspect/{case}", f"{title}: {what}", "ms", case, milliseconds("seconds")
        )
    for case in ("analyze", "inspect"):
        what = f"{title}: {shown[case]}, CPU time"
        yield samples.row(f"inspect/{case}/cpu", what, "ms", case, milliseconds("cpu"))
    for case in ("inspect", "json", "open_stream"):
        yield samples.ratio(
            f"inspect/{case}/analyze",
            f"{title}: {shown[case]}, times as fast as analyze-migration.py",
            case,
            "analyze",
            pace,
            None if case == "open_stream" else Target(20),
        )


def _memory(samples: Samples, full: str, empty: str) -> Iterator[Row]:
    cases = {
        "inspect": f"{full}: inspect, memory at most",
        "json": f"{full}: inspect --json, memory at most",
        "empty": f"{empty}: inspect, memory at most",
        "long": f"{full}, sent {_TIMES} times over: inspect, memory at most",
    }
    for case, what in cases.items():
        target = Target(_LIMIT_MB, most=True)
        yield samples.row(f"inspect/{case}/peak", what, "MB", case, megabytes, target)


def _script(directory: Path) -> Callable[[], Path]:
    """QEMU's script, from Debian's source package; says each time why it is not to be had."""
    command = [sys.executable, "-m", "tests.vmstate.analyze", str(directory / "script")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        problem = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)

    def script() -> Path:
        if problem:
            raise Unmeasured(f"the script cannot be had: {problem}")
        return Path(done.stdout.strip())

    return script


def _repeated(stream: Path) -> Sample:
    """Inspect the stream from a pipe, with its passes over guest memory several times over."""
    first, last = _passes(stream)
    pieces = [(0, first), *[(first, last)] * _TIMES, (last, stream.stat().st_size)]
    with (
        stream.open("rb", buffering=0) as file,
        Process(vmferry("inspect", "-"), discard=True, stdin=subprocess.PIPE) as process,
    ):
        feeder = threading.Thread(target=_feed, args=(file, process.input, pieces))
        feeder.start()
        try:
            return process.wait()
        finally:
            feeder.join()


def _feed(file: BinaryIO, pipe: BinaryIO, pieces: Sequence[tuple[int, int]]) -> None:
    try:
        with pipe:
            for start, end in pieces:
                at = start
                while at < end:
                    at += os.sendfile(pipe.fileno(), file.fileno(), at, end - at)
    except OSError:
        pass  # the reader has gone, and says why itself


def _passes(stream: Path) -> tuple[int, int]:
    """Where the first part of a section begins, and the end of it: pages lie between the two."""
    reader = StreamReader()
    first = None
    with stream.open("rb", buffering=0) as file:
        while True:
            reader.buffer.received(file.readinto(reader.buffer.room()))
            for event in reader.events():
                if isinstance(event, SectionPart | SectionEnd):
                    start = reader.buffer.offset - len(event.encode())
                    if isinstance(event, SectionEnd):
                        return first or start, start
                    first = first or start
