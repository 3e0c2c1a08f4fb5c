"""The commands of a machine that vmferry hosts: those of QEMU, with answers of the same shape.

QEMU 7.2 ``qapi/{control,machine,migration,misc,run-state}.json``.  What QEMU has besides is unknown
here (``CommandNotFound``), and what it can and this cannot is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final
from uuid import UUID

from vmferry.errors import UsageError
from vmferry.migration.bitmaps import DirtyBitmaps
from vmferry.migration.capabilities import Capability
from vmferry.migration.control import Control
from vmferry.qemu.commands import Command
from vmferry.qemu.messages import Object
from vmferry.version import __version__

VERSION: Final = {
    "qemu": {"major": 7, "minor": 2, "micro": 0},
    "package": f"vmferry {__version__}",
}
"""The QEMU whose commands these are, and who really answers them."""

GREETING: Final = {"version": VERSION, "capabilities": []}


def machine_commands(
    control: Control, *, name: str = "", uuid: UUID | None = None
) -> dict[str, Command]:
    """The commands for the machine of *control*; *name* and *uuid* are for whoever asks."""
    identity = str(uuid or UUID(int=0))
    return {
        "query-status": _question(lambda: _status(control.run_state)),
        "query-name": _question(lambda: {"name": name} if name else {}),
        "query-uuid": _question(lambda: {"UUID": identity}),
        "query-version": _question(lambda: VERSION),
        "query-migrate": _question(control.query),
        "query-migrate-capabilities": _question(lambda: _capabilities(control.capabilities)),
        "query-migrate-parameters": _question(lambda: _parameters(control)),
        "stop": _order(control.stop),
        "cont": _order(control.cont),
        "migrate-set-capabilities": Command(
            lambda arguments: control.set_capabilities(_states(arguments["capabilities"])),
            required={"capabilities": list},
        ),
        "migrate-set-parameters": Command(control.set_parameters, more=True),
        "migrate": Command(
            lambda arguments: _migrate(control, arguments),
            required={"uri": str},
            optional={"detach": bool, "blk": bool, "inc": bool, "resume": bool},
        ),
        "migrate-incoming": Command(
            lambda arguments: _incoming(control, arguments), required={"uri": str}
        ),
        "migrate-start-postcopy": Command(lambda _arguments: control.start_postcopy()),
        "migrate-recover": Command(
            lambda arguments: _recover(control, arguments), required={"uri": str}, at_once=True
        ),
        "migrate-continue": Command(
            lambda arguments: control.proceed(arguments["state"]), required={"state": str}
        ),
        "migrate_cancel": Command(lambda _: control.cancel(), at_once=True),
        **_bitmap_commands(control.bitmaps),
    }


def _bitmap_commands(bitmaps: DirtyBitmaps) -> dict[str, Command]:
    def order(give: Callable[[str, str], None]) -> Command:
        return Command(
            lambda arguments: give(arguments["node"], arguments["name"]),
            required={"node": str, "name": str},
        )

    return {
        "block-dirty-bitmap-add": Command(
            lambda arguments: _add_bitmap(bitmaps, **arguments),
            required={"node": str, "name": str},
            optional={"granularity": int, "persistent": bool, "disabled": bool},
        ),
        "block-dirty-bitmap-remove": order(bitmaps.remove),
        "block-dirty-bitmap-clear": order(bitmaps.clear),
        "block-dirty-bitmap-enable": order(partial(bitmaps.record, on=True)),
        "block-dirty-bitmap-disable": order(partial(bitmaps.record, on=False)),
    }


def _add_bitmap(
    bitmaps: DirtyBitmaps, node: str, name: str, *, persistent: bool = False, **more: Any
) -> None:
    if persistent:
        raise UsageError("dirty bitmaps are kept in memory by vmferry, and cannot be persistent")
    bitmaps.add(node, name, **more)


def _question(ask: Callable[[], object]) -> Command:
    return Command(lambda _: ask(), at_once=True)


def _order(give: Callable[[], None]) -> Command:
    return Command(lambda _: give())


def _status(run_state: str) -> Object:
    return {"status": run_state, "singlestep": False, "running": run_state == "running"}


def _capabilities(enabled: frozenset[Capability]) -> list[Object]:
    return [{"capability": one, "state": one in enabled} for one in Capability]


def _parameters(control: Control) -> Object:
    return control.parameters.to_qmp()  # those of now: they are replaced when one changes


def _states(entries: list[object]) -> dict[str, bool]:
    states = {}
    for entry in entries:
        match entry:
            case {"capability": str(name), "state": bool(state), **rest} if not rest:
                states[name] = state
            case _:
                raise UsageError("expected objects with capability and state as capabilities")
    return states


def _incoming(control: Control, arguments: Object) -> None:
    control.incoming(arguments["uri"])


def _recover(control: Control, arguments: Object) -> None:
    control.recover(arguments["uri"])


def _migrate(control: Control, arguments: Object) -> None:
    # In QMP a migration is always detached, whatever is said.
    if wanted := [name for name in ("blk", "inc") if arguments.get(name)]:
        instead = {"blk": "the capability block", "inc": "the parameter block-incremental"}
        raise UsageError(f"{wanted[0]} is deprecated in QEMU, too: set {instead[wanted[0]]}")
    begin = control.resume if arguments.get("resume") else control.migrate
    begin(arguments["uri"])
