"""The shared options: what they take, what they refuse, what they never say."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from m27quant.cli import options

SECRET = "hf_" + "s3cr3t" * 5


def command(
    device: options.Device = "auto",
    max_memory: options.MaxMemory = None,
    token: options.HubToken = None,
    fail: bool = False,
) -> None:
    if fail:
        raise typer.BadParameter(f"token was {token}, {token!r}")
    typer.echo(f"{device} {max_memory} {token.reveal() if token else None}")


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command()(command)
    return app


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "auto None None"),
        (["--device", "cpu"], "cpu None None"),
        (["--device", "cuda:1", "--max-memory", "16GiB"], f"cuda:1 {16 << 30} None"),
        (["--max-memory", "5GB", "--token", SECRET], f"auto 5000000000 {SECRET}"),
    ],
)
def test_values(args: list[str], says: str, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, args)
    assert (result.exit_code, result.stdout) == (0, says + "\n")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "CPU", "cuda:0 ", "cuda:\u0661", ""])
def test_no_device(device: str, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--device", device])
    assert result.exit_code == 2
    assert "Invalid value for '--device'" in result.stderr


def test_no_size(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--max-memory", "much"])
    assert result.exit_code == 2
    assert "Invalid value for '--max-memory': 'much' is not a size; write 16GiB (binary)" in result.stderr


def test_a_token_is_never_said(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--token", SECRET, "--fail"])
    assert result.exit_code == 2
    assert SECRET not in result.output
    assert "Token(***)" in result.stderr
    assert SECRET not in CliRunner().invoke(app, ["--help"], env={"HF_TOKEN": SECRET}).output
