"""QEMU's own XBZRLE, compiled, for comparison alone; it does not ship with vmferry.

The environment variable VMFERRY_QEMU_XBZRLE names a shared object with the functions of
``migration/xbzrle.c``, or says ``fetch``: then it is built from Debian's source package.  For use
in several runs: ``python -m tests.support.qemu_xbzrle DIRECTORY`` prints the path for the variable.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.qemu_source import fetch

VARIABLE = "VMFERRY_QEMU_XBZRLE"
_LIBRARY = "xbzrle.so"

# What stands in for QEMU's headers, as far as the two files need them.
_HEADERS = {
    "osdep.h": "#include <stdint.h>\n#include <string.h>\n#include <assert.h>\n"
    "#define g_assert assert\n",
    "cutils.h": "int uleb128_encode_small(uint8_t *, uint32_t);\n"
    "int uleb128_decode_small(const uint8_t *, uint32_t *);\n",
}


@functools.cache
def qemu_xbzrle() -> ctypes.CDLL | None:
    """The library, or ``None`` where nobody asks for it."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return None
    if wanted != "fetch":
        return ctypes.CDLL(wanted)
    with tempfile.TemporaryDirectory(prefix="vmferry-xbzrle-") as directory:
        return ctypes.CDLL(str(build(Path(directory))))


def build(directory: Path) -> Path:
    """Compile it in *directory*: two files as in QEMU, with the -O2 of QEMU's own build."""
    fetch(directory, "migration/xbzrle.c", "migration/xbzrle.h", "util/cutils.c")
    include = directory / "include" / "qemu"
    include.mkdir(parents=True)
    for name, content in _HEADERS.items():
        (include / name).write_text(content)
    functions = re.findall(
        r"^int uleb128_\w+\(.*?^}", (directory / "cutils.c").read_text(), re.MULTILINE | re.DOTALL
    )
    (directory / "uleb128.c").write_text("\n".join(['#include "qemu/osdep.h"', *functions, ""]))
    sources = [str(directory / "xbzrle.c"), str(directory / "uleb128.c")]
    return compile_library(directory / _LIBRARY, *sources, f"-I{directory}", f"-I{include.parent}")


def compile_library(path: Path, *arguments: str) -> Path:
    """A shared object of C sources; :class:`RuntimeError` with what the compiler says."""
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(path), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"a C compiler is needed: {error}") from None
    if done.returncode:
        raise RuntimeError(f"cc failed: {done.stderr.strip()[-500:]}")
    return path


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))  # noqa: T201
