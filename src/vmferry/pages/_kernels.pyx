# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Kernels over batches of pages, without the interpreter lock.

Every function has a twin of the same name in ``_plain.py``, which is its specification; the tests
feed both the same input.  Record layout: QEMU 7.2 ``migration/ram.c``.  Page sums are XXH64.
"""

from libc.errno cimport EINTR, EIO, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t)
    uint64_t htobe64(uint64_t)
    uint64_t le64toh(uint64_t)
    uint32_t be32toh(uint32_t)
    uint32_t htobe32(uint32_t)
    uint16_t be16toh(uint16_t)
    uint16_t htobe16(uint16_t)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev(int, const iovec *, int, long)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int, void *, size_t, long)
    ssize_t pwrite(int, const void *, size_t, long)

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <linux/falloc.h>
    extern int fallocate(int, int, off_t, off_t);
    static int punch(int fd, long offset, long length)
    {
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    }
    """
    int punch(int, long, long) nogil

cdef struct Row:
    uint64_t word
    uint64_t position
    uint32_t length
    uint32_t unused

cdef enum:
    ZERO = 0x002
    PAGE = 0x008
    CONTINUE = 0x020
    XBZRLE = 0x040
    COMPRESS = 0x100
    KINDS = 0x14a
    MAX_PAGE = 65536
    MAX_RUN = 512  # pages in one gathered write


