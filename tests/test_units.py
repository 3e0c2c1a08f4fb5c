"""Durations as people write them."""

from __future__ import annotations

import pytest

from vmferry.errors import UsageError
from vmferry.units import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300ms", 0.3),
        ("1.5s", 1.5),
        ("2 min", 120.0),
        (" 1h ", 3600.0),
        ("250us", 0.00025),
        ("0s", 0.0),
    ],
)
def test_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "300", "ms", "-1s", "1 s s", "1d", "1,5s", "1MS"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a duration such as 300ms"):
        parse_duration(text)
