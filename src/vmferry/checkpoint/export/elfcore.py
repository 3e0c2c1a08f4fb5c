"""An ELF core file of the machine, for gdb, crash, drgn, volatility and their like.

What QEMU's ``dump-guest-memory`` writes (QEMU 7.2 ``dump/dump.c``, ``target/i386/arch_dump.c``): a
note NT_PRSTATUS for each CPU, then a note of QEMU's own for each, then memory as PT_LOADs by
physical address.  The file is ELF64 whatever the guest; where the first CPU is not in long mode its
machine is the i386, with the NT_PRSTATUS of that.  Differences to QEMU: every PT_LOAD starts at a
page of the file, zero pages are holes, there is no section table.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmferry.checkpoint.checkpoint import Checkpoint
from vmferry.errors import storage_error
from vmferry.migration.progress import Meter

from .cpu import Registers, SegmentRegister
from .layout import Layout
from .raw import write_memory

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_NOTE: Final = struct.Struct("<III8s")
_IDENT: Final = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
_ET_CORE: Final = 4
_EM_386: Final = 3
_EM_X86_64: Final = 62
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4

_NT_PRSTATUS: Final = 1
_PRSTATUS_64: Final = struct.Struct("<32xI76x27Q8x")
_PRSTATUS_32: Final = struct.Struct("<24xI44x17I4x")
_QEMU_STATE: Final = struct.Struct("<II18Q")
_QEMU_SEGMENT: Final = struct.Struct("<IIIIQ")
_QEMU_CONTROL: Final = struct.Struct("<6Q")
_QEMU_VERSION: Final = 1

_ALIGNMENT: Final = 4096

_RAX, _RCX, _RDX, _RBX, _RSP, _RBP, _RSI, _RDI = range(8)


def write_elf_core(
    checkpoint: Checkpoint, layout: Layout, cpus: Sequence[Registers], path: Path, meter: Meter
) -> None:
    """Fill the empty file *path*; there is one CPU at least."""
    machine, prstatus = (_EM_X86_64, _prstatus64) if cpus[0].long_mode else (_EM_386, _prstatus32)
    notes = b"".join(_note(b"CORE", _NT_PRSTATUS, prstatus(cpu)) for cpu in cpus)
    notes += b"".join(_note(b"QEMU", 0, _qemu_state(cpu)) for cpu in cpus)
    count = 1 + len(layout.segments)
    notes_at = _HEADER.size + count * _PROGRAM_HEADER.size
    offset = _aligned(notes_at + len(notes))
    headers = [_PROGRAM_HEADER.pack(_PT_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 0)]
    placed = []
    for segment in layout.segments:
        placed.append((segment, offset))
        address, size = segment.address, segment.size
        headers.append(
            _PROGRAM_HEADER.pack(_PT_LOAD, 0, offset, address, address, size, size, _ALIGNMENT)
        )
        offset = _aligned(offset + size)
    try:
        path.write_bytes(b"".join((_header(machine, count), *headers, notes)))
    except OSError as error:
        raise storage_error(path, "written", error) from None
    last, at = placed[-1]
    write_memory(checkpoint, placed, path, at + last.size, meter)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _header(machine: int, count: int) -> bytes:
    sizes = (_HEADER.size, _PROGRAM_HEADER.size, count, 0, 0, 0)
    return _HEADER.pack(_IDENT, _ET_CORE, machine, 1, 0, _HEADER.size, 0, 0, *sizes)


def _note(name: bytes, kind: int, content: bytes) -> bytes:
    """A note; names of four letters and contents of whole words need no further padding."""
    return _NOTE.pack(len(name) + 1, len(content), kind, name) + content


def _prstatus64(cpu: Registers) -> bytes:
    """The kernel's elf_prstatus of x86-64: a process id and the registers, the rest is zero."""
    general, segments = cpu.general, cpu.segments
    return _PRSTATUS_64.pack(
        _thread(cpu),
        *(general[number] for number in (15, 14, 13, 12, _RBP, _RBX, 11, 10, 9, 8)),
        *(general[number] for number in (_RAX, _RCX, _RDX, _RSI, _RDI)),
        0,  # orig_rax: no system call
        cpu.rip,
        segments["cs"].selector,
        cpu.rflags,
        general[_RSP],
        segments["ss"].selector,
        segments["fs"].base,
        segments["gs"].base,
        *(segments[name].selector for name in ("ds", "es", "fs", "gs")),
    )


def _prstatus32(cpu: Registers) -> bytes:
    """The same of the i386."""
    segments = {name: segment.selector & 0xFFFF for name, segment in cpu.segments.items()}
    general = [number & 0xFFFFFFFF for number in cpu.general]
    return _PRSTATUS_32.pack(
        _thread(cpu),
        *(general[number] for number in (_RBX, _RCX, _RDX, _RSI, _RDI, _RBP, _RAX)),
        *(segments[name] for name in ("ds", "es", "fs", "gs")),
        0,  # orig_eax
        cpu.rip & 0xFFFFFFFF,
        segments["cs"],
        cpu.rflags & 0xFFFFFFFF,
        general[_RSP],
        segments["ss"],
    )


def _thread(cpu: Registers) -> int:
    """Debuggers see CPUs as threads of a process, whose ids start at 1."""
    return (cpu.index + 1) & 0xFFFFFFFF


def _qemu_state(cpu: Registers) -> bytes:
    """QEMU's own note: what a debugger of kernels needs besides, and cannot find in the other."""
    general = cpu.general
    order = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt")
    segments = b"".join(_qemu_segment(cpu.segments[name]) for name in order)
    size = _QEMU_STATE.size + len(segments) + _QEMU_CONTROL.size
    numbers = (_RAX, _RBX, _RCX, _RDX, _RSI, _RDI, _RSP, _RBP, *range(8, 16))
    state = _QEMU_STATE.pack(
        _QEMU_VERSION, size, *(general[number] for number in numbers), cpu.rip, cpu.rflags
    )
    return state + segments + _QEMU_CONTROL.pack(*cpu.cr, cpu.kernel_gs_base)


def _qemu_segment(segment: SegmentRegister) -> bytes:
    return _QEMU_SEGMENT.pack(segment.selector, segment.limit, segment.flags, 0, segment.base)
