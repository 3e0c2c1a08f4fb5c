from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.pages.twins import needs_compiled


def chosen(wanted):
    environment = {**os.environ, "VMFERRY_KERNELS": wanted}
    code = "from vmferry import pages; print(pages.KERNELS, pages.page_sums.__module__)"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("plain", "plain vmferry.pages._plain.sums\n"),
        pytest.param("compiled", "compiled vmferry.pages._compiled.sums\n", marks=needs_compiled),
        pytest.param("", "compiled vmferry.pages._compiled.sums\n", marks=needs_compiled),
    ],
)
def test_kernels_are_those_asked_for(wanted, found):
    assert chosen(wanted).stdout == found


def test_unknown_kernels_are_refused_by_name():
    result = chosen("turbo")
    assert result.returncode != 0
    assert "VMFERRY_KERNELS asks for 'turbo'" in result.stderr
