"""Making ``KVM_RUN`` return: a signal that is blocked all the time but there.

A kick sets ``immediate_exit``, so that a vCPU that is not in ``KVM_RUN`` yet does not stay there,
and sends the signal to its thread, so that one that is in there leaves.  The thread keeps the
signal blocked and ``KVM_SET_SIGNAL_MASK`` opens it for the guest's time only.  A blocked signal
that arrives there ends ``KVM_RUN`` and then stays pending, until it is taken away.  So no handler
is ever called and none has to be installed: what the process does with the signal is its own
business, and Python's main thread does not notice.
"""

from __future__ import annotations

import fcntl
import signal
from typing import Final

from . import abi

SIGNAL: Final = signal.SIGRTMIN + 6
"""Sent to threads that run a vCPU, and to no others."""

_KICK: Final = {SIGNAL}


def prepare_thread(vcpu: int) -> None:
    """Block the signal in the calling thread, but for the time that it is in ``KVM_RUN``."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _KICK) - _KICK
    bits = sum(1 << number - 1 for number in mask)
    fcntl.ioctl(vcpu, abi.SET_SIGNAL_MASK, abi.SignalMask(8, bits))


def take_signal() -> None:
    """Take away the signal, if it is pending for the calling thread."""
    signal.sigtimedwait(_KICK, 0)


def send_signal(thread: int) -> None:
    """Send the signal to a thread, by its ``threading.get_ident()``."""
    signal.pthread_kill(thread, SIGNAL)
