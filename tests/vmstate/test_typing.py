"""A declared class is an ordinary typed class to ``mypy --strict``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = """\
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from vmferry.vmstate import (
    U8, U16, Array, Gap, Local, Timer, device, load, save, since, state, subsection, when
)


@state("pit/extra")
@dataclass
class Extra:
    latch: U8 = 0


@state("channel")
@dataclass
class Channel:
    mode: U8 = 0


@device("pit", version=2, minimum_version=1)
@dataclass(slots=True)
class Pit:
    divider: U16 = 0
    next: Timer = None
    _gap: ClassVar[Annotated[None, Gap(4)]]
    late: Annotated[U8, since(2)] = 0
    odd: Annotated[U8, when(lambda pit: pit.late > 0)] = 0
    channels: Annotated[list[Channel], Array(3)] = field(
        default_factory=lambda: [Channel() for _ in range(3)]
    )
    bus: Local[str] = "isa"
    extra: Annotated[Extra | None, subsection] = None


pit = Pit(divider=1)
load(pit, save(pit), 2)
reveal_type(pit)
reveal_type(pit.divider)
reveal_type(pit.next)
reveal_type(pit.channels[0].mode)
reveal_type(pit.bus)
reveal_type(pit.extra)
Pit(divider="1")
pit.dividr = 2
"""


def test_mypy_understands_a_declared_class(tmp_path: Path) -> None:
    file = tmp_path / "pit.py"
    file.write_text(SOURCE)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    said = [line.split(": ", 2)[-1] for line in done.stdout.splitlines()]
    assert [line.split('"')[1].replace("pit.", "") for line in said if "Revealed" in line] == [
        "Pit",
        "int",
        "int | None",
        "int",
        "str",
        "Extra | None",
    ]
    assert [line for line in said if "Revealed" not in line] == [
        'Argument "divider" to "Pit" has incompatible type "str"; expected "int"  [arg-type]',
        '"Pit" has no attribute "dividr"; maybe "divider"?  [attr-defined]',
    ]
