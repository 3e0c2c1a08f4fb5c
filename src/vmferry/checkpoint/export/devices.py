"""Device state of a checkpoint, looked up by the name that QEMU gives to the kind of state."""

from __future__ import annotations

from vmferry.checkpoint.checkpoint import Checkpoint
from vmferry.errors import StreamError, UsageError
from vmferry.vmstate.decode import decode_device
from vmferry.vmstate.tree import DeviceState, Node
from vmferry.wire.description import parse_description
from vmferry.wire.devices import DeviceSection


class Devices:
    """The devices of *checkpoint*.

    Raises :class:`UsageError` where the stream came without a description, so that nothing tells
    what its bytes mean, and :class:`StreamError` where the description is no good.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        text = checkpoint.description
        if text is None:
            raise UsageError(
                "the stream had no description of its devices, so their state cannot be read;"
                " QEMU writes one for machine types from 2.3 on, unless suppress-vmdesc is on"
            )
        self._described = {(d.name, d.instance): d for d in parse_description(text).devices}
        self._sections = [s for s in checkpoint.device_sections if isinstance(s, DeviceSection)]

    def states(self, kind: str) -> list[DeviceState]:
        """Every device whose state is of that *kind* (the name of its vmsd), by instance."""
        found = []
        for section in self._sections:
            device = self._described.get((section.name, section.instance))
            if device is not None and device.vmsd is not None and device.vmsd.name == kind:
                found.append(decode_device(device, section.body))
        return sorted(found, key=lambda state: state.instance)

    def only(self, kind: str) -> DeviceState | None:
        """The one device whose state is of that *kind*; ``None`` where there is none."""
        states = self.states(kind)
        if len(states) > 1:
            raise StreamError("one device of this kind", str(len(states)), section=kind)
        return states[0] if states else None


def unreadable(device: str, expected: str, found: Node | None) -> StreamError:
    """What to raise where a *device* has something else than its kind is known to have."""
    shown = f"{found.size} bytes of type {found.type}" if found is not None else "nothing"
    return StreamError(expected, shown, section=device)
