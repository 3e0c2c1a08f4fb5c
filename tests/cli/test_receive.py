"""``receive``: what it tells, how it fails, and what it leaves behind."""

from __future__ import annotations

import resource
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import vmferry as package
from tests.cli import schema
from tests.cli.command import COMMAND, PROMPT, Running, connected, environment, read_all, vmferry
from tests.support.recorded import recorded

FAILED = bytes.fromhex("0001 0004 00000001")
"""What a source is told on the return path when it keeps its machine."""
LOADED = bytes.fromhex("0001 0004 00000000")

STREAM = bytes(recorded("pc")[0].sent)
ANSWERED = bytes(recorded("pc-return-path")[0].sent)


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "stream"
    path.write_bytes(STREAM)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tmp_path / "saved"


def test_result_is_one_line(stream: Path, saved: Path) -> None:
    done = vmferry("receive", f"file:{stream}", saved)
    assert (done.returncode, done.stderr) == (0, "")
    first, last = done.stdout.splitlines()
    assert first == f"reading file:{stream}"
    assert last.startswith(f"received pc-i440fx-7.2 with 2.33 MiB of RAM to {saved}: 628 KiB in ")
    package.Checkpoint(saved, verify=True).close()


def test_quiet_says_nothing(stream: Path, saved: Path) -> None:
    done = vmferry("receive", "-", saved, "--quiet", stdin=STREAM)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    package.Checkpoint(saved, verify=True).close()


def test_port_that_the_system_chose_is_told(saved: Path) -> None:
    with Running("receive", "tcp:127.0.0.1:0", saved, "--json") as command:
        with connected(command.address()) as source:
            source.sendall(ANSWERED)
            assert read_all(source).endswith(LOADED)
        assert command.finish() == 0
    for event in command.events:
        schema.event(event, event["event"])
    assert command.events[-1]["machine"] == "pc-i440fx-7.2"
    assert command.events[-1]["transferred"] == len(ANSWERED)
    assert [e["phase"] for e in command.events if e["event"] == "progress"][-1] == "completed"


def test_source_may_send_byte_by_byte(tmp_path: Path, saved: Path) -> None:
    head, tail = STREAM[:2000], STREAM[-2000:]
    command = Running("receive", f"unix:{tmp_path}/s", saved)
    with command, connected(command.address()) as source:
        for piece in (head, tail):
            if piece is tail:
                source.sendall(STREAM[2000:-2000])
            for byte in piece:
                source.send(bytes([byte]))
        source.shutdown(socket.SHUT_WR)
        assert command.finish() == 0
    package.Checkpoint(saved, verify=True).close()


@pytest.mark.parametrize("size", [0, 3, 100, 100_000, len(STREAM) - 1])
def test_source_that_leaves_early_is_a_bad_stream(size: int, tmp_path: Path, saved: Path) -> None:
    with Running("receive", f"unix:{tmp_path}/s", saved) as command:
        with connected(command.address()) as source:
            source.sendall(STREAM[:size])
        assert command.finish() == 3
    assert_one_error(command, "expected ")
    assert not saved.exists()
    assert not (tmp_path / "s").exists()


def test_source_that_says_nothing_is_left_after_a_while(tmp_path: Path, saved: Path) -> None:
    with Running("receive", f"unix:{tmp_path}/s", saved, "--timeout", "0.2") as command:
        with connected(command.address()) as source:
            source.sendall(ANSWERED[:100_000])
            assert read_all(source).endswith(FAILED)
        assert command.finish() == 4
    assert_one_error(command, f'"unix:{tmp_path}/s": waited 200 ms for data, nothing came')
    assert not saved.exists()


@pytest.mark.parametrize("size", [0, 3])
def test_source_that_never_begins_is_left_after_a_while(
    size: int, tmp_path: Path, saved: Path
) -> None:
    with Running("receive", f"unix:{tmp_path}/s", saved, "--timeout", "0.2") as command:
        with connected(command.address()) as source:
            source.sendall(STREAM[:size])
            assert read_all(source) == b""
        assert command.finish() == 4
    assert_one_error(command, "200 ms")
    assert not saved.exists()


def test_source_hears_that_its_stream_is_bad(tmp_path: Path, saved: Path) -> None:
    with Running("receive", f"unix:{tmp_path}/s", saved, "--json") as command:
        with connected(command.address()) as source:
            source.sendall(ANSWERED[:5000] + b"\xff" * 10_000)
            assert read_all(source).endswith(FAILED)
        assert command.finish() == 3
    result = command.events[-1]
    schema.event(result, "result")
    assert (result["ok"], result["exit_status"]) == (False, 3)
    assert command.err == [f"vmferry: {result['error']['message']}"]
    assert not saved.exists()