cdef inline uint64_t load_be64(const uint8_t *p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return be64toh(v)


cdef inline uint32_t load_be32(const uint8_t *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return be32toh(v)


cdef inline uint16_t load_be16(const uint8_t *p) noexcept nogil:
    cdef uint16_t v
    memcpy(&v, p, 2)
    return be16toh(v)


cdef inline bint is_zero(const uint8_t *p, size_t size) noexcept nogil:
    cdef uint64_t head
    memcpy(&head, p, 8)
    return head == 0 and memcmp(p, p + 8, size - 8) == 0


cdef inline uint64_t rotl(uint64_t v, int n) noexcept nogil:
    return (v << n) | (v >> (64 - n))


cdef uint64_t P1 = 0x9E3779B185EBCA87ULL
cdef uint64_t P2 = 0xC2B2AE3D27D4EB4FULL
cdef uint64_t P3 = 0x165667B19E3779F9ULL
cdef uint64_t P4 = 0x85EBCA77C2B2AE63ULL


cdef uint64_t xxh64(const uint8_t *p, size_t size) noexcept nogil:
    """XXH64 with seed 0 of *size* bytes, a multiple of 32."""
    cdef uint64_t v1 = P1 + P2, v2 = P2, v3 = 0, v4 = 0 - P1
    cdef uint64_t a, b, c, d, h
    cdef size_t at = 0
    while at < size:
        memcpy(&a, p + at, 8)
        memcpy(&b, p + at + 8, 8)
        memcpy(&c, p + at + 16, 8)
        memcpy(&d, p + at + 24, 8)
        v1 = rotl(v1 + le64toh(a) * P2, 31) * P1
        v2 = rotl(v2 + le64toh(b) * P2, 31) * P1
        v3 = rotl(v3 + le64toh(c) * P2, 31) * P1
        v4 = rotl(v4 + le64toh(d) * P2, 31) * P1
        at += 32
    h = rotl(v1, 1) + rotl(v2, 7) + rotl(v3, 12) + rotl(v4, 18)
    h = (h ^ (rotl(v1 * P2, 31) * P1)) * P1 + P4
    h = (h ^ (rotl(v2 * P2, 31) * P1)) * P1 + P4
    h = (h ^ (rotl(v3 * P2, 31) * P1)) * P1 + P4
    h = (h ^ (rotl(v4 * P2, 31) * P1)) * P1 + P4
    h += size
    h ^= h >> 33
    h *= P2
    h ^= h >> 29
    h *= P3
    return h ^ (h >> 32)


cdef inline uint64_t page_sum(const uint8_t *p, size_t size) noexcept nogil:
    cdef uint64_t value
    if is_zero(p, size):
        return 0
    value = xxh64(p, size)
    return value if value != 0 else 1


def page_sums(const uint8_t[::1] data, Py_ssize_t page_size, uint64_t[::1] sums):
    cdef Py_ssize_t i, count
    if page_size < 32 or page_size % 32:
        raise ValueError("page_sums: page size not a multiple of 32")
    count = data.shape[0] // page_size
    if sums.shape[0] < count:
        raise ValueError("page_sums: sums too short")
    with nogil:
        for i in range(count):
            sums[i] = page_sum(&data[i * page_size], page_size)


cdef inline uint32_t compress_bound(uint32_t page_size) noexcept nogil:
    return page_size + (page_size >> 12) + (page_size >> 14) + 13


cdef bint is_sound(const Row *row, uint64_t total, uint32_t page_size) noexcept nogil:
    """Whether the row is a page record, with a payload of a right length within *total* bytes."""
    cdef uint32_t kind = row.word & (page_size - 1) & ~<uint64_t>CONTINUE
    if kind == ZERO:
        return row.length == 1
    if kind == PAGE:
        if row.length != page_size:
            return False
    elif kind == XBZRLE:
        if row.length > page_size or row.length > 0xffff:
            return False
    elif kind != COMPRESS or row.length > compress_bound(page_size):
        return False
    return row.position <= total and row.length <= total - row.position


def scan_records(
    const uint8_t[::1] data,
    Py_ssize_t start,
    Py_ssize_t stop,
    uint32_t page_size,
    uint64_t block_size,
    const uint8_t[::1] name,
    Row[::1] rows,
):
    cdef Py_ssize_t at = start, p, count = 0, capacity = rows.shape[0]
    cdef Py_ssize_t name_size = name.shape[0]
    cdef uint64_t word, mask = page_size - 1
    cdef uint32_t flags, length, bound = compress_bound(page_size)
    cdef const uint8_t *base
    if start < 0 or stop > data.shape[0] or start >= stop or capacity == 0 or name_size == 0:
        return start, 0
    base = &data[0]
    with nogil:
        while count < capacity and stop - at >= 9:
            word = load_be64(base + at)
            flags = word & mask
            if block_size < page_size or (word & ~mask) > block_size - page_size:
                break
            p = at + 8
            if not flags & CONTINUE:
                if stop - p < name_size or memcmp(base + p, &name[0], name_size) != 0:
                    break
                p += name_size
            flags &= ~<uint32_t>CONTINUE
            if flags == PAGE:
                length = page_size
            elif flags == ZERO:
                if stop - p < 1 or base[p] != 0:
                    break
                length = 1
            elif flags == XBZRLE:
                if stop - p < 3 or base[p] != 1:
                    break
                length = load_be16(base + p + 1)
                if length > page_size:
                    break
                p += 3
            elif flags == COMPRESS:
                if stop - p < 4:
                    break
                length = load_be32(base + p)
                if length > bound:
                    break
                p += 4
            else:
                break
            if stop - p < length:
                break
            rows[count].word = word
            rows[count].position = p
            rows[count].length = length
            rows[count].unused = 0
            count += 1
            at = p + length
    return at, count


def pack_records(
    const Row[::1] rows,
    Py_ssize_t first,
    const uint8_t[::1] data,
    uint32_t page_size,
    const uint8_t[::1] name,
    uint8_t[::1] out,
):
    cdef Py_ssize_t i = first, at = 0, size, room = out.shape[0], name_size = name.shape[0]
    cdef uint64_t word, raw
    cdef uint32_t flags, length
    cdef uint32_t raw32
    cdef uint16_t raw16
    cdef bint sound = True
    if rows.shape[0] <= first:
        return first, 0
    with nogil:
        while i < rows.shape[0]:
            sound = is_sound(&rows[i], data.shape[0], page_size)
            if not sound:
                break
            word = rows[i].word
            length = rows[i].length
            flags = word & KINDS
            size = 8 + (0 if word & CONTINUE else name_size) + length
            if flags == XBZRLE:
                size += 3
            elif flags == COMPRESS:
                size += 4
            if room - at < size:
                break
            raw = htobe64(word)
            memcpy(&out[at], &raw, 8)
            at += 8
            if not word & CONTINUE:
                memcpy(&out[at], &name[0], name_size)
                at += name_size
            if flags == ZERO:
                memset(&out[at], 0, length)
            else:
                if flags == XBZRLE:
                    out[at] = 1
                    raw16 = htobe16(<uint16_t>length)
                    memcpy(&out[at + 1], &raw16, 2)
                    at += 3
                elif flags == COMPRESS:
                    raw32 = htobe32(length)
                    memcpy(&out[at], &raw32, 4)
                    at += 4
                if length:
                    memcpy(&out[at], &data[rows[i].position], length)
            at += length
            i += 1
    if not sound:
        raise ValueError("pack_records: a row is no page record, or points outside the data")
    return i, at


cdef int uleb(const uint8_t *p, Py_ssize_t left, uint32_t *value) noexcept nogil:
    """Bytes taken by the number at *p*: 1 or 2; 0 where there is none."""
    if left < 1:
        return 0
    if p[0] < 0x80:
        value[0] = p[0]
        return 1
    if left < 2 or p[1] >= 0x80:
        return 0
    value[0] = (p[0] & 0x7f) | (<uint32_t>p[1] << 7)
    return 2


cdef bint apply_xbzrle(const uint8_t *p, Py_ssize_t size, uint8_t *page, uint32_t page_size) noexcept nogil:
    cdef Py_ssize_t at = 0
    cdef uint32_t position = 0, run = 0
    cdef int taken
    while at < size:
        if size - at < 2:
            return False
        taken = uleb(p + at, size - at, &run)
        if taken == 0 or (run == 0 and at != 0) or run > page_size - position:
            return False
        at += taken
        position += run
        taken = uleb(p + at, size - at, &run)
        if taken == 0 or run == 0 or run > page_size - position:
            return False
        at += taken
        if run > size - at:
            return False
        memcpy(page + position, p + at, run)
        at += run
        position += run
    return True


def xbzrle_decode(const uint8_t[::1] encoded, uint8_t[::1] page):
    cdef bint done = True
    cdef Py_ssize_t size = encoded.shape[0]
    if size and page.shape[0]:
        with nogil:
            done = apply_xbzrle(&encoded[0], size, &page[0], page.shape[0])
    return done or size == 0


cdef int write_all(int fd, iovec *parts, int count, long offset) noexcept nogil:
    """Write every part at *offset*; 0 or the errno."""
    cdef ssize_t done
    cdef int first = 0
    while first < count:
        done = pwritev(fd, parts + first, count - first, offset)
        if done < 0:
            if errno == EINTR:
                continue
            return errno
        if done == 0:
            return EIO
        offset += done
        while first < count and <size_t>done >= parts[first].iov_len:
            done -= parts[first].iov_len
            first += 1
        if first < count:
            parts[first].iov_base = <char *>parts[first].iov_base + done
            parts[first].iov_len -= done
    return 0


cdef int read_page(int fd, uint8_t *page, uint32_t page_size, long offset) noexcept nogil:
    cdef ssize_t got
    cdef uint32_t have = 0
    while have < page_size:
        got = pread(fd, page + have, page_size - have, offset + have)
        if got < 0:
            if errno == EINTR:
                continue
            return errno
        if got == 0:
            return EIO
        have += got
    return 0


cdef int clear_page(int fd, uint32_t page_size, uint64_t offset) noexcept nogil:
    cdef uint8_t zeros[MAX_PAGE]
    cdef uint32_t done = 0
    cdef iovec part
    cdef int error
    if punch(fd, offset, page_size) == 0:
        return 0
    if errno != EOPNOTSUPP:
        return errno
    memset(zeros, 0, MAX_PAGE)
    while done < page_size:
        part.iov_base = zeros
        part.iov_len = page_size - done if page_size - done < MAX_PAGE else MAX_PAGE
        done += part.iov_len
        error = write_all(fd, &part, 1, offset + done - part.iov_len)
        if error:
            return error
    return 0


cdef int store_delta(
    int fd, const uint8_t *encoded, uint32_t length, uint32_t page_size, uint64_t offset, uint64_t *sum
) noexcept nogil:
    """Patch the page at *offset*, whose sum is in *sum*; 0, the errno, or -1 for a broken encoding."""
    cdef uint8_t page[MAX_PAGE]
    cdef iovec part
    cdef uint64_t before = sum[0]
    cdef int error
    if page_size > MAX_PAGE:
        return -1
    error = read_page(fd, page, page_size, offset)
    if error:
        return error
    if not apply_xbzrle(encoded, length, page, page_size):
        return -1
    sum[0] = page_sum(page, page_size)
    if sum[0] == 0:
        return clear_page(fd, page_size, offset) if before != 0 else 0
    part.iov_base = page
    part.iov_len = page_size
    return write_all(fd, &part, 1, offset)


def store_records(
    int fd,
    const Row[::1] rows,
    Py_ssize_t first,
    const uint8_t[::1] data,
    uint32_t page_size,
    uint64_t[::1] sums,
):
    cdef Py_ssize_t i = first, run_start, count = rows.shape[0]
    cdef uint64_t offset, index, value, run_offset, mask = page_size - 1
    cdef uint64_t pages = sums.shape[0]
    cdef uint32_t flags
    cdef int error = 0, parts
    cdef iovec run[MAX_RUN]
    cdef const uint8_t *source
    if page_size < 32 or page_size % 32:
        raise ValueError("store_records: page size not a multiple of 32")
    with nogil:
        parts = 0
        run_start = first
        run_offset = 0
        while i < count:
            offset = rows[i].word & ~mask
            index = offset // page_size
            flags = rows[i].word & KINDS
            if index >= pages or not is_sound(&rows[i], data.shape[0], page_size):
                break
            if flags == PAGE:
                source = &data[rows[i].position]
                value = page_sum(source, page_size)
            else:
                source = NULL
                value = 0
            if parts and (
                flags != PAGE
                or value == 0
                or parts == MAX_RUN
                or offset != run_offset + <uint64_t>parts * page_size
            ):
                error = write_all(fd, run, parts, run_offset)
                parts = 0
                if error:
                    i = run_start
                    break
            if flags == PAGE and value != 0:
                if parts == 0:
                    run_offset = offset
                    run_start = i
                run[parts].iov_base = <void *>source
                run[parts].iov_len = page_size
                parts += 1
            elif flags == PAGE or flags == ZERO:
                if sums[index] != 0:
                    error = clear_page(fd, page_size, offset)
                    if error:
                        break
            elif flags == XBZRLE:
                source = &data[rows[i].position] if rows[i].length else NULL
                value = sums[index]
                error = store_delta(fd, source, rows[i].length, page_size, offset, &value)
                if error:
                    break
            else:
                break
            sums[index] = value
            i += 1
        if parts and not error:
            error = write_all(fd, run, parts, run_offset)
            if error:
                i = run_start
    return i, max(error, 0)
