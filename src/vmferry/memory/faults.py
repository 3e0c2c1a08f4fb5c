"""Faults on missing pages, handled in user space: ``userfaultfd(2)`` in missing mode.

A thread that touches a page which has no memory sleeps in the kernel until somebody has placed it.
Who does that need not be of the same process: the descriptor works on the memory of the process
that opened it, wherever it is used.

Memory is mapped more than once (:attr:`.MemoryBlock.addresses`).  A page that was placed through
one mapping is there in all of them, but only those who wait at that one are woken.

The descriptor may be had without privilege for faults of user space alone
(``UFFD_USER_MODE_ONLY``).  That is not enough where the kernel touches guest memory: for a virtual
CPU of KVM, or reading a disk into it.  For those it takes ``/dev/userfaultfd`` (Linux 6.1),
``CAP_SYS_PTRACE``, or ``vm.unprivileged_userfaultfd=1``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from .holes import PAGE_SIZE

# linux/userfaultfd.h
_API: Final = 0xAA
_SHMEM: Final = 1 << 5
"""``UFFD_FEATURE_MISSING_SHMEM``, Linux 4.11."""
_THREADS: Final = 1 << 8
"""``UFFD_FEATURE_THREAD_ID``, Linux 4.14."""
USER_MODE_ONLY: Final = 1
"""``UFFD_USER_MODE_ONLY``: faults of user space alone, which takes no privilege."""
_MISSING: Final = 1
_NEW: Final = 0xAA00
_HELLO: Final = 0xC018AA3F
_REGISTER: Final = 0xC020AA00
_UNREGISTER: Final = 0x8010AA01
_WAKE: Final = 0x8010AA02
_COPY: Final = 0xC028AA03
_ZEROPAGE: Final = 0xC020AA04
_PAGEFAULT: Final = 0x12
_MESSAGE: Final = struct.Struct("=B7xQQI4x")
_SYSTEM_CALL: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}

_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK

_AT_ONCE: Final = 64
"""Faults that are read in one go."""


def open_faults(*, kernel: bool, threads: bool = False) -> int:
    """A descriptor for faults on the memory of this process; *kernel* for those of the kernel too.

    With *threads* a fault says whose it is.  Raises :class:`OSError` where this host does not give
    one.
    """
    return greeted(_open(kernel=kernel), _SHMEM | (_THREADS if threads else 0))


def greeted(descriptor: int, features: int) -> int:
    """*descriptor*, with these features; closed where the kernel has not all of them."""
    try:
        fcntl.ioctl(descriptor, _HELLO, bytearray(struct.pack("3Q", _API, features, 0)))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def missing(*, kernel: bool, threads: bool = False) -> str | None:
    """What this host or this process lacks for :func:`open_faults`; ``None`` if it works."""
    try:
        os.close(open_faults(kernel=kernel, threads=threads))
    except OSError as error:
        if threads and missing(kernel=kernel) is None:
            return f"userfaultfd that says which thread waits: {error.strerror}; Linux 4.14 has it"
        needs = "Linux 4.11 has it, and a filter for system calls may forbid it"
        if kernel:
            needs = (
                "it takes read access to /dev/userfaultfd, the capability CAP_SYS_PTRACE, or the"
                " setting vm.unprivileged_userfaultfd=1"
            )
        return f"userfaultfd for missing pages: {error.strerror}; {needs}"
    return None


def _open(*, kernel: bool) -> int:
    with suppress(OSError):
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(device, _NEW, _FLAGS)
        finally:
            os.close(device)
    try:
        return userfaultfd(0)
    except PermissionError:
        if kernel:
            raise
    return userfaultfd(USER_MODE_ONLY)


def userfaultfd(flags: int) -> int:
    """The system call; its descriptor is not inherited, and reading it never waits."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYSTEM_CALL.get(os.uname().machine, -1)
    descriptor: int = libc.syscall(number, flags | _FLAGS)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def register(descriptor: int, address: int, size: int) -> None:
    """Have *size* bytes of a mapping at *address* fault on pages that have no memory."""
    _ioctl(descriptor, _REGISTER, address, size, _MISSING, 0)


def unregister(descriptor: int, address: int, size: int) -> None:
    """No more; whoever waits there is woken, and what is missing is zero from now on."""
    _ioctl(descriptor, _UNREGISTER, address, size)


def wake(descriptor: int, address: int, size: int = PAGE_SIZE) -> None:
    """Wake whoever waits there; who finds the page missing still, faults again."""
    _ioctl(descriptor, _WAKE, address, size)


def place(descriptor: int, address: int, source: int, size: int) -> None:
    """Put whole pages at *address*, with the content at *source* of the process that calls.

    Each is there at once or not at all.  A page that has memory already stays as it is.
    """
    done = 0
    while done < size:
        request = bytearray(struct.pack("4Qq", address + done, source + done, size - done, 0, 0))
        try:
            fcntl.ioctl(descriptor, _COPY, request)
        except OSError as error:
            done += _progress(error, request)
        else:
            return


def place_zeros(descriptor: int, address: int) -> bool:
    """Put a page of zeros at *address*; false where the page has memory already."""
    request = bytearray(struct.pack("3Qq", address, PAGE_SIZE, 0, 0))
    while True:
        try:
            fcntl.ioctl(descriptor, _ZEROPAGE, request)
        except OSError as error:
            if error.errno == errno.EEXIST:
                return False
            _progress(error, request)
        else:
            return True


def _progress(error: OSError, request: bytearray) -> int:
    """How many bytes to go on: what was placed, or the page that is there already."""
    done: int = struct.unpack_from("q", request, len(request) - 8)[0]
    if done > 0:
        return done
    if error.errno == errno.EEXIST:
        return PAGE_SIZE
    if error.errno == errno.EAGAIN:
        return 0
    raise error


def read_faults(descriptor: int) -> Iterator[tuple[int, int]]:
    """The faults that wait: the page's address, and the thread, 0 where it is unknown."""
    try:
        data = os.read(descriptor, _AT_ONCE * _MESSAGE.size)
    except BlockingIOError:
        return
    for event, _flags, address, thread in _MESSAGE.iter_unpack(data):
        if event == _PAGEFAULT:
            yield address & -PAGE_SIZE, thread


def _ioctl(descriptor: int, request: int, *words: int) -> None:
    fcntl.ioctl(descriptor, request, bytearray(struct.pack(f"{len(words)}Q", *words)))
