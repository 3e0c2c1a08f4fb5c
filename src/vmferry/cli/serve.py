"""``vmferry serve``: a page server, that any number of machines get their memory from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json, Quiet

if TYPE_CHECKING:
    from .signals import Work


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A checkpoint.")],
    server: Annotated[
        Path, typer.Argument(metavar="SOCKET", help="Where it can be asked, by QMP.")
    ],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve any number of restores of the saved machine in DIRECTORY at once.

    vmferry restore DIRECTORY URI --server SOCKET asks for one. A signal ends it when no machine
    depends on it any more, a second one at once. It tells systemd when it is ready (Type=notify).
    """
    from vmferry import Checkpoint
    from vmferry.checkpoint.page_server import PageServer

    from .notify import tell_manager
    from .reports import Done, reporter
    from .restoring import summary
    from .signals import Interrupted, supervised
    from .views import Moving

    def tell(restore: dict[str, Any]) -> None:
        result, why = restore.get("result"), restore.get("error-desc", "")
        went = why or (summary(result) if result else "begun")
        content = {key: restore[key] for key in ("id", "uri", "status")}
        content |= {"message": why} if why else {}
        report.happened("restore", f"restore {restore['id']}: {went}", **content, **(result or {}))

    def work(control: Work) -> None:
        with (
            Checkpoint(directory) as checkpoint,
            PageServer(checkpoint, server, told=tell) as pages,
        ):
            control.begun(pages)
            report.listening(f"unix:{server}")
            tell_manager("READY=1")
            pages.wait()
            tell_manager("STOPPING=1")

    with reporter(Moving(), json=json, quiet=quiet) as report:
        try:
            supervised(work)
        except Interrupted as interrupted:
            if interrupted.is_left:
                interrupted.consequence = (
                    "machines that depend on it freeze where they need memory that they do not"
                    " have: vmferry restore --resume goes on"
                )
            raise
        report.finished(Done("ended: nobody depends on it", {"directory": str(directory)}))
