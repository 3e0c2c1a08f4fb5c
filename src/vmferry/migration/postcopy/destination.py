"""The destination of a postcopy migration: the machine runs here, and its memory follows.

QEMU 7.2 ``migration/savevm.c`` and ``migration/postcopy-ram.c``.  Here is what the process of the
machine does of it; :mod:`.pager` has what must not depend on that process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias

from vmferry.errors import (
    ChannelClosed,
    PeerError,
    TransportError,
    UsageError,
    VmferryError,
    printable,
)
from vmferry.memory import PAGE_SIZE, GuestMemory, MemoryBlock
from vmferry.memory.faults import missing, open_faults, register
from vmferry.migration.takeover import ABORT, GO
from vmferry.transports import Channel, Listener
from vmferry.wire.commands import (
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamDiscard,
)
from vmferry.wire.postcopy import Continuation
from vmferry.wire.return_path import Message, Pong

from .late import say_that_all_came
from .missing import MISSING, Marks
from .pager_process import PagerProcess
from .shared import Shared
from .waits import Times

_SHMEM_HUGE: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_ASK: Final = 0.1
"""Seconds between two looks at the record of who owns the machine."""

Event: TypeAlias = dict[str, Any]


def check_host(*, kernel: bool, threads: bool) -> None:
    """Raise :class:`UsageError` where this host has no postcopy for a machine.

    *kernel*: the kernel itself touches guest memory, for virtual CPUs or for disks.  *threads*: it
    is to be counted how long each waits.
    """
    if (lack := missing(kernel=kernel, threads=threads) or _forced()) is not None:
        raise UsageError(f"postcopy-ram is not possible here: {lack}")


def _forced() -> str | None:
    """Whether shared memory comes in huge pages whoever wants it: of those no part can be missing.

    Else what says that it wants none gets none.
    """
    try:
        setting = _SHMEM_HUGE.read_text()
    except OSError:
        return None  # the kernel has none
    return f"{_SHMEM_HUGE} is force: set it to anything else" if "[force]" in setting else None


class PostcopyDestination:
    """Gets a machine with *memory*, if its source switches to postcopy.

    *kernel* as for :func:`check_host`; with *preempt* there is a channel of its own for urgent
    pages.  *idle* is how many seconds the source may be silent while a page is waited for, *first*
    how many the preempt channel may take to come.  *mark* gets the arrays in which the pages that
    come in precopy are to be marked, *phase* hears of ``postcopy-active``,
    ``postcopy-paused`` and ``postcopy-recover``, *lost* of why it is paused.  Of *threads* it is
    counted how long they wait, where these are given.

    :meth:`recover` and :meth:`cancel` are for any thread, all else for that of the migration.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        kernel: bool,
        preempt: bool,
        idle: float | None,
        first: float | None,
        mark: Callable[[Mapping[str, Marks]], None],
        phase: Callable[[str], None],
        lost: Callable[[str], None],
        threads: Sequence[int] | None = None,
    ) -> None:
        self._memory = memory
        self._threads = threads
        self._waits: Times | None = None
        self._kernel = kernel
        self.preempt = preempt
        self._idle = idle
        self._first = first
        self._mark = mark
        self._phase = phase
        self._lost = lost
        self._cleanup = ExitStack()
        self._marks = os.memfd_create("marks", os.MFD_CLOEXEC)
        self._cleanup.callback(os.close, self._marks)
        self._received: dict[str, Marks] = {}
        self._first_pages: dict[str, int] = {}
        self._faults = -1
        self._is_done = self._is_up = self._is_answered = self._is_resumed = False
        self._words: set[int] = set()
        self._start: Continuation | None = None
        self._source: Sequence[int] = ()
        self._channels: list[Channel] = []
        self._listener: Listener | None = None
        self._recovering = threading.Lock()
        self._events: SimpleQueue[Event | Listener | None] = SimpleQueue()
        self._pager: PagerProcess | None = self._new_pager()

    def _new_pager(self) -> PagerProcess:
        return PagerProcess(self._events.put)

    # Before the machine runs

    def advise(self, command: PostcopyAdvise) -> None:
        """The source may switch later: forget all memory, so that what is missing can be seen.

        The pager is waited for here, and not when the machine stands still.
        Raises :class:`PeerError` where its pages are not those of this host.
        """
        found = command.page_sizes, command.target_page
        if found != (PAGE_SIZE, PAGE_SIZE):
            raise PeerError(
                f"postcopy needs memory in pages of {PAGE_SIZE} bytes on both sides, and the source"
                f" has pages of {' and '.join(map(str, found))}"
            )
        total = 0
        for block in self._memory.blocks:
            self._first_pages[block.name] = total // PAGE_SIZE
            total += block.size
            self._forget(block, 0, block.size)
            # Of a huge page no part can be missing.
            for address in block.addresses:
                block.use_huge_pages(address, on=False)
        shared = Shared(self._marks, total // PAGE_SIZE, self._threads or ())
        self._waits = shared.times
        for block in self._memory.blocks:
            first = self._first_pages[block.name]
            self._received[block.name] = shared.marks[first : first + block.pages]
        self._mark(self._received)
        while not self._is_up:
            self._step(None)

    def discard(self, command: RamDiscard) -> None:
        """Forget what the machine has written since it was sent."""
        block = self._memory[command.block]
        for start, length in command.ranges:
            self._forget(block, start, length)
            first = start // PAGE_SIZE
            self._received[block.name][first : first + length // PAGE_SIZE] = MISSING

    def listen(
        self,
        start: Continuation,
        main: Channel,
        head: bytes,
        urgent: Channel | None,
        source: Sequence[int],
    ) -> None:
        """Have the pager fetch what is missing, from now on.

        *head* was read from *main* already.  *source* are the pings by which the source has said
        who it is; one that comes back later has to say the same.
        """
        pager = self._pager
        if pager is None or not self._received:
            raise PeerError("the source has not announced postcopy")
        self._start, self._source = start, source
        try:
            self._register(pager)
        except OSError as error:
            raise VmferryError(
                f"the host has no faults for missing memory: {error.strerror}"
            ) from error
        self._channels = [main] if urgent is None else [main, urgent]
        pager.stream(start, main, head, idle=self._idle)
        if urgent is not None:
            pager.urgent(urgent)
        self._phase("postcopy-active")

    def _register(self, pager: PagerProcess) -> None:
        faults = open_faults(kernel=self._kernel, threads=self._threads is not None)
        try:
            for block in self._memory.blocks:
                block.has_missing = True
                for address in block.addresses:
                    register(faults, address, block.size)
            pager.memory(self._layout(), self._threads or (), faults, self._marks)
        finally:
            os.close(faults)

    def _forget(self, block: MemoryBlock, start: int, length: int) -> None:
        block.discard(start, length)
        if (kept := block.next_populated(start)) < start + length:
            raise VmferryError(
                f"block {printable(block.name)}: the host keeps memory at {kept:#x} that was given"
                " up, so that nobody can miss what belongs there"
            )

    def _layout(self) -> list[object]:
        return [
            (block.name, block.size, self._first_pages[block.name], block.addresses)
            for block in self._memory.blocks
        ]

    def say(self, message: Message) -> None:
        """Have the pager send *message*: it alone writes to the source now."""
        if self._pager is not None:
            self._pager.say(message.encode())

    def keep(self) -> None:
        """From now on nothing is given up: where the source is lost, it is waited for.

        Raises :class:`PeerError` where it was lost before.
        """
        if self._pager is not None:
            self._pager.keep()
        while self._faults < 0:
            self._step(None)

    def await_go(self, taken: Callable[[], bool] | None) -> bool:
        """Wait until the machine is this side's: by the source's word, or where *taken* says so.

        Whether the source waits for the answer (:meth:`answer_go`).  One that resumes a migration
        that was paused has given the machine away, and does not.
        """
        while True:
            if ABORT in self._words:
                raise PeerError("the source has taken its machine back")
            if taken is not None:
                if taken():
                    return False
            elif GO in self._words or self._is_resumed:
                return not self._is_resumed
            elif self._is_done:
                raise PeerError("the source has ended without giving its machine away")
            self._step(None if taken is None else _ASK)

    def answer_go(self) -> None:
        """Answer *go*, and see it on its way; where the source is lost before, until it resumes.

        A source that was not answered knows by the end of this side's process that the machine has
        not run here.
        """
        self.say(Pong(GO))
        if self._pager is not None:
            self._pager.flush()
        while not (self._is_answered or self._is_resumed):
            self._step(None)

    # While it runs

    @property
    def has_all(self) -> bool:
        """Whether everything has come."""
        return self._is_done

    @property
    def waits(self) -> tuple[list[float], float] | None:
        """For how many seconds each of *threads* waited, and all at once; ``None``: not counted."""
        if self._threads is None:
            return None
        if self._waits is None:  # memory came before the machine
            return [0.0] * len(self._threads), 0.0
        *each, together = self._waits.tolist()
        return each, together

    def follow(self) -> None:
        """Wait until everything has come, however often the source is lost and comes back."""
        while not self._is_done:
            self._step(None)
        self._end_faults()

    def _step(self, timeout: float | None) -> None:
        """Deal with the next thing that happens within *timeout* seconds, if anything does."""
        try:
            found = self._events.get(timeout=timeout)
        except Empty:
            return
        match found:
            case None:
                raise ChannelClosed("the migration was cancelled on this side")
            case Listener():
                self._take_up(found)
            case _:
                self._hear(found)

    def _hear(self, event: Event) -> None:
        match event:
            case {"event": "kept", "descriptor": descriptor}:
                if self._faults >= 0:
                    os.close(descriptor)
                else:
                    self._faults = descriptor
            case {"event": "up"}:
                self._is_up = True
            case {"event": "done"}:
                self._is_done = True
            case {"event": "word", "value": value}:
                self._words.add(value)
            case {"event": "said"}:
                self._is_answered = True
            case {"event": "resumed"}:
                self._is_resumed = True
                self._phase("postcopy-active")
            case {"event": "paused", "reason": reason}:
                self._pause(reason)
            case {"event": "failed", "reason": reason}:
                raise PeerError(f"the source is lost before the machine ran: {reason}")
            case {"event": "gone", "reason": reason}:
                self._pager_ended(reason)

    def _pager_ended(self, reason: str) -> None:
        if self._pager is not None:
            self._pager.close()
            self._pager = None
        if self._faults < 0:
            raise PeerError(f"{reason} before the machine ran")
        self._pause(reason)

    def _pause(self, reason: str) -> None:
        self._drop_channels()
        self._phase("postcopy-paused")
        self._lost(reason)

    def _drop_channels(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels = []

    def recover(self, listener: Listener) -> None:
        """Let the source come back at *listener*, which belongs to this side from now on.

        Where everything has come it may do so to hear that.
        """
        with self._recovering:
            before, self._listener = self._listener, listener
            if self._is_done:
                again = threading.Thread(target=self._say_again, args=(listener,), daemon=True)
                again.start()
            else:
                self._events.put(listener)
        if before is not None:
            before.shutdown()

    def _take_up(self, listener: Listener) -> None:
        """Wait for the source, and hand its connection over."""
        with listener:
            try:
                self._hand_over(listener)
            except ChannelClosed:
                pass  # it is waited for elsewhere now
            except (OSError, TransportError) as error:
                # The host may have what it takes the next time.
                self._pause(str(error))

    def _say_again(self, listener: Listener) -> None:
        with listener, suppress(VmferryError):
            channel = listener.accept()
            if channel is None or self._start is None:
                return
            with channel:
                self._channels = [channel]
                say_that_all_came(channel, self._start, self._source)

    def _hand_over(self, listener: Listener) -> None:
        channel = listener.accept()
        if channel is None or self._start is None:
            return
        self._drop_channels()
        self._channels = [channel]
        pager = self._revived()
        self._phase("postcopy-recover")
        pager.resume(self._start, channel, self._source, idle=self._idle)
        if not self.preempt:
            return
        with suppress(TransportError):
            urgent = listener.accept(self._first)
            if urgent is not None:
                self._channels.append(urgent)
                pager.urgent(urgent)

    def _revived(self) -> PagerProcess:
        """The pager, or another one in the place of one that has died."""
        if self._pager is None:
            self._pager = self._new_pager()
            self._pager.memory(self._layout(), self._threads or (), self._faults, self._marks)
            self._pager.keep()
        return self._pager

    # The end

    def cancel(self) -> None:
        """Have whatever waits raise :class:`ChannelClosed`."""
        self._events.put(None)
        if self._is_done:
            for channel in list(self._channels):
                channel.shutdown()
        if self._listener is not None:
            self._listener.shutdown()

    def give_up(self) -> None:
        """Let nobody wait for a page any more: what is missing is zero, and the machine is lost."""
        if self._pager is not None:
            self._pager.kill()
        self._end_faults()

    def _end_faults(self) -> None:
        """All memory is as any other."""
        if self._faults >= 0:
            os.close(self._faults)
            self._faults = -1
        for block in self._memory.blocks:
            block.has_missing = False
            for address in block.addresses:
                block.use_huge_pages(address, on=True)

    def close(self) -> None:
        """End the pager, when it has sent what was said; and all connections."""
        if self._pager is not None:
            self._pager.close()
        if self._faults < 0:
            self._end_faults()
        self._drop_channels()
        self._received = {}
        self._mark(self._received)  # they are mapped, and that keeps their descriptor
        self._waits = None if self._waits is None else self._waits.copy()
        if self._listener is not None:
            self._listener.close()
        self._cleanup.close()


def package_parts(package: Package) -> tuple[list[int], memoryview]:
    """The values of the pings in a package, and the device sections; *offset* as the package's."""
    content = memoryview(package.content)
    listen, run = len(PostcopyListen().encode()), len(PostcopyRun().encode())
    start, end = listen, len(content) - run
    pings = []
    size = len(Ping(0).encode())
    head = Ping(0).encode()[:-4]
    while content[start : start + len(head)] == head and start + size <= end:
        pings.append(int.from_bytes(content[start + len(head) : start + size]))
        start += size
    while end - size >= start and content[end - size : end - 4] == head:
        pings.append(int.from_bytes(content[end - 4 : end]))
        end -= size
    return pings, content[start:end]
