# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Between the memory of a guest and wire buffers."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from .page cimport (
    CONTINUE,
    KINDS,
    PAGE,
    XBZRLE,
    ZERO,
    Row,
    is_page_size,
    is_sound,
    is_zero,
    store_be64,
)
from .store cimport MAX_RUN, iovec, write_all
from .xbzrle cimport decode


cdef uint64_t pages_of(const uint8_t[::1] memory, uint32_t page_size, const uint8_t[::1] known) except? 0:
    """How many pages *memory* has; *known* is empty, or has a byte for each."""
    cdef uint64_t count
    if not is_page_size(page_size):
        raise ValueError("page size: no power of two from 1024 on")
    count = memory.shape[0] // page_size
    if known.shape[0] != 0 and <uint64_t>known.shape[0] < count:
        raise ValueError("known: not one byte for each page")
    return count


def pack_pages(
    const uint8_t[::1] memory,
    const uint64_t[::1] pages,
    Py_ssize_t first,
    uint32_t page_size,
    const uint8_t[::1] name,
    bint named,
    uint8_t[::1] out,
    const uint8_t[::1] known=b"",
):
    cdef uint64_t page, word, total = pages_of(memory, page_size, known)
    cdef Py_ssize_t i = first, at = 0, zeros = 0, head, size, room = out.shape[0]
    cdef bint all_known = known.shape[0] == 0, zero, outside = False
    cdef const uint8_t *source
    if first < 0 or named and name.shape[0] == 0:
        raise ValueError("pack_pages: a page before the first, or a name without bytes")
    with nogil:
        while i < pages.shape[0]:
            page = pages[i]
            outside = page >= total
            if outside:
                break
            head = 8 + (name.shape[0] if named else 0)
            if room - at < head + 1:
                break
            source = &memory[page * page_size]
            zero = not (all_known or known[page]) or is_zero(source, page_size)
            size = 1 if zero else page_size
            if room - at < head + size:
                break
            word = page * page_size | (ZERO if zero else PAGE) | (0 if named else CONTINUE)
            store_be64(&out[at], word)
            if named:
                memcpy(&out[at + 8], &name[0], name.shape[0])
            at += head
            if zero:
                out[at] = 0
                zeros += 1
            else:
                memcpy(&out[at], source, page_size)
            at += size
            named = False
            i += 1
    if outside:
        raise ValueError("pack_pages: a page outside the memory")
    return i, at, zeros


def zero_pages(
    const uint8_t[::1] memory,
    const uint64_t[::1] pages,
    uint32_t page_size,
    uint8_t[::1] zero,
    const uint8_t[::1] known=b"",
):
    cdef uint64_t page, total = pages_of(memory, page_size, known)
    cdef Py_ssize_t i, count = 0
    cdef bint all_known = known.shape[0] == 0, outside = False
    if zero.shape[0] < pages.shape[0]:
        raise ValueError("zero_pages: the mask is too short")
    with nogil:
        for i in range(pages.shape[0]):
            page = pages[i]
            outside = page >= total
            if outside:
                break
            zero[i] = not (all_known or known[page]) or is_zero(&memory[page * page_size], page_size)
            count += zero[i]
    if outside:
        raise ValueError("zero_pages: a page outside the memory")
    return count


def gather_pages(
    const uint8_t[::1] memory, const uint64_t[::1] pages, uint32_t page_size, uint8_t[::1] out
):
    cdef uint64_t total = pages_of(memory, page_size, b"")
    cdef Py_ssize_t i
    cdef bint outside = False
    if out.shape[0] // page_size < pages.shape[0]:
        raise ValueError("gather_pages: more pages than out has room for")
    with nogil:
        for i in range(pages.shape[0]):
            outside = pages[i] >= total
            if outside:
                break
            memcpy(&out[i * page_size], &memory[pages[i] * page_size], page_size)
    if outside:
        raise ValueError("gather_pages: a page outside the memory")
    return pages.shape[0] * page_size


cdef struct Run:
    uint64_t first
    int count
    iovec parts[MAX_RUN]


cdef void write_run(int fd, Run *run, uint8_t *memory, uint32_t page_size) noexcept nogil:
    """Write pages that follow each other through the file, and empty the run.

    The file takes a page that it did not have as it comes; a mapping first clears one.
    """
    cdef int i, count = run.count
    cdef iovec parts[MAX_RUN]
    if count == 0:
        return
    run.count = 0
    memcpy(parts, run.parts, count * sizeof(iovec))
    if write_all(fd, parts, count, run.first * page_size) == 0:
        return
    for i in range(count):
        memcpy(memory + (run.first + i) * page_size, run.parts[i].iov_base, page_size)


def apply_records(
    uint8_t[::1] memory,
    const Row[::1] rows,
    Py_ssize_t first,
    const uint8_t[::1] data,
    uint32_t page_size,
    uint8_t[::1] known,
    int fd=-1,
):
    cdef uint64_t page, total = pages_of(memory, page_size, known)
    cdef Py_ssize_t i = first
    cdef uint32_t kind
    cdef uint8_t *target
    cdef const uint8_t *source
    cdef Run run
    run.count = 0
    if first < 0 or <uint64_t>known.shape[0] < total:
        raise ValueError("apply_records: a row before the first, or known not one byte for each page")
    with nogil:
        while i < rows.shape[0]:
            page = rows[i].word // page_size
            if page >= total or not is_sound(&rows[i], data.shape[0], page_size):
                break
            kind = rows[i].word & KINDS
            target = &memory[page * page_size]
            source = &data[rows[i].position] if kind != ZERO and rows[i].length else NULL
            if fd >= 0 and kind == PAGE and not known[page] and not is_zero(source, page_size):
                known[page] = 1
                if run.count in (0, MAX_RUN) or page != run.first + run.count:
                    write_run(fd, &run, &memory[0], page_size)
                    run.first = page
                run.parts[run.count].iov_base = <void *>source
                run.parts[run.count].iov_len = page_size
                run.count += 1
                i += 1
                continue
            write_run(fd, &run, &memory[0], page_size)
            if kind == XBZRLE:
                known[page] = 1
                if not decode(source, rows[i].length, target, page_size):
                    break
            elif kind == PAGE and (known[page] or not is_zero(source, page_size)):
                known[page] = 1
                memcpy(target, source, page_size)
            elif kind == ZERO:
                if known[page] and not is_zero(target, page_size):
                    memset(target, 0, page_size)
            elif kind != PAGE:
                break
            i += 1
        if run.count:
            write_run(fd, &run, &memory[0], page_size)
    return i
