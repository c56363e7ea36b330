"""`m27quant serve --compose DIR`: two files for containers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from m27quant.cli.files import write_file
from m27quant.cli.output import Output
from m27quant.errors import OutputError, escape

if TYPE_CHECKING:
    from m27quant.serve.launch import Launch


def write_compose(
    output: Output, launch: Launch, folder: Path, *, image: str | None, overwrite: bool
) -> None:
    """Write compose.yaml and kubernetes.yaml into `folder`, which is made.

    Raises:
        OutputError: one of them is there and `overwrite` is not.
        EnvironmentFault: not writable.
    """
    from m27quant.checkpoint.durable import raise_for_os_error
    from m27quant.serve.compose import compose_file, kubernetes_manifest

    texts = {
        "compose.yaml": compose_file(launch, image),
        "kubernetes.yaml": kubernetes_manifest(launch, image),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = [name for name in texts if (folder / name).exists()]
    except OSError as fault:
        raise_for_os_error(fault, folder)
    if there and not overwrite:
        raise OutputError(
            f"{escape(folder / there[0])}: there already", hint="add --overwrite, or name a new folder"
        )
    for name, text in texts.items():
        write_file(folder / name, text.encode())
    paths = [str(folder / name) for name in texts]
    output.result({**launch.document(), "files": paths}, human="\n".join(paths), quiet="\n".join(paths))
