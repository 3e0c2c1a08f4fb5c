from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.support import KINDS, Kind, kind


@pytest.fixture(params=KINDS)
def any_kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    """An empty image of each kind."""
    with kind(request.param, tmp_path) as found:
        yield found
