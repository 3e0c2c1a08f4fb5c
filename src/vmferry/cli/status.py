"""``vmferry status``: what a machine does, and how far its migration is."""

from __future__ import annotations

from .options import Json, Monitor


def command(monitor: Monitor, json: Json = False) -> None:
    """Show whether the machine behind the monitor SOCKET runs, and how far its migration is.

    It is a QEMU or a machine of vmferry run.
    """
    from json import dumps

    from vmferry.qemu import Qmp, query_machine

    from .migrating import described
    from .output import write

    with Qmp.connect(monitor, timeout=10) as qmp:
        machine = query_machine(qmp)
    write([dumps(machine.to_json())] if json else described(machine))