@pytest.mark.parametrize(
    ("name", "option"), [("pc-background-snapshot", "no-end"), ("no memory", "no-ram")]
)
def test_what_no_source_means_is_accepted_by_name(
    name: str, option: str, tmp_path: Path, saved: Path
) -> None:
    path = tmp_path / "stream"
    path.write_bytes(recorded(name)[0].sent if name[0] == "p" else without_memory())
    refused = vmferry("receive", f"file:{path}", saved)
    assert refused.returncode == 3
    assert option in refused.stderr
    assert not saved.exists()
    assert vmferry("receive", f"file:{path}", saved, "--accept", option).returncode == 0
    package.Checkpoint(saved, verify=True).close()


def without_memory() -> bytes:
    """The recorded stream without its section ``ram``."""
    ram = STREAM.index(b"\x01\x00\x00\x00\x02\x03ram")
    devices = STREAM.index(b"\x04\x00\x00\x00\x00\x05timer")
    return STREAM[:ram] + STREAM[devices:]


def test_directory_with_something_in_it_is_refused(stream: Path, saved: Path) -> None:
    saved.mkdir()
    (saved / "precious").write_text("x")
    done = vmferry("receive", f"file:{stream}", saved)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == f"vmferry: {saved}: exists already; choose a new directory\n"
    assert [path.name for path in saved.iterdir()] == ["precious"]


def test_empty_directory_is_used_and_stays_after_a_failure(stream: Path, saved: Path) -> None:
    saved.mkdir()
    stream.write_bytes(STREAM[:-1])
    assert vmferry("receive", f"file:{stream}", saved).returncode == 3
    assert list(saved.iterdir()) == []
    stream.write_bytes(STREAM)
    assert vmferry("receive", f"file:{stream}", saved).returncode == 0


@pytest.mark.parametrize(
    ("uri", "status", "message"),
    [
        ("tcp:127.0.0.1:{port}", 4, "Address already in use"),
        ("unix:{path}/no/such/s", 4, "No such file or directory"),
        ("file:{path}/none", 5, "No such file or directory"),
        ("exec:exit 3", 4, "3"),
        ("fd:77", 4, "Bad file descriptor"),
    ],
)
def test_place_that_cannot_be_had_is_one_line(
    uri: str, status: int, message: str, tmp_path: Path, saved: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = uri.format(port=taken.getsockname()[1], path=tmp_path)
        done = vmferry("receive", place, saved)
    assert done.stderr.startswith("vmferry: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == status
    assert not saved.exists()


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_directory_that_cannot_be_made_is_a_storage_error(
    parent: str, stream: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = vmferry("receive", f"file:{stream}", tmp_path / parent / "saved")
    assert done.returncode == 5
    assert done.stderr.startswith(f"vmferry: {tmp_path / parent / 'saved'}: cannot be created: ")


@contextmanager
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None] | None]]:
    """A directory that 256 KiB fit in, and what the command has to do first for that to be so."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    mounted = False
    with suppress(OSError):
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        yield path, None if mounted else limit_files
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


def limit_files() -> None:
    """Without a disk of our own to fill: let no file grow."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, 256 << 10))


def test_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path) as (disk, before):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [*COMMAND, "receive", f"fd:{theirs.fileno()}", str(disk / "saved")],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=[theirs.fileno()],
                preexec_fn=before,  # noqa: PLW1509 - only sets a limit
            )
            theirs.close()
            ours.settimeout(PROMPT)
            with suppress(ConnectionError):
                ours.sendall(ANSWERED)
            assert read_all(ours).endswith(FAILED)
            _, errors = process.communicate(timeout=PROMPT)
        assert process.returncode == 5
        assert errors.startswith(f"vmferry: {disk}/saved/")
        assert "No space left on device" in errors or "File too large" in errors
        assert errors.count("\n") == 1
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_standard_streams_are_not_reused(
    closed: tuple[int, ...], stream: Path, saved: Path
) -> None:
    # What the child prints would else end up in the first file that was opened.
    uri = f"exec:cat {stream}; echo astray >&2"
    redirections = " ".join(f"{number}>&-" for number in closed)
    line = shlex.join([*COMMAND, "receive", uri, str(saved)])
    done = subprocess.run(
        ["sh", "-c", f"{line} {redirections}"], env=environment(), check=False, timeout=60
    )
    assert done.returncode == 0
    package.Checkpoint(saved, verify=True).close()


def assert_one_error(command: Running, text: str) -> None:
    """Nothing on standard error but one line with *text* in it."""
    assert len(command.err) == 1, command.err
    assert command.err[0].startswith("vmferry: ")
    assert text in command.err[0]
