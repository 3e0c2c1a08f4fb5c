"""Capabilities are taken and refused as QEMU does it, but for those that vmferry does not have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import UsageError
from vmferry.migration.capabilities import NOT_SUPPORTED, Capability, checked, to_qmp
from vmferry.qemu import QemuProcess, QmpError

PARTICULAR = (Capability.COMPRESS, Capability.POSTCOPY_RAM, Capability.POSTCOPY_PREEMPT)
"""Those that cannot be on with any others, or without."""

NOTHING: frozenset[Capability] = frozenset()


def refusal(changes: Mapping[str, object], *, incoming: bool = True) -> str:
    with pytest.raises(UsageError) as caught:
        checked(NOTHING, changes, incoming=incoming)  # type: ignore[arg-type]
    return str(caught.value)


def test_on_and_off() -> None:
    on = checked(NOTHING, {"xbzrle": True, "events": True}, incoming=False)
    assert on == {Capability.XBZRLE, Capability.EVENTS}
    assert checked(on, {"xbzrle": False, "multifd": True}, incoming=False) == {
        Capability.EVENTS,
        Capability.MULTIFD,
    }
    assert checked(on, {}, incoming=False) == on


@given(
    st.dictionaries(st.sampled_from(Capability), st.booleans()),
    st.dictionaries(st.sampled_from(Capability), st.booleans()),
)
def test_one_call_or_two_are_the_same(
    first: dict[Capability, bool], second: dict[Capability, bool]
) -> None:
    for changes in (first, second):
        for name in PARTICULAR:
            changes.pop(name, None)
    then = checked(checked(NOTHING, first, incoming=True), second, incoming=True)
    assert then == checked(NOTHING, first | second, incoming=True)


def test_compress_is_for_destinations() -> None:
    assert checked(NOTHING, {"compress": True}, incoming=True) == {Capability.COMPRESS}
    assert "compress is accepted by a destination only" in refusal(
        {"compress": True}, incoming=False
    )
    # Left on by a machine that came here, and wants to go on from here.
    with pytest.raises(UsageError, match="by a destination only"):
        checked(frozenset({Capability.COMPRESS}), {"xbzrle": True}, incoming=False)


def test_what_postcopy_goes_with() -> None:
    on = {"postcopy-ram": True}
    assert checked(NOTHING, on, incoming=True) == {Capability.POSTCOPY_RAM}
    assert checked(NOTHING, on, incoming=False) == {Capability.POSTCOPY_RAM}
    assert refusal({"postcopy-preempt": True}).startswith("postcopy-preempt needs postcopy-ram")
    assert "cannot be on with x-ignore-shared" in refusal(on | {"x-ignore-shared": True})
    both = on | {"postcopy-preempt": True, "compress": True}
    assert "cannot be on with compress" in refusal(both)


def test_combinations_are_judged_whole() -> None:
    assert refusal({"multifd": True, "compress": True}).startswith(
        "compress cannot be on with multifd"
    )
    compress = frozenset({Capability.COMPRESS})
    with pytest.raises(UsageError, match="compress cannot be on with multifd"):
        checked(compress, {"multifd": True}, incoming=True)
    changes = {"multifd": True, "compress": False}
    assert checked(compress, changes, incoming=True) == {Capability.MULTIFD}


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_qemu_has_besides_can_only_be_off(name: str) -> None:
    assert refusal({name: True}) == f"capability {name} is not supported by vmferry (yet)"
    assert checked(NOTHING, {name: False}, incoming=False) == NOTHING


@pytest.mark.parametrize("state", [True, False])
def test_unknown_names_are_refused_with_a_near_one(state: bool) -> None:
    assert refusal({"xbzlre": state}) == (
        'there is no migration capability "xbzlre"; did you mean xbzrle?'
    )
    assert refusal({"auto_converge": state}).endswith("did you mean auto-converge?")
    assert refusal({"flying\x1b": state}) == 'there is no migration capability "flying\\x1b"'


@pytest.mark.parametrize("state", [1, 0, "on", None])
def test_states_are_booleans(state: object) -> None:
    assert refusal({"events": state}) == f"capability events is true or false, not {state!r}"


# Against the real one


def qemu_says(vm: QemuProcess, changes: Mapping[str, object]) -> bool:
    """Whether QEMU takes these, from nothing on; everything is off again afterwards."""
    states = [{"capability": name, "state": state} for name, state in changes.items()]
    try:
        vm.execute("migrate-set-capabilities", {"capabilities": states})
    except QmpError:
        return False
    off = [{"capability": name, "state": False} for name in changes]
    vm.execute("migrate-set-capabilities", {"capabilities": off})
    return True


def vmferry_says(changes: Mapping[str, object]) -> bool:
    try:
        checked(NOTHING, changes, incoming=True)  # type: ignore[arg-type]
    except UsageError:
        return False
    return True


@pytest.mark.qemu
def test_names_are_those_of_qemu(start_qemu: Callable[..., QemuProcess]) -> None:
    vm = start_qemu("-machine", "none")
    answer = vm.execute("query-migrate-capabilities")
    assert {one["capability"] for one in answer} == {*Capability, *NOT_SUPPORTED}
    assert [one for one in answer if one["capability"] not in NOT_SUPPORTED] == to_qmp(NOTHING)
    vm.prepare_migration(["events", "multifd"])
    on = checked(NOTHING, {"events": True, "multifd": True}, incoming=False)
    answer = vm.execute("query-migrate-capabilities")
    assert [one for one in answer if one["capability"] not in NOT_SUPPORTED] == to_qmp(on)


@pytest.mark.qemu
def test_combinations_are_those_of_qemu(start_qemu: Callable[..., QemuProcess]) -> None:
    vm = start_qemu("-machine", "none", "-incoming", "defer")
    # What does not go together are two or three.
    for count in range(5):
        for names in itertools.combinations(Capability, count):
            changes = dict.fromkeys(names, True)
            assert qemu_says(vm, changes) == vmferry_says(changes), names


@pytest.mark.qemu
def test_bad_values_are_refused_as_by_qemu(start_qemu: Callable[..., QemuProcess]) -> None:
    vm = start_qemu("-machine", "none", "-incoming", "defer")
    for changes in ({"events": 1}, {"events": None}, {"events": "on"}, {"xbzlre": True}):
        assert not qemu_says(vm, changes)
        assert not vmferry_says(changes)
