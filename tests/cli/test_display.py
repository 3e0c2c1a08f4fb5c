"""Progress as people see it: on a terminal, whatever its size and talents, and in a log."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import COMMAND, PROMPT, connected, environment, vmferry
from tests.cli.test_receive import STREAM

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?!\?25)[0-9;]*3[0-9][0-9;]*m")


class Terminal:
    """The command on a terminal."""

    def __init__(self, arguments: list[str], columns: int, **more: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            env=environment(**({"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | more)),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def wait_for(self, wanted: str) -> None:
        deadline = time.monotonic() + PROMPT
        while wanted not in self.text:
            assert time.monotonic() < deadline, self.text
            self._read(0.1)

    def finish(self) -> int:
        """The exit status, when everything was read."""
        deadline = time.monotonic() + PROMPT
        while self._read(0.1):
            assert time.monotonic() < deadline, self.text
        return self.process.wait(PROMPT)

    def _read(self, timeout: float) -> bool:
        """Take in what comes; false at the end."""
        if not select.select([self._master], [], [], timeout)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # how Linux says that nobody holds the terminal any more
            return False
        self.text += data.decode()
        return bool(data)


@contextmanager
def receiving(tmp_path: Path, *, columns: int = 100, **more: str) -> Iterator[Terminal]:
    """A command in the middle of a machine; it gets the rest when the block is left."""
    uri = f"unix:{tmp_path}/s"
    terminal = Terminal(["receive", uri, str(tmp_path / "saved")], columns, **more)
    try:
        terminal.wait_for("listening at")
        with connected(uri) as source:
            source.sendall(STREAM[:300_000])
            yield terminal
            if terminal.process.poll() is None:
                source.sendall(STREAM[300_000:])
    finally:
        terminal.close()


def drawn(text: str) -> list[str]:
    """The progress lines that were drawn, without what colours them."""
    pieces = ESCAPE.sub("", text).replace("\r", "\n").split("\n")
    return [piece for piece in pieces if piece.startswith("active ")]


def test_terminal_shows_a_line_that_is_gone_in_the_end(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/s"
    terminal = Terminal(["receive", uri, str(tmp_path / "saved")], 100)
    terminal.wait_for("listening at")
    with connected(uri) as source:
        source.sendall(STREAM[:300_000])
        terminal.wait_for("of 2.33 MiB RAM")
        source.sendall(STREAM[300_000:])
    assert terminal.finish() == 0
    terminal.close()
    assert re.search(r"active +.*KiB +.*/s +\d+% of 2.33 MiB RAM", drawn(terminal.text)[-1])
    assert terminal.text.rindex(SHOW) > terminal.text.rindex(HIDE)
    assert COLOUR.search(terminal.text)
    # Behind the line's last erasure there is only the result.
    erased = ESCAPE.sub("", terminal.text[terminal.text.rindex("\x1b[2K") :])
    assert erased.startswith("received pc-i440fx-7.2")


def test_interrupted_terminal_gets_its_cursor_back(tmp_path: Path) -> None:
    with receiving(tmp_path) as terminal:
        terminal.wait_for("of 2.33 MiB RAM")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.finish() == 130
    assert terminal.text.rindex(SHOW) > terminal.text.rindex(HIDE)
    last = ESCAPE.sub("", terminal.text).replace("\r", "\n").rstrip().split("\n")[-1]
    assert last.startswith("vmferry: interrupted; nothing was kept")


@pytest.mark.parametrize("columns", [20, 40, 60, 79, 200])
def test_line_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    with receiving(tmp_path, columns=columns) as terminal:
        terminal.wait_for("active")
        terminal.wait_for("KiB")
        terminal.process.send_signal(signal.SIGINT)
        terminal.finish()
    lines = drawn(terminal.text)
    assert lines
    # Room for the ^C that a terminal shows, so that it does not push the line on.
    assert max(map(len, lines)) <= columns - 2
    assert ("RAM" in lines[-1]) == (columns >= 60)


def test_no_colour_where_none_is_wanted(tmp_path: Path) -> None:
    with receiving(tmp_path, NO_COLOR="1") as terminal:
        terminal.wait_for("of 2.33 MiB RAM")
        terminal.process.send_signal(signal.SIGINT)
        terminal.finish()
    assert not COLOUR.search(terminal.text)


def test_dumb_terminal_gets_lines(tmp_path: Path) -> None:
    with receiving(tmp_path, TERM="dumb") as terminal:
        terminal.process.send_signal(signal.SIGINT)
        terminal.finish()
    assert "\x1b" not in terminal.text


@pytest.mark.parametrize(("more", "bold"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_headings_are_bold_on_a_terminal(more: dict[str, str], bold: bool, tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(STREAM)
    terminal = Terminal(["inspect", str(tmp_path / "stream")], 80, **more)
    assert terminal.finish() == 0
    terminal.close()
    assert ("\x1b[1mSections\x1b[0m" in terminal.text) == bold
    lines = ESCAPE.sub("", terminal.text).splitlines()
    assert max(map(len, lines[10:])) <= 80


def test_log_gets_a_line_now_and_then(tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(STREAM)
    vmferry("receive", f"file:{tmp_path}/stream", tmp_path / "saved")
    done = vmferry("send", tmp_path / "saved", f"file:{tmp_path}/again", "--bandwidth", "300KiB")
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 4
    assert re.fullmatch(r"[\d.]+ KiB, [\d.]+ KiB/s, \d+% of 2.33 MiB RAM, .* zero", lines[0])
