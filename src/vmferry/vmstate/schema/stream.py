"""Whether one stream loads in a program: what the stream says of itself against a declaration.

The closing description has names, versions, and the bytes of what was really sent, subsections
too, so that conditions and lengths need no guess on this side.  Sections are found by the name of
their state, as the declared types are not in the stream; several types may share one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from vmferry.wire.description import (
    STRUCT,
    DeviceDescription,
    FieldDescription,
    VmDescription,
    Vmsd,
)

from .align import Gap, Pair, align
from .findings import Direction, Finding, Kind, Spot
from .model import CANDIDATES, FieldSchema, Key, Schema, StateSchema
from .shape import GAP, form, forms, is_gap, leaves, same_type, total

_BY_HAND: Final = frozenset(
    {
        *("PCIBUS", "acpi_build", "adb_bus", "apic", "cpu", "cpu_common", "eeprom", "globalstate"),
        *("i2c_bus", "i82550", "i82551", "i82557a", "i82557b", "i82557c", "i82558a", "i82558b"),
        *("i82559a", "i82559b", "i82559c", "i82559er", "i82562", "i82801", "icp/server", "ide"),
        *("ipmi-bmc-sim", "ipmi-interface", "spapr", "spapr_cpu", "spapr_iommu", "timer"),
        "virtio-mem-device-early",
    }
)
"""States that QEMU registers by hand, so that no dump of its has them, as far as 7.2 and 10.0 sent
them."""

_PLAIN: Final = frozenset(
    {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("uint8 equal", "uint16 equal", "int32 equal", "uint32 equal", "int64 equal", "int32 le"),
    }
)
"""Types of as many bytes on the wire as in memory."""

_GAP_TYPE: Final = "unused_buffer"
_BYTES: Final = frozenset({"buffer", _GAP_TYPE})
_ONE_BYTE: Final = _BYTES | {"bool", "int8", "uint8", "uint8 equal"}
"""Types that may have one byte; of any other, that is the mark of a pointer that is NULL."""


def check_stream(
    description: VmDescription, schema: Schema, others: Iterable[str] = ()
) -> list[Finding]:
    """What there is to know of a stream in a program; *others* are sections without description.

    What is judged is the device sections: that each is known, fits in its versions, and is made of
    the fields that are declared.  Whether the machine there has the devices is not in a schema.
    """
    known: dict[str, dict[StateSchema, None]] = defaultdict(dict)
    for declared in schema.devices:
        known[declared.state.name][declared.state] = None
    found: dict[Finding, None] = {}
    for device in description.devices:
        found |= dict.fromkeys(_device(device, list(known.get(_state_name(device), ())), schema))
    for name in dict.fromkeys(others):
        spot = Spot(Direction.STREAM, name, name)
        found[spot.note(Kind.NOT_JUDGED, "a declared state", "a section of its own kind")] = None
    return list(found)


def _state_name(device: DeviceDescription) -> str:
    return device.vmsd.name if device.vmsd else device.name


def _device(
    device: DeviceDescription, states: Sequence[StateSchema], schema: Schema
) -> Iterator[Finding]:
    vmsd, name = device.vmsd, _state_name(device)
    title = f"{device.name}:{device.instance}" if device.instance else device.name
    spot = Spot(Direction.STREAM, title, name)
    if vmsd is None:
        yield spot.note(Kind.NOT_JUDGED, "a described state", f"{device.size} bytes")
    elif states:
        yield from min(
            (list(_versioned(vmsd, state, spot)) for state in states[:CANDIDATES]),
            key=lambda findings: sum(finding.breaks for finding in findings),
        )
    elif not schema.complete and name in _BY_HAND:
        yield spot.note(Kind.NOT_JUDGED, "a declared device", "one that QEMU never dumps")
    else:
        yield spot.breaks(Kind.DEVICE_UNKNOWN, "a device that is declared", f"{name}, which is not")


def _versioned(vmsd: Vmsd, state: StateSchema, spot: Spot) -> Iterator[Finding]:
    found = f"version {vmsd.version}"
    if vmsd.version > state.version:
        yield spot.breaks(Kind.VERSION_TOO_NEW, f"at most version {state.version}", found)
    elif vmsd.version < state.minimum:
        yield spot.breaks(Kind.VERSION_TOO_OLD, f"at least version {state.minimum}", found)
    else:
        yield from _state(vmsd, state, vmsd.version, spot)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A field of the stream, with all of its elements: an array has one entry, or one for each."""

    elements: tuple[FieldDescription, ...]

    @property
    def first(self) -> FieldDescription:
        return self.elements[0]

    @property
    def count(self) -> int:
        return sum(element.array_len or 1 for element in self.elements)

    @property
    def size(self) -> int:
        return sum(element.wire_size for element in self.elements)

    @property
    def form(self) -> str:
        number = f"{self.count} times " if self.count > 1 else ""
        return f"{number}{self.first.size} byte{'s' * (self.first.size != 1)} of {self.first.type}"


