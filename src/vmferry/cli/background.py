"""A command that returns while a process of it goes on."""

from __future__ import annotations

import json as _json
import subprocess
import sys
from typing import Any

import typer

from .output import say


def leave_behind(*, json: bool, quiet: bool) -> None:
    """Run this very command in a session of its own, and return once its machine runs.

    Where it ends before, so does this one, with its status.
    """
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)  # the command of QEMU is its own
    unwanted = {"--background", "--quiet", "-q", "--json"}
    arguments = [a for a in given[:end] if a not in unwanted] + given[end:]
    command = [sys.executable, "-P", "-m", "vmferry", arguments[0], "--json", *arguments[1:]]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    for line in process.stdout or ():
        event: dict[str, Any] = _json.loads(line)
        if event["event"] == "progress" and event["phase"] == "postcopy-active":
            if json:
                say(_json.dumps({"event": "result", "ok": True, "pid": process.pid}), sys.stdout)
            elif not quiet:
                say(f"running; process {process.pid} sends the rest of its memory", sys.stdout)
            return
        if event["event"] == "result":
            if json:
                say(line.rstrip(), sys.stdout)
            break
    raise typer.Exit(process.wait())
