"""``send``: what it tells, how it fails, and destinations that behave badly."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

import vmferry as package
from tests.cli import schema
from tests.cli.command import (
    COMMAND,
    PROMPT,
    Running,
    environment,
    listening,
    read_all,
    vmferry,
)
from tests.cli.test_receive import FAILED, LOADED, STREAM
from tests.migration.script import PAGE_SIZE, devices, end, head, page, part, start
from vmferry.units import format_size
from vmferry.wire.ram import RamBlock, RamBlocks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    directory = tmp_path_factory.mktemp("send")
    (directory / "stream").write_bytes(STREAM)
    package.receive(f"file:{directory}/stream", directory / "saved").close()
    return directory / "saved"


def test_result_is_one_line(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "stream"
    done = vmferry("send", saved, f"file:{out}", "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    head, _, tail = done.stdout.partition(" in ")
    size = format_size(out.stat().st_size)
    assert head == f"sent pc-i440fx-7.2 with 2.33 MiB of RAM to file:{out}: {size}"
    assert tail.endswith("; nobody says whether it was loaded\n")
    assert package.open_stream(out).error is None


@pytest.mark.parametrize(("more", "said"), [(["--json"], b'"event": "result"'), ([], b"sent pc-")])
def test_standard_output_carries_nothing_but_the_stream(
    more: list[str], said: bytes, saved: Path
) -> None:
    done = subprocess.run(
        [*COMMAND, "send", str(saved), "-", *more],
        env=environment(),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert json.loads(vmferry("inspect", "-", "--json", stdin=done.stdout).stdout)["trailing"] == 0
    assert said in done.stderr


def test_one_command_feeds_another(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    command = f"exec:{' '.join(COMMAND)} receive - {again} --quiet"
    done = vmferry("send", saved, command)
    assert done.returncode == 0
    with package.Checkpoint(saved) as first, package.Checkpoint(again, verify=True) as second:
        assert second.devices == first.devices
        assert [entry.sums.sha256 for entry in second.manifest.ram] == [
            entry.sums.sha256 for entry in first.manifest.ram
        ]


def test_destination_that_loads_it_is_success(saved: Path, tmp_path: Path) -> None:
    arguments = ["send", saved, f"unix:{tmp_path}/s", "--json"]
    with listening(tmp_path / "s") as listener, Running(*arguments) as command:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PROMPT)
            reader = threading.Thread(target=read_all, args=[connection])
            reader.start()
            command.wait_for_phase("loading")
            connection.sendall(LOADED)
            assert command.finish() == 0
            reader.join(PROMPT)
    for event in command.events:
        schema.event(event, event["event"])
    phases = [event["phase"] for event in command.events if event["event"] == "progress"]
    shown = [phase for phase in dict.fromkeys(phases) if phase != "setup"]
    assert shown == ["active", "device", "loading", "completed"]
    assert command.events[-1]["target"] == f"unix:{tmp_path}/s"


def refuse(connection: socket.socket) -> None:
    reader = threading.Thread(target=read_all, args=[connection])
    reader.start()
    connection.sendall(FAILED)
    reader.join(PROMPT)


def leave_at_once(connection: socket.socket) -> None:
    connection.close()


def leave_at_the_end(connection: socket.socket) -> None:
    data = b""
    while not data.endswith(b"}"):
        data += connection.recv(1 << 20)
    connection.close()


def say_nothing(connection: socket.socket) -> None:
    read_all(connection)


def talk_nonsense(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    read_all(connection)


@pytest.mark.parametrize(
    ("behave", "status", "message"),
    [
        (refuse, 4, "the destination refused the machine"),
        (leave_at_once, 4, ""),
        (leave_at_the_end, 4, "without saying that it has loaded the machine"),
        (say_nothing, 4, "waited 300 ms for"),
        (talk_nonsense, 3, "expected "),
    ],
)
def test_destination_that_behaves_badly_is_one_line(
    behave: object, status: int, message: str, saved: Path, tmp_path: Path
) -> None:
    arguments = ["send", saved, f"unix:{tmp_path}/s", "--timeout", "0.3", "--quiet"]
    with listening(tmp_path / "s") as listener, Running(*arguments) as command:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PROMPT)
            behave(connection)  # type: ignore[operator]
            assert command.finish() == status
    assert (command.out, len(command.err)) == ([], 1)
    assert command.err[0].startswith("vmferry: ")
    assert message in command.err[0]
    package.Checkpoint(saved, verify=True).close()


def test_destination_that_reads_nothing_is_left_after_a_while(tmp_path: Path) -> None:
    memory = RamBlock("pc.ram", 4 << 20)  # more than a socket holds
    pages = [page(number, 1, memory) for number in range(memory.length // PAGE_SIZE)]
    parts = head(), start(blocks=RamBlocks((memory,))), part(*pages), end(), devices()
    (tmp_path / "stream").write_bytes(b"".join(parts))
    package.receive(f"file:{tmp_path}/stream", tmp_path / "saved").close()
    arguments = ["send", tmp_path / "saved", f"unix:{tmp_path}/s", "--timeout", "0.3", "--quiet"]
    with listening(tmp_path / "s") as listener, Running(*arguments) as command:
        connection, _ = listener.accept()
        with connection:
            assert command.finish() == 4
    assert len(command.err) == 1
    assert f'"unix:{tmp_path}/s": waited 300 ms for the other side to read' in command.err[0]


@pytest.mark.parametrize(
    ("uri", "status", "message"),
    [
        ("unix:{path}/s", 4, "No such file or directory"),
        ("tcp:127.0.0.1:1", 4, "Connection refused"),
        ("tcp:127.0.0.1:0", 2, "connecting needs a host and a port"),
        ("exec:exit 7", 4, ""),
        ("elsewhere:1", 2, "expected tcp:HOST:PORT"),
    ],
)
def test_nobody_at_the_other_end_is_one_line(
    uri: str, status: int, message: str, saved: Path, tmp_path: Path
) -> None:
    done = vmferry("send", saved, uri.format(path=tmp_path))
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("vmferry: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compress", "zlib"], "compression needs multifd channels (--multifd N)"),
        (["--compress", "lzma", "--multifd", "2"], "'lzma' is not one of 'zlib', 'zstd'"),
        (["--multifd", "256"], "'--multifd'"),
        (["--bandwidth", "0"], "expected a rate above 0"),
        (["--bandwidth", "fast"], "'--bandwidth': expected a size"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_sent(
    options: list[str], message: str, saved: Path, tmp_path: Path
) -> None:
    done = vmferry("send", saved, f"file:{tmp_path}/stream", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_directory_that_is_no_checkpoint_is_a_storage_error(saved: Path, tmp_path: Path) -> None:
    cases = {"none": "no such checkpoint directory", "empty": "not a checkpoint"}
    (tmp_path / "empty").mkdir()
    shutil.copytree(saved, tmp_path / "half")
    (tmp_path / "half" / "manifest.json").rename(tmp_path / "half" / "manifest.json.partial")
    shutil.copytree(saved, tmp_path / "short")
    with (tmp_path / "short" / "devices.bin").open("ab") as file:
        file.write(b"x")
    cases |= {"half": "incomplete", "short": "expected "}
    for name, message in cases.items():
        done = vmferry("send", tmp_path / name, f"file:{tmp_path}/stream")
        assert done.returncode == 5, name
        assert done.stderr.startswith(f"vmferry: {tmp_path / name}")
        assert message in done.stderr
    assert not (tmp_path / "stream").exists()


def test_damage_is_found_before_anything_is_sent_if_asked(saved: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    with (damaged / "ram" / "00-pc.ram.raw").open("r+b") as file:
        file.seek(0x100000)
        file.write(b"damage")
    done = vmferry("send", damaged, f"file:{tmp_path}/stream", "--verify")
    assert done.returncode == 5
    assert "0x100000 is damaged" in done.stderr
    assert not (tmp_path / "stream").exists()
