"""What the kernels are called with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
Bytes = bytes | bytearray | memoryview
Room = bytearray | memoryview
"""Bytes that are written to."""
Memory = U8 | bytearray | memoryview
"""A RAM block as mapped."""
