"""Saving and loading whole objects."""

from __future__ import annotations

import json
from typing import Any

from vmferry.errors import StateError, UsageError

from .codec import check_version, compile_plan
from .paths import path_to
from .plan import PLAN, Plan
from .staging import Loader, Saver, run_hook


def save(obj: object) -> bytes:
    """The bytes of a declared object, as the body of a device section has them.

    ``post_save`` is called whether or not that succeeds, as it may have to undo ``pre_save``.
    Raises :class:`StateError` for a value that does not fit, and for a device that is unmigratable.
    """
    return save_described(obj)[0]


def describe(obj: object) -> dict[str, Any]:
    """What the bytes that :func:`save` makes of *obj* consist of; the hooks are called alike.

    That is ``vmsd_name``, ``version``, ``fields`` and ``subsections``, in the schema of QEMU 7.2
    ``migration/vmstate.c``: what stands at the end of a stream for this device.
    """
    described: dict[str, Any] = json.loads(f"{{{save_described(obj)[1]}}}")
    return described


def save_described(obj: object, *, before: bytes = b"", behind: bytes = b"") -> tuple[bytes, str]:
    """What :func:`save` returns, between *before* and *behind*, and what :func:`describe` does.

    The latter are the members of a JSON object.
    """
    plan = plan_of_object(obj)
    if plan.registration is not None and plan.registration.unmigratable is not None:
        raise StateError("a device that can be migrated", plan.registration.unmigratable).inside(
            plan.name
        )
    saver = Saver()
    try:
        with saver.after:
            described = compile_plan(plan, plan.version).save(obj, saver)
            return b"".join((before, *saver.parts, behind)), described
    except StateError as error:
        raise error.inside(plan.name) from error.__cause__


class Staged:
    """A state that has decoded whole, and is not assigned yet; ``size`` is its bytes."""

    def __init__(self, plan: Plan, obj: object, loader: Loader) -> None:
        self.size = loader.at
        self._plan = plan
        self._obj = obj
        self._loader = loader

    def commit(self) -> None:
        """Assign it, and run what takes notice: temporaries and ``post_load``, innermost first."""
        owner = self._obj
        try:
            run_hook(self._plan.cls.__qualname__, self._loader.commit)
            for owner, hook in self._loader.after:  # noqa: B007 - whose hook failed
                hook()
        except StateError as error:
            path = path_to(self._obj, owner)
            outer = f"{self._plan.name}.{path}" if path else self._plan.name
            raise error.inside(outer) from error.__cause__


def stage(obj: object, data: bytes | bytearray | memoryview, version: int) -> Staged:
    """Decode a state of *obj* that *data* begins with, of which *version* it says it is.

    Nothing is changed before the result's ``commit()``, until when *data* must not change either.
    Raises :class:`StateError`.
    """
    plan = plan_of_object(obj)
    view = memoryview(data).toreadonly().cast("B")
    try:
        check_version(plan, version)
        loader = Loader(view, 0)
        compile_plan(plan, version).load_into(loader, obj)
    except StateError as error:
        raise error.inside(plan.name) from error.__cause__
    return Staged(plan, obj, loader)


def load(obj: object, data: bytes | bytearray | memoryview, version: int) -> None:
    """Load *data*, all of it, into *obj*.

    *obj* is as it was where that fails with a :class:`StateError`, unless ``post_load`` was what
    failed.
    """
    staged = stage(obj, data, version)
    if staged.size != memoryview(data).nbytes:
        raise StateError(
            f"a state of {memoryview(data).nbytes} bytes", f"its end at {staged.size}"
        ).inside(plan_of_object(obj).name)
    staged.commit()


def plan_of_object(obj: object) -> Plan:
    """The plan of an object, or an error that says what lacks."""
    plan = type(obj).__dict__.get(PLAN)
    if isinstance(plan, Plan) and plan.cls is type(obj):
        return plan
    raise UsageError(f"{type(obj).__qualname__} is not declared with @device or @state")