def _state(vmsd: Vmsd, state: StateSchema, version: int, spot: Spot) -> Iterator[Finding]:
    names = state.described_names()
    wanted = [((names[key], 0), field) for key, field in state.fields_in(version)]
    for part in align(list(_sent(vmsd)), wanted, lambda key: key[0].partition("[")[0] != GAP):
        if isinstance(part, Pair):
            yield from _pair(part.sent, part.wanted, spot.at(part.wanted.name))
        else:
            yield from _gap(part, spot)
    known = {sub.name: sub for sub in state.subsections}
    for sub in vmsd.subsections:
        inner = spot.at(sub.name)
        if sub.name in known:
            yield from _versioned(sub, known[sub.name], inner)
        else:
            expected = "a subsection that is declared"
            yield inner.breaks(Kind.SUBSECTION_UNKNOWN, expected, f"{sub.name}, which is not")


def _sent(vmsd: Vmsd) -> Iterator[tuple[Key, _Sent]]:
    """The fields by name, the elements of an array together."""
    # A peer may repeat a name that QEMU would not; only the first is then one that is known.
    seen: Counter[str] = Counter()
    for name, run in groupby(vmsd.fields, key=lambda field: field.name):
        entries = tuple(run)
        # QEMU 10.0 leaves the index of the last element out.
        is_array = entries[0].index is not None
        for elements in [entries] if is_array else [(entry,) for entry in entries]:
            yield (name, seen[name]), _Sent(elements)
            seen[name] += 1


def _pair(sent: _Sent, wanted: FieldSchema, spot: Spot) -> Iterator[Finding]:
    count = wanted.count
    if count is not None and (sent.count > count if wanted.counted else sent.count != count):
        yield spot.breaks(Kind.ARRAY_LENGTH_CHANGED, form(wanted), sent.form)
    for element in sent.elements:
        if element.struct is not None and wanted.struct is not None:
            # A struct of fixed version says which; others are loaded as the loader knows them.
            own = element.struct.version if element.type == "vstruct" else wanted.struct.version
            version = wanted.struct_version or own
            yield from _state(element.struct, wanted.struct, version, spot)
        elif element.size != 1 or element.type in _ONE_BYTE:
            yield from _value(element, wanted, spot, sent.form)


def _value(
    element: FieldDescription, wanted: FieldSchema, spot: Spot, found: str
) -> Iterator[Finding]:
    """A value or bytes, or a struct that nothing is known of."""
    is_struct = element.type == STRUCT
    if is_struct if wanted.struct is None else element.type in _PLAIN:
        yield spot.breaks(Kind.TYPE_CHANGED, form(wanted), found)
    elif wanted.struct is None and not _fits(element, wanted.size):
        yield spot.breaks(Kind.SIZE_CHANGED, form(wanted), found)
    elif wanted.struct is None and not same_type(element.type, wanted.type):
        yield spot.may_break(Kind.TYPE_CHANGED, form(wanted), found)


def _fits(element: FieldDescription, size: int) -> bool:
    """Whether the bytes of a value can be those of a declared *size*."""
    if element.type in _PLAIN:
        return element.size == size
    if element.type in _BYTES and size:
        # The length of some buffers is a number in another field, times the declared size.
        return element.size % size == 0
    return True


def _gap(gap: Gap[_Sent, FieldSchema], spot: Spot) -> Iterator[Finding]:
    # A field under a condition that did not hold is not there.
    missing = [field for field in gap.wanted if not field.conditional]
    possible = [replace(field, conditional=False) for field in gap.wanted]
    size = sum(sent.size for sent in gap.sent)
    for fields in (missing, possible) if gap.sent else ():
        values = leaves(fields)
        if values and total(values) == size:
            if not is_gap(fields) or any(sent.first.type != _GAP_TYPE for sent in gap.sent):
                words = " and ".join(f"{sent.first.name} ({sent.form})" for sent in gap.sent)
                first = spot.at(gap.sent[0].first.name)
                yield first.note(Kind.FIELDS_REGROUPED, forms(fields), words)
            return
    for sent in gap.sent:
        inner = spot.at(sent.first.name)
        told = inner.breaks if len(missing) == len(possible) else inner.may_break
        yield told(Kind.FIELD_UNKNOWN, "no such field", sent.form)
    for field in missing:
        inner = spot.at(field.name)
        untold = field.type is None and field.struct is not None and field.count is None
        if field.counted or untold:
            # An array whose length is 0 leaves no trace, and QEMU does not tell which are arrays.
            inner = inner.when("unless it is an array without elements")
            yield inner.may_break(Kind.FIELD_MISSING, form(field), "no such field")
        else:
            yield inner.breaks(Kind.FIELD_MISSING, form(field), "no such field")
    for field in gap.moved:
        yield spot.at(field.name).breaks(Kind.ORDER_CHANGED, "it here", "it in another place")
