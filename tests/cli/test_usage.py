"""Arguments: what is refused, in which words, and what --help costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vmferry as package
from tests.cli.command import COMMAND, environment, vmferry

STREAM = "/nonexistent/stream"


def test_version_is_shown() -> None:
    done = vmferry("--version")
    assert (done.returncode, done.stdout) == (0, f"vmferry {package.__version__}\n")


@pytest.mark.parametrize(
    "verb", ["receive", "send", "inspect", "run", "migrate", "status", "convert"]
)
def test_help_tells_every_verb(verb: str) -> None:
    assert f"\n  {verb} " in vmferry("--help").stdout
    done = vmferry(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: vmferry {verb} ")


def test_no_arguments_show_the_help_and_are_an_error() -> None:
    done = vmferry()
    assert done.returncode == 2
    assert done.stdout == vmferry("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("frobnicate", "no such command 'frobnicate'; see vmferry --help"),
        ("receive", "missing argument 'URI'; see vmferry receive --help"),
        ("receive unix:/x", "missing argument 'DIRECTORY'; see vmferry receive --help"),
        ("inspect x --frob", "no such option: --frob; see vmferry inspect --help"),
        ("receive nowhere d", "expected tcp:HOST:PORT, unix:PATH, fd:NUMBER, exec:COMMAND,"),
        ("receive tcp:host:70000 d", "expected a port of at most 65535, found 70000"),
        ("receive unix:/x d --max-ram lots", "'--max-ram': expected a size such as 512MiB"),
        ("receive unix:/x d --page-size 5000", "a power of two; not 5000"),
        ("receive unix:/x d --accept all", "'--accept': 'all' is not one of 'no-ram', 'no-end'"),
        ("receive unix:/x d --timeout soon", "'--timeout':"),
        ("receive unix:/x d --timeout -1", "'--timeout':"),
        ("receive unix:/x d --json --quiet", "expected --json or --quiet, found both"),
        ("convert x y", "missing option '--to'"),
        ("convert x y --to iso", "'--to': 'iso' is not one of 'raw', 'elf-core', 'stream'"),
        (f"inspect {STREAM} --verify", "--verify is for checkpoints"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: str, message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments.split()],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "") or "--json" in arguments
    assert done.stderr.startswith("vmferry: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_arguments_cannot_move_the_cursor() -> None:
    done = vmferry("inspect", "/nonexistent/\x1b[2J\n\u202e")
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
    assert "\u202e" not in done.stderr


def test_bug_is_one_line_with_its_place_and_a_traceback_if_asked(tmp_path: Path) -> None:
    # A checkpoint module that does not work stands for whatever nobody thought of.
    broken = "import vmferry.checkpoint.stream_file as m; del m._Surveyor; "
    run = f"{broken}from vmferry.cli import main; raise SystemExit(main(['inspect', {STREAM!r}]))"
    command = [sys.executable, "-c", run]
    plain = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert plain.returncode == 1
    assert plain.stderr.startswith("vmferry: this is a bug in vmferry: NameError: ")
    assert "(at vmferry/checkpoint/stream_file.py:" in plain.stderr
    assert plain.stderr.count("\n") == 1
    asked = environment(VMFERRY_DEBUG="1")
    told = subprocess.run(
        command, env=asked, capture_output=True, text=True, check=False, timeout=60
    )
    assert told.returncode == 1
    assert told.stderr.startswith("Traceback")


@pytest.mark.parametrize(
    "command",
    [["-m", "vmferry", "--help"], ["-m", "vmferry", "receive", "--help"], ["-c", "import vmferry"]],
)
def test_nothing_heavy_is_imported_before_it_is_needed(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    heavy = {"numpy", "zstandard", "rich.console", "asyncio"}
    assert "vmferry" in imported
    assert not heavy & imported
    assert "typer" not in imported or command[0] == "-m"


def test_numpy_starts_no_threads() -> None:
    program = """
import os, vmferry.cli
vmferry.cli.main(["inspect", os.devnull])
import numpy
print(len(os.listdir("/proc/self/task")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, check=True
    )
    assert done.stdout.splitlines()[-1] == b"1"


def test_help_survives_a_reader_that_goes_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [*COMMAND, "--help"], stdout=pipe, stderr=subprocess.PIPE, check=False, timeout=60
        )
    assert done.stderr == b""
