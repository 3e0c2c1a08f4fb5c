"""Devices of QEMU, declared as its streams describe them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from vmferry.vmstate import (
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    Buffer,
    Custom,
    Gap,
    Timer,
    VarArray,
    at_most,
    before,
    device,
    equal,
    named,
    of,
    since,
    state,
    subsection,
    when,
)


def zeros(length: int) -> Callable[[], list[int]]:
    return lambda: [0] * length


def blank(length: int) -> Callable[[], bytearray]:
    return lambda: bytearray(length)


@device("timer", version=2, minimum_version=1)
@dataclass(slots=True)
class TimerState:
    cpu_ticks_offset: I64 = 0
    _unused: ClassVar[Annotated[None, Gap(8)]]
    cpu_clock_offset: Annotated[I64, since(2)] = 0


@device("cpu_common", version=1)
class CpuCommon:
    halted: U32
    interrupt_request: U32


@state("serial/thr_ipending")
@dataclass
class ThrPending:
    thr_ipending: I32 = 0


@state("serial", version=3, minimum_version=2)
@dataclass
class Uart:
    divider: U16 = 0
    rbr: U8 = 0
    ier: U8 = 0
    iir: U8 = 0
    lcr: U8 = 0
    mcr: U8 = 0
    lsr: U8 = 0
    msr: U8 = 0
    scr: U8 = 0
    fcr: Annotated[U8, since(3), named("fcr_vmstate")] = 0
    thr: Annotated[ThrPending | None, subsection] = None


@device("serial", version=3, minimum_version=2)
@dataclass
class IsaSerial:
    state: Uart = field(default_factory=Uart)


@state("pit channel", version=2)
@dataclass
class PitChannel:
    count: I32 = 0
    latched_count: U16 = 0
    count_latched: U8 = 0
    status_latched: U8 = 0
    status: U8 = 0
    read_state: U8 = 0
    write_state: U8 = 0
    write_latch: U8 = 0
    rw_mode: U8 = 0
    mode: U8 = 0
    bcd: U8 = 0
    gate: U8 = 0
    count_load_time: I64 = 0
    next_transition_time: I64 = 0


@device("i8254", version=3, minimum_version=2)
@dataclass
class Pit:
    irq_disabled: Annotated[U32, since(3), named("channels[0].irq_disabled")] = 0
    channels: Annotated[list[PitChannel], Array(3)] = field(
        default_factory=lambda: [PitChannel() for _ in range(3)]
    )
    next: Annotated[I64, named("channels[0].next_transition_time")] = 0


@device("i8259", version=1)
@dataclass(slots=True)
class Pic:
    last_irr: U8 = 0
    irr: U8 = 0
    imr: U8 = 0
    isr: U8 = 0
    priority_add: U8 = 0
    irq_base: U8 = 0
    read_reg_select: U8 = 0
    poll: U8 = 0
    special_mask: U8 = 0
    init_state: U8 = 0
    auto_eoi: U8 = 0
    rotate_on_auto_eoi: U8 = 0
    special_fully_nested_mode: U8 = 0
    init4: U8 = 0
    single_mode: U8 = 0
    elcr: U8 = 0


@device("mc146818rtc", version=3, minimum_version=1)
@dataclass
class Rtc:
    cmos_data: Annotated[bytearray, Buffer(128)] = field(default_factory=blank(128))
    cmos_index: U8 = 0
    _gap0: ClassVar[Annotated[None, Gap(28)]]
    periodic_timer: Timer = None
    next_periodic_time: I64 = 0
    _gap1: ClassVar[Annotated[None, Gap(24)]]
    irq_coalesced: Annotated[U32, since(2)] = 0
    period: Annotated[U32, since(2)] = 0
    base_rtc: Annotated[U64, since(3)] = 0
    last_update: Annotated[U64, since(3)] = 0
    offset: Annotated[I64, since(3)] = 0
    update_timer: Annotated[Timer, since(3)] = None
    next_alarm_time: Annotated[U64, since(3)] = 0


@state("PS2 Common State", version=3, minimum_version=2)
@dataclass
class Ps2:
    write_cmd: I32 = 0
    rptr: Annotated[I32, named("queue.rptr")] = 0
    wptr: Annotated[I32, named("queue.wptr")] = 0
    count: Annotated[I32, named("queue.count")] = 0
    data: Annotated[bytearray, Buffer(256), named("queue.data")] = field(default_factory=blank(256))


@device("ps2kbd", version=3, minimum_version=2)
@dataclass
class Keyboard:
    parent_obj: Ps2 = field(default_factory=Ps2)
    scan_enabled: I32 = 0
    translate: I32 = 0
    scancode_set: Annotated[I32, since(3)] = 0


@device("ps2mouse", version=2)
@dataclass
class Mouse:
    parent_obj: Ps2 = field(default_factory=Ps2)
    mouse_status: U8 = 0
    mouse_resolution: U8 = 0
    mouse_sample_rate: U8 = 0
    mouse_wrap: U8 = 0
    mouse_type: U8 = 0
    mouse_detect_state: U8 = 0
    mouse_dx: I32 = 0
    mouse_dy: I32 = 0
    mouse_dz: I32 = 0
    mouse_buttons: U8 = 0


@state("pckbd/extended_state", version=0)
@dataclass
class KbdExtended:
    migration_flags: U32 = 0
    obsrc: U32 = 0
    obdata: U8 = 0
    cbdata: U8 = 0


@state("pckbd", version=3)
@dataclass
class Kbd:
    write_cmd: U8 = 0
    status: U8 = 0
    mode: U8 = 0
    pending: Annotated[U8, named("pending_tmp")] = 0
    extended: Annotated[KbdExtended | None, subsection] = None


@device("pckbd", version=3)
@dataclass
class IsaKbd:
    kbd: Kbd = field(default_factory=Kbd)


class Raw:
    """A type of QEMU's own that is some bytes."""

    def __init__(self, type_name: str, size: int) -> None:
        self.type = type_name
        self._size = size

    def save(self, value: bytes) -> bytes:
        return value

    def load(self, data: memoryview) -> tuple[bytes, int]:
        if len(data) < self._size:
            raise ValueError(f"{self._size} bytes are not there")
        return bytes(data[: self._size]), self._size


