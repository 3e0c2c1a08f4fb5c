"""Writing a dump: what classes declare, in the form of QEMU's ``-dump-vmstate``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from vmferry.errors import UsageError, VmferryError, printable
from vmferry.vmstate.declare import vmstate_of
from vmferry.vmstate.description import Json, declared

from .read import MACHINE, WRITER


def dump_schema(devices: type[Any] | Iterable[type[Any]], name: str = WRITER) -> Json:
    """What a device class, or each of several, declares; *name* says whose they are.

    Plain data for ``json.dumps``: an object with an entry for each device by its name, behind which
    the class stands where two have the same.  :class:`~vmferry.errors.UsageError` for what is no
    device.
    """
    found: Json = {MACHINE: {"Name": name, "writer": WRITER}}
    for cls in [devices] if isinstance(devices, type) else _listed(devices, name):
        if not isinstance(cls, type):
            raise UsageError(f"{name}: expected classes of devices, found {_what(cls)}")
        plan = vmstate_of(cls)
        if plan.registration is None:
            raise UsageError(f"{name}: {cls.__qualname__} is the state of no device: see @device")
        key = plan.name if plan.name not in found else f"{plan.name} ({cls.__qualname__})"
        found[key] = declared(cls) | {"Name": key}
    return found


def import_devices(target: str) -> Any:
    """Import ``MODULE:ATTR``, from the current directory too: this runs the code of the module."""
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise UsageError(f"expected MODULE:ATTR, found {printable(target)}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return reduce(getattr, attribute.split("."), import_module(module))
    except VmferryError:
        raise
    except Exception as error:  # whatever somebody else's module may raise
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{printable(target)} cannot be imported: {reason}") from error
    finally:
        sys.path.remove(here)


def _listed(devices: Any, name: str) -> list[Any]:
    try:
        return list(devices)
    except TypeError:
        raise UsageError(
            f"{name}: expected the class of a device, or several, found {_what(devices)}"
        ) from None


def _what(found: object) -> str:
    return f"an object of type {type(found).__name__}"
