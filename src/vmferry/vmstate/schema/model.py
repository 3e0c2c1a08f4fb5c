"""What a program declares of its device state: the model of QEMU's ``-dump-vmstate``.

The dump (QEMU 7.2 ``migration/savevm.c``, ``dump_vmstate_json_to_file``) has names and versions of
everything, but not all that decides how many bytes there are: no types, only sizes, and those are
of the program's memory; whether a field has a condition, but not which; the lengths of arrays only
since QEMU 8.2, and never those that another field holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

CANDIDATES: Final = 32
"""Types of one state name that are tried at the most; QEMU 10 has up to 9."""


@dataclass(frozen=True, slots=True)
class FieldSchema:
    """A field: there from *version* of the state that it belongs to on.

    ``conditional`` says that the program decides each time whether it is there.  ``size`` is the
    bytes of one element in memory, 0 where that is not fixed; ``count`` is the elements of an array
    of fixed length, ``None`` where there is one, or as many as another field says, or where the
    dump does not tell.  ``struct`` is what it is made of, ``None`` for a plain value or bytes.

    The rest only vmferry's dumps tell: ``type``, as in a stream's description; that another field
    has the length (``counted``) and ``count`` is its bound; from which version on the field is no
    longer there (``before``); in which version the struct is written, if not in its own.
    """

    name: str
    size: int
    version: int = 0
    conditional: bool = False
    count: int | None = None
    struct: StateSchema | None = None
    type: str | None = None
    counted: bool = False
    before: int | None = None
    struct_version: int | None = None

    def in_version(self, version: int) -> bool:
        """Whether *version* has the field."""
        return self.version <= version and (self.before is None or version < self.before)

    def inside(self) -> list[tuple[Key, FieldSchema]]:
        """The fields of its struct, as far as they take part."""
        if self.struct is None:
            return []
        return self.struct.fields_in(self.struct_version or self.struct.version)


@dataclass(frozen=True, slots=True)
class StateSchema:
    """A state: of a device, inside a field, or a subsection.

    As that of a device or a subsection it loads from streams of the versions from ``minimum`` to
    ``version``; inside a field its version is not in the stream.
    """

    name: str
    version: int
    minimum: int = 0
    fields: tuple[FieldSchema, ...] = ()
    subsections: tuple[StateSchema, ...] = ()

    def fields_in(self, version: int) -> list[tuple[Key, FieldSchema]]:
        """The fields that *version* has, in their order, by name and ordinal."""
        return [entry for entry in self.keyed() if entry[1].in_version(version)]

    def keyed(self) -> Iterator[tuple[Key, FieldSchema]]:
        """All fields; variants of one share their name, and are told apart by an ordinal."""
        seen: Counter[str] = Counter()
        for field in self.fields:
            yield (field.name, seen[field.name]), field
            seen[field.name] += 1

    def described_names(self) -> dict[Key, str]:
        """What a stream's description calls each field: with the ordinal where a name repeats."""
        often = Counter(field.name for field in self.fields)
        return {
            key: f"{key[0]}[{key[1]}]" if often[key[0]] > 1 else key[0] for key, _ in self.keyed()
        }


Key = tuple[str, int]
"""A field's name, and which of those of that name it is."""


@dataclass(frozen=True, slots=True)
class DeviceSchema:
    """A type of device: *type* is its name in the program, ``state.name`` that in the stream."""

    type: str
    state: StateSchema


@dataclass(frozen=True, slots=True)
class Schema:
    """The devices that a program declares; ``machine`` is the machine type it was asked with.

    ``complete`` says that these are all there are, as in a dump of vmferry's.  QEMU's leave out
    devices that are registered by hand.
    """

    devices: tuple[DeviceSchema, ...]
    machine: str | None = None
    complete: bool = False

    @property
    def has_counts(self) -> bool:
        """Whether the dump tells the lengths of arrays."""
        return self.complete or any(_has_counts(device.state) for device in self.devices)


def _has_counts(state: StateSchema) -> bool:
    return any(
        field.count is not None or (field.struct is not None and _has_counts(field.struct))
        for field in state.fields
    ) or any(map(_has_counts, state.subsections))
