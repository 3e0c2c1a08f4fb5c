"""Text for people: safe for any terminal and any encoding, and no matter who stops reading."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable
from typing import Final, TextIO

from vmferry.errors import StorageError, printable

_PLAIN: Final = re.compile(r"[!#-\[\]-~]+")
"""ASCII without spaces, quotes and backslashes."""


class ReaderGone(BaseException):
    """Nobody reads standard output any more: there is nothing left to do."""


def open_standard_streams() -> None:
    """Put something harmless where the command was started with a standard stream closed.

    Else the next file that is opened would take its number, and get what a child process prints.
    """
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, stream) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            setattr(sys, stream, os.fdopen(number, "w" if number else "r"))


def name(text: str) -> str:
    """A name from a stream: as it is where it is harmless, else quoted and escaped."""
    return text if len(text) <= 80 and _PLAIN.fullmatch(text) else printable(text)


def count(number: int, what: str) -> str:
    """``1 block``, ``2,000 blocks``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def one_line(text: str) -> str:
    """*text* without anything that would move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line (to standard output) at once; goes on where nobody reads it."""
    file = file or sys.stdout
    try:
        print(_fitting(line, file), file=file, flush=True)
    except BrokenPipeError:
        silence(file)


def write(lines: Iterable[str]) -> None:
    """Write *lines* to standard output; :class:`ReaderGone` where nobody reads them."""
    out = sys.stdout
    try:
        for line in lines:
            out.write(f"{_fitting(line, out).rstrip()}\n")
        out.flush()
    except BrokenPipeError:
        silence(out)
        raise ReaderGone from None
    except OSError as error:
        silence(out)
        raise StorageError(f"standard output: cannot be written: {error.strerror}") from None


def silence(file: TextIO) -> None:
    """Let what is still buffered, and what else is printed, go nowhere."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, file.fileno())
    os.close(nothing)


def is_terminal(file: TextIO) -> bool:
    """Whether *file* is a terminal that can do more than append."""
    return file.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def width() -> int:
    """Columns of the terminal; where there is none, as many as still read well."""
    return shutil.get_terminal_size((80 if sys.stdout.isatty() else 120, 0)).columns


def heading(text: str) -> str:
    """*text* in bold where that can be seen and is wanted."""
    if is_terminal(sys.stdout) and not os.environ.get("NO_COLOR"):
        return f"\x1b[1m{text}\x1b[0m"
    return text


def _fitting(line: str, file: TextIO) -> str:
    """*line* with what the encoding of *file* lacks escaped."""
    encoding = file.encoding or "ascii"
    return line.encode(encoding, "backslashreplace").decode(encoding)
