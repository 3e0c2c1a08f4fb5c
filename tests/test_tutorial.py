"""docs/tutorial.md, docs/migration.md: their blocks run in order, and print what stands below them.

``VMFERRY_UPDATE=1`` writes what they print now into the page.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType

import pytest

from tests.cli.command import environment

DOCS = Path(__file__).parent.parent / "docs"

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+)\.py\n")


class Session:
    """A reader who enters the page, block by block, in an empty directory."""

    def __init__(self, page: Path, module: ModuleType) -> None:
        self.page = page
        self.names = module.__dict__
        self.printed = ""

    def enter(self, block: re.Match[str]) -> str:
        """The block as it should be: with what is printed in place of what is said to be."""
        language, content = block.groups()
        if language == "console":
            assert not self.printed, "what a block prints has to stand below it"
            content = "".join(map(self.command, re.findall(r"^\$ .*\n", content, re.MULTILINE)))
        elif language == "python":
            assert not self.printed, "what a block prints has to stand below it"
            if name := FILE.match(content):
                self.file(name[1], content)
            else:
                self.printed = self.python(content)
        else:
            content, self.printed = self.printed, ""
        return f"```{language}\n{content}```"

    def file(self, name: str, code: str) -> None:
        """Save a module, import it, and run the tests that it has."""
        Path(f"{name}.py").write_text(code)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        for test in re.findall(r"^def (test_\w+)", code, re.MULTILINE):
            getattr(module, test)()

    def python(self, code: str) -> str:
        """What the block prints, with the last line of the traceback if it fails."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                exec(compile(code, self.page.name, "exec"), self.names)  # noqa: S102 - our own page
            except Exception as error:  # noqa: BLE001 - shown, and compared
                output.writelines(traceback.format_exception_only(error))
        return output.getvalue()

    def command(self, line: str) -> str:
        """The line and what the command prints."""
        python = f"{shlex.quote(sys.executable)} -m vmferry"
        command = re.sub(r"^\$ vmferry", lambda _: python, line)
        assert command != line, f"only vmferry is run: {line}"
        done = subprocess.run(  # noqa: S602 - our own page
            command,
            shell=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            env=environment(COLUMNS="90", PYTHONDONTWRITEBYTECODE="1"),
        )
        return line + done.stdout


@pytest.mark.parametrize("name", ["tutorial", "migration"])
def test_page_shows_what_happens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = ModuleType(name)
    for taken in (name, "timer", "test_timer", "board", "counter"):
        monkeypatch.setitem(sys.modules, taken, module)  # so that it is gone again afterwards
    page = DOCS / f"{name}.md"
    text = page.read_text()
    session = Session(page, module)
    shown = BLOCK.sub(session.enter, text)
    assert not session.printed
    if os.environ.get("VMFERRY_UPDATE"):
        page.write_text(shown)
    assert shown == page.read_text()
