"""The threads of the vCPUs: run, at rest, or kept from running for a share of the time.

A vCPU runs while nobody holds it.  There are three who may: the pause, the throttle, and the end
of the guest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from vmferry.errors import MachineError, UsageError

from .cpu import Exit, Vcpu

_AGAIN: Final = 0.001
"""Seconds after which a vCPU that did not stop is kicked again."""

_PATIENCE: Final = 10.0
"""Seconds after which a vCPU is said not to stop at all."""

_SLICE: Final = 0.010
"""Seconds that a throttled vCPU runs at a time (CPU_THROTTLE_TIMESLICE_NS of QEMU 7.2)."""

_PAUSE, _THROTTLE, _END = "pause", "throttle", "end"


class Runner:
    """Runs *vcpus*; at first they are paused.

    *until_alarm* says for how many seconds a vCPU that halted or rests has to wait, ``None`` for
    ever.  *ended* is called when the machine cannot go on, with :attr:`failure` set; in the thread
    of a vCPU, and once.
    """

    def __init__(
        self,
        vcpus: Sequence[Vcpu],
        *,
        until_alarm: Callable[[int], float | None],
        ended: Callable[[], None],
    ) -> None:
        self._vcpus = vcpus
        self._until_alarm = until_alarm
        self._ended = ended
        self._changed = threading.Condition()
        self._holds = {_PAUSE}
        self._inside: set[int] = set()
        self._resting: set[int] = set()
        self._closing = False
        self._percent = 0
        self._throttle: threading.Thread | None = None
        self.failure: Exception | None = None
        self._threads = [
            threading.Thread(target=self._main, args=(index,), name=f"vcpu-{index}", daemon=True)
            for index in range(len(vcpus))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def threads(self) -> list[int]:
        """The kernel's ids of the threads."""
        return [thread.native_id or 0 for thread in self._threads]

    def pause(self) -> None:
        """Hold all vCPUs; when this returns, none runs.  Not for the thread of a vCPU.

        Raises :class:`MachineError` for one that does not stop within ten seconds.
        """
        deadline = time.monotonic() + _PATIENCE
        with self._changed:
            self._hold(_PAUSE)
            while self._inside:
                if time.monotonic() > deadline:
                    raise MachineError(f"vCPU {min(self._inside)} does not stop")
                self._changed.wait(_AGAIN)
                self._kick()

    def resume(self) -> None:
        """Let go of the vCPUs."""
        self._release(_PAUSE)

    def end(self) -> None:
        """Hold all vCPUs for good, from any thread; does not wait until they have stopped."""
        with self._changed:
            self._hold(_END)

    def rest(self, index: int) -> None:
        """Let a vCPU wait for its alarm, as if it had halted; called in its own thread."""
        self._resting.add(index)
        self._vcpus[index].kick()

    def throttle(self, percent: int) -> None:
        """Keep the vCPUs from running for *percent* of the time, 0 to 99."""
        if not 0 <= percent <= 99:
            raise UsageError(f"a throttle takes 0 to 99 percent, not {percent}")
        with self._changed:
            self._percent = percent
            self._changed.notify_all()
            if percent and self._throttle is None:
                self._throttle = threading.Thread(
                    target=self._throttling, name="throttle", daemon=True
                )
                self._throttle.start()

    def close(self) -> None:
        """Stop the vCPUs and end the threads; again is harmless."""
        self.pause()
        with self._changed:
            self._closing = True
            throttle = self._throttle
            self._changed.notify_all()
        for thread in (*self._threads, throttle):
            if thread is not None:
                thread.join()

    # Holds

    def _hold(self, who: str) -> None:
        self._holds.add(who)
        self._kick()
        self._changed.notify_all()

    def _kick(self) -> None:
        for index in self._inside:
            self._vcpus[index].kick()

    def _release(self, who: str) -> None:
        with self._changed:
            self._holds.discard(who)
            self._changed.notify_all()

    # The threads of the vCPUs

    def _main(self, index: int) -> None:
        vcpu = self._vcpus[index]
        while self._enter(index):
            try:
                reason = vcpu.run()
            except Exception as error:  # noqa: BLE001  (whoever waits for the machine raises it)
                self._fail(error)
                reason = Exit.KICKED
            self._leave(index)
            if reason is Exit.HALTED or index in self._resting:
                self._resting.discard(index)
                self._wait_alarm(index)

    def _enter(self, index: int) -> bool:
        """Wait until nobody holds the vCPU; false when it is to run no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not self._holds)
            if not self._closing:
                self._inside.add(index)
            return not self._closing

    def _leave(self, index: int) -> None:
        with self._changed:
            self._inside.discard(index)
            if self._holds:
                self._changed.notify_all()

    def _wait_alarm(self, index: int) -> None:
        """Wait for the alarm; where the vCPU is held meanwhile, it may run on without."""
        with self._changed:
            self._changed.wait_for(lambda: self._holds or self._closing, self._until_alarm(index))

    def _fail(self, error: Exception) -> None:
        with self._changed:
            first, self.failure = self.failure is None, self.failure or error
            self._hold(_END)
        if first:
            self._ended()

    # The thread of the throttle

    def _throttling(self) -> None:
        with self._changed:
            while self._percent and not self._closing:
                percent = self._percent
                began = time.monotonic()
                self._throttle_wait(percent, _SLICE)
                self._hold(_THROTTLE)
                # Longer than a slice, where vCPUs leave this thread no processor to wake up on.
                ran = time.monotonic() - began
                self._throttle_wait(percent, ran * percent / (100 - percent))
                self._holds.discard(_THROTTLE)
                self._changed.notify_all()
            self._throttle = None

    def _throttle_wait(self, percent: int, seconds: float) -> None:
        self._changed.wait_for(lambda: self._closing or self._percent != percent, seconds)
