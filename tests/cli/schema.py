"""docs/inspect-json.md and docs/operating.md as a table that JSON is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Check = Callable[[Any, str], None]


def number(value: Any, where: str) -> None:
    assert type(value) is int, f"{where}: {value!r}"


def size(value: Any, where: str) -> None:
    number(value, where)
    assert value >= 0, f"{where}: {value!r}"


def seconds(value: Any, where: str) -> None:
    assert isinstance(value, int | float), f"{where}: {value!r}"
    assert value >= 0, f"{where}: {value!r}"


def text(value: Any, where: str) -> None:
    assert isinstance(value, str), f"{where}: {value!r}"


def flag(value: Any, where: str) -> None:
    assert isinstance(value, bool), f"{where}: {value!r}"


def hexadecimal(value: Any, where: str) -> None:
    bytes.fromhex(value)


def one_of(*allowed: Any) -> Check:
    def check(value: Any, where: str) -> None:
        assert value in allowed, f"{where}: {value!r}"

    return check


def optional(inner: Check) -> Check:
    return lambda value, where: None if value is None else inner(value, where)


def each(inner: Check) -> Check:
    def check(value: Any, where: str) -> None:
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            inner(item, f"{where}[{index}]")

    return check


def counts(value: Any, where: str) -> None:
    assert isinstance(value, dict), where
    for key, count in value.items():
        text(key, where)
        size(count, f"{where}.{key}")


def obj(keys: dict[str, Check], **may_be_there: Check) -> Check:
    """Exactly *keys*, in any order, and some of *may_be_there*."""

    def check(value: Any, where: str) -> None:
        assert isinstance(value, dict), where
        assert keys.keys() <= value.keys() <= keys.keys() | may_be_there.keys(), where
        for key, item in value.items():
            (keys | may_be_there)[key](item, f"{where}.{key}")

    return check


def node(value: Any, where: str) -> None:
    NODES[value["kind"]](value, f"{where} {value['name']}")


_COMMON = {"kind": text, "name": text, "type": text, "offset": size, "size": size}


def value_of_node(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        optional(number)(value, where)


NODES: dict[str, Check] = {
    "value": obj(_COMMON | {"value": value_of_node}, note=text),
    "array": obj(_COMMON | {"values": each(number)}),
    "raw": obj(_COMMON | {"hex": hexadecimal}, reason=text),
    "elements": obj(_COMMON | {"items": each(node)}),
    "struct": obj(_COMMON | {"vmsd": text, "version": size, "fields": each(node)}),
}

_STREAM_ERROR = {
    "expected": text,
    "found": text,
    "advice": optional(text),
    "channel": optional(text),
    "offset": optional(size),
    "section": optional(text),
    "block": optional(text),
}


def error(value: Any, where: str) -> None:
    of_stream = value["kind"] in {"StreamError", "TruncatedStream", "LimitExceeded"}
    more = _STREAM_ERROR if of_stream else {}
    obj({"kind": text, "message": text} | more)(value, where)


RAM = obj(
    {
        "name": text,
        "size": size,
        "page_size": optional(size),
        "address": optional(size),
        "data_pages": size,
        "zero_pages": size,
        "unsent_pages": size,
        "records": counts,
    }
)
SECTION = obj(
    {
        "kind": one_of("start", "part", "end", "full"),
        "name": text,
        "instance": size,
        "version": size,
        "number": size,
        "offset": size,
        "size": size,
        "count": size,
    }
)
DISK = obj({"name": text, "size": size, "chunks": size, "zero_chunks": size})
BITMAP = obj({"node": text, "name": text, "granularity": size, "enabled": flag, "persistent": flag})
DEVICE = obj(
    {
        "name": text,
        "instance": size,
        "version": optional(size),
        "reason": optional(text),
        "state": node,
    }
)
HEAD: dict[str, Check] = {
    "schema": one_of(1),
    "source": text,
    "size": size,
    "trailing": size,
    "created": optional(text),
    "machine": optional(text),
    "uuid": optional(text),
    "page_size": size,
    "footers": flag,
    "capabilities": each(text),
    "commands": counts,
    "disks": each(DISK),
    "bitmaps": each(BITMAP),
    "error": optional(error),
}
PARTS: dict[str, Check] = {"ram": each(RAM), "sections": each(SECTION), "devices": each(DEVICE)}
SURVEY = obj(HEAD | PARTS)
INSPECT = obj(HEAD | {"verified": flag}, **PARTS)

_PROGRESS = {
    "event": one_of("progress"),
    "phase": one_of(
        "setup", "active", "device", "storing", "loading", "completed", "sent", "failed"
    ),
    "transferred": size,
    "ram_total": size,
    "page_size": size,
    "normal_pages": size,
    "zero_pages": size,
    "round": size,
    "rate": size,
    "elapsed": seconds,
}
_MOVED = {
    "machine": optional(text),
    "source": text,
    "target": text,
    "ram_total": size,
    "transferred": size,
    "elapsed": seconds,
    "rate": size,
}
_CONVERTED = {
    "source": text,
    "target": text,
    "form": one_of("raw", "elf-core", "stream"),
    "left_out": each(text),
}
MIGRATION: dict[str, Check] = {
    "status": text,
    "transferred": size,
    "remaining": size,
    "total": size,
    "round": size,
    "rate": size,
    "dirty_rate": size,
    "total_time": seconds,
    "setup_time": optional(seconds),
    "expected_downtime": optional(seconds),
    "downtime": optional(seconds),
    "throttle": optional(size),
    "requests": size,
    "service_time": optional(seconds),
    "stall": text,
    "error": text,
    "confirmed": optional(flag),
}
MACHINE: dict[str, Check] = {
    "run_state": text,
    "is_running": flag,
    "name": text,
    "migration": obj(MIGRATION),
    "listening": each(text),
}
_RESULT = {"event": one_of("result"), "ok": flag}


def event(value: Any, where: str) -> None:
    match value["event"]:
        case "listening":
            obj({"event": text, "address": text})(value, where)
        case "progress":
            obj(_PROGRESS)(value, where)
        case _ if not value["ok"]:
            obj(_RESULT | {"error": error, "exit_status": size})(value, where)
        case _:
            obj(_RESULT | (_CONVERTED if "form" in value else _MOVED))(value, where)


def migrate_event(value: Any, where: str) -> None:
    """A line of ``vmferry migrate --json``."""
    if value["event"] == "progress":
        obj({"event": text} | MIGRATION)(value, where)
    elif value["event"] in {"stalled", "paused"}:
        obj({"event": text, "message": text})(value, where)
    elif value["ok"]:
        obj(_RESULT | {"target": text} | MIGRATION)(value, where)
    else:
        event(value, where)


def run_event(value: Any, where: str) -> None:
    """A line of ``vmferry run --json``."""
    if value["event"] == "state":
        obj({"event": text, "state": text})(value, where)
    elif value["event"] == "warning":
        obj({"event": text, "message": text})(value, where)
    elif value["event"] == "result" and value["ok"]:
        obj(_RESULT | {"reason": text})(value, where)
    else:
        event(value, where)


_SIDE: dict[str, Check] = {
    "pid": size,
    "state": text,
    "heartbeats": size,
    "guest_time": optional(seconds),
}
_DEMO: dict[str, dict[str, Check]] = {
    "machine": {"kind": text, "ram": size, "working_set": size, "rate": size},
    "progress": {
        "move": size,
        "moves": size,
        "rounds": each(size),
        "sides": each(obj(_SIDE)),
        "migration": obj(MIGRATION),
    },
    "moved": {
        "move": size,
        "source": size,
        "destination": size,
        "stood_still": seconds,
        "migration": obj(MIGRATION),
    },
    "result": {
        "ok": flag,
        "records": optional(size),
        "heartbeats": size,
        "checked": size,
        "pages": size,
        "downtimes": each(seconds),
    },
}


def demo_event(value: Any, where: str) -> None:
    """A line of ``vmferry demo --json``."""
    obj({"event": text} | _DEMO[value["event"]])(value, where)
