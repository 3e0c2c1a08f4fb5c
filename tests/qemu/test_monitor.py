"""The monitor of a hosted machine, held against a real QEMU's, and driven by QEMU's clients."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from guests import Serial, walker
from tests.qemu.hosts import HELD, PATIENCE, Hosts, assert_intact
from tests.transports.support import wait_until
from vmferry.qemu import Migration, MigrationCancelled, QemuProcess, Qmp, QmpError, query_machine
from vmferry.qemu.hosting import CHECK

Start = Callable[..., QemuProcess]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with ExitStack() as stack:
        yield Hosts(stack, tmp_path)


def shape(value: object) -> object:
    """Keys and types, without the values; every entry of a list has the same."""
    match value:
        case dict():
            return {key: shape(item) for key, item in value.items()}
        case list():
            return [shape(item) for item in value[:1]]
        case bool() | str() | None:
            return type(value).__name__
        case _:
            return "number"


def moments(source: Qmp, destination: Qmp, uri: str) -> Iterator[tuple[str, object]]:
    """What both say while the machine is migrated to *uri*: first in vain, then not."""
    yield "source before", source.execute("query-migrate")
    yield "destination before", destination.execute("query-migrate")
    yield "destination's state", destination.execute("query-status")
    for one in (source, destination):
        states = [{"capability": "events", "state": True}]
        one.execute("migrate-set-capabilities", {"capabilities": states})
    source.execute("migrate-set-parameters", HELD)
    source.execute("migrate", {"uri": f"{uri}-nobody"})
    yield "failed", wait_for(source, "failed")
    destination.execute("migrate-incoming", {"uri": uri})
    source.execute("migrate", {"uri": uri})
    wait_until(lambda: source.execute("query-migrate").get("ram", {}).get("transferred", 0) > 4096)
    yield "active", source.execute("query-migrate")
    yield "loading", destination.execute("query-migrate")
    yield "state meanwhile", source.execute("query-status")
    yield "event of migration", source.wait_event("MIGRATION", timeout=PATIENCE)
    yield "event of a pass", source.wait_event("MIGRATION_PASS", timeout=PATIENCE)
    source.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 2000})
    yield "completed", wait_for(source, "completed")
    yield "loaded", wait_for(destination, "completed")
    yield "event of resuming", destination.wait_event("RESUME", timeout=PATIENCE)
    yield "event of stopping", source.wait_event("STOP", timeout=PATIENCE)
    yield "state behind", source.execute("query-status")
    yield "state there", destination.execute("query-status")


def wait_for(session: Qmp, status: str) -> dict[str, Any]:
    """The answer to query-migrate as soon as it has *status*."""
    wait_until(lambda: session.execute("query-migrate").get("status") == status)
    answer: dict[str, Any] = session.execute("query-migrate")
    return answer


@pytest.fixture
def qemus(start_qemu: Start, tmp_path: Path) -> tuple[Qmp, Qmp]:
    """The monitors of a QEMU that runs, and of one that waits for it."""
    (tmp_path / "guest").write_bytes(walker(pages=512, hot=256, fill=1024))
    machine = ["-machine", "pc", "-nodefaults", "-m", "16392k", "-kernel", str(tmp_path / "guest")]
    source = start_qemu(*machine)
    Serial(source.serial).wait_beat()
    return source.qmp, start_qemu(*machine, "-incoming", "defer").qmp


@pytest.mark.qemu
def test_answers_have_the_shape_of_qemus(
    qemus: tuple[Qmp, Qmp], hosts: Hosts, tmp_path: Path
) -> None:
    source, ours = hosts.start()
    source.console.wait_filled(PATIENCE)
    _, theirs = hosts.start(incoming="defer")
    expected = moments(*qemus, f"unix:{tmp_path}/qemu")
    found = moments(ours, theirs, f"unix:{tmp_path}/vmferry")
    for (title, answer), (_, own) in zip(expected, found, strict=True):
        assert shape(own) == shape(answer), title
        for key in ("status", "running", "event"):
            if isinstance(answer, dict) and key in answer:
                assert own[key] == answer[key], title  # type: ignore[index]


@pytest.mark.qemu
def test_questions_have_the_answers_of_qemu(start_qemu: Start, hosts: Hosts) -> None:
    qemu = start_qemu("-machine", "none").qmp
    _, ours = hosts.start()
    for command in ("query-status", "query-name", "query-uuid", "query-version"):
        assert shape(ours.execute(command)) == shape(qemu.execute(command)), command
    assert shape(ours.greeting["version"]) == shape(qemu.greeting["version"])
    assert ours.greeting["capabilities"] == []
    for command in ("query-commands", "query-migrate-capabilities"):
        (expected,) = shape(qemu.execute(command))  # type: ignore[misc]
        assert all(shape(entry) == expected for entry in ours.execute(command))
    known = {entry["name"] for entry in qemu.execute("query-commands")}
    assert {entry["name"] for entry in ours.execute("query-commands")} <= known | {CHECK}
    parameters = qemu.execute("query-migrate-parameters")
    for name, value in ours.execute("query-migrate-parameters").items():
        own = name.startswith("x-vmferry-") or name == "avail-switchover-bandwidth"  # since 8.2
        assert own or shape(value) == shape(parameters[name]), name


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("nothing", None),
        ("qmp_capabilities", None),
        ("migrate", None),
        ("migrate", {"uri": 3}),
        ("migrate", {"uri": "nowhere"}),
        ("migrate", {"uri": "unix:/nowhere", "speed": 1}),
        ("migrate", {"uri": "unix:/nowhere", "detach": 1}),
        ("stop", {"now": True}),
        ("migrate-continue", {"state": "pre-switchover"}),
        ("migrate-incoming", {"uri": "unix:/nowhere"}),
        ("migrate-set-capabilities", None),
        ("migrate-set-capabilities", {"capabilities": 1}),
        ("migrate-set-capabilities", {"capabilities": [{"capability": "xbzrle"}]}),
        ("migrate-set-capabilities", {"capabilities": [{"capability": "flying", "state": True}]}),
        ("migrate-set-parameters", {"altitude": 1}),
        ("migrate-set-parameters", {"downtime-limit": "high"}),
        ("migrate-set-parameters", {"max-cpu-throttle": 100}),
    ],
)
def test_what_qemu_refuses_is_refused_with_the_same_class(
    command: str, arguments: dict[str, object] | None, start_qemu: Start, hosts: Hosts
) -> None:
    kinds = []
    for session in (start_qemu("-machine", "none").qmp, hosts.start()[1]):
        with pytest.raises(QmpError) as caught:
            session.execute(command, arguments)
        kinds.append(caught.value.kind)
        assert caught.value.description.isprintable()
    assert kinds[0] == kinds[1]


@pytest.mark.qemu
def test_shutdown_is_told_as_by_qemu(start_qemu: Start, hosts: Hosts) -> None:
    qemu = start_qemu("-machine", "none").qmp
    host, ours = hosts.start()
    events = []
    for session in (qemu, ours):
        session.execute("quit")
        if session is ours:
            assert host.wait() == "host-qmp-quit"
        events.append(session.wait_event("SHUTDOWN", timeout=PATIENCE))
    assert shape(events[1]) == shape(events[0])
    assert events[1]["data"] == events[0]["data"]


def test_stop_and_cont_tell_what_they_change(hosts: Hosts) -> None:
    host, session = hosts.start()
    session.execute("stop")
    session.execute("stop")
    assert not host.machine.running
    assert session.execute("query-status")["status"] == "paused"
    session.execute("cont")
    session.execute("cont")
    assert host.machine.running
    session.execute("query-status")
    events = [session.wait_event(timeout=PATIENCE)["event"] for _ in range(2)]
    assert events == ["STOP", "RESUME"]
    assert_intact(host)


def test_machine_that_is_awaited_cannot_be_run_nor_moved(hosts: Hosts) -> None:
    host, session = hosts.start(incoming="defer")
    assert session.execute("query-status")["status"] == "inmigrate"
    for command, arguments in (("cont", None), ("stop", None), ("migrate", {"uri": hosts.uri()})):
        with pytest.raises(QmpError):
            session.execute(command, arguments)
    assert not host.machine.running


def test_destination_tells_where_it_waits(hosts: Hosts) -> None:
    _, session = hosts.start(incoming="tcp:127.0.0.1:0")
    (uri,) = query_machine(session).listening
    assert uri.startswith("tcp:127.0.0.1:")
    assert not uri.endswith(":0")


def test_driver_moves_it_as_it_moves_a_qemu(hosts: Hosts) -> None:
    source, here = hosts.start()
    source.console.wait_filled(PATIENCE)
    destination, there = hosts.start(incoming=hosts.uri())
    assert destination.address
    migration = Migration(here)
    migration.begin(
        destination.address,
        capabilities={"multifd": True},
        parameters={"max-bandwidth": "1GiB/s", "downtime-limit": "1s"},
    )
    end = migration.wait()
    assert (end.status, end.confirmed) == ("completed", True)
    assert end.downtime is not None
    assert end.round > 1
    assert query_machine(here).run_state == "postmigrate"
    assert query_machine(there).is_running
    assert_intact(destination)


def test_cancelled_machine_runs_on(hosts: Hosts) -> None:
    source, here = hosts.start()
    source.console.wait_filled(PATIENCE)
    destination, _ = hosts.start(incoming=hosts.uri())
    assert destination.address
    migration = Migration(here)
    migration.begin(destination.address, parameters=HELD)
    with pytest.raises(MigrationCancelled, match="the source is running"):
        migration.wait(lambda now: migration.cancel() if now.transferred else None)
    assert_intact(source)


def test_stall_is_told(hosts: Hosts) -> None:
    source, here = hosts.start()
    source.console.wait_filled(PATIENCE)
    destination, _ = hosts.start(incoming=hosts.uri())
    assert destination.address
    quick = {"x-vmferry-stall-rounds": 2, "x-vmferry-stall-seconds": "100ms"}
    migration = Migration(here)
    migration.begin(destination.address, parameters=HELD | quick)
    seen = []

    def look(now: Any) -> None:
        if now.stall:
            seen.append(now.stall)
            migration.cancel()

    with pytest.raises(MigrationCancelled):
        migration.wait(look)
    assert "no progress for" in seen[0]
    event = here.wait_event("VMFERRY_STALLED", timeout=PATIENCE)
    assert event["data"]["message"] == seen[0]


def test_settings_are_those_of_now(hosts: Hosts) -> None:
    _, session = hosts.start()
    session.execute("migrate-set-parameters", {"downtime-limit": 77})
    assert session.execute("query-migrate-parameters")["downtime-limit"] == 77
    states = [{"capability": "xbzrle", "state": True}]
    session.execute("migrate-set-capabilities", {"capabilities": states})
    assert {"capability": "xbzrle", "state": True} in session.execute("query-migrate-capabilities")


# QEMU's own clients


def test_qemus_client_drives_a_migration(hosts: Hosts, tmp_path: Path) -> None:
    source, _ = hosts.start()
    source.console.wait_filled(PATIENCE)
    destination, _ = hosts.start(incoming=hosts.uri())

    async def drive() -> list[str]:
        client = QMPClient("test")
        await client.connect(str(tmp_path / "monitor1"))
        with pytest.raises(ExecuteError, match="there is no command"):
            await client.execute("nothing")
        states = [{"capability": "events", "state": True}]
        await client.execute("migrate-set-capabilities", {"capabilities": states})
        await client.execute("migrate-set-parameters", {"downtime-limit": 1000})
        await client.execute("migrate", {"uri": destination.address})
        statuses = []
        async with asyncio.timeout(PATIENCE):
            while not statuses or statuses[-1] != "completed":
                event = await client.events.get()
                if event["event"] == "MIGRATION":
                    statuses.append(event["data"]["status"])
        await client.disconnect()
        return statuses

    statuses = asyncio.run(drive())
    assert statuses[0] == "setup"
    assert "active" in statuses
    assert_intact(destination)


def test_qmp_shell_talks_to_it(hosts: Hosts, tmp_path: Path) -> None:
    hosts.start()
    lines = [
        "query-status",
        "stop",
        "query-status",
        "migrate-set-parameters max-bandwidth=1000000 multifd-compression=zstd",
        "query-migrate-parameters",
        "migrate-set-capabilities capabilities=[{'capability':'events','state':True}]",
        "nothing",
    ]
    shell = Path(sys.executable).with_name("qmp-shell")
    done = subprocess.run(
        [shell, tmp_path / "monitor1"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    answers = [line.partition(") ")[2] for line in done.stdout.splitlines() if "(QEMU)" in line]
    assert '"running": true' in answers[0]
    assert '"running": false' in answers[2]
    assert '"max-bandwidth": 1000000' in answers[4]
    assert '"multifd-compression": "zstd"' in answers[4]
    assert answers[5] == '{"return": {}}'
    assert "CommandNotFound" in answers[6]


def test_machine_that_is_paused_on_the_way_stays_paused(hosts: Hosts) -> None:
    """What the operator said last counts, whichever side has the machine in the end."""
    source, here = hosts.start()
    source.console.wait_filled(PATIENCE)
    destination, there = hosts.start(incoming=hosts.uri())
    uri = destination.address
    assert uri
    Migration(here).begin(uri, parameters=HELD)
    wait_until(lambda: query_machine(here).migration.transferred > 0)
    here.execute("stop")
    here.execute("migrate-set-parameters", {"max-bandwidth": 0})
    wait_for(here, "completed")
    wait_for(there, "completed")
    assert query_machine(there).run_state == "paused"
    there.execute("cont")
    assert_intact(destination)


def test_machine_that_was_paused_on_the_way_is_not_run_by_a_cancel(hosts: Hosts) -> None:
    source, here = hosts.start()
    source.console.wait_filled(PATIENCE)
    destination, _ = hosts.start(incoming=hosts.uri())
    migration = Migration(here)
    migration.begin(str(destination.address), parameters=HELD)
    here.execute("stop")
    migration.cancel()
    with pytest.raises(MigrationCancelled, match="the source is paused"):
        migration.wait()
    assert not source.machine.running


def test_events_tell_of_a_switchover_that_is_broken_off(hosts: Hosts) -> None:
    source, here = hosts.start()
    source.console.wait_filled(PATIENCE)
    destination, _ = hosts.start(incoming=hosts.uri())
    migration = Migration(here)
    migration.begin(
        str(destination.address),
        capabilities={"pause-before-switchover": True},
        parameters={"max-bandwidth": 0, "downtime-limit": 1000},
    )
    wait_for(here, "pre-switchover")
    assert here.wait_event("STOP", timeout=PATIENCE)
    assert query_machine(here).run_state == "finish-migrate"
    migration.cancel()
    with pytest.raises(MigrationCancelled, match="the source is running"):
        migration.wait()
    assert here.wait_event("RESUME", timeout=PATIENCE)
    assert_intact(source)
