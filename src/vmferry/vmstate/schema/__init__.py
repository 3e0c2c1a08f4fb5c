"""Declared device state of two programs, compared: what breaks before anything is migrated."""

from .compare import check
from .dump import dump_schema, import_devices
from .findings import Direction, Finding, Kind, Severity
from .model import DeviceSchema, FieldSchema, Schema, StateSchema
from .read import parse_schema, read_schema
from .stream import check_stream

__all__ = [
    "DeviceSchema",
    "Direction",
    "FieldSchema",
    "Finding",
    "Kind",
    "Schema",
    "Severity",
    "StateSchema",
    "check",
    "check_stream",
    "dump_schema",
    "import_devices",
    "parse_schema",
    "read_schema",
]
