"""One call for every form in which a saved machine can leave vmferry."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from vmferry.checkpoint.checkpoint import Checkpoint
from vmferry.checkpoint.transfer import receive
from vmferry.errors import UsageError, printable
from vmferry.migration.progress import Meter, Report
from vmferry.wire.ram import RamBlock
from vmferry.wire.reader import Tolerate

from .aside import new_file
from .cpu import read_cpus
from .devices import Devices
from .elfcore import write_elf_core
from .layout import layout_of
from .raw import write_raw
from .stream import opened, write_stream

FORMS: Final = ("raw", "elf-core", "stream")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: ``left_out`` are blocks of the machine that the form has no place for."""

    path: Path
    left_out: tuple[RamBlock, ...] = ()


def convert(
    source: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    progress: Report | None = None,
    max_ram: int | None = None,
    page_size: int | None = None,
    tolerate: Tolerate = Tolerate.NOTHING,
) -> Exported:
    """Write the machine in *source* to the new file *out*.

    *source* is a checkpoint directory, a stream file, or ``-`` for a stream on standard input; a
    stream is received into a checkpoint beside *out* first, which needs room for the machine's
    memory; *max_ram*, *page_size* and *tolerate* are for that, as in :func:`vmferry.receive`.  *to*
    is one of

    ``raw``: physical memory, byte by byte, in a sparse file;
    ``elf-core``: a core file with memory and the registers of the CPUs;
    ``stream``: what QEMU wrote or might have written.

    The first two need to know where the machine has its memory: :mod:`.layout` says for which
    machines that is so, and what is not in it.  *out* appears when it is complete; it is readable
    for its owner only.  *progress* hears of the receiving, then of the writing, each from
    ``setup`` to ``completed``; of the writing, ``transferred`` of ``ram_total`` bytes are done.

    Raises :class:`~vmferry.errors.UsageError` for what cannot be told of the machine,
    :class:`~vmferry.errors.StorageError` where *out* exists or cannot be written, and for *source*
    what :func:`~vmferry.checkpoint.receive` and :class:`~vmferry.checkpoint.Checkpoint` raise.
    """
    if to not in FORMS:
        raise UsageError(f"expected one of {', '.join(FORMS)}; found {printable(to)}")
    path = Path(out)
    receiving = partial(
        receive, progress=progress, max_ram=max_ram, page_size=page_size, tolerate=tolerate
    )
    with (
        new_file(path) as aside,
        opened(source, path.parent, receiving) as checkpoint,
    ):
        if to == "stream":
            write_stream(checkpoint, aside, progress)
            return Exported(path)
        return Exported(path, _write_memory(checkpoint, to, aside, Meter(progress)))


def _write_memory(
    checkpoint: Checkpoint, to: str, path: Path, meter: Meter
) -> tuple[RamBlock, ...]:
    layout = layout_of(checkpoint)
    cpus = read_cpus(Devices(checkpoint)) if to == "elf-core" else ()
    meter.start()
    meter.active(layout.size, checkpoint.page_size)
    if to == "raw":
        write_raw(checkpoint, layout, path, meter)
    else:
        write_elf_core(checkpoint, layout, cpus, path, meter)
    meter.phase("completed")
    return layout.left_out