@state("PCIDevice", version=2, minimum_version=1)
@dataclass
class PciDevice:
    version_id: Annotated[I32, at_most] = 2
    config: Annotated[bytes, Custom(Raw("pci config", 256)), when(lambda pci: not pci.express)] = (
        bytes(256)
    )
    extended: Annotated[
        bytes, Custom(Raw("pci config", 4096)), when(lambda pci: pci.express), named("config")
    ] = bytes(4096)
    irq_state: Annotated[bytes, Custom(Raw("pci irq state", 16)), since(2)] = bytes(16)

    express: ClassVar[bool] = False


@device("PIIX3", version=3, minimum_version=2)
@dataclass
class Piix3:
    dev: PciDevice = field(default_factory=PciDevice)
    levels: Annotated[list[I32], Array(4), since(3), named("pci_irq_levels_vmstate")] = field(
        default_factory=zeros(4)
    )


@device("I440FX", version=3)
@dataclass
class I440fx:
    parent_obj: PciDevice = field(default_factory=PciDevice)
    _unused: ClassVar[Annotated[None, Gap(1)]]


@device("PCIBUS", version=1)
@dataclass
class PciBus:
    nirq: Annotated[I32, equal] = 4
    irq_count: Annotated[list[I32], VarArray("nirq", bound=256)] = field(default_factory=zeros(4))


@state("dma_regs", version=1)
@dataclass
class DmaRegs:
    now: Annotated[list[I32], Array(2)] = field(default_factory=zeros(2))
    base: Annotated[list[U16], Array(2)] = field(default_factory=zeros(2))
    mode: U8 = 0
    page: U8 = 0
    pageh: U8 = 0
    dack: U8 = 0
    eop: U8 = 0


@device("dma", version=1)
@dataclass
class Dma:
    command: U8 = 0
    mask: U8 = 0
    flip_flop: U8 = 0
    dshift: I32 = 0
    regs: Annotated[list[DmaRegs], Array(4)] = field(
        default_factory=lambda: [DmaRegs() for _ in range(4)]
    )


