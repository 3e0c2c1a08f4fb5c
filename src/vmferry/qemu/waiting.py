"""A QEMU that waits for a machine, as it is made ready for one that needs more than that.

What it has is asked for before it listens, so that a machine of another shape is refused before
anything is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from vmferry.errors import Refused, UsageError, printable
from vmferry.units import format_size
from vmferry.wire.ram import RamBlock

from .qmp import Qmp, QmpError

_BLOCK: Final = re.compile(
    r"^ *(?P<name>\S.*?) +(?P<size>\d+) (?P<unit>[KMG]iB|B) +0x[0-9a-f]+ +0x(?P<used>[0-9a-f]+)"
    r" +0x[0-9a-f]+",
    re.MULTILINE,
)
_COMPLETED: Final = "completed"
_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True)
class WaitingBlock:
    """A RAM block of a QEMU: bytes in use, and of a page of what is behind it."""

    length: int
    page_size: int


class WaitingQemu:
    """The QEMU behind *qmp*, started with ``-incoming``."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        status = qmp.execute("query-status").get("status")
        if status != "inmigrate":
            raise UsageError(
                "expected a QEMU that waits for a machine (-incoming defer), found one that is"
                f" {printable(str(status))}"
            )

    def blocks(self) -> dict[str, WaitingBlock] | None:
        """Its RAM blocks by name; ``None`` where it does not tell."""
        try:
            table = str(
                self._qmp.execute("human-monitor-command", {"command-line": "info ramblock"})
            )
        except QmpError:
            return None
        return {
            found["name"]: WaitingBlock(
                int(found["used"], 16), int(found["size"]) * _UNITS[found["unit"]]
            )
            for found in _BLOCK.finditer(table)
        }

    def machine(self) -> str | None:
        """The name of its machine type, version and all; ``None`` where it does not tell."""
        try:
            found = self._qmp.execute("qom-get", {"path": "/machine", "property": "type"})
        except QmpError:
            return None
        return str(found).removesuffix("-machine")

    def check(self, blocks: Sequence[RamBlock], machine: str | None = None) -> dict[str, int]:
        """Refuse another *machine* or memory; the page size of each block, as far as it tells.

        Raises :class:`Refused` with what differs.
        """
        other = self.machine()
        if machine is not None and other is not None and other != machine:
            raise Refused(
                f"the QEMU that waits is of the machine type {printable(other)}, the saved machine"
                f" of {printable(machine)}: start it as the saved machine was started"
            )
        there = self.blocks()
        if there is None:
            return {}
        wrong = []
        for block in blocks:
            found = there.pop(block.name, None)
            if found is None:
                wrong.append(f"it has no block {printable(block.name)}")
            elif found.length != block.length and not block.name.startswith("/rom@"):
                has, not_this = format_size(found.length), format_size(block.length)
                if has == not_this:  # rounded
                    has, not_this = f"{found.length} bytes", str(block.length)
                wrong.append(f"its block {printable(block.name)} has {has}, not {not_this}")
            else:
                there[block.name] = found
        names = {block.name for block in blocks}
        wrong += [f"it has a block {printable(name)} more" for name in there if name not in names]
        if wrong:
            raise Refused(
                "the QEMU that waits is another machine than the saved one: "
                + "; ".join(wrong)
                + ": start it as the saved machine was started"
            )
        return {name: found.page_size for name, found in there.items()}

    def listen(
        self,
        uri: str,
        capabilities: Iterable[str],
        *,
        parameters: Mapping[str, object] | None = None,
        paused: bool = False,
    ) -> None:
        """Have it listen at *uri* with *capabilities* on; *paused*: it shall not run."""
        states = [{"capability": name, "state": True} for name in capabilities]
        self._qmp.execute("migrate-set-capabilities", {"capabilities": states})
        if parameters:
            self._qmp.execute("migrate-set-parameters", dict(parameters))
        if paused:
            # While it waits this means that it is not to start by itself (softmmu/vl.c).
            # A machine of vmferry refuses it, and heeds what the stream says.
            with suppress(QmpError):
                self._qmp.execute("stop")
        try:
            self._qmp.execute("migrate-incoming", {"uri": uri})
        except QmpError as error:
            if not self._qmp.execute("query-migrate").get("socket-address"):
                raise
            del error  # it was started with -incoming URI, and listens

    def running_at(self, timeout: float) -> float:
        """When it began to run, in seconds since 1970 by this host's clock."""
        event = self._qmp.wait_event("RESUME", timeout=timeout)
        stamp = event.get("timestamp")
        if not isinstance(stamp, dict):
            raise UsageError("expected an event with a time stamp, found one without")
        return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


def listen_again(qmp: Qmp, uri: str) -> None:
    """Have a QEMU whose migration is paused listen at *uri* for the rest of its memory.

    One that has all of it may have a source that did not hear that: a machine of vmferry says it
    once more.  Raises :class:`UsageError` where its migration is neither.
    """
    status = qmp.execute("query-migrate").get("status", "none")
    if status not in {"postcopy-paused", _COMPLETED}:
        raise UsageError(
            "expected a QEMU whose migration is postcopy-paused, found one where it is"
            f" {printable(str(status))}"
        )
    qmp.execute("migrate-recover", {"uri": uri})


def has_everything(qmp: Qmp) -> bool:
    """Whether the migration into a QEMU is over, and all has come."""
    return bool(qmp.execute("query-migrate").get("status") == _COMPLETED)
