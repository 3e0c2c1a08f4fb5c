"""``vmferry inspect``: see what is in a stream or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import MaxRam, PageSize

if TYPE_CHECKING:
    from vmferry import Survey


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A file with a stream, - for standard input, or a checkpoint."
        ),
    ],
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Show all fields of the devices with such a name, as cpu:1 or '*virtio*'. "
            "May be repeated.",
        ),
    ] = None,
    ram: Annotated[bool, typer.Option("--ram", help="Show guest memory only.")] = False,
    sections: Annotated[
        bool, typer.Option("--sections", help="Show the list of sections only.")
    ] = False,
    working_set: Annotated[
        bool,
        typer.Option(
            "--working-set",
            help="Show what the machine wanted first when it was restored (vmferry restore).",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every checksum of a checkpoint.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Show everything as JSON (docs/inspect-json.md).")
    ] = False,
    max_ram: MaxRam = None,
    page_size: PageSize = None,
) -> None:
    """See what is in SOURCE: its machine, guest memory, sections, and devices with their fields.

    Of a broken stream, what stands before the fault is shown.
    """
    if working_set:
        return _write_working_set(source, json=json)
    survey = _survey(source, verify=verify, max_ram=max_ram, page_size=page_size)
    wanted = {
        part
        for part, chosen in (("ram", ram), ("sections", sections), ("devices", device))
        if chosen
    }
    if json:
        _write_json(survey, wanted, device or [], verified=verify)
    elif survey.size:  # else there is nothing before the fault
        _write_text(survey, wanted, device or [], verified=verify)
    if survey.error is not None:
        raise survey.error
    return None


def _write_working_set(source: str, *, json: bool) -> None:
    from json import dumps

    from vmferry import Checkpoint
    from vmferry.checkpoint.restore import survey_working_set

    from .contents import working_set
    from .output import write

    with Checkpoint(source) as checkpoint:
        content = survey_working_set(checkpoint)
    write(dumps(content, indent=1).splitlines() if json else working_set(content))


def _write_text(
    survey: Survey, wanted: set[str], patterns: Sequence[str], *, verified: bool
) -> None:
    from . import contents, fields
    from .output import write

    parts = [] if wanted else [contents.overview(survey, verified=verified)]
    if not wanted or "ram" in wanted:
        parts += [contents.memory(survey), contents.disks(survey), contents.bitmaps(survey)]
    if not wanted or "sections" in wanted:
        parts.append(contents.sections(survey))
    if "devices" in wanted:
        _check_patterns(survey, patterns)
        parts += [fields.device(*device) for device in survey.decoded(*patterns)]
    write(_paragraphs(parts))


def _paragraphs(parts: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of all parts, with an empty one between two that are not empty."""
    is_first = True
    for part in parts:
        for number, line in enumerate(part):
            if number == 0 and not is_first:
                yield ""
            is_first = False
            yield line


def _write_json(
    survey: Survey, wanted: set[str], patterns: Sequence[str], *, verified: bool
) -> None:
    import json

    from .output import write

    _check_patterns(survey, patterns)
    content = survey.to_json(*patterns) | {"verified": verified}
    unwanted = {"ram", "sections", "devices"} - wanted if wanted else set()
    shown = {key: value for key, value in content.items() if key not in unwanted}
    write(json.dumps(shown, indent=1).splitlines())


def _check_patterns(survey: Survey, patterns: Sequence[str]) -> None:
    """A pattern for nothing is a mistake, unless the stream broke off before the devices."""
    from vmferry import UsageError

    for pattern in patterns:
        if survey.error is None and next(survey.states(pattern), None) is None:
            raise UsageError(f"no device is named {pattern}; --sections lists them")


def _survey(source: str, *, verify: bool, max_ram: int | None, page_size: int | None) -> Survey:
    from vmferry import UsageError, open_stream

    if source != "-" and Path(source).is_dir():
        from vmferry import Checkpoint

        with Checkpoint(source, verify=verify) as checkpoint:
            return checkpoint.survey()
    if verify:
        raise UsageError(f"{source}: a stream has no checksums: --verify is for checkpoints")
    return open_stream(source, max_ram=max_ram, page_size=page_size, partial=True)
