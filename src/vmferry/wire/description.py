"""The closing description: what the source says its device sections are made of.

One JSON object behind the end of the stream, written by QEMU 7.2 ``migration/savevm.c`` and
``migration/vmstate.c`` while the bytes themselves were written, so every ``size`` in it was
measured.  The exception are the elements of a compressed array (``array_len``): there only the
first was measured, and pointers that are NULL make the others differ.

The JSON comes from the peer: its size, depth and number of tokens are checked before it is parsed,
and every value in it before it is used.  Keys that are not known are left alone, they belong to a
later QEMU; keys that occur twice are legal, the last one counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from vmferry.errors import LimitExceeded, StreamError, TruncatedStream, printable

from . import limits
from .buffer import encode_name
from .layout import Kind

STRUCT: Final = "struct"
"""The only type of field whose members may be walked for their layout."""

_NAME: Final = 255
_BE32: Final = 0xFFFFFFFF
_PAGE: Final = range(1 << 8, 1 << 24)
_DIGITS: Final = 19

_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_NOT_TOKENS: Final = bytes(set(range(256)) - set(b"{}[],:"))


@dataclass(frozen=True, slots=True)
class FieldDescription:
    """One field, or one array of fields that are alike.

    ``size`` is the bytes on the wire of one element.  ``array_len`` is the number of elements where
    one entry stands for all of them, ``index`` the place of this element where each has its own
    entry; both are ``None`` where there is one element.  ``struct`` is what a field of type
    ``struct``, ``tmp`` or ``vstruct`` is made of.
    """

    name: str
    type: str
    size: int
    array_len: int | None = None
    index: int | None = None
    struct: Vmsd | None = None

    @property
    def wire_size(self) -> int:
        """Bytes of all elements."""
        return self.size if self.array_len is None else self.size * self.array_len

    @property
    def certain(self) -> Vmsd | None:
        """The struct whose members stand where they are described, if this field is one.

        That is not certain inside arrays, nor where the members do not add up to the struct.
        """
        struct = self.struct
        if struct is None or self.type != STRUCT or self.array_len is not None:
            return None
        return struct if struct.size == self.size else None


@dataclass(frozen=True, slots=True)
class Vmsd:
    """A state: fields in the order of the stream, then the subsections that were sent.

    ``size`` is the bytes that they add up to.
    """

    name: str
    version: int
    fields: tuple[FieldDescription, ...]
    subsections: tuple[Vmsd, ...] = ()
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        size = sum(field.wire_size for field in self.fields)
        size += sum(len(sub.head()) + sub.size for sub in self.subsections)
        object.__setattr__(self, "size", size)

    def head(self) -> bytes:
        """What announces this state on the wire where it is a subsection."""
        return bytes([Kind.SUBSECTION]) + encode_name(self.name) + self.version.to_bytes(4)


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """A device section: its name and instance, the bytes of its body, and what it is made of.

    ``vmsd`` is ``None`` for devices that QEMU saves with hand-written code: of those only the size
    is known.
    """

    name: str
    instance: int
    vmsd: Vmsd | None
    size: int


@dataclass(frozen=True, slots=True)
class VmDescription:
    """The whole description; ``configuration`` came with QEMU 8.2, ``text`` is the JSON as sent."""

    page_size: int
    devices: tuple[DeviceDescription, ...]
    configuration: Vmsd | None
    text: bytes = field(repr=False)

    def encode(self) -> bytes:
        """The description as on the wire."""
        return bytes([Kind.DESCRIPTION]) + len(self.text).to_bytes(4) + self.text


@dataclass(frozen=True, slots=True)
class UnreadDescription:
    """A description that nobody had to read, as the devices are known without it."""

    text: bytes | memoryview

    def encode(self) -> bytes:
        """The description as on the wire."""
        return b"".join((bytes([Kind.DESCRIPTION]), len(self.text).to_bytes(4), self.text))


def parse_description(text: bytes | memoryview) -> VmDescription:
    """Read the JSON of a description.

    Raises :class:`StreamError` that names the place in the JSON, :class:`LimitExceeded` where it is
    too large, too deep, or describes more bytes than a device or a stream may have.
    """
    _limit("bytes of the description", len(text), limits.DESCRIPTION)
    text = bytes(text)
    _check_bounds(text)
    try:
        root = json.loads(
            text.decode("utf-8"),
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        raise StreamError("a description in UTF-8", f"{error.reason} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise StreamError("a description in JSON", f"{error.msg} at {error.pos}") from None
    top = _object(root, "the description")
    page_size = _number(top, "page_size", "", _PAGE.stop)
    if page_size not in _PAGE or page_size & (page_size - 1):
        raise StreamError("page_size to be a power of two from 256", str(page_size))
    nodes = _list(top, "devices", "")
    _limit("the number of devices", len(nodes), limits.DEVICE_COUNT)
    devices = tuple(_device(node, f"devices[{i}]") for i, node in enumerate(nodes))
    _limit("bytes of all devices", sum(device.size for device in devices), limits.DEVICES)
    configuration = top.get("configuration")
    return VmDescription(
        page_size,
        devices,
        None if configuration is None else _vmsd(configuration, "configuration"),
        text,
    )


def body_size(device: DeviceDescription, data: bytes | memoryview, start: int = 0) -> int:
    """Bytes that the body of *device* takes in *data* from *start* on.

    The sizes are the description's; what the bytes can confirm of them are the heads of
    subsections, and those must stand where they are described.  Raises :class:`StreamError` where
    they do not, :class:`TruncatedStream` where *data* ends before the body does.
    """
    if device.size > len(data) - start:
        raise TruncatedStream(f"a body of {device.size} bytes", f"{len(data) - start} left")
    if device.vmsd is not None:
        _check_subsections(device.vmsd, data, start, start)
    return device.size


def _check_subsections(vmsd: Vmsd, data: bytes | memoryview, at: int, start: int) -> None:
    for member in vmsd.fields:
        if (inner := member.certain) is not None:
            _check_subsections(inner, data, at, start)
        at += member.wire_size
    for sub in vmsd.subsections:
        head = sub.head()
        found = bytes(data[at : at + len(head)])
        if found != head:
            raise StreamError(
                f"subsection {printable(sub.name)} at byte {at - start} of the body",
                found[:16].hex(" ") or "nothing",
            )
        _check_subsections(sub, data, at + len(head), start)
        at += len(head) + sub.size


# Bounds of the JSON


def _check_bounds(text: bytes) -> None:
    """Refuse what is too much before it is parsed, in time linear in the bytes."""
    if b"\\" in text:
        # Escaped quotes would be taken for the ends of strings.
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    _limit("strings in the description", text.count(b'"') // 2, limits.JSON_TOKENS)
    tokens = b"".join(text.split(b'"')[::2]).translate(None, delete=_NOT_TOKENS)
    _limit("tokens in the description", len(tokens), limits.JSON_TOKENS)
    nested = tokens.translate(_BRACKETS, delete=b",:")
    for _ in range(limits.JSON_DEPTH):
        if not nested:
            return
        nested = nested.replace(b"[]", b"")
    if nested:
        raise LimitExceeded(
            f"matching brackets, at most {limits.JSON_DEPTH} deep, in the description",
            "brackets that are deeper, or do not match",
        )


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise LimitExceeded(
            f"numbers of at most {_DIGITS} digits in the description", f"one of {len(digits)}"
        )
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise StreamError("whole numbers in the description", printable(text, 40))


# Values of the JSON; *path* leads to the object that is read


def _device(node: Any, path: str) -> DeviceDescription:
    device = _object(node, path)
    name = _text(device, "name", path, least=1)
    instance = _number(device, "instance_id", path)
    if "vmsd_name" in device:
        vmsd = _vmsd(device, path)
        size = vmsd.size
    else:
        vmsd = None
        size = _number(device, "size", path, limits.DEVICE_SECTION)
    _limit(path, size, limits.DEVICE_SECTION)
    return DeviceDescription(name, instance, vmsd, size)


def _vmsd(node: Any, path: str) -> Vmsd:
    vmsd = _object(node, path)
    name = _text(vmsd, "vmsd_name", path, least=1)
    version = _number(vmsd, "version", path)
    fields = _list(vmsd, "fields", path)
    subsections = _list(vmsd, "subsections", path) if "subsections" in vmsd else []
    return Vmsd(
        name,
        version,
        tuple(_field(node, f"{path}.fields[{i}]") for i, node in enumerate(fields)),
        tuple(_vmsd(node, f"{path}.subsections[{i}]") for i, node in enumerate(subsections)),
    )


def _field(node: Any, path: str) -> FieldDescription:
    entry = _object(node, path)
    name = _text(entry, "name", path)
    type_name = _text(entry, "type", path)
    size = _number(entry, "size", path, limits.DEVICE_SECTION)
    array_len = _number(entry, "array_len", path) if "array_len" in entry else None
    index = _number(entry, "index", path) if "index" in entry else None
    struct = None
    if "struct" in entry:
        # Empty where the element is a NULL pointer.
        if entry["struct"] != {}:
            struct = _vmsd(entry["struct"], f"{path}.struct")
    elif "vmsd_name" in entry:
        struct = _vmsd(entry, path)
    described = FieldDescription(name, type_name, size, array_len, index, struct)
    _limit(path, described.wire_size, limits.DEVICE_SECTION)
    return described


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise StreamError(f"{path} to be an object", _shown(value))
    return value


def _list(node: dict[str, Any], key: str, path: str) -> list[Any]:
    value = node.get(key)
    if not isinstance(value, list):
        raise StreamError(f"{_join(path, key)} to be an array", _shown(value))
    return value


def _text(node: dict[str, Any], key: str, path: str, *, least: int = 0) -> str:
    value = node.get(key)
    # Printable leaves out lone surrogates, which JSON can spell and no name on the wire can match.
    if isinstance(value, str) and value.isprintable() and least <= len(value.encode()) <= _NAME:
        return value
    raise StreamError(
        f"{_join(path, key)} to be printable text of {least} to {_NAME} bytes", _shown(value)
    )


def _number(node: dict[str, Any], key: str, path: str, limit: int = _BE32) -> int:
    value = node.get(key)
    # To Python true is a number; to JSON it is not.
    if type(value) is not int or value < 0:
        raise StreamError(f"{_join(path, key)} to be a whole number", _shown(value))
    if value > limit:
        raise LimitExceeded(f"{_join(path, key)} to be at most {limit}", str(value))
    return value


def _limit(what: str, value: int, limit: int) -> None:
    if value > limit:
        raise LimitExceeded(f"{what} to be at most {limit}", str(value))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


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
