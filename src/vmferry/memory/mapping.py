"""A mapping of a memfd that begins where a huge page may begin.

Memory comes in huge pages only where addresses and places in the file agree modulo their size
(``mmap(2)`` chooses any page), so room for one more is reserved and the file put inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from .holes import REGION

_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_COLLAPSE: Final = 25
"""``MADV_COLLAPSE``, Linux 6.1."""

# Unlike mmap.madvise, which holds the interpreter lock while the kernel clears memory.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapping:
    """*size* bytes of the file *fd*, mapped shared at ``address``.

    Raises :class:`OSError` where the host refuses.  Views that somebody holds stay valid when the
    mapping is closed; the memory goes with the last one.
    """

    def __init__(self, fd: int, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._reserved = mmap.mmap(-1, size + REGION, flags)
        whole: npt.NDArray[np.uint8] = np.frombuffer(self._reserved, np.uint8)
        start = -whole.ctypes.data % REGION
        self.view = memoryview(self._reserved)[start : start + size]
        self.array: npt.NDArray[np.uint8] = whole[start : start + size]
        self.address: Final = self.array.ctypes.data
        access, how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(self.address, size, access, how, fd, 0) != self.address:
            raise _error()
        self._fd = fd
        self._size = size

    def advise(self, advice: int, start: int = 0, size: int | None = None) -> None:
        """``madvise(2)`` for all of it, or *size* bytes from *start* on, as long as it is there."""
        if self._reserved.closed:
            return
        if _libc.madvise(self.address + start, self._size if size is None else size, advice):
            raise _error()

    def collapse(self, region: int) -> None:
        """Have a region, by its number, in one huge page, with what memory it has already.

        One such page takes the kernel a fifth of the time of 512 small ones.  Unlike an ordinary
        one it needs no ``shmem_enabled``.  Raises :class:`OSError` where the kernel has no such
        call or no such page.
        """
        # The kernel leaves alone what has no memory at all.
        os.posix_fallocate(self._fd, region * REGION, mmap.PAGESIZE)
        if _libc.madvise(self.address + region * REGION, REGION, _COLLAPSE):
            raise _error()

    def close(self) -> None:
        """Give up this view of the file."""
        self.view.release()
        self.array = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # the last view does it
            self._reserved.close()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
