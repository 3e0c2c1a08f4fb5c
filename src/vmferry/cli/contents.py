"""The contents of a stream or a checkpoint as text: what ``vmferry inspect`` shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from vmferry.checkpoint.survey import KINDS, BlockSurvey, SectionSurvey, Survey
from vmferry.units import format_size
from vmferry.vmstate.tree import DeviceState
from vmferry.wire.devices import DeviceRegion

from .fields import summary
from .output import count, heading, name, width

_SUMMARY: Final = 24
"""Columns that a summary of a device gets at least."""


def overview(survey: Survey, *, verified: bool = False) -> Iterator[str]:
    """What it is."""
    broken = " read, then it breaks off" if survey.error else ""
    facts = {
        "machine": name(survey.machine) if survey.machine else "not named",
        "uuid": str(survey.configuration.uuid or "") if survey.configuration else "",
        "page size": format_size(survey.page_size),
        "size": f"{format_size(survey.size)} ({survey.size:,} bytes){broken}",
        "behind it": f"{survey.trailing:,} bytes" if survey.trailing else "",
        "created": name(survey.created or ""),
        "capabilities": ", ".join(map(name, sorted(survey.capabilities))),
        "commands": ", ".join(
            command if count == 1 else f"{count} {command}"
            for command, count in survey.commands.items()
        ),
        "checksums": "all hold" if verified else "",
    }
    yield heading(name(survey.source))
    for label, fact in facts.items():
        if fact and fact != '""':
            yield f"  {label:<12}  {fact}"


def memory(survey: Survey) -> Iterator[str]:
    """RAM blocks, with their pages by kind."""
    if not survey.blocks:
        return
    total = sum(block.block.length for block in survey.blocks)
    pages = sum(map(_pages, survey.blocks))
    zero = sum(block.zero_pages for block in survey.blocks)
    yield heading(
        f"RAM: {format_size(total)} in {count(len(survey.blocks), 'block')}, "
        f"{_percent(zero, pages)} zero pages"
    )
    kinds = [kind for kind in KINDS.values() if any(b.records.get(kind) for b in survey.blocks)]
    unsent = any(block.unsent_pages for block in survey.blocks)
    head = ["block", "size", "data", "zero", *["unsent"][: int(unsent)], "zero %"]
    rows = [head + [f"sent {kind}" for kind in kinds]]
    for block in survey.blocks:
        numbers = [block.data_pages, block.zero_pages, *[block.unsent_pages][: int(unsent)]]
        rows.append(
            [
                name(block.block.name),
                format_size(block.block.length),
                *(f"{number:,}" for number in numbers),
                _percent(block.zero_pages, _pages(block)),
                *(f"{block.records[kind]:,}" for kind in kinds),
            ]
        )
    yield from _table(rows)
    if unsent and survey.error is None:
        yield "  What was not sent here came through other channels (multifd), or not at all."


def disks(survey: Survey) -> Iterator[str]:
    """Disks that came along."""
    if not survey.disks:
        return
    yield heading("Disks, in chunks of 1 MiB")
    rows = [["disk", "size", "chunks", "zero"]]
    for title, disk in survey.disks.items():
        rows.append(
            [name(title), format_size(disk.size), f"{disk.chunks:,}", f"{disk.zero_chunks:,}"]
        )
    yield from _table(rows)


def bitmaps(survey: Survey) -> Iterator[str]:
    """Dirty bitmaps that came along."""
    if not survey.bitmaps:
        return
    yield heading("Dirty bitmaps")
    rows = [["node", "bitmap", "granularity", "enabled", "persistent"]]
    for start in survey.bitmaps:
        flags = ["yes" if flag else "no" for flag in (start.enabled, start.persistent)]
        rows.append([name(start.node), name(start.name), format_size(start.granularity), *flags])
    yield from _table(rows, right=(2,))


def sections(survey: Survey) -> Iterator[str]:
    """Sections in their order, devices with a summary of their fields."""
    regions = [device for device in survey.devices if isinstance(device, DeviceRegion)]
    if not survey.sections and not regions:
        return
    yield heading("Sections")
    states = {section.offset: state for section, state in survey.decoded()}
    rows = [["offset", "size", "section", ""]]
    lasts = [""]
    for section in survey.sections:
        rows.append([f"{section.offset:#x}", format_size(section.size), *_title(section)])
        lasts.append(_last(section, states))
    for region in regions:
        rows.append([f"{region.offset:#x}", format_size(region.size), region.name, ""])
        lasts.append(region.reason)
    for line, last in zip(_table(rows, right=(0, 1)), lasts, strict=True):
        room = max(width() - len(line) - 2, _SUMMARY)
        yield f"{line}  {_shortened(last, room)}"


def _title(section: SectionSurvey) -> list[str]:
    instance = f":{section.instance}" if section.instance else ""
    return [name(section.name) + instance, f"v{section.version}"]


def _last(section: SectionSurvey, states: dict[int, DeviceState]) -> str:
    if section.kind == "full":
        state = states.get(section.offset)
        return summary(state) if state else ""
    return section.kind if section.count == 1 else f"{section.count:,} {section.kind}s"


def _pages(block: BlockSurvey) -> int:
    return block.data_pages + block.zero_pages + block.unsent_pages


def _percent(part: int, whole: int) -> str:
    # Rounded down, so that only all is 100.
    return f"{1000 * part // whole / 10}%" if whole else "-"


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 4].rstrip(', ')} ..."


def _table(rows: Sequence[Sequence[str]], right: Iterable[int] | None = None) -> Iterator[str]:
    """*rows* in columns, those in *right* (all but the first) flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush = set(range(1, len(widths)) if right is None else right)
    for row in rows:
        cells = [
            cell.rjust(width) if index in flush else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells)


def working_set(content: dict[str, Any]) -> Iterator[str]:
    """What a machine wants first when it is restored."""
    if not content["restores"]:
        yield "no working set: the machine was never restored by vmferry restore"
        return
    yield (
        f"{content['pages']:,} pages, {format_size(content['bytes'])},"
        f" {content['share']:.1%} of guest memory"
    )
    for block, pages in content["blocks"].items():
        yield f"  {name(block)}: {pages:,} pages"
    moments = [f"{pages:,} within {bound} ms" for bound, pages in content["within_ms"]]
    yield f"wanted since the connection: {', '.join(moments)}"
    learned = f"learned in {content['restores']} restores"
    if content["coverage"] is not None:
        learned += (
            f"; in the last one {content['coverage']:.0%} of what was wanted had been sent before"
            " it was asked for"
        )
    yield learned
