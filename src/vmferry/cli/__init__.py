"""The ``vmferry`` command: one module per verb, each a few lines over what Python users call.

Exit status: 0 for success, that of the error's class (``vmferry/errors.py``), 130 after ctrl-C (128
and the signal's number in general), 141 where the reader of the output has gone.  What is imported
here and by the modules of the verbs is what ``--help`` costs, so they import the rest where it is
used.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the status that the process is to exit with, at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Interrupted while all this is still imported, it ends without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # numpy's linear algebra would start a thread for each processor, and nothing here needs it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from .signals import Interrupted, raising_signals

    given = sys.argv[1:] if arguments is None else list(arguments)
    with raising_signals():
        try:
            from .ending import status_of
            from .output import open_standard_streams

            open_standard_streams()
            return status_of(lambda: _run(given))
        except Interrupted as error:  # before the command began, or after it had ended
            return error.exit_status


def _run(arguments: list[str]) -> int:
    from .app import app

    status = app(arguments or ["--help"], prog_name="vmferry", standalone_mode=False)
    return 2 if not arguments else int(status or 0)
