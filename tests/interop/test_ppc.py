"""A machine of the other endianness: PowerPC, with a guest in the Forth of its own firmware."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.interop.lab import Lab, main_memory
from tests.interop.test_decoded import raw, state_of, value, values
from tests.support.capture import Scenario
from vmferry.vmstate.tree import DeviceState

pytestmark = pytest.mark.qemu("ppc")

# A walker over 32 pages: it writes the number of the pass to each 64th byte, looks whether it is
# there, and speaks as the walker of x86 does.
WALKER = """
    variable n  create a 20000 allot
    : h ( u -- ) space <# u# u# u# u# u# u# u# u# u#> type ;
    : at ( i -- address ) 40 * a + ;
    : stamp 800 0 do n @ i at ! loop ;
    : check 800 0 do i at @ n @ <> if ." E" i h i at @ h n @ h cr then loop ;
    : beat n @ 7 and 0= if ." C" n @ h cr then ;
    : run ." R" cr begin 1 n +! stamp check beat again ;
    run
"""


@dataclass(frozen=True, kw_only=True)
class Mac(Scenario):
    """A Macintosh with nothing to look at; its firmware runs the walker."""

    target: str = "ppc"
    memory: int = 64
    bandwidth: int = 8 << 20

    @property
    def ram_size(self) -> int:
        """Not a multiple of 64 pages, for TCG's dirty log; see :class:`Scenario`."""
        return (self.memory << 20) + (8 << 10)

    def arguments(self, directory: Path) -> list[str]:  # noqa: ARG002
        """QEMU's arguments."""
        command = f"boot-command={' '.join(WALKER.split())}"
        return [*self.machine, "-m", f"{self.ram_size >> 10}k", "-prom-env", command]


MACHINES = [
    pytest.param(Mac(machine=("-machine", machine, "-nodefaults", "-vga", "none")), id=machine)
    for machine in ("g3beige", "mac99")
]
SPECIAL = (("XER", 1), ("LR", 8), ("CTR", 9), ("SRR0", 26), ("SRR1", 27), ("PVR", 287))


@pytest.mark.parametrize("mac", MACHINES)
def test_powerpc_goes_on_where_it_was_saved(lab: Lab, mac: Mac) -> None:
    """It counts on with all its memory, which is, as its registers are, what QEMU shows."""
    scenario = replace(mac, capabilities=("return-path",))
    source = lab.source(scenario)
    source.serial.wait_beat()
    checkpoint = lab.receive(source, scenario)
    assert source.qemu.query_migrate()["ram"]["dirty-sync-count"] > 2
    dump = source.qemu.directory / "memory"
    source.qemu.save_memory(dump, 0, scenario.ram_size)
    memory = main_memory(checkpoint, scenario)
    assert memory is not None
    assert np.array_equal(np.fromfile(memory.path, np.uint8), np.fromfile(dump, np.uint8))
    shown = source.qemu.hmp("info registers")
    assert dict(decoded(state_of(checkpoint, "cpu"))) == dict(registers(shown))
    stopped_at = source.serial.drain()
    resumed = lab.resume(checkpoint, scenario)
    resumed.qemu.wait_running()
    assert resumed.serial.wait_beat() > stopped_at
    resumed.serial.wait_beat()
    assert "R" not in resumed.serial.lines


def registers(shown: str) -> Iterator[tuple[str, Any]]:
    """The registers that QEMU shows, in text."""
    for name, number in re.findall(r"\b(NIP|LR|CTR|XER|MSR|CR|SRR0|SRR1|PVR|FPSCR) (\w+)", shown):
        yield name, int(number, 16)
    for kind in ("GPR", "FPR"):
        lines = re.findall(rf"{kind}\d\d((?: \w{{16}}){{4}})", shown)
        yield kind, [int(number, 16) for line in lines for number in line.split()]


def decoded(cpu: DeviceState) -> Iterator[tuple[str, Any]]:
    """The same registers of a decoded ``cpu`` section."""
    special = values(cpu, "env.spr")
    for name, number in SPECIAL:
        yield name, special[number]
    yield "NIP", value(cpu, "env.nip")
    yield "MSR", value(cpu, "env.msr")
    fields = values(cpu, "env.crf")
    yield "CR", sum(field << 4 * (7 - number) for number, field in enumerate(fields))
    high = values(cpu, "env.gprh")
    yield "GPR", [h << 32 | low for h, low in zip(high, values(cpu, "env.gpr"), strict=True)]
    doubles = raw(cpu, "cpu/fpu.env.vsr")
    yield "FPR", [int.from_bytes(doubles[at : at + 8]) for at in range(0, 256, 8)]
    yield "FPSCR", value(cpu, "cpu/fpu.env.fpscr")
