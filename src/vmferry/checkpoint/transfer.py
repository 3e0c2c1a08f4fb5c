"""Receiving a machine into a checkpoint, and sending it from one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vmferry.migration.connections import Deadlines
from vmferry.migration.destination import Destination
from vmferry.migration.progress import Meter, Report
from vmferry.migration.source import SendOptions, Source
from vmferry.transports import connect, listen
from vmferry.wire.reader import Tolerate

from .checkpoint import Checkpoint
from .writer import CheckpointWriter


def receive(
    uri: str,
    directory: str | os.PathLike[str],
    *,
    progress: Report | None = None,
    max_ram: int | None = None,
    page_size: int | None = None,
    tolerate: Tolerate = Tolerate.NOTHING,
    deadlines: Deadlines | None = None,
    switchover_ack: bool | None = None,
    started: Callable[[Destination], None] | None = None,
) -> Checkpoint:
    """Be the destination of a migration from QEMU at *uri*; returns the new checkpoint.

    Recognises by itself how the source sends: plain, xbzrle, compress, multifd with any number of
    channels and compression, with a return path or without.  *max_ram* bounds guest memory in bytes
    (default: what this machine has), *page_size* is the target page in bytes where neither stream
    nor machine type tell; *tolerate*, *deadlines* and *switchover_ack* as in
    :class:`~vmferry.migration.destination.Destination`.  *progress* is called now and then with a
    :class:`~vmferry.migration.progress.Progress`.  *started* is called once it listens, with the
    :class:`~vmferry.migration.destination.Destination`: its ``address`` says where, which tells the
    port of ``tcp:HOST:0``, and its ``cancel()`` ends it from another thread.

    Raises :class:`~vmferry.errors.StreamError` for a bad stream,
    :class:`~vmferry.errors.TransportError` and :class:`~vmferry.errors.PeerError` for the network
    and the source, :class:`~vmferry.errors.StorageError` for the directory.  After any of these
    there is no checkpoint, and the source, where it listens, knows that it keeps its machine.  The
    exception is a source that cannot be told of success: then the checkpoint stays, and the error
    says so.
    """
    with CheckpointWriter(directory) as writer, listen(uri) as listener:
        destination = Destination(
            listener,
            writer,
            meter=Meter(progress),
            deadlines=deadlines,
            max_ram=max_ram,
            page_size=page_size,
            tolerate=tolerate,
            switchover_ack=switchover_ack,
        )
        if started is not None:
            started(destination)
        destination.run()
    return Checkpoint(directory)


def send(
    checkpoint: Checkpoint | str | os.PathLike[str],
    uri: str,
    *,
    options: SendOptions | None = None,
    progress: Report | None = None,
    started: Callable[[Source], None] | None = None,
) -> None:
    """Be the source: a QEMU that waits with ``-incoming`` at *uri* resumes the machine.

    Returns when the destination has said that it loaded everything; over transports without a way
    back (``file:``, ``exec:``) when everything is written.  The checkpoint is not changed and may
    be sent any number of times.  *started* is called before anything is sent, with the
    :class:`~vmferry.migration.source.Source`: its ``cancel()`` ends it from another thread.

    Raises what :func:`receive` raises.
    """
    if not isinstance(checkpoint, Checkpoint):
        with Checkpoint(Path(checkpoint)) as opened:
            send(opened, uri, options=options, progress=progress, started=started)
        return
    source = Source(
        checkpoint,
        lambda given_up: connect(uri, given_up=given_up),
        options=options,
        meter=Meter(progress),
    )
    if started is not None:
        started(source)
    source.run()
