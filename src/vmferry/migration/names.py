"""What to say where a name is not known: the name that may have been meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from vmferry.errors import UsageError, printable


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for *name*, which is no *what*; to be raised by the caller."""
    near = get_close_matches(name.lower().replace("_", "-"), list(known), n=1)
    advice = f"; did you mean {near[0]}?" if near else ""
    return UsageError(f"there is no migration {what} {printable(name)}{advice}")
