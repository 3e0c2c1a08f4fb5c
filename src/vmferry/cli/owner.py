"""``vmferry owner``: who may run a machine, and what an operator can state of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vmferry.ownership.record import Record
    from vmferry.ownership.store import Store

verbs = typer.Typer(no_args_is_help=True, help="See and settle who may run a machine.")

Set = Annotated[
    str,
    typer.Argument(
        metavar="SET",
        help="Where the record is: file:PATH, etcd://HOST:PORT/KEY, or the TOML file of a machine "
        "that names it.",
    ),
]
Generation = Annotated[
    int, typer.Option(metavar="N", help="The generation that the record has, as show tells it.")
]
Fenced = Annotated[
    bool,
    typer.Option(
        "--i-have-fenced-it",
        help="You have made sure that the other engine runs the machine and writes its images "
        "no more: its process is dead, its host is off, or its storage is cut off.",
    ),
]
Note = Annotated[str, typer.Option(metavar="TEXT", help="Kept in the history.")]
Json = Annotated[bool, typer.Option("--json", help="Show the record as one JSON object.")]


@verbs.command()
def show(where: Set, json: Json = False) -> None:
    """Show who has the machine, in which generation, and what may be done."""
    from vmferry.ownership.administration import read

    _print(read(_store(where)).record, json=json)


@verbs.command()
def history(where: Set, json: Json = False) -> None:
    """Show the latest changes; what operators forced is kept longest."""
    from vmferry.ownership.administration import read

    from .output import one_line, write

    record = read(_store(where)).record
    if json or record is None:
        return _print(record, json=json)
    return write(
        [
            one_line(
                f"{entry.generation}  {entry.act}  {entry.by}"
                + (f"  forced at {entry.at}: {entry.note}" if entry.forced else "")
            )
            for entry in record.history
        ]
    )


@verbs.command()
def fence(
    where: Set,
    engine: Annotated[str, typer.Option(metavar="NAME", help="Which engine, as show tells it.")],
    generation: Generation,
    i_have_fenced_it: Fenced = False,
    note: Note = "",
    json: Json = False,
) -> None:
    """State that an engine cannot run the machine any more, so that another one may."""
    from vmferry.ownership.administration import fence as state

    _check(i_have_fenced_it)
    store = _store(where)
    _print(state(store, engine=engine, generation=generation, note=note), json=json)


@verbs.command()
def release(where: Set, generation: Generation, note: Note = "", json: Json = False) -> None:
    """Let whoever starts the machine next have it: its owner is fenced, or known to be gone."""
    from vmferry.ownership.administration import free

    _print(free(_store(where), "release", generation=generation, note=note), json=json)


@verbs.command()
def claim(
    where: Set,
    generation: Generation,
    i_have_fenced_it: Fenced = False,
    note: Note = "",
    json: Json = False,
) -> None:
    """Take the machine from its owner, which is fenced: whoever starts it next has it."""
    from vmferry.ownership.administration import fence as state
    from vmferry.ownership.administration import free, read

    _check(i_have_fenced_it)
    store = _store(where)
    record = read(store).record
    if record is not None and record.owner and record.owner not in record.fenced:
        record = state(store, engine=record.owner, generation=generation, note=note)
        generation = record.generation
    _print(free(store, "claim", generation=generation, note=note), json=json)


def _check(stated: bool) -> None:
    if not stated:
        raise typer.BadParameter(
            "nothing is taken from an engine that may run the machine: make sure that it cannot, "
            "and say so with --i-have-fenced-it"
        )


def _store(where: str) -> Store:
    from vmferry.errors import UsageError
    from vmferry.machines import read_config
    from vmferry.ownership.store import open_store

    if where.startswith(("file:", "etcd:")):
        return open_store(where)
    config = read_config(where)
    if config.ownership is None:
        raise UsageError(f"{where}: names no store of its owner's record ([ownership] store)")
    return open_store(config.ownership.store)


def _print(record: Record | None, *, json: bool) -> None:
    from dataclasses import asdict
    from json import dumps

    from .output import one_line, write

    if record is None:
        return
    if json:
        write([dumps(asdict(record))])
        return
    lines = [f"machine     {record.vm}", f"phase       {record.phase}"]
    lines += [f"owner       {record.owner or 'nobody'}", f"generation  {record.generation}"]
    lines += [f"nominee     {record.nominee}"] if record.nominee else []
    lines += [f"fenced      {name}" for name in record.fenced]
    write([one_line(line) for line in lines])
