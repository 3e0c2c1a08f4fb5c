"""``exec:``: the command's status, its end, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.transports.support import PROMPT, accepted, background, blocked, receive, wait_until
from vmferry.errors import ChannelClosed, TransportError
from vmferry.transports import Channel, connect, listen


def output_of(command: str) -> Channel:
    with listen(f"exec:{command}") as listener:
        return accepted(listener.accept())


def read_pid(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def is_gone(pid: int) -> bool:
    """No process, not even a zombie."""
    return not Path(f"/proc/{pid}").exists()


def is_dead(pid: int) -> bool:
    """No process that runs: a grandchild is for others to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_command_is_read_by_the_shell(tmp_path: Path) -> None:
    with output_of("printf 'a b' | tr a-z A-Z; echo $((1+1)) >&1") as receiver:
        assert receive(receiver) == b"A B2\n"
    with connect(f"exec:tr a b | cat >{tmp_path}/out") as sender:
        sender.send([b"banana"])
        sender.end_of_data()
        assert (tmp_path / "out").read_bytes() == b"bbnbnb"


def test_close_waits_for_the_command_to_take_everything(tmp_path: Path) -> None:
    with connect(f"exec:cat >{tmp_path}/out; echo done >>{tmp_path}/out") as sender:
        sender.send([b"x" * 100_000])
    assert (tmp_path / "out").read_bytes() == b"x" * 100_000 + b"done\n"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("exit 3", "the command ended with status 3"),
        ("no-such-command 2>/dev/null", "status 127 (the command was not found)"),
        ("/etc/passwd 2>/dev/null", "status 126 (it cannot be executed)"),
        ("kill -9 $$", "the command was killed by signal 9"),
    ],
)
def test_failed_command_is_an_error_in_place_of_the_end(command: str, why: str) -> None:
    with output_of(f"printf x; {command}") as receiver:
        assert receive(receiver, 1) == b"x"
        with pytest.raises(TransportError) as caught:
            receiver.recv_into(memoryview(bytearray(1)))
        assert why in str(caught.value)
        assert '"exec:printf x' in str(caught.value)


def test_failed_command_is_told_by_the_end_of_data() -> None:
    with connect("exec:cat >/dev/null; exit 7") as sender:
        sender.send([b"x"])
        with pytest.raises(TransportError, match="ended with status 7"):
            sender.end_of_data()
        sender.end_of_data()


def test_failed_command_is_told_by_close_if_by_nothing_before() -> None:
    sender = connect("exec:cat >/dev/null; exit 7")
    with pytest.raises(TransportError, match="ended with status 7"):
        sender.close()
    sender.close()


def test_command_that_stops_reading_tells_its_status() -> None:
    with connect("exec:head -c 10 >/dev/null; exit 5") as sender:
        sending = background(lambda: sender.send([bytes(100 << 20)]))
        with pytest.raises(TransportError, match="status 5 before it had read everything"):
            sending.result(PROMPT)


def test_receiver_that_has_enough_is_not_told_of_the_status() -> None:
    with output_of("yes; exit 9") as receiver:
        assert receive(receiver, 4) == b"y\ny\n"


def test_command_is_not_in_the_terminals_process_group(tmp_path: Path) -> None:
    with output_of("ps -o pgid= -p $$ || cut -d' ' -f5 /proc/$$/stat") as receiver:
        assert int(receive(receiver)) != os.getpgrp()


def test_shutdown_ends_the_command_and_its_children(tmp_path: Path) -> None:
    sender = connect(f"exec:sh -c 'echo $$ >{tmp_path}/pid; sleep 1000' & wait")
    pid = read_pid(tmp_path / "pid")
    sender.shutdown()
    sender.close()
    wait_until(lambda: is_dead(pid))


def test_killed_command_never_saw_the_end_of_its_input(tmp_path: Path) -> None:
    sender = connect(
        f"exec:echo $$ >{tmp_path}/pid; cat >/dev/null; echo whole >{tmp_path}/verdict"
    )
    pid = read_pid(tmp_path / "pid")
    sender.send([b"half of it"])
    sender.shutdown()
    sender.close()
    assert is_gone(pid)
    assert not (tmp_path / "verdict").exists()


def test_failure_in_a_with_block_ends_the_command(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        connect(f"exec:cat >/dev/null; echo whole >{tmp_path}/verdict"),
    ):
        raise ZeroDivisionError
    assert not (tmp_path / "verdict").exists()


def test_command_that_refuses_to_end_is_killed(tmp_path: Path) -> None:
    receiver = output_of(f"trap '' TERM; echo $$ >{tmp_path}/pid; while :; do sleep 0.1; done")
    pid = read_pid(tmp_path / "pid")
    receiver.close()
    assert is_gone(pid)


def test_wait_for_the_end_of_the_command_is_released_by_a_shutdown() -> None:
    with connect("exec:trap '' TERM; cat >/dev/null; sleep 1000") as sender:
        ending = blocked(sender.end_of_data)
        sender.shutdown()
        with pytest.raises(ChannelClosed):
            ending.result(PROMPT)


def test_wait_at_the_end_of_the_output_is_released_by_a_shutdown() -> None:
    with output_of("exec >&-; sleep 1000") as receiver:
        waiting = blocked(lambda: receiver.recv_into(memoryview(bytearray(1))))
        receiver.shutdown()
        with pytest.raises(ChannelClosed):
            waiting.result(PROMPT)


def test_command_gets_no_ignored_signals() -> None:
    with output_of("grep SigIgn /proc/self/status") as receiver:
        ignored = int(receive(receiver).split()[1], 16)
    assert not ignored & 1 << (signal.SIGPIPE - 1)


def test_command_nobody_accepted_is_ended(tmp_path: Path) -> None:
    listener = listen(f"exec:echo $$ >{tmp_path}/pid; exec sleep 1000")
    pid = read_pid(tmp_path / "pid")
    listener.close()
    assert is_gone(pid)
