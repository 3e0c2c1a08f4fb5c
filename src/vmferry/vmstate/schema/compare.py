"""Whether streams of one program load in another: two declarations, field by field.

The rules are those of loading (QEMU 7.2 ``migration/vmstate.c``, ``vmstate_load_state``).  The
version of a device or subsection is in the stream and is held against the loader's; a state inside
a field has no version there, so both sides go by their own.  A field takes part from its version
on, or when its condition holds.  Subsections are found by name, in any order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from .align import Gap, Pair, align
from .findings import Direction, Finding, Kind, Spot
from .model import CANDIDATES, DeviceSchema, FieldSchema, Key, Schema, StateSchema
from .shape import GAP, form, forms, is_gap, leaves, same_type, total

Entry = tuple[Key, FieldSchema]


def check(old: Schema, new: Schema) -> list[Finding]:
    """What there is to know of streams of *old* in *new*, then of streams of *new* in *old*."""
    return [
        *_Check(old, new, Direction.OLD_TO_NEW).findings(),
        *_Check(new, old, Direction.NEW_TO_OLD).findings(),
    ]


class _Check:
    """Streams of *sender* in *loader*."""

    def __init__(self, sender: Schema, loader: Schema, direction: Direction) -> None:
        self._sender = sender
        self._direction = direction
        self._types = {device.type: device for device in loader.devices}
        self._names: dict[str, list[DeviceSchema]] = defaultdict(list)
        for device in loader.devices:
            self._names[device.state.name].append(device)
        self._tell = (loader.has_counts, sender.has_counts)
        self._untold = 0

    def findings(self) -> Iterator[Finding]:
        """All findings, device by device."""
        for device in self._sender.devices:
            yield from self._device(device)
        if self._untold:
            words = ["lengths of arrays" if told else "none told" for told in self._tell]
            spot = Spot(self._direction, "", f"{self._untold} array{'s' * (self._untold != 1)}")
            yield spot.note(Kind.ARRAY_LENGTH_UNKNOWN, *words)

    def _device(self, device: DeviceSchema) -> Iterator[Finding]:
        spot = Spot(self._direction, device.type, device.state.name)
        same = self._types.get(device.type)
        others = [same] if same else []
        if same is None or same.state.name != device.state.name:
            others = self._names.get(device.state.name, [])
        if not others:
            expected = f"state {same.state.name}" if same else "a device that is declared"
            spot = spot.when("when the machine has it")
            yield spot.breaks(Kind.DEVICE_UNKNOWN, expected, f"{device.type}, which is not")
            return
        if others != [same]:
            # Sections go by the name of the state: any type that has it will do, if it is there.
            types = ", ".join(other.type for other in others[:CANDIDATES])
            yield spot.may_break(Kind.DEVICE_RENAMED, f"type {types}", f"type {device.type}")
        states = list(dict.fromkeys(other.state for other in others))
        yield from min(
            (list(self._versioned(device.state, state, spot)) for state in states[:CANDIDATES]),
            key=lambda findings: sum(finding.breaks for finding in findings),
        )

    def _versioned(self, sent: StateSchema, wanted: StateSchema, spot: Spot) -> Iterator[Finding]:
        """A state that has its version in the stream."""
        found = f"version {sent.version}"
        if sent.version > wanted.version:
            yield spot.breaks(Kind.VERSION_TOO_NEW, f"at most version {wanted.version}", found)
            return
        if sent.version < wanted.minimum:
            yield spot.breaks(Kind.VERSION_TOO_OLD, f"at least version {wanted.minimum}", found)
            return
        findings = list(
            self._fields(sent.fields_in(sent.version), wanted.fields_in(sent.version), spot)
        )
        if sent.version < wanted.version and any(
            finding.breaks and finding.condition == spot.condition for finding in findings
        ):
            expected = f"what fits, as version {wanted.minimum} and later are taken"
            yield spot.breaks(Kind.MINIMUM_NOT_RAISED, expected, f"{found}, which does not")
        yield from findings
        yield from _later(sent, wanted, spot)
        yield from self._subsections(sent, wanted, spot)

    def _subsections(self, sent: StateSchema, wanted: StateSchema, spot: Spot) -> Iterator[Finding]:
        known = {sub.name: sub for sub in wanted.subsections}
        for sub in sent.subsections:
            inner = spot.at(sub.name).when(f"when {sub.name} is sent")
            if sub.name in known:
                yield from self._versioned(sub, known.pop(sub.name), inner)
            else:
                expected = "a subsection that is declared"
                yield inner.breaks(Kind.SUBSECTION_UNKNOWN, expected, f"{sub.name}, which is not")
        for name in known:
            yield spot.at(name).note(Kind.SUBSECTION_MISSING, "it, or nothing", "nothing")

    def _fields(self, sent: list[Entry], wanted: list[Entry], spot: Spot) -> Iterator[Finding]:
        for part in align(sent, wanted, lambda key: key[0] != GAP):
            if isinstance(part, Pair):
                yield from self._pair(part.sent, part.wanted, spot.at(part.sent.name))
            else:
                yield from self._gap(part, spot)

    def _pair(self, sent: FieldSchema, wanted: FieldSchema, spot: Spot) -> Iterator[Finding]:
        if sent.conditional != wanted.conditional:
            words = [
                f"it {'under a condition' if field.conditional else 'always'}"
                for field in (wanted, sent)
            ]
            yield spot.may_break(Kind.FIELD_CONDITION, *words)
        if (sent.count, sent.counted) != (wanted.count, wanted.counted):
            yield from self._count(sent, wanted, spot)
        words = [form(wanted), form(sent)]
        if sent.struct is not None and wanted.struct is not None:
            if not same_type(sent.type, wanted.type):
                yield spot.breaks(Kind.TYPE_CHANGED, *words)
                return
            yield from self._fields(sent.inside(), wanted.inside(), spot)
            yield from self._subsections(sent.struct, wanted.struct, spot)
        elif sent.struct is not None or wanted.struct is not None:
            if leaves([sent]) is None or leaves([sent]) != leaves([wanted]):
                yield spot.breaks(Kind.TYPE_CHANGED, *words)
        elif sent.size != wanted.size:
            told = spot.breaks if sent.size and wanted.size else spot.may_break
            yield told(Kind.SIZE_CHANGED, *words)
        elif not same_type(sent.type, wanted.type):
            yield spot.may_break(Kind.TYPE_CHANGED, *words)

    def _count(self, sent: FieldSchema, wanted: FieldSchema, spot: Spot) -> Iterator[Finding]:
        """Arrays that differ in length; of those that others count, in their bounds."""
        if not all(self._tell):
            self._untold += 1
        elif not sent.counted and not wanted.counted:
            yield spot.breaks(Kind.ARRAY_LENGTH_CHANGED, form(wanted), form(sent))
        elif not (sent.counted and wanted.counted) or (sent.count or 0) > (wanted.count or 0):
            yield spot.may_break(Kind.ARRAY_LENGTH_CHANGED, form(wanted), form(sent))

    def _gap(self, gap: Gap[FieldSchema, FieldSchema], spot: Spot) -> Iterator[Finding]:
        """Fields that take each other's place, or nothing's."""
        while gap.sent and gap.wanted and gap.sent[0] == gap.wanted[0]:
            gap.sent.pop(0)
            gap.wanted.pop(0)
        while gap.sent and gap.wanted and gap.sent[-1] == gap.wanted[-1]:
            gap.sent.pop()
            gap.wanted.pop()
        if gap.sent and gap.wanted:
            replaced = self._replaced(gap, spot)
            if replaced is not None:
                yield from replaced
                return
        for field in gap.sent:
            told = _one_sided(field, spot)
            yield told(Kind.FIELD_UNKNOWN, "no such field", form(field))
        for field in gap.wanted:
            told = _one_sided(field, spot)
            yield told(Kind.FIELD_MISSING, form(field), "no such field")
        for field in gap.moved:
            yield spot.at(field.name).breaks(Kind.ORDER_CHANGED, "it here", "it in another place")

    def _replaced(self, gap: Gap[FieldSchema, FieldSchema], spot: Spot) -> Iterator[Finding] | None:
        """What there is to say of fields that are others than they were, with the same bytes."""
        gapped = is_gap(gap.sent) or is_gap(gap.wanted)
        if not gapped and len(gap.sent) == len(gap.wanted):
            pairs = list(zip(gap.sent, gap.wanted, strict=True))
            if all(_alike(*pair) for pair in pairs):
                return self._renamed(pairs, spot)
        sent, wanted = leaves(gap.sent), leaves(gap.wanted)
        if sent is None or wanted is None:
            return None
        inner = spot.at(gap.sent[0].name)
        words = (forms(gap.wanted), forms(gap.sent))
        if sent == wanted or (gapped and total(sent) == total(wanted)):
            return iter([inner.note(Kind.FIELDS_REGROUPED, *words)])
        if gapped and not all(self._tell):
            return iter([inner.may_break(Kind.ARRAY_LENGTH_UNKNOWN, *words)])
        return None

    def _renamed(
        self, pairs: list[tuple[FieldSchema, FieldSchema]], spot: Spot
    ) -> Iterator[Finding]:
        for sent, wanted in pairs:
            inner = spot.at(sent.name)
            if sent.name != wanted.name:
                told = inner.may_break if sent.conditional else inner.note
                yield told(Kind.FIELD_RENAMED, wanted.name, sent.name)
            yield from self._pair(sent, wanted, inner)


def _later(sent: StateSchema, wanted: StateSchema, spot: Spot) -> Iterator[Finding]:
    """Fields that the loader knows from a later version on."""
    known = {key for key, _ in sent.keyed()}
    for key, field in wanted.keyed():
        if field.version > sent.version and key not in known:
            expected = f"it from version {field.version} on"
            found = f"version {sent.version}"
            yield spot.at(field.name).note(Kind.FIELD_IN_LATER_VERSION, expected, found)


def _one_sided(field: FieldSchema, spot: Spot) -> Callable[[Kind, str, str], Finding]:
    """How bad it is that only one side has a field."""
    inner = spot.at(field.name)
    if field.counted:
        inner = inner.when("when it has elements")
    return inner.may_break if field.conditional else inner.breaks


def _alike(one: FieldSchema, other: FieldSchema) -> bool:
    """Whether two fields that differ in name can be the same."""
    if not same_type(one.type, other.type):
        return False
    if one.struct is not None and other.struct is not None:
        return one.struct.name == other.struct.name
    same = (other.struct, other.size, other.count, other.conditional)
    return (one.struct, one.size, one.count, one.conditional) == same
