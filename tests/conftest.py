"""The ``qemu`` marker, and machines for the tests that carry it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import settings

from vmferry.errors import UsageError
from vmferry.qemu import QemuProcess, find_qemu

# How long an example takes says more of the machine than of the code; tests have a time limit.
settings.register_profile("vmferry", deadline=None)
settings.load_profile("vmferry")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``qemu`` where QEMU is missing, or fail it with VMFERRY_REQUIRE_QEMU set.

    ``qemu("s390x")`` asks for the QEMU of another architecture.
    """
    for marker in item.iter_markers("qemu"):
        try:
            find_qemu(*marker.args)
        except UsageError as exc:
            if os.environ.get("VMFERRY_REQUIRE_QEMU"):
                pytest.fail(f"VMFERRY_REQUIRE_QEMU is set, but {exc}", pytrace=False)
            pytest.skip(str(exc))


@pytest.fixture
def start_qemu() -> Iterator[Callable[..., QemuProcess]]:
    """Starts a QEMU with the given arguments (those of QemuProcess); it ends with the test."""
    with ExitStack() as stack:

        def start(*arguments: str, **options: object) -> QemuProcess:
            return stack.enter_context(QemuProcess(arguments, **options))  # type: ignore[arg-type]

        yield start
