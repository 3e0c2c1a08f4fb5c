"""The public names of the room: all there, and none of them a module."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import vmferry.vmstate


def test_every_name_that_is_promised_is_there() -> None:
    assert dir(vmferry.vmstate) == sorted(vmferry.vmstate.__all__)
    for name in vmferry.vmstate.__all__:
        assert not isinstance(getattr(vmferry.vmstate, name), ModuleType), name


def test_reading_foreign_state_loads_nothing_of_declarations() -> None:
    code = "import sys, vmferry.vmstate.decode; print('vmferry.vmstate.declare' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
