"""A source against our own destination and against scripted ones."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

import vmferry
from tests.support.recorded import recorded
from vmferry import Method, SendOptions
from vmferry.wire.reader import StreamReader
from vmferry.wire.return_path import Pong, Shut

RECORDINGS = ["pc-block", "pc-bitmaps", "q35-devices", "ppc-g3beige", "pc-uuid", "pc-2.3"]
OPTIONS = [
    SendOptions(),
    SendOptions(bandwidth=200 << 20),
    *(
        SendOptions(multifd=channels, method=method)
        for channels, method in itertools.product((1, 3), (Method.NONE, Method.ZLIB, Method.ZSTD))
    ),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a recording."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            (directory / "stream").write_bytes(recorded(name)[0].sent)
            vmferry.receive(f"file:{directory / 'stream'}", directory / "vm").close()
            made[name] = directory / "vm"
        return made[name]

    return of


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread and no descriptor survives a test."""
    threads, files = set(threading.enumerate()), _open_files()
    yield
    assert set(threading.enumerate()) <= threads
    assert _open_files() <= files


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def content(directory: Path) -> dict[str, Any]:
    """Everything that a checkpoint holds, but when and how it came."""
    with vmferry.Checkpoint(directory, verify=True) as checkpoint:
        manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    kept = {"machine", "page_size", "uuid", "footers", "ram", "sections", "devices", "description"}
    kept |= {"disks", "bitmaps", "stream_capabilities", "page_bits"}
    return {key: value for key, value in manifest.items() if key in kept}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", RECORDINGS)
def test_what_is_sent_arrives_whole(
    saved: Callable[[str], Path], tmp_path: Path, name: str, options: SendOptions
) -> None:
    listening = threading.Event()
    uri = f"unix:{tmp_path / 'socket'}"
    errors: list[BaseException] = []

    def receive() -> None:
        try:
            vmferry.receive(uri, tmp_path / "vm", started=lambda _: listening.set()).close()
        except vmferry.VmferryError as error:
            errors.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    assert listening.wait(5)
    vmferry.send(saved(name), uri, options=options)
    thread.join(10)
    assert errors == []
    assert content(tmp_path / "vm") == content(saved(name))


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_file_gets_a_stream_that_reads_back(
    saved: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    vmferry.send(saved(name), f"file:{tmp_path / 'stream'}")
    vmferry.receive(f"file:{tmp_path / 'stream'}", tmp_path / "vm").close()
    assert content(tmp_path / "vm") == content(saved(name))


class Peer:
    """A scripted destination: accepts *channels* connections and acts on the first."""

    def __init__(
        self, path: Path, stack: ExitStack, act: Callable[[socket.socket], None], channels: int = 1
    ) -> None:
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(str(path))
        self._listener.listen()
        self._stack = stack
        self._thread = threading.Thread(target=self._run, args=(act, channels))
        self._thread.start()
        stack.callback(self._thread.join, 10)

    def _run(self, act: Callable[[socket.socket], None], channels: int) -> None:
        connections = []
        for _ in range(channels):
            connection, _ = self._listener.accept()
            connection.settimeout(10)
            connections.append(connection)
        with suppress(ConnectionError):
            act(connections[0])
        for connection in connections:
            connection.close()


def read_all(connection: socket.socket) -> None:
    """Read a whole stream, as a destination does, and answer the ping."""
    reader = StreamReader()
    while not reader.finished:
        count = connection.recv_into(reader.buffer.room())
        reader.buffer.received(count)
        for _ in reader.events():
            pass
    connection.sendall(Pong(1).encode())


def refuses(connection: socket.socket) -> None:
    read_all(connection)
    connection.sendall(Shut(1).encode())


def says_nothing(connection: socket.socket) -> None:
    read_all(connection)


def answers_junk(connection: socket.socket) -> None:
    read_all(connection)
    connection.sendall(b"\xff" * 8)


def stays_silent(connection: socket.socket) -> None:
    read_all(connection)
    connection.recv(1)  # until the source gives up


def dies(connection: socket.socket) -> None:
    connection.recv(1000)


FAILURES = [
    pytest.param(refuses, vmferry.PeerError, "refused the machine", id="refuses"),
    pytest.param(says_nothing, vmferry.PeerError, "without saying", id="closes without a word"),
    pytest.param(answers_junk, vmferry.StreamError, "return-path message", id="answers junk"),
    pytest.param(stays_silent, vmferry.TransportError, "waited 300 ms", id="stays silent"),
    pytest.param(dies, vmferry.VmferryError, "unix:|multifd", id="dies"),
]


@pytest.mark.parametrize("channels", [0, 2])
@pytest.mark.parametrize(("act", "kind", "message"), FAILURES)
def test_a_destination_that_fails_is_named(
    saved: Callable[[str], Path],
    tmp_path: Path,
    act: Callable[[socket.socket], None],
    kind: type[vmferry.VmferryError],
    message: str,
    channels: int,
) -> None:
    with ExitStack() as stack:
        Peer(tmp_path / "socket", stack, act, channels + 1)
        answer = 0.3 if act is stays_silent else 30.0
        options = SendOptions(multifd=channels, answer=answer)
        with pytest.raises(kind, match=message):
            vmferry.send(saved("pc-uuid"), f"unix:{tmp_path / 'socket'}", options=options)


def test_nobody_listening_is_an_error(saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(vmferry.TransportError, match="No such file"):
        vmferry.send(saved("pc-uuid"), f"unix:{tmp_path / 'nobody'}")


@pytest.mark.parametrize(
    "options",
    [SendOptions(multifd=256), SendOptions(multifd=-1), SendOptions(method=Method.ZSTD)],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    saved: Callable[[str], Path], tmp_path: Path, options: SendOptions
) -> None:
    with pytest.raises(vmferry.UsageError):
        vmferry.send(saved("pc-uuid"), f"unix:{tmp_path / 'nobody'}", options=options)


def test_a_truncated_memory_file_ends_the_migration(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "stream").write_bytes(recorded("pc-uuid")[0].sent)
    with vmferry.receive(f"file:{tmp_path / 'stream'}", tmp_path / "vm") as checkpoint:
        block = max(checkpoint.manifest.ram, key=lambda entry: entry.data_pages)
        with (tmp_path / "vm" / block.file).open("r+b") as file:
            file.truncate(4096)
        with pytest.raises(vmferry.CheckpointDamaged, match="shorter than"):
            vmferry.send(checkpoint, f"file:{tmp_path / 'again'}")
