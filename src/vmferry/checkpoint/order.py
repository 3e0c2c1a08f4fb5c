"""What is asked for of a restore, by a command or by whoever asks a page server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from vmferry.errors import UsageError
from vmferry.migration.postcopy.source import LazyOptions, Paused
from vmferry.migration.progress import Report
from vmferry.qemu.messages import Object
from vmferry.qemu.qmp import Qmp

from .checkpoint import Checkpoint
from .restore import Restore


def is_page_size(size: int) -> bool:
    """Whether a host may have pages of *size* bytes."""
    return size >= 1 << 10 and not size & (size - 1)


ARGUMENTS: Final[Mapping[str, type]] = {
    "qmp": str,
    "preempt": bool,
    "page-sizes": dict,
    "bandwidth": int,
    "timeout": int,
    "resume": bool,
    "verify": bool,
    "working-set": bool,
}
"""Of ``restore``, beside ``uri``: what each of them is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a client asks for: see :class:`~vmferry.checkpoint.restore.Restore`.

    *qmp* is where the monitor of the QEMU that waits can be reached.
    """

    uri: str
    qmp: str | None = None
    options: LazyOptions
    verify: bool = False
    learn: bool = True

    def restore(
        self,
        checkpoint: Checkpoint,
        qmp: Qmp | None,
        progress: Report,
        paused: Callable[[Paused], None],
    ) -> Restore:
        """The restore; *qmp* is a session with the monitor."""
        return Restore(
            checkpoint,
            self.uri,
            qmp=qmp,
            options=self.options,
            verify=self.verify,
            learn=self.learn,
            progress=progress,
            paused=paused,
        )

    def to_arguments(self) -> Object:
        """The arguments of ``restore``."""
        options = self.options
        arguments = {
            "uri": self.uri,
            "qmp": self.qmp,
            "preempt": options.preempt,
            "page-sizes": dict(options.page_sizes),
            "bandwidth": None if options.bandwidth is None else int(options.bandwidth),
            "timeout": math.ceil(options.idle or 0),
            "resume": options.resume,
            "verify": self.verify,
            "working-set": self.learn,
        }
        return {name: value for name, value in arguments.items() if value is not None}

    @classmethod
    def from_arguments(cls, arguments: Object) -> Self:
        """What a client has sent; raises :class:`UsageError` where that is senseless."""
        sizes = arguments.get("page-sizes", {})
        for size in sizes.values():
            if type(size) is not int or not is_page_size(size):
                raise UsageError("expected powers of two from 1024 on in page-sizes")
        bandwidth, timeout = arguments.get("bandwidth"), arguments.get("timeout", 60)
        if timeout < 0 or (bandwidth is not None and bandwidth <= 0):
            raise UsageError("expected a bandwidth above 0, and a timeout of 0 or more")
        options = LazyOptions(
            preempt=arguments.get("preempt", False),
            page_sizes=sizes,
            bandwidth=bandwidth,
            idle=timeout or None,
            answer=timeout or None,
            resume=arguments.get("resume", False),
        )
        return cls(
            uri=arguments["uri"],
            qmp=arguments.get("qmp"),
            options=options,
            verify=arguments.get("verify", False),
            learn=arguments.get("working-set", True),
        )
