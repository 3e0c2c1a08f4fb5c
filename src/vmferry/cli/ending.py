"""How the command ends: one line on standard error, and the exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import typer

from vmferry.errors import VmferryError

from .output import ReaderGone, one_line, silence
from .signals import Interrupted

# The base of what typer raises for bad arguments has no public name, and has moved.
_BAD_ARGUMENTS: Final[type[Exception]] = typer.BadParameter.__mro__[2]

_BUG: Final = 1
_STORAGE: Final = 5
_READER_GONE: Final = 141
_PACKAGE: Final = Path(__file__).parent.parent


def status_of(run: Callable[[], int]) -> int:
    """The exit status of *run*, which has returned it or raised, after the line that says why."""
    try:
        status = run()
        sys.stdout.flush()
    except (ReaderGone, BrokenPipeError):
        silence(sys.stdout)
        return _READER_GONE
    except (Exception, Interrupted) as error:  # noqa: BLE001 - no traceback unless asked for
        message, status = judged(error)
        if os.environ.get("VMFERRY_DEBUG") and status == _BUG:
            traceback.print_exception(error)
        with suppress(OSError):  # nobody listens
            print(f"vmferry: {one_line(message)}", file=sys.stderr, flush=True)
        if isinstance(error, OSError):
            silence(sys.stdout)  # it may be what cannot be written
        if isinstance(error, Interrupted) and error.is_left:
            # Whoever is left behind may hold what an orderly end of the interpreter waits for.
            os._exit(status)
    return status


def judged(error: BaseException) -> tuple[str, int]:
    """What to say of *error*, and the exit status."""
    match error:
        case VmferryError() | Interrupted():
            return str(error), error.exit_status
        case OSError():
            where = f"{error.filename}: " if error.filename is not None else ""
            return f"{where}{error.strerror or error}", _STORAGE
        case MemoryError():
            return "there is not enough memory for this", _BUG
        case _ if isinstance(error, _BAD_ARGUMENTS):
            return _bad_arguments(error), 2
        case _:
            return _bug(error), _BUG


def _bad_arguments(error: BaseException) -> str:
    message = " ".join(getattr(error, "format_message", error.__str__)().split())
    message = message.replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "vmferry"
    return f"{message[:1].lower()}{message[1:].rstrip('.')}; see {command} --help"


def _bug(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    last = (ours or list(frames))[-1]
    name = last.filename
    with suppress(ValueError):
        name = str(Path(name).relative_to(_PACKAGE.parent))
    return (
        f"this is a bug in vmferry: {type(error).__name__}: {error} (at {name}:{last.lineno});"
        " please report it, with what VMFERRY_DEBUG=1 shows"
    )
