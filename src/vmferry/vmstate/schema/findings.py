"""What the checks find: each kind of finding has its severity and its advice here.

``docs/schema.md`` has an example of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final


class _Words(StrEnum):
    """Values are words with hyphens between them."""

    @property
    def words(self) -> str:
        """As in a sentence."""
        return self.value.replace("-", " ")


class Severity(_Words):
    """Whether a stream loads.

    ``BREAKS``: it does not, or loads wrong; where the finding has a condition, only if that holds.
    ``MAY_BREAK``: what was declared does not tell.  ``NOTE``: it loads.
    """

    BREAKS = "breaks"
    MAY_BREAK = "may-break"
    NOTE = "note"


class Direction(_Words):
    """Whose stream is loaded by whom."""

    OLD_TO_NEW = "old-to-new"
    NEW_TO_OLD = "new-to-old"
    STREAM = "stream"


class Kind(_Words):
    """What a finding is about; *unknown* is to the side that loads, *missing* in the stream."""

    DEVICE_UNKNOWN = "device-unknown"
    DEVICE_RENAMED = "device-renamed"
    VERSION_TOO_NEW = "version-too-new"
    VERSION_TOO_OLD = "version-too-old"
    MINIMUM_NOT_RAISED = "minimum-not-raised"
    FIELD_UNKNOWN = "field-unknown"
    FIELD_MISSING = "field-missing"
    FIELD_IN_LATER_VERSION = "field-in-later-version"
    FIELD_RENAMED = "field-renamed"
    FIELDS_REGROUPED = "fields-regrouped"
    FIELD_CONDITION = "field-condition"
    SIZE_CHANGED = "size-changed"
    TYPE_CHANGED = "type-changed"
    ARRAY_LENGTH_CHANGED = "array-length-changed"
    ARRAY_LENGTH_UNKNOWN = "array-length-unknown"
    ORDER_CHANGED = "order-changed"
    SUBSECTION_UNKNOWN = "subsection-unknown"
    SUBSECTION_MISSING = "subsection-missing"
    NOT_JUDGED = "not-judged"


ADVICE: Final = {
    Kind.DEVICE_UNKNOWN: "leave the device out of the machine, or declare it on the loading side",
    Kind.DEVICE_RENAMED: "give the machine there the device of that type",
    Kind.VERSION_TOO_NEW: "keep the version and put what is new into a subsection",
    Kind.VERSION_TOO_OLD: "keep the minimum, and give what is new a version of its own",
    Kind.MINIMUM_NOT_RAISED: "raise the minimum to where the fields fit, or give the fields that "
    "are new a version",
    Kind.FIELD_UNKNOWN: "leave a gap of its size in its place",
    Kind.FIELD_MISSING: "give the field a version, and raise that of the device to it, or put it "
    "into a subsection; in a nested state only a subsection will do",
    Kind.FIELD_IN_LATER_VERSION: "nothing: it keeps the value it has",
    Kind.FIELD_RENAMED: "nothing where it is the same field: names are not in the stream",
    Kind.FIELDS_REGROUPED: "nothing: there are as many bytes",
    Kind.FIELD_CONDITION: "see that the condition holds on both sides or on neither",
    Kind.SIZE_CHANGED: "keep the size and put the rest into a subsection; if the type has an "
    "encoding of its own, sizes in memory do not matter",
    Kind.TYPE_CHANGED: "keep the old form, and put the new one into a subsection",
    Kind.ARRAY_LENGTH_CHANGED: "keep the length and put the rest into a subsection",
    Kind.ARRAY_LENGTH_UNKNOWN: "compare the declarations, or dumps of QEMU 8.2 or later",
    Kind.ORDER_CHANGED: "restore the order: fields are in the stream in the order of declaration",
    Kind.SUBSECTION_UNKNOWN: "see that it is not needed as long as streams go there",
    Kind.SUBSECTION_MISSING: "nothing: what is in it keeps the value it has",
    Kind.NOT_JUDGED: "try the stream itself",
}
"""What to do about each kind."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a stream that is loaded by another program.

    ``path`` leads from the state of the device to the field (``serial.fifo.thr``).  ``expected`` is
    what the loading side declares, ``found`` what the stream has.  ``condition`` is when it matters
    at all, empty for always.
    """

    kind: Kind
    severity: Severity
    direction: Direction
    device: str
    path: str
    expected: str
    found: str
    condition: str = ""

    @property
    def breaks(self) -> bool:
        """Whether its severity is that."""
        return self.severity is Severity.BREAKS

    @property
    def advice(self) -> str:
        """What to do."""
        return ADVICE[self.kind]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return {
            "kind": self.kind.value,
            "severity": self.severity.value,
            "direction": self.direction.value,
            "device": self.device,
            "path": self.path,
            "expected": self.expected,
            "found": self.found,
            "condition": self.condition,
            "advice": self.advice,
        }

    def __str__(self) -> str:
        condition = f" ({self.condition})" if self.condition else ""
        return (
            f"{self.path}: {self.kind.words}: expected {self.expected}, found {self.found}"
            f"{condition}"
        )


@dataclass(frozen=True, slots=True)
class Spot:
    """Where findings are made, and when they matter at all."""

    direction: Direction
    device: str
    path: str
    condition: str = ""

    def at(self, name: str) -> Spot:
        """A field or subsection of the state here."""
        return replace(self, path=f"{self.path}.{name}")

    def when(self, condition: str) -> Spot:
        """The same, where it matters only then."""
        both = f"{self.condition}, and {condition}" if self.condition else condition
        return replace(self, condition=both)

    def breaks(self, kind: Kind, expected: str, found: str) -> Finding:
        """A finding that breaks."""
        return self._finding(kind, Severity.BREAKS, expected, found)

    def may_break(self, kind: Kind, expected: str, found: str) -> Finding:
        """A finding that may break."""
        return self._finding(kind, Severity.MAY_BREAK, expected, found)

    def note(self, kind: Kind, expected: str, found: str) -> Finding:
        """A finding that only says so."""
        return self._finding(kind, Severity.NOTE, expected, found)

    def _finding(self, kind: Kind, severity: Severity, expected: str, found: str) -> Finding:
        return Finding(
            kind,
            severity,
            self.direction,
            self.device,
            self.path,
            expected,
            found,
            self.condition,
        )
