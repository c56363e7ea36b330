"""The written reference and the frozen options agree with the program."""

from __future__ import annotations

from pathlib import Path

from m27quant.cli.docs import contexts, reference

FROZEN = Path(__file__).with_name("frozen_options.txt")


def spellings() -> list[str]:
    """Every command with every way to write each of its options, one per line."""
    lines = []
    for context in contexts():
        for parameter in context.command.params:
            names = " ".join([*parameter.opts, *parameter.secondary_opts])
            lines.append(f"{context.command_path}: {names}")
    return sorted(lines)


def test_options_are_frozen() -> None:
    """Scripts rely on these names: take one away only with a word in CHANGELOG.md, then `make docs`."""
    assert spellings() == FROZEN.read_text(encoding="utf-8").splitlines()


def test_the_reference_is_up_to_date(repository: Path) -> None:
    written = (repository / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(), "run `make docs`"


def test_no_command_goes_without_help() -> None:
    for context in contexts():
        assert context.command.help, context.command_path
        for parameter in context.command.params:
            assert parameter.help, f"{context.command_path} {parameter.name}"


if __name__ == "__main__":
    FROZEN.write_text("\n".join(spellings()) + "\n", encoding="utf-8")
