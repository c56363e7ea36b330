"""What engines' tokenizer makes of a text: the class that tokenizer_config.json names, beside tokenizer.json as it is.

transformers 5 replaces the pre-tokenizer of some classes (GPT2Tokenizer, which M2's official files name): other
tokens, and spaces where none belong.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from m27quant.checkpoint.strict_json import read_object
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import M27Error, escape
from m27quant.verify.collect import Findings

FILE = "tokenizer_config.json"
SAMPLES = (
    "See SPEC.md and src/main.py, then run `python -m build`.",
    "It's 12,345.67 EUR; don't split self.value, os.path.join(a, b) or https://example.org/x?y=1.",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}\n\n\n\ttabs\tand   spaces  \n",
    "日本語のテキスト、中文文本。Ünïcödé — naïve café 🙂",
)
"""Also what is checked in a model's own answers: file names, contractions, code, other scripts."""


def check_tokenizer_class(folder: Path, found: Findings) -> None:
    """Tokenize the samples as transformers would; a class that disagrees with tokenizer.json is a finding."""
    if not (folder / "tokenizer.json").is_file() or not (folder / FILE).is_file():
        return  # other checks say so
    try:
        plain = Tokenizer(folder)
        name = read_object(folder / FILE).get("tokenizer_class")
    except M27Error:
        return
    for title, tokenizer in _as_engines_do(folder, name):
        if isinstance(tokenizer, Exception):
            found.add(
                "M27-O004",
                f"{FILE}: {title} cannot be loaded ({escape(tokenizer)})",
                file=FILE, found=type(tokenizer).__name__,
            )  # fmt: skip
            continue
        for sample in SAMPLES:
            ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
            wanted, text = plain.rendered(sample), tokenizer.decode(ids)
            if ids != wanted or text != sample:
                expected, other = _first_difference(plain, wanted, ids)
                found.add(
                    "M27-O004",
                    f"{FILE}: {title} tokenizes otherwise than tokenizer.json: {escape(repr(sample[:40]))}, which "
                    f"comes back as {escape(repr(text[:40]))}",
                    file=FILE, expected=expected, found=other,
                )  # fmt: skip
                break


def _first_difference(plain: Tokenizer, wanted: list[int], ids: list[int]) -> tuple[str, str]:
    """The tokens around the first one that differs, as text with bars between."""
    at = next(
        (i for i, (a, b) in enumerate(zip(wanted, ids, strict=False)) if a != b), min(len(wanted), len(ids))
    )

    def shown(tokens: list[int]) -> str:
        return "|".join(plain.decode([t], skip_special_tokens=False) for t in tokens[at : at + 4])

    return shown(wanted), shown(ids)


def _as_engines_do(folder: Path, name: Any) -> list[tuple[str, Any]]:
    """(what, tokenizer or the exception that came in its place): AutoTokenizer, and the named class by itself."""
    import transformers

    found: list[tuple[str, Any]] = []
    before = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity(logging.ERROR)
        ways = [("AutoTokenizer", transformers.AutoTokenizer)]
        if isinstance(name, str) and isinstance(getattr(transformers, name, None), type):
            ways.append((f"the class {escape(name)}", getattr(transformers, name)))
        for title, kind in ways:
            try:
                found.append((title, kind.from_pretrained(str(folder), local_files_only=True)))
            except Exception as fault:  # noqa: BLE001 - whatever it raises, an engine would too
                found.append((title, fault))
        transformers.logging.set_verbosity(before)
    return found
