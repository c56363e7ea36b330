"""`m27quant drafter`: data for drafters, their training, and how they fare."""

from __future__ import annotations

import typer

from m27quant.cli import drafter_data, drafter_eval, drafter_train

drafter_app = typer.Typer(
    help="Train DFlash and EAGLE3 drafters, and measure them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
drafter_app.command("train")(drafter_train.train)
drafter_app.command("generate-data")(drafter_data.generate_data)
drafter_app.command("eval")(drafter_eval.eval_)
