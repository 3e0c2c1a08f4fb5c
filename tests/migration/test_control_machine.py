"""Commands in any order, a link that is cut: the machine never runs twice, and is never lost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.migration.python_machine import PythonMachine
from tests.migration.relay import Relay
from vmferry import UsageError
from vmferry.migration.control import Control, RunState
from vmferry.migration.status import UNDER_WAY, Status

LONG = 60.0

# Each so slow that what follows comes while it is under way, or so fast that it does not.
BANDWIDTHS = st.sampled_from([0, 8 << 20, 64 << 20])
CAPABILITIES = st.sampled_from(["multifd", "xbzrle", "auto-converge", "events"])


class Commands(RuleBasedStateMachine):
    """One machine, the side that has it, and the one where it goes; a new one after each end."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.path = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.made = 0

    def side(self) -> Control:
        machine = self.stack.enter_context(PythonMachine(300, 6))
        control = Control(machine)
        self.stack.callback(control.close)
        return control

    @initialize()
    def begin(self) -> None:
        self.source = self.side()
        self.machine_of(self.source).fill().resume()
        self.await_it()

    def machine_of(self, control: Control) -> PythonMachine:
        assert isinstance(control.machine, PythonMachine)
        return control.machine

    def await_it(self) -> None:
        self.made += 1
        self.has_begun = False
        self.destination = self.side()
        address = self.destination.incoming(f"unix:{self.path}/{self.made}")
        self.relay = self.stack.enter_context(Relay(f"unix:{self.path}/{self.made}r", address))

    def tell(self, command: Callable[..., object], *arguments: object) -> bool:
        """Give a command, which may be refused; whether it was not."""
        try:
            command(*arguments)
        except UsageError:
            return False
        return True

    # Commands

    @rule(bandwidth=BANDWIDTHS)
    def migrate(self, bandwidth: int) -> None:
        self.source.set_parameters({"max-bandwidth": bandwidth})
        self.has_begun |= self.tell(self.source.migrate, self.relay.address)

    @rule(name=CAPABILITIES | st.just("pause-before-switchover"), on=st.booleans())
    def capability(self, name: str, on: bool) -> None:
        self.tell(self.source.set_capabilities, {name: on})

    @rule(bandwidth=BANDWIDTHS, limit=st.sampled_from([0, 1, 300]))
    def parameters(self, bandwidth: int, limit: int) -> None:
        self.source.set_parameters({"max-bandwidth": bandwidth, "downtime-limit": limit})

    @rule()
    def cancel(self) -> None:
        was_running = self.source.machine.running
        self.source.cancel()
        if was_running and self.source.status == Status.CANCELLING:
            assert self.source.machine.running

    @rule(source=st.booleans())
    def stop(self, source: bool) -> None:
        self.tell((self.source if source else self.destination).stop)

    @rule()
    def cont(self) -> None:
        # In doubt it is the word of an operator who knows, and here nobody does.
        if self.source.run_state != RunState.POSTMIGRATE and not self.source.in_doubt:
            self.tell(self.source.cont)

    @rule()
    def cont_there(self) -> None:
        if not self.destination.in_doubt:
            self.tell(self.destination.cont)

    @rule()
    def proceed(self) -> None:
        self.tell(self.source.proceed, "pre-switchover")

    @rule()
    def give_up(self) -> None:
        if not self.destination.in_doubt:
            self.destination.cancel_incoming()

    @rule()
    def cut(self) -> None:
        self.relay.cut()

    @rule(seconds=st.sampled_from([0.001, 0.02, 0.1]))
    def pass_time(self, seconds: float) -> None:
        time.sleep(seconds)

    # What holds

    @invariant()
    def never_both(self) -> None:
        if hasattr(self, "destination"):
            # In this order: the source never runs again behind that.
            there = self.destination.machine.running
            assert not (there and self.source.machine.running)

    @rule()
    def settle(self) -> None:
        """All is over: one side has the machine, whole, or both say that they cannot know."""
        if not self.has_begun:
            return None
        self.tell(self.source.set_parameters, {"max-bandwidth": 0, "downtime-limit": 2000})
        deadline = time.monotonic() + LONG
        while self.source.status in UNDER_WAY and time.monotonic() < deadline:
            self.tell(self.source.proceed, "pre-switchover")
            time.sleep(0.01)
        assert self.source.wait(LONG) not in UNDER_WAY
        if self.source.in_doubt:
            return self.settle_doubt()
        if self.source.status == Status.COMPLETED:
            assert self.destination.wait(LONG) == Status.COMPLETED
            self.go_on_at(self.destination)
            return None
        assert self.source.run_state in {RunState.RUNNING, RunState.PAUSED}
        self.destination.cancel_incoming()
        assert self.destination.wait(LONG) == Status.FAILED
        assert self.destination.run_state == RunState.INMIGRATE
        self.go_on_at(self.source)
        return None

    def settle_doubt(self) -> None:
        """The source has said go; an operator looks at the destination."""
        deadline = time.monotonic() + LONG
        while self.destination.status in UNDER_WAY and not self.destination.in_doubt:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if self.destination.in_doubt:
            self.destination.cont()
        if self.destination.wait(LONG) == Status.COMPLETED:
            return self.go_on_at(self.destination)
        self.source.cont()
        return self.go_on_at(self.source)

    def go_on_at(self, control: Control) -> None:
        """The machine is right and can run; the next move is from there."""
        other = self.destination if control is self.source else self.source
        assert not other.machine.running
        machine = self.machine_of(control)
        machine.pause()
        machine.check()
        machine.resume()
        self.source = control
        self.await_it()

    def teardown(self) -> None:
        if hasattr(self, "destination"):
            self.settle()
        self.stack.close()


Commands.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestCommands = Commands.TestCase
