"""The fixture of this directory: a lab for machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interop.lab import Lab
from vmferry.qemu import QemuProcess


@pytest.fixture
def lab(start_qemu: Callable[..., QemuProcess], tmp_path: Path) -> Iterator[Lab]:
    """Where a test runs its machines; nothing of it is left afterwards."""
    with Lab(start_qemu, tmp_path) as made:
        yield made
