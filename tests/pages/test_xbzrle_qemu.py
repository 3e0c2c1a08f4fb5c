"""The encoder beside QEMU's own, on pages of every kind."""

from __future__ import annotations

import ctypes
import os

import pytest
from hypothesis import given

from tests.pages.test_xbzrle import encoded, page_pairs
from tests.pages.twins import both
from tests.support.qemu_xbzrle import VARIABLE, qemu_xbzrle

pytestmark = pytest.mark.skipif(
    VARIABLE not in os.environ,
    reason=f"{VARIABLE} names no library of QEMU's xbzrle.c, and does not say fetch",
)


def by_qemu(old, new):
    area = ctypes.c_ubyte * len(new)
    before, after, out = area.from_buffer_copy(old), area.from_buffer_copy(new), area()
    size = qemu_xbzrle().xbzrle_encode_buffer(before, after, len(new), out, len(out))
    return None if size < 0 else bytes(out[:size])


@both
@given(page_pairs())
def test_same_pages_give_the_same_bytes(kernels, pair):
    assert encoded(kernels, *pair) == by_qemu(*pair)
