"""Reading a dump: vmferry's, or one that QEMU writes for ``-dump-vmstate``.

It comes from a file that somebody handed over: size, depth and number of its parts are checked, and
every value before it is used.  Keys that are not known are left alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final, NoReturn

from vmferry.errors import LimitExceeded, StorageError, StreamError, printable

from .model import DeviceSchema, FieldSchema, Schema, StateSchema

SIZE: Final = 16 << 20
"""Bytes of a dump at the most; QEMU 10 has 0.8 MiB."""

PARTS: Final = 250_000
"""Brackets in a dump at the most; QEMU 10 has 6,000."""

DEPTH: Final = 32
"""States inside each other at the most; QEMU 10 has 4."""

MACHINE: Final = "vmschkmachine"
"""The key that is not a device."""

WRITER: Final = "vmferry"
"""What stands there as ``writer`` in a dump of vmferry's."""

_NAME: Final = 255
_BE32: Final = 0xFFFFFFFF
_MEMORY: Final = 1 << 40
_DIGITS: Final = 19


def read_schema(path: str | os.PathLike[str]) -> Schema:
    """Read the file *path*; :class:`~vmferry.errors.StorageError` where it is no dump."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(SIZE + 1)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return parse_schema(text)
    except StreamError as error:
        raise StorageError(
            f"{path}: not declared state as vmferry schema dump and qemu -dump-vmstate write it:"
            f" {error}"
        ) from None


def parse_schema(text: bytes) -> Schema:
    """Read the JSON of a dump; :class:`~vmferry.errors.StreamError` names the place in it."""
    _limit("bytes of the schema", len(text), SIZE)
    _limit("brackets in the schema", text.count(b"{") + text.count(b"["), PARTS)
    try:
        root = json.loads(
            text.decode("utf-8"),
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        raise StreamError("a schema in UTF-8", f"{error.reason} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise StreamError("a schema in JSON", f"{error.msg} at {error.pos}") from None
    except RecursionError:
        raise LimitExceeded(f"at most {DEPTH} states inside each other", "more") from None
    top = _object(root, "the schema")
    head = _object(top.get(MACHINE, {}), MACHINE)
    return Schema(
        tuple(_device(name, top[name]) for name in top if name != MACHINE),
        _text(head, "Name", MACHINE) if head else None,
        complete=head.get("writer") == WRITER,
    )


def _device(name: str, node: Any) -> DeviceSchema:
    path = printable(name, 60)
    if not (name.isprintable() and 0 < len(name.encode()) <= _NAME):
        raise StreamError(f"types to have printable names of 1 to {_NAME} bytes", path)
    device = _object(node, path)
    return DeviceSchema(name, _state(device.get("Description"), f"{path}.Description", DEPTH))


def _state(node: Any, path: str, depth: int) -> StateSchema:
    if depth == 0:
        raise LimitExceeded(f"at most {DEPTH} states inside each other", f"more at {path}")
    state = _object(node, path)
    subsections = tuple(
        _state(item, f"{path}.Subsections[{index}]", depth - 1)
        for index, item in enumerate(_list(state, "Subsections", path))
    )
    names = [sub.name for sub in subsections]
    if len(set(names)) < len(names):
        raise StreamError(f"{path}.Subsections to differ in name", "two that are alike")
    return StateSchema(
        _text(state, "name", path),
        _number(state, "version_id", path, _BE32),
        _number(state, "minimum_version_id", path, _BE32),
        tuple(
            _field(item, f"{path}.Fields[{index}]", depth - 1)
            for index, item in enumerate(_list(state, "Fields", path))
        ),
        subsections,
    )


def _field(node: Any, path: str, depth: int) -> FieldSchema:
    field = _object(node, path)
    conditional = field.get("field_exists", False)
    if not isinstance(conditional, bool):
        raise StreamError(f"{path}.field_exists to be true or false", _shown(conditional))
    before = _optional(field, "before", path)
    struct = None
    if "Description" in field:
        struct = _state(field["Description"], f"{path}.Description", depth)
    return FieldSchema(
        _text(field, "field", path),
        _number(field, "size", path, _MEMORY),
        _number(field, "version_id", path, _BE32),
        # QEMU has no other way to say that a field is gone than by a condition.
        conditional and before is None,
        _optional(field, "num", path),
        struct,
        _text(field, "type", path) if "type" in field else None,
        "num_field" in field,
        before,
        _optional(field, "struct_version_id", path),
    )


def _optional(node: dict[str, Any], key: str, path: str) -> int | None:
    return _number(node, key, path, _BE32) if key in node else None


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise StreamError(f"{path} to be an object", _shown(value))
    return value


def _list(node: dict[str, Any], key: str, path: str) -> list[Any]:
    value = node.get(key, [])
    if not isinstance(value, list):
        raise StreamError(f"{path}.{key} to be an array", _shown(value))
    return value


def _text(node: dict[str, Any], key: str, path: str) -> str:
    value = node.get(key)
    if isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= _NAME:
        return value
    raise StreamError(f"{path}.{key} to be printable text of 1 to {_NAME} bytes", _shown(value))


def _number(node: dict[str, Any], key: str, path: str, limit: int) -> int:
    value = node.get(key)
    # To Python true is a number; to JSON it is not.
    if type(value) is not int or value < 0:
        raise StreamError(f"{path}.{key} to be a whole number", _shown(value))
    if value > limit:
        raise LimitExceeded(f"{path}.{key} to be at most {limit}", str(value))
    return value


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise LimitExceeded(f"numbers of at most {_DIGITS} digits", f"one of {len(digits)}")
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise StreamError("whole numbers", printable(text, 40))


def _limit(what: str, value: int, limit: int) -> None:
    if value > limit:
        raise LimitExceeded(f"{what} to be at most {limit}", str(value))


def _shown(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case str():
            return printable(value, 40)
        case dict() | list():
            return "an object" if isinstance(value, dict) else "an array"
        case _:
            return str(value)