@state("fdrive/media_rate", version=1)
@dataclass
class MediaRate:
    media_rate: U8 = 0


@state("fdrive", version=1)
@dataclass
class Drive:
    head: U8 = 0
    track: U8 = 0
    sect: U8 = 0
    rate: Annotated[MediaRate | None, subsection] = None


@state("fdc", version=2)
@dataclass
class FdcState:
    sra: U8 = 0
    srb: U8 = 0
    dor: Annotated[U8, named("dor_vmstate")] = 0
    tdr: U8 = 0
    dsr: U8 = 0
    msr: U8 = 0
    status0: U8 = 0
    status1: U8 = 0
    status2: U8 = 0
    fifo: Annotated[list[U8], Array(512)] = field(default_factory=zeros(512))
    data_pos: U32 = 0
    data_len: U32 = 0
    data_state: U8 = 0
    data_dir: U8 = 0
    eot: U8 = 0
    timer0: U8 = 0
    timer1: U8 = 0
    precomp_trk: U8 = 0
    config: U8 = 0
    lock: U8 = 0
    pwrd: U8 = 0
    num_floppies: Annotated[U8, equal] = 2
    drives: Annotated[list[Drive], Array(2)] = field(
        default_factory=lambda: [Drive() for _ in range(2)]
    )


@device("fdc", version=2)
@dataclass
class Fdc:
    state: FdcState = field(default_factory=FdcState)


@state("hpet_timer", version=1)
@dataclass
class HpetTimer:
    tn: U8
    config: U64
    cmp: U64
    fsb: U64
    period: U64
    wrap_flag: U8
    qemu_timer: Timer


@device("hpet", version=2, minimum_version=1)
@dataclass
class Hpet:
    config: U64 = 0
    isr: U64 = 0
    hpet_counter: U64 = 0
    num_timers: Annotated[U8, since(2)] = 0
    timers: Annotated[list[HpetTimer], VarArray("num_timers", bound=32), named("timer")] = field(
        default_factory=list
    )


@state("fw_cfg/dma", version=0)
@dataclass
class FwCfgDma:
    dma_addr: U64 = 0


@state("fw_cfg/acpi_mr", version=1)
@dataclass
class FwCfgSizes:
    table_mr_size: U64 = 0
    linker_mr_size: U64 = 0
    rsdp_mr_size: U64 = 0


@device("fw_cfg", version=2, minimum_version=1)
@dataclass
class FwCfg:
    cur_entry: U16 = 0
    _narrow: ClassVar[Annotated[U16, of("cur_offset"), before(2)]]
    cur_offset: Annotated[U32, since(2)] = 0
    dma: Annotated[FwCfgDma | None, subsection] = None
    sizes: Annotated[FwCfgSizes | None, subsection] = None


@device("ioapic", version=3, minimum_version=1)
@dataclass
class IoApic:
    id: U8 = 0
    ioregsel: U8 = 0
    _unused: ClassVar[Annotated[None, Gap(8), since(2)]]
    irr: Annotated[U32, since(2)] = 0
    ioredtbl: Annotated[list[U64], Array(24)] = field(default_factory=zeros(24))


@device("globalstate", version=1)
@dataclass
class GlobalState:
    size: U32 = 0
    runstate: Annotated[bytes, Buffer(100)] = bytes(100)


DEVICES: dict[str, type[Any]] = {
    "timer": TimerState,
    "cpu_common": CpuCommon,
    "serial": IsaSerial,
    "i8254": Pit,
    "i8259": Pic,
    "mc146818rtc": Rtc,
    "ps2kbd": Keyboard,
    "ps2mouse": Mouse,
    "pckbd": IsaKbd,
    "PIIX3": Piix3,
    "I440FX": I440fx,
    "PCIBUS": PciBus,
    "dma": Dma,
    "fdc": Fdc,
    "hpet": Hpet,
    "fw_cfg": FwCfg,
    "ioapic": IoApic,
    "globalstate": GlobalState,
}
"""By the last part of the section's name."""
