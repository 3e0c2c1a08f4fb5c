"""``vmferry schema``: what programs declare of their device state, written and compared."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from .options import MaxRam, PageSize

if TYPE_CHECKING:
    from vmferry import Survey
    from vmferry.vmstate.schema import Finding
    from vmferry.wire.description import VmDescription

Titles: TypeAlias = "dict[str, tuple[str, str]]"
"""The files whose streams load in which, by direction."""

SCHEMA: Final = 1
"""The version of the JSON; ``docs/schema.md`` has it in full."""

_SEVERITY: Final = 11
_COUNTED: Final = {"breaks": "break", "may-break": "possible break", "note": "note"}
_WIDTH: Final = 60

verbs = typer.Typer(rich_markup_mode=None, add_completion=False)


@verbs.callback()
def schema() -> None:
    """Declared device state: write it, and see whether streams of one program load in another."""


class Way(StrEnum):
    """Whose streams are to load."""

    BOTH = "both"
    OLD_TO_NEW = "old-to-new"
    NEW_TO_OLD = "new-to-old"


@verbs.command(short_help="See what breaks between two programs, or for a stream.")
def check(
    schemas: Annotated[
        list[str],
        typer.Argument(
            metavar="OLD NEW",
            help="Files that vmferry schema dump or qemu -dump-vmstate wrote. With --stream: one.",
        ),
    ],
    stream: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="See whether this one loads: a file with a stream, - for standard input, or a "
            "checkpoint.",
        ),
    ] = None,
    direction: Annotated[
        Way,
        typer.Option(
            metavar="old-to-new|new-to-old|both", help="Whose streams are to load in the other."
        ),
    ] = Way.BOTH,
    json: Annotated[
        bool, typer.Option("--json", help="Show the findings as JSON (docs/schema.md).")
    ] = False,
    max_ram: MaxRam = None,
    page_size: PageSize = None,
) -> int:
    """See whether streams of the program OLD load in NEW, and streams of NEW in OLD.

    Exit status 1 where something breaks, even if only under a condition; 0 otherwise.
    docs/schema.md explains what is found.
    """
    from vmferry.vmstate.schema import check as compare
    from vmferry.vmstate.schema import check_stream, read_schema

    if stream is None:
        old, new = _exactly(schemas, 2, "OLD and NEW")
        titles = {Way.OLD_TO_NEW.value: (old, new), Way.NEW_TO_OLD.value: (new, old)}
        if direction is not Way.BOTH:
            titles = {direction.value: titles[direction.value]}
        findings = compare(read_schema(old), read_schema(new))
    else:
        (target,) = _exactly(schemas, 1, "one SCHEMA with --stream")
        titles = {"stream": (stream, target)}
        declared = read_schema(target)
        survey = _survey(stream, max_ram=max_ram, page_size=page_size)
        others = [section.name for section in survey.sections if section.kind == "start"]
        findings = check_stream(_description(survey), declared, others)
    findings = [finding for finding in findings if finding.direction in titles]
    (_write_json if json else _write_text)(findings, titles)
    return int(any(finding.breaks for finding in findings))


@verbs.command(short_help="Write what the devices of a Python program declare.")
def dump(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:ATTR",
            help="The class of a device, or something to go through that has several. The module "
            "is imported: its code runs.",
        ),
    ],
) -> None:
    """Write what the devices in MODULE:ATTR declare, as JSON in the form of qemu -dump-vmstate."""
    import json

    from vmferry.vmstate.schema import dump_schema, import_devices

    from .output import write

    write(json.dumps(dump_schema(import_devices(target), target), indent=1).splitlines())


def _exactly(schemas: list[str], count: int, wanted: str) -> list[str]:
    from vmferry import UsageError

    if len(schemas) != count:
        raise UsageError(f"expected {wanted}, found {len(schemas)}")
    return schemas


def _survey(source: str, *, max_ram: int | None, page_size: int | None) -> Survey:
    from vmferry import Checkpoint, open_stream

    if source != "-" and Path(source).is_dir():
        with Checkpoint(source) as checkpoint:
            return checkpoint.survey()
    return open_stream(source, max_ram=max_ram, page_size=page_size)


def _description(survey: Survey) -> VmDescription:
    from vmferry import UsageError

    if survey.description is None:
        raise UsageError(
            f"{survey.source}: has no closing description to compare: QEMU sends one from machine"
            " type 2.3 on, and none in postcopy"
        )
    return survey.description


def _write_json(findings: Sequence[Finding], titles: Titles) -> None:
    import json

    from .output import write

    content = {
        "schema": SCHEMA,
        "compared": [
            {"direction": direction, "from": source, "into": target}
            for direction, (source, target) in titles.items()
        ],
        "breaks": any(finding.breaks for finding in findings),
        "findings": [finding.to_json() for finding in findings],
    }
    write(json.dumps(content, indent=1).splitlines())


def _write_text(findings: Sequence[Finding], titles: Titles) -> None:
    from .output import write

    write(_text(findings, titles))


def _text(findings: Sequence[Finding], titles: Titles) -> Iterator[str]:
    """The findings by direction and device, with what they come to."""
    from .output import heading, name, one_line

    for direction, (source, target) in titles.items():
        found = [finding for finding in findings if finding.direction == direction]
        yield heading(one_line(f"{source} into {target}: {_verdict(found)}"))
        for device, group in groupby(found, key=lambda finding: finding.device):
            yield f"  {name(device) if device else 'in all'}"
            for finding in group:
                yield from _lines(finding)


def _lines(finding: Finding) -> Iterator[str]:
    """A finding, and what to do where that is anything."""
    from vmferry.vmstate.schema import Severity

    from .output import one_line, width

    said = [(str(finding), finding.severity.words)]
    if finding.severity is not Severity.NOTE:
        said.append((f"-> {finding.advice}", ""))
    for text, first in said:
        yield from textwrap.wrap(
            one_line(text),
            max(width(), _WIDTH),
            initial_indent=f"    {first:<{_SEVERITY}}",
            subsequent_indent=" " * (_SEVERITY + 4),
            break_on_hyphens=False,
        )


def _verdict(findings: Sequence[Finding]) -> str:
    from vmferry.vmstate.schema import Severity

    counts = {
        severity: sum(finding.severity is severity for finding in findings) for severity in Severity
    }
    if not findings:
        return "loads"
    counted = ", ".join(
        f"{count} {_COUNTED[severity.value]}{'s' * (count != 1)}"
        for severity, count in counts.items()
        if count
    )
    if counts[Severity.BREAKS]:
        return f"breaks ({counted})"
    return f"{'may break' if counts[Severity.MAY_BREAK] else 'loads'} ({counted})"
