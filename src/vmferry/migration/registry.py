"""Which devices and handlers a machine has, under which names, and what keeps it from migrating.

The registry half of QEMU 7.2 ``migration/savevm.c``.  A section is known by its name and its
instance; streams may also call it by an alias, a second instance number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from vmferry.errors import StreamError, UsageError, printable
from vmferry.vmstate import vmstate_of
from vmferry.vmstate.plan import Registration
from vmferry.wire import limits
from vmferry.wire.reader import VERSIONS

from .handlers import Iterative

_NAME: Final = 255
_NUMBER: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """What a registered device or handler is called in streams."""

    name: str
    instance: int
    alias: int | None
    version: int

    def __str__(self) -> str:
        return f"{printable(self.name)} instance {self.instance}"


@dataclass(frozen=True, slots=True, eq=False)
class Device(Section):
    """A registered object of a class that was declared with ``@device``."""

    device: object
    registration: Registration

    @property
    def owner(self) -> object:
        """The object that was registered."""
        return self.device


@dataclass(frozen=True, slots=True, eq=False)
class Handler(Section):
    """A registered handler of state that is sent in pieces."""

    handler: Iterative

    @property
    def owner(self) -> object:
        """The object that was registered."""
        return self.handler


@dataclass(frozen=True, slots=True, eq=False)
class Blocker:
    """A reason not to migrate, as long as it stands in its registry."""

    reason: str


class Registry:
    """The devices and handlers of one machine."""

    def __init__(self) -> None:
        self._sections: dict[int, Device | Handler] = {}  # by the identity of their owners
        self._names: dict[tuple[str, int], Device | Handler] = {}
        self._next: dict[str, int] = {}
        self._blockers: list[Blocker] = []

    def register(
        self,
        device: object,
        *,
        path: str = "",
        instance: int | None = None,
        alias: int | None = None,
    ) -> Device:
        """Add an object of a class that was declared with ``@device``.

        Its section is called as the class says, behind *path* and a slash if there is one.
        *instance* and *alias* stand above those of the class; where neither gives an instance, it
        is the one behind the highest so far, from 0 on.  Raises :class:`UsageError` for what is
        taken or no device.
        """
        plan = vmstate_of(device)
        registration = plan.registration
        if registration is None:
            raise UsageError(f"{plan.cls.__qualname__} is part of a device (@state), and not one")
        name = f"{path}/{plan.name}" if path else plan.name
        if instance is None:
            instance = registration.instance_id
        section = Device(
            name,
            self._free(name) if instance is None else instance,
            registration.alias_id if alias is None else alias,
            plan.version,
            device,
            registration,
        )
        self._add(section)
        return section

    def register_iterative(
        self, handler: Iterative, *, path: str = "", instance: int | None = None
    ) -> Handler:
        """Add a handler of state that is sent in pieces; names and errors as for devices."""
        if not 1 <= handler.chunk <= limits.FRAME:
            raise UsageError(
                f"{handler.name}: a chunk has 1 to {limits.FRAME} bytes, not {handler.chunk}"
            )
        if len(self.handlers) == limits.ITERABLES:
            raise UsageError(f"a machine has at most {limits.ITERABLES} iterative handlers")
        name = f"{path}/{handler.name}" if path else handler.name
        number = self._free(name) if instance is None else instance
        section = Handler(name, number, None, handler.version, handler)
        self._add(section)
        return section

    def unregister(self, owner: object) -> None:
        """Take a device or handler out; raises :class:`UsageError` if it is not in."""
        section = self._sections.pop(id(owner), None)
        if section is None:
            raise UsageError(f"this {type(owner).__qualname__} is not registered")
        self._names = {key: other for key, other in self._names.items() if other is not section}
        self._next[section.name] = max(self.instances(section.name), default=-1) + 1

    @property
    def devices(self) -> list[Device]:
        """The devices as they are saved: higher priorities first, else as they were registered."""
        devices = [s for s in self._sections.values() if isinstance(s, Device)]
        return sorted(devices, key=lambda section: -section.registration.priority)

    @property
    def handlers(self) -> list[Handler]:
        """The iterative handlers, as they were registered."""
        return [s for s in self._sections.values() if isinstance(s, Handler)]

    def find(self, name: str, instance: int) -> Device | Handler | None:
        """What streams call *name* and *instance*, which may be an alias."""
        return self._names.get((name, instance))

    def instances(self, name: str) -> list[int]:
        """The instances that sections called *name* have here."""
        return sorted(s.instance for s in self._sections.values() if s.name == name)

    # What keeps the machine from migrating

    def add_blocker(self, reason: str) -> Blocker:
        """Keep the machine from being saved or sent, until the blocker is removed."""
        blocker = Blocker(reason)
        self._blockers.append(blocker)
        return blocker

    def remove_blocker(self, blocker: Blocker) -> None:
        """Let go of a blocker; raises :class:`UsageError` if it does not stand here."""
        if blocker not in self._blockers:
            raise UsageError(f"no such blocker: {blocker.reason}")
        self._blockers.remove(blocker)

    @contextmanager
    def blocked(self, reason: str) -> Iterator[Blocker]:
        """A blocker for the time of the block."""
        blocker = self.add_blocker(reason)
        try:
            yield blocker
        finally:
            self.remove_blocker(blocker)

    def check_migratable(self) -> None:
        """Raise :class:`UsageError` with every reason not to save the machine, if there is one."""
        reasons = [
            f"{section}: {reason}"
            for section in self.devices
            if (reason := section.registration.unmigratable) is not None
        ]
        reasons += [blocker.reason for blocker in self._blockers]
        if reasons:
            raise UsageError(f"the machine cannot be migrated: {'; '.join(reasons)}")

    # Names

    def _add(self, section: Device | Handler) -> None:
        name, owner = section.name, section.owner
        if not 1 <= len(name.encode()) <= _NAME or not name.isprintable():
            raise UsageError(
                f"a section's name has 1 to {_NAME} printable bytes, not {printable(name)}"
            )
        if name in VERSIONS:
            raise UsageError(f"a section called {name} has a meaning of its own")
        if id(owner) in self._sections:
            raise UsageError(f"this {type(owner).__qualname__} is registered already")
        numbers = {"instance": section.instance}
        if section.alias is not None:
            numbers["alias"] = section.alias
        for what, number in numbers.items():
            if not 0 <= number <= _NUMBER:
                raise UsageError(f"{section}: {what} is 0 to {_NUMBER}, not {number}")
            if (other := self._names.get((name, number))) is not None:
                raise UsageError(f"{section}: {what} {number} is taken by {other}")
        if not 0 <= section.version <= _NUMBER:
            raise UsageError(f"{section}: a version is 0 to {_NUMBER}, not {section.version}")
        self._names.update({(name, number): section for number in numbers.values()})
        self._sections[id(owner)] = section
        self._next[name] = max(self._next.get(name, 0), section.instance + 1)

    def _free(self, name: str) -> int:
        number = self._next.get(name, 0)
        while (name, number) in self._names:
            number += 1
        return number


@contextmanager
def within(section: Section, offset: int | None = None) -> Iterator[None]:
    """Say of errors in which section they came up."""
    try:
        yield
    except StreamError as error:
        error.within(section=section.name, offset=offset)
        raise
