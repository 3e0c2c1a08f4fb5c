"""Migration parameters as people write them."""

from __future__ import annotations

import pytest

from vmferry.errors import UsageError
from vmferry.qemu.parameters import read_parameters

CURRENT: dict[str, object] = {
    "max-bandwidth": 128 << 20,
    "xbzrle-cache-size": 64 << 20,
    "downtime-limit": 300,
    "multifd-channels": 2,
    "cpu-throttle-tailslow": False,
    "multifd-compression": "none",
    "tls-creds": "",
    "x-vmferry-idle-deadline": 60.0,
    "x-vmferry-downtime-step": 150,
}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max-bandwidth", "1GiB/s", 1 << 30),
        ("max-bandwidth", "100MB", 100_000_000),
        ("max-bandwidth", "0", 0),
        ("xbzrle-cache-size", "1GiB", 1 << 30),
        ("downtime-limit", "50", 50),
        ("downtime-limit", "50ms", 50),
        ("downtime-limit", "1.5s", 1500),
        ("multifd-channels", "4", 4),
        ("cpu-throttle-tailslow", "on", True),
        ("cpu-throttle-tailslow", "False", False),
        ("multifd-compression", "zstd", "zstd"),
        ("tls-creds", "1", "1"),
        ("x-vmferry-idle-deadline", "2", 2.0),
        ("x-vmferry-idle-deadline", "2min", 120.0),
        ("x-vmferry-downtime-step", "0.2s", 200),
    ],
)
def test_text_is_read_as_the_machine_has_it(name: str, text: str, value: object) -> None:
    read = read_parameters({name: text}, CURRENT)[name]
    assert (read, type(read)) == (value, type(value))


def test_what_is_no_text_stays_as_it_is() -> None:
    assert read_parameters({"downtime-limit": 7}, CURRENT) == {"downtime-limit": 7}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("max-bandwith", "1GiB", 'no migration parameter "max-bandwith"; did you mean max-bandw'),
        ("max-bandwidth", "lots", "parameter max-bandwidth: expected a size such as"),
        ("xbzrle-cache-size", "1GiB/s", "parameter xbzrle-cache-size: expected a size"),
        ("downtime-limit", "-1", "parameter downtime-limit: expected a duration such as 300ms"),
        ("multifd-channels", "2MiB", "parameter multifd-channels: expected a whole number"),
        ("multifd-channels", "²", "expected a whole number"),
        ("cpu-throttle-tailslow", "1", "expected on or off, found '1'"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_parameters({name: text}, CURRENT)
