"""The network, or the store, breaks at each step of a switchover: the record decides."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.proxy import Break, Proxy
from tests.migration.runs_of_vmferry import LONG, Process
from tests.ownership.etcd import Etcd
from tests.ownership.pairs import Pair, runs, the_one_that_runs
from tests.support.ports import free_port
from tests.transports.support import wait_until

SOURCE = {
    "stopped": "source",
    "offer-landed": "source",
    "devices-sent": "source",
    "ready-heard": "",
    "grant-landed": "",
}
DESTINATION = {
    "loaded": "source",
    "ready-said": "",
    "take-landed": "destination",
    "start-landed": "destination",
    "shut-said": "destination",
}
"""At which point of one side, and who runs the machine afterwards, where that is certain."""


def is_settled(source: Process) -> bool:
    return source.status() in {"completed", "failed"} and "x-vmferry-doubt" not in source.query()


@pytest.mark.parametrize("how", Break)
@pytest.mark.parametrize("point", [*SOURCE, *DESTINATION])
def test_broken_network_leaves_one_owner(
    tmp_path: Path, pairs: ExitStack, point: str, how: Break
) -> None:
    port = free_port()
    pair = Pair(pairs, tmp_path, f"file:{tmp_path}/owner")
    proxy = pairs.enter_context(Proxy(port))
    side = "source" if point in SOURCE else "destination"
    source, destination = pair.begin(
        **{side: f"{point}:stop"},  # type: ignore[arg-type]
        waits_at=f"tcp:127.0.0.1:{port}",
        to=proxy.uri,
    )
    frozen = source if side == "source" else destination
    frozen.wait_frozen()
    proxy.break_off(how)
    frozen.thaw()
    wait_until(lambda: is_settled(source), LONG)
    one = the_one_that_runs(source, destination)
    expected = (SOURCE | DESTINATION)[point]
    assert not expected or one is {"source": source, "destination": destination}[expected]
    pair.goes_on()
    if one is source is not frozen:  # and it can be moved by the next attempt
        destination.wait_end()
        again = pair.arrive("again")
        source.qmp.execute("migrate", {"uri": f"unix:{tmp_path}/again.channel"})
        assert the_one_that_runs(again) is again
        pair.goes_on()


AT_THE_SOURCE = ["offer-asked", "offer-landed", "grant-asked", "revoke-asked"]
AT_THE_DESTINATION = ["ready-said", "take-asked", "take-landed", "return-asked"]


@pytest.mark.parametrize("point", [*AT_THE_SOURCE, *AT_THE_DESTINATION])
def test_silent_store_leaves_one_owner(
    tmp_path: Path, etcd: Etcd, pairs: ExitStack, point: str
) -> None:
    pair = Pair(pairs, tmp_path, etcd.uri(tmp_path.name, term=4))
    faults = {"source" if point in AT_THE_SOURCE else "destination": f"{point}:stop"}
    if point == "revoke-asked":
        faults["destination"] = "loaded:fail"
    source, destination = pair.begin(**faults, fails=point == "return-asked")  # type: ignore[arg-type]
    frozen = source if point in AT_THE_SOURCE else destination
    frozen.wait_frozen()
    with etcd.frozen():
        frozen.thaw()
        wait_until(lambda: "x-vmferry-doubt" in frozen.query(), LONG)
        assert not runs(source)
        assert not runs(destination)
    wait_until(lambda: is_settled(source), LONG)
    one = the_one_that_runs(source, destination)
    assert one is source or point not in {"revoke-asked", "return-asked"}
    pair.goes_on()
