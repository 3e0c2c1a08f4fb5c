# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""XBZRLE: what changed in a page, QEMU 7.2 ``migration/xbzrle.c``."""

from libc.limits cimport INT_MAX
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #ifdef __SSE2__
    #include <emmintrin.h>
    #else
    #include <endian.h>
    #endif

    /* Which of 64 bytes differ: bit i is byte i. */
    static inline uint64_t changed(const uint8_t *a, const uint8_t *b)
    {
        uint64_t found = 0;
    #ifdef __SSE2__
        for (int i = 0; i < 64; i += 16) {
            __m128i x = _mm_loadu_si128((const __m128i *)(a + i));
            __m128i y = _mm_loadu_si128((const __m128i *)(b + i));
            found |= (uint64_t)_mm_movemask_epi8(_mm_cmpeq_epi8(x, y)) << i;
        }
        return ~found;
    #else
        for (int i = 0; i < 64; i += 8) {
            uint64_t x, y;
            memcpy(&x, a + i, 8);
            memcpy(&y, b + i, 8);
            x = le64toh(x ^ y);
            if (x) {
                x |= x >> 4;
                x |= x >> 2;
                x |= x >> 1;
                x &= 0x0101010101010101ULL;
                found |= (x * 0x0102040810204080ULL >> 56) << i;
            }
        }
        return found;
    #endif
    }
    """
    uint64_t changed(const uint8_t *, const uint8_t *) nogil
    int __builtin_ctzll(unsigned long long) nogil

cdef enum:
    MAX_PAGE = 16384
    MAX_RUN = 16383  # its length takes two bytes, 14 bits
    MARKS = 257  # one for every 64 bytes, and one to end on


cdef inline void copy_run(uint8_t *target, const uint8_t *source, int size) noexcept nogil:
    """Short runs are the most, and cost more to call for than to copy."""
    cdef uint64_t a, b
    cdef uint32_t c, d
    cdef uint16_t e, f
    if size > 16:
        memcpy(target, source, size)
    elif size >= 8:
        memcpy(&a, source, 8)
        memcpy(&b, source + size - 8, 8)
        memcpy(target, &a, 8)
        memcpy(target + size - 8, &b, 8)
    elif size >= 4:
        memcpy(&c, source, 4)
        memcpy(&d, source + size - 4, 4)
        memcpy(target, &c, 4)
        memcpy(target + size - 4, &d, 4)
    elif size >= 2:
        memcpy(&e, source, 2)
        memcpy(&f, source + size - 2, 2)
        memcpy(target, &e, 2)
        memcpy(target + size - 2, &f, 2)
    else:
        target[0] = source[0]


cdef inline int put_length(uint8_t *out, int length) noexcept nogil:
    if length < 0x80:
        out[0] = length
        return 1
    out[0] = (length & 0x7f) | 0x80
    out[1] = length >> 7
    return 2


cdef int encode(
    const uint8_t *old, const uint8_t *new, int size, uint8_t *out, int room
) noexcept nogil:
    """The bytes written; 0 where nothing changed, -1 where they do not fit.

    *size* is a multiple of 64, at most ``MAX_PAGE``.
    """
    cdef uint64_t marks[MARKS]
    cdef uint64_t word, same
    cdef int i, words = size // 64, at = 0, start, end = 0, run
    for i in range(words):
        marks[i] = changed(old + 64 * i, new + 64 * i)
    marks[words] = 0
    i = 0
    word = marks[0]
    while end < size:
        if room - at < 2:
            return -1
        while word == 0:
            i += 1
            if i >= words:
                return at
            word = marks[i]
        start = 64 * i + __builtin_ctzll(word)
        same = ~(word | (word - 1))
        while same == 0:
            i += 1
            same = ~marks[i]
        at += put_length(out + at, start - end)
        end = 64 * i + __builtin_ctzll(same)
        word = marks[i] & (~<uint64_t>0 << (end & 63))
        run = end - start
        if room - at < 2 or run > MAX_RUN:
            return -1
        at += put_length(out + at, run)
        if run > room - at:
            return -1
        if run <= 16 and room - at >= 16 and size - start >= 16:
            memcpy(out + at, new + start, 16)
        else:
            memcpy(out + at, new + start, run)
        at += run
    return at


cdef inline int get_length(const uint8_t *p, int left, int *value) noexcept nogil:
    """Bytes taken by the number at *p*: 1 or 2; 0 where there is none."""
    if left < 1:
        return 0
    if p[0] < 0x80:
        value[0] = p[0]
        return 1
    if left < 2 or p[1] >= 0x80:
        return 0
    value[0] = (p[0] & 0x7f) | (<int>p[1] << 7)
    return 2


cdef int decode(const uint8_t *encoded, int size, uint8_t *page, int page_size) noexcept nogil:
    """Patch *page*; 0 where a rule is broken, with the page then half patched."""
    cdef int at = 0, position = 0, run = 0, taken
    while at < size:
        if size - at < 2:
            return 0
        taken = get_length(encoded + at, size - at, &run)
        if taken == 0 or (run == 0 and at != 0) or run > page_size - position:
            return 0
        at += taken
        position += run
        taken = get_length(encoded + at, size - at, &run)
        if taken == 0 or run == 0 or run > page_size - position:
            return 0
        at += taken
        if run > size - at:
            return 0
        copy_run(page + position, encoded + at, run)
        at += run
        position += run
    return 1


def xbzrle_encode(const uint8_t[::1] old, const uint8_t[::1] new, uint8_t[::1] out):
    cdef int size, room
    if new.shape[0] != old.shape[0] or new.shape[0] % 64 or not 0 < new.shape[0] <= MAX_PAGE:
        raise ValueError("xbzrle_encode: pages of two sizes, or no multiple of 64 up to 16384")
    size = new.shape[0]
    room = min(out.shape[0], size)
    with nogil:
        size = encode(&old[0], &new[0], size, &out[0], room)
    return size


def xbzrle_decode(const uint8_t[::1] encoded, uint8_t[::1] page):
    cdef int done
    if encoded.shape[0] > INT_MAX or page.shape[0] > INT_MAX:
        raise ValueError("xbzrle_decode: more than 2 GiB")
    with nogil:
        done = decode(&encoded[0], encoded.shape[0], &page[0], page.shape[0])
    return done != 0
