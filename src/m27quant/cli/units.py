"""Numbers as people write and read them: sizes, rates, durations."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes in "16GiB" (binary), "5GB" or "5G" (decimal), "1048576".

    Raises:
        ValueError: not a size, or not at least one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write 16GiB (binary) or 5GB (decimal)")
    number, prefix, binary = match.groups()
    if binary and not prefix:
        raise ValueError(f"{text!r} is not a size; write 16GiB (binary) or 5GB (decimal)")
    size = int(float(number) * (1024 if binary else 1000) ** _POWER[prefix.lower()])
    if size < 1:
        raise ValueError(f"{text!r} is not at least one byte")
    return size


def format_size(size_bytes: float) -> str:
    """Binary units with one decimal: "5.1 GiB"; whole bytes below one KiB."""
    if size_bytes < 1024:
        return f"{int(size_bytes)} B"
    for unit in ("KiB", "MiB", "GiB"):
        size_bytes /= 1024
        if size_bytes < 1024:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1024:.1f} TiB"


def format_rate(bytes_per_s: float) -> str:
    """Decimal units, as disks and memory state theirs: "0.52 GB/s"."""
    if bytes_per_s < 1e8:
        return f"{bytes_per_s / 1e6:.1f} MB/s"
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:03", "2:03"; days count as hours."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
