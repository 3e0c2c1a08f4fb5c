"""A running machine moves; a QEMU is saved while it runs, looked into, and resumed in a new one.

Without QEMU the latter is done with a recorded stream, as far as that goes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import zstandard

from guests import GuestError, Serial, walker
from vmferry import UsageError, VmferryError
from vmferry.qemu import QemuProcess, find_qemu

ROOT: Final = Path(__file__).parent.parent
SAVED: Final = "demo/saved-vm"
RECORDED: Final = ROOT / "tests" / "data" / "q35-devices.zst"

# 64 MiB and 8 KiB: with a multiple of 256 KiB QEMU 7.2's TCG forgets pages that are written to.
MACHINE: Final = ("-machine", "q35", "-accel", "tcg", "-smp", "2", "-m", "65544k")


def main() -> int:
    """Run the demonstration; the exit status is 0 if everything was as it should be."""
    os.chdir(ROOT)
    shutil.rmtree(SAVED, ignore_errors=True)
    try:
        moved()
        saved()
    except (VmferryError, GuestError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    return 0


def moved() -> None:
    """A running machine moves from process to process; with a picture of it on a terminal."""
    say("A running machine moves to another process, and from there to a third one.", "")
    say("$ vmferry demo")
    if status := subprocess.call([sys.executable, "-m", "vmferry", "demo"]):
        raise VmferryError(f"vmferry ended with status {status}")


def saved() -> None:
    """A QEMU, or what was recorded of one, is saved and resumed."""
    say("", "vmferry and QEMU:", "")
    try:
        find_qemu()
    except UsageError:
        say("QEMU is not installed here, so a recorded stream stands in for the running machine.")
        recorded()
    else:
        live()


def live() -> None:
    """The demonstration with two real QEMUs."""
    with tempfile.TemporaryDirectory(prefix="vmferry-demo-") as scratch:
        kernel, uri = Path(scratch, "guest"), f"unix:{scratch}/migration"
        kernel.write_bytes(walker(pages=4096, hot=1024, delay=20_000))
        machine = [*MACHINE, "-kernel", str(kernel)]
        say(
            "A QEMU runs a guest that stamps 16 MiB of its memory again and again, checks every",
            "stamp it left before, and counts its rounds on the serial port.",
        )
        with QemuProcess(machine) as source:
            serial = Serial(source.serial)
            serial.wait_ready()
            serial.wait_beat(after=2)
            say("", f"The guest counts {serial.counter}. Save it while it goes on writing:", "")
            with Vmferry("receive", uri, SAVED) as receiver:
                receiver.wait_line()
                source.migrate(uri, capabilities=["return-path"])
                status = source.wait_migration()["status"]
            last = serial.drain()
            say("", f"QEMU says {status}. The guest's last count there was {last}.", "")
        run("inspect", SAVED, head=32)
        run("inspect", SAVED, "--device", "cpu:0", head=10)
        say("", "A new QEMU resumes it:", "")
        with QemuProcess([*machine, "-incoming", "defer"]) as destination:
            destination.incoming(uri)
            run("send", SAVED, uri)
            serial = Serial(destination.serial)
            now = serial.wait_beat(after=last)
            destination.wait_running()
            for _ in range(3):
                now = serial.wait_beat(after=now)
        say("", f"Its counter went on: {last} before, {now} now, and it found no page changed.")


def recorded() -> None:
    """The demonstration with a stream recorded from QEMU 7.2."""
    with tempfile.TemporaryDirectory(prefix="vmferry-demo-") as scratch:
        stream = Path(scratch, "recorded")
        stream.write_bytes(zstandard.decompress(RECORDED.read_bytes()))
        run("receive", f"file:{stream}", SAVED)
        run("inspect", SAVED)
        run("inspect", SAVED, "--device", "cpu:0", head=14)
        again = Path(scratch, "again")
        run("send", SAVED, f"file:{again}")
        run("inspect", str(again), head=6)


class Vmferry:
    """The command, running; its output is shown as it comes.  Leaving it waits for its end."""

    def __init__(self, *arguments: str) -> None:
        say(f"$ vmferry {shlex.join(arguments)}")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vmferry", *arguments], stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.terminate()
        while self.wait_line():
            pass
        if self._process.wait() and kind is None:
            raise VmferryError(f"vmferry ended with status {self._process.returncode}")

    def wait_line(self, *, show: bool = True) -> bool:
        """Wait for one more line of output; false where there is none."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line and show:
            say(f"  {line}".rstrip())
        return bool(line)


def run(*arguments: str, head: int | None = None) -> None:
    """Run the command; show its output, or the first *head* lines of it."""
    with Vmferry(*arguments) as command:
        lines = 0
        while command.wait_line(show=head is None or lines < head):
            lines += 1
    if head is not None and lines > head:
        say(f"  ... {lines - head} more lines")


def say(*lines: str) -> None:
    """Show some lines at once."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
