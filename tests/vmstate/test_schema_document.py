"""docs/schema.md: every kind of finding has an example there, and the examples are right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.recorded import recorded
from vmferry.checkpoint.stream_file import open_stream
from vmferry.vmstate.schema import (
    Finding,
    Kind,
    Schema,
    check,
    check_stream,
    dump_schema,
    parse_schema,
)

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "schema.md"

IMPORTS = """
from dataclasses import field
from typing import Annotated, ClassVar
from vmferry.vmstate import *
"""

EXAMPLE = re.compile(
    r"^### ([a-z-]+)\n(?:(?!^#).)*?```python\n(.*?)```\n\n```text\n(.*?)```",
    re.MULTILINE | re.DOTALL,
)


def schema_of(declared: Any) -> Schema:
    """As read from the file that ``vmferry schema dump`` writes, or of a dump as it is."""
    dumped = declared if isinstance(declared, dict) else dump_schema(declared)
    return parse_schema(json.dumps(dumped).encode())


def shown(finding: Finding) -> str:
    return f"{finding.direction}: {finding.severity.words}: {finding}"


def found_by(code: str) -> list[str]:
    """What is found of ``Old`` and ``New`` in an example."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(IMPORTS + code, names)  # noqa: S102 - our own document
    return [shown(finding) for finding in check(schema_of(names["Old"]), schema_of(names["New"]))]


EXAMPLES = {kind: (code, text) for kind, code, text in EXAMPLE.findall(DOCUMENT.read_text())}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_example_shows_what_is_found(kind: str) -> None:
    code, text = EXAMPLES[kind]
    found = found_by(code)
    assert found == text.splitlines()
    assert any(f": {Kind(kind).words}: " in line for line in found)


def test_every_kind_has_its_heading() -> None:
    headings = re.findall(r"^### (.+)$", DOCUMENT.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(kind.value for kind in Kind)
    assert set(headings) - set(EXAMPLES) == {"subsection-missing", "not-judged"}


def test_what_is_not_judged_is_found_in_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(recorded("pc")[0].sent)
    description = open_stream(path).description
    assert description is not None
    found = {shown(finding) for finding in check_stream(description, Schema(()), ["ram"])}
    text = DOCUMENT.read_text().partition("### not-judged")[2]
    examples = text.partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(examples) == 2
    assert found >= set(examples)
