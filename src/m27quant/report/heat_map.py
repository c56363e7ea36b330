"""Maps of layers x experts: an SVG frame with its axes around an indexed PNG, which keeps 15,872 cells small.

The ramps are fixed; frame and text are drawn in classes that the page's style sheet colours.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from m27quant.report.plots import Table, number, short, tag

MAP_WIDTH = 1000
MAX_CELL, MIN_CELL_HEIGHT, MAX_CELL_HEIGHT = 44.0, 8.0, 26.0

VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
BELOW, ABOVE = "2f6fde", "e0662b"


def heat_map(
    table_LE: Table, *, label: str, diverging: bool = False, log: bool = False
) -> tuple[Markup, Markup]:
    """(the map with its axes, the ramp below it): layers down, experts across; NaN cells are left open.

    A diverging map has its middle at 0 and fades to nothing there; the other runs from the least to the largest.
    """
    known = table_LE[~np.isnan(table_LE)]
    scaled_LE = np.log1p(table_LE) if log else table_LE
    ends = (float(known.min()), float(known.max()))
    if diverging:
        reach = max(1.0, float(np.abs(known).max()))
        ends, bounds = (-reach, reach), (-reach, reach)
    else:
        bounds = (math.log1p(ends[0]), math.log1p(ends[1])) if log else ends
    span = (bounds[1] - bounds[0]) or 1.0
    codes = np.where(np.isnan(table_LE), 0, 1 + np.nan_to_num((scaled_LE - bounds[0]) / span) * 254)
    palette = _diverging() if diverging else _sequential()
    picture = _png(np.rint(codes).astype(np.uint8), palette)
    ramp = _png(np.arange(1, 256, dtype=np.uint8)[None], palette)
    middle = 0.0 if diverging else math.expm1((bounds[0] + bounds[1]) / 2) if log else sum(ends) / 2
    return _framed(picture, table_LE.shape, label), _ramp(ramp, (ends[0], middle, ends[1]))


def _framed(picture: str, shape: tuple[int, ...], label: str) -> Markup:
    layers, experts = shape
    left, top = 40, 22
    cell = min(MAX_CELL, MAP_WIDTH / experts)
    height = min(MAX_CELL_HEIGHT, max(MIN_CELL_HEIGHT, cell))
    wide, high = cell * experts, height * layers
    parts = [
        tag("image", href=picture, x=left, y=top, width=wide, height=high, preserveAspectRatio="none", class_="cells"),
        tag("rect", class_="frame", x=left, y=top, width=wide, height=high),
    ]  # fmt: skip
    every = next(
        n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 20) if n * cell >= 30 or n == 1 << 20
    )
    for n in range(0, experts, every):
        x = left + (n + 0.5) * cell
        parts.append(tag("text", str(n), class_="tick", x=x, y=top - 7, text_anchor="middle"))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1 << 20) if n * height >= 18 or n == 1 << 20)
    for n in range(0, layers, every):
        y = top + (n + 0.5) * height + 4
        parts.append(tag("text", str(n), class_="tick", x=left - 7, y=y, text_anchor="end"))
    parts.append(tag("rect", class_="cursor", width=cell, height=height, x=left, y=top))
    box = f"0 0 {short(left + wide + 4)} {short(top + high + 4)}"
    return tag(
        "svg", Markup("").join(parts), viewBox=box, width=left + wide + 4, role="img", aria_label=label,
        class_="map wide" if experts > 64 else "map", tabindex="0", data_layers=layers, data_experts=experts,
    )  # fmt: skip


def _ramp(picture: str, ends: tuple[float, float, float]) -> Markup:
    places = zip(ends, (0, 120, 240), ("start", "middle", "end"), strict=True)
    marks = [
        tag("text", number(value), class_="tick", x=x, y=28, text_anchor=anchor)
        for value, x, anchor in places
    ]
    bar = tag("image", href=picture, x=0, y=0, width=240, height=12, preserveAspectRatio="none")
    frame = tag("rect", class_="frame", x=0, y=0, width=240, height=12)
    return tag(
        "svg", Markup("").join([bar, frame, *marks]), viewBox="-1 -1 242 34", width=242, class_="ramp",
        aria_hidden="true",
    )  # fmt: skip


def _sequential() -> bytes:
    """RGBA of 256 codes: 0 is open, 1 to 255 run through viridis, which also greyscale keeps in order."""
    stops = np.array([list(bytes.fromhex(c)) for c in VIRIDIS], float)
    at = np.linspace(0, len(stops) - 1, 255)
    colours = np.stack([np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1)
    return _with_alpha(colours, np.full(255, 255.0))


def _diverging() -> bytes:
    """RGBA of 256 codes: 0 is open, 1 to 255 run from blue through nothing to orange."""
    at = np.linspace(-1, 1, 255)
    colours = np.where(at[:, None] < 0, list(bytes.fromhex(BELOW)), list(bytes.fromhex(ABOVE))).astype(float)
    return _with_alpha(colours, 20 + 235 * np.abs(at) ** 0.8)


def _with_alpha(colours: Table, alpha: Table) -> bytes:
    rgba = np.concatenate([colours, alpha[:, None]], axis=1)
    codes: bytes = np.rint(rgba).astype(np.uint8).tobytes()
    return bytes(4) + codes


def _png(codes: npt.NDArray[np.uint8], palette: bytes) -> str:
    """An indexed PNG as a data: address (https://www.w3.org/TR/png-3/, 11.2)."""
    rgba = np.frombuffer(palette, np.uint8).reshape(-1, 4)
    rows = b"".join(b"\0" + row.tobytes() for row in codes)
    height, width = codes.shape
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", rgba[:, :3].tobytes()),
        (b"tRNS", rgba[:, 3].tobytes()),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
