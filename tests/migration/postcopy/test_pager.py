"""The process of the pager, where it has no memory to fetch yet."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from vmferry.migration.postcopy.pager_process import PagerProcess

LONG = 30.0


def test_what_lies_about_where_the_machine_was_started_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    heard: SimpleQueue[dict[str, Any]] = SimpleQueue()
    pager = PagerProcess(heard.put)
    assert heard.get(timeout=LONG) == {"event": "up"}
    pager.close()
    assert heard.get(timeout=LONG)["event"] == "gone"
