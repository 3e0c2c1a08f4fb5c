"""Parameters have QEMU's names, defaults and ranges; a real QEMU is asked for them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import UsageError
from vmferry.migration.parameters import (
    NOT_SUPPORTED,
    Compression,
    Parameters,
    StallPolicy,
    changed,
)
from vmferry.qemu import QemuProcess, QmpError
from vmferry.wire.multifd import Method

OWN = {name for name in Parameters().to_qmp() if name.startswith("x-vmferry-")}
LATER = {"avail-switchover-bandwidth"}
"""What QEMU 7.2 does not have yet."""


def refusal(**changes: object) -> str:
    with pytest.raises(UsageError) as caught:
        changed(Parameters(), {name.replace("_", "-"): value for name, value in changes.items()})
    return str(caught.value)


def test_changes_are_by_qemus_names() -> None:
    now = changed(
        Parameters(),
        {
            "max-bandwidth": 0,
            "multifd-compression": "zstd",
            "cpu-throttle-tailslow": True,
            "x-vmferry-stall-policy": "give-up",
            "x-vmferry-idle-deadline": 5,
        },
    )
    assert now == dataclasses.replace(
        Parameters(),
        max_bandwidth=0,
        multifd_compression=Compression.ZSTD,
        cpu_throttle_tailslow=True,
        stall_policy=StallPolicy.GIVE_UP,
        idle_deadline=5.0,
    )
    assert now.multifd_compression.method is Method.ZSTD
    assert changed(now, {"max-bandwidth": 1}).stall_policy is StallPolicy.GIVE_UP


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("downtime_limit", 2000001, "downtime-limit is a whole number from 0 to 2000000 (millise"),
        ("multifd_channels", 0, "multifd-channels is a whole number from 1 to 255 (channels), not"),
        ("max_bandwidth", -1, "max-bandwidth is a whole number from 0 to 18446744073709551615 (by"),
        ("max_bandwidth", True, "(bytes per second), not True"),
        ("max_bandwidth", 1.0, "(bytes per second), not 1.0"),
        ("multifd_zlib_level", 10, "multifd-zlib-level is a whole number from 0 to 9, not 10"),
        ("multifd_zstd_level", 21, "multifd-zstd-level is a whole number from 0 to 20, not 21"),
        ("multifd_compression", "lz4", "multifd-compression is none or zlib or zstd, not 'lz4'"),
        ("multifd_compression", None, "none or zlib or zstd, not None"),
        ("multifd_compression", [], "none or zlib or zstd, not []"),
        ("xbzrle_cache_size", 6000, "xbzrle-cache-size is a power of two of bytes, 4096 (a page)"),
        ("xbzrle_cache_size", 2048, "power of two of bytes, 4096 (a page) or more, not 2048"),
        ("cpu_throttle_tailslow", 1, "cpu-throttle-tailslow is true or false, not 1"),
        (
            "max_cpu_throttle",
            19,
            "max-cpu-throttle is from cpu-throttle-initial, 20 percent, to 99",
        ),
        ("x_vmferry_stall_policy", "panic", "x-vmferry-stall-policy is keep-trying or raise-downt"),
        ("x_vmferry_stall_rounds", 0, "x-vmferry-stall-rounds is a whole number from 1 to 10000"),
        ("x_vmferry_idle_deadline", -1, "x-vmferry-idle-deadline is a number from 0 to 1000000"),
        ("x_vmferry_idle_deadline", float("inf"), "from 0 to 1000000 (seconds), not inf"),
        ("x_vmferry_idle_deadline", "5", "from 0 to 1000000 (seconds), not '5'"),
        ("downtime_limt", 5, 'no migration parameter "downtime-limt"; did you mean downtime-limit'),
        ("idle_deadline", 5, 'no migration parameter "idle-deadline"; did you mean x-vmferry-idle'),
        ("announce_rounds", 4, "announce-rounds is not supported by vmferry (yet): it stays 5, no"),
        ("tls_creds", "tls0", "tls-creds is not supported by vmferry (yet): it stays '', not 'tls"),
        ("block_incremental", 0, "block-incremental is true or false, not 0"),
    ],
)
def test_refusals_say_what_may_be(name: str, value: object, text: str) -> None:
    assert text in refusal(**{name: value})


def test_there_are_no_bad_parameters() -> None:
    with pytest.raises(UsageError, match="downtime-limit is a whole number from 0 to 2000000"):
        Parameters(downtime_limit=-1)
    assert isinstance(Parameters(idle_deadline=5).idle_deadline, float)


def test_refusals_are_short() -> None:
    assert len(refusal(multifd_compression="z" * 10_000)) < 120
    assert len(refusal(multifd_compression=[[1] * 1000] * 1000)) < 250


def test_all_or_nothing() -> None:
    before = Parameters()
    with pytest.raises(UsageError):
        changed(before, {"downtime-limit": 5, "max-bandwidth": -1})
    assert before == Parameters()


def test_pairs_are_judged_when_both_are_in() -> None:
    both = {"max-cpu-throttle": 70, "cpu-throttle-initial": 60}
    assert changed(Parameters(), both).max_cpu_throttle == 70
    low = changed(Parameters(), {"max-cpu-throttle": 50})
    with pytest.raises(UsageError, match="from cpu-throttle-initial, 60 percent, to 99, not 50"):
        changed(low, {"cpu-throttle-initial": 60})


def test_what_others_set_to_its_default_is_taken() -> None:
    assert changed(Parameters(), NOT_SUPPORTED) == Parameters()


@given(st.data())
def test_what_is_told_can_be_set(data: st.DataObject) -> None:
    """``to_qmp`` of anything, through JSON and back, is the same."""
    values = {
        "max-bandwidth": data.draw(st.integers(0, (1 << 64) - 1)),
        "downtime-limit": data.draw(st.integers(0, 2_000_000)),
        "multifd-compression": data.draw(st.sampled_from(["none", "zlib", "zstd"])),
        "xbzrle-cache-size": 1 << data.draw(st.integers(12, 63)),
        "x-vmferry-stall-policy": data.draw(st.sampled_from([str(one) for one in StallPolicy])),
        "x-vmferry-stall-seconds": data.draw(st.floats(0, 1e6)),
    }
    one = changed(Parameters(), values)
    told = json.loads(json.dumps(one.to_qmp()))
    assert values.items() <= told.items()
    assert changed(Parameters(), told) == one


# Against the real one


def of_qemu(vm: QemuProcess) -> dict[str, Any]:
    answer: dict[str, Any] = vm.execute("query-migrate-parameters")
    return answer


@pytest.mark.qemu
def test_names_and_defaults_are_those_of_qemu(start_qemu: Callable[..., QemuProcess]) -> None:
    ours = Parameters().to_qmp()
    theirs = of_qemu(start_qemu("-machine", "none"))
    assert ours.keys() - OWN - LATER == theirs.keys() - NOT_SUPPORTED.keys()
    for name, default in theirs.items():
        assert (ours | NOT_SUPPORTED)[name] == default, name


BOUNDS: Mapping[str, list[object]] = {
    "max-bandwidth": [0, 1, 10**15, 1 << 63, (1 << 64) - 1, 1 << 64, 1.5, 2.0, "1", True, None],
    "downtime-limit": [0, 2_000_000, 2_000_001, -1, 1.0, "5"],
    "multifd-channels": [0, 1, 255, 256, -1, 3.0, "3"],
    "multifd-compression": ["none", "zlib", "zstd", "lz4", "ZLIB", "", 1, None],
    "multifd-zlib-level": [0, 9, -1, 256, "1"],
    "multifd-zstd-level": [0, 20, -1, 256, None],
    "xbzrle-cache-size": [0, 1024, 4095, 4096, 4097, 6000, 3 << 20, 1 << 20, 1 << 63, -1],
    "throttle-trigger-threshold": [0, 1, 100, 101],
    "cpu-throttle-initial": [0, 1, 99, 100],
    "cpu-throttle-increment": [0, 1, 99, 100],
    "cpu-throttle-tailslow": [True, False, 1, 0, "on", None],
    "max-cpu-throttle": [0, 19, 20, 99, 100],
    "no-such-thing": [1],
}


@pytest.mark.qemu
def test_ranges_are_those_of_qemu(start_qemu: Callable[..., QemuProcess]) -> None:
    vm = start_qemu("-machine", "none")
    defaults = {name: of_qemu(vm).get(name) for name in BOUNDS if name != "no-such-thing"}
    for name, value in [(name, value) for name, values in BOUNDS.items() for value in values]:
        try:
            vm.execute("migrate-set-parameters", {name: value})
        except QmpError:
            with pytest.raises(UsageError):
                changed(Parameters(), {name: value})
            continue
        told = changed(Parameters(), {name: value}).to_qmp()
        if not name.endswith("-level"):  # which 7.2 takes and forgets
            assert told[name] == of_qemu(vm)[name] == value
        vm.execute("migrate-set-parameters", defaults)


@pytest.mark.qemu
def test_qemu_takes_everything_of_ours(start_qemu: Callable[..., QemuProcess]) -> None:
    """What is not vmferry's own can be handed on to a QEMU as it is."""
    vm = start_qemu("-machine", "none")
    ours = Parameters(downtime_limit=77, multifd_compression=Compression.ZLIB).to_qmp()
    vm.prepare_migration(parameters={n: v for n, v in ours.items() if n not in OWN | LATER})
    assert of_qemu(vm)["downtime-limit"] == 77
    assert of_qemu(vm)["multifd-compression"] == "zlib"
