"""Block scales in the order that kernels want, seen without the source: `order` has the statistics."""

from __future__ import annotations

from m27quant.checkpoint.header import TensorInfo
from m27quant.errors import escape
from m27quant.verify import order
from m27quant.verify.collect import Findings
from m27quant.verify.view import View


def check_scale_order(view: View, info: TensorInfo, scale_NG: order.Bytes, found: Findings) -> None:
    """Look at one matrix's block scales; w3's rows are kept for `Nibbles`."""
    share = order.explained(scale_NG)
    if share is not None and share.looks_swizzled:
        found.add(
            "M27-S020",
            f"'{escape(info.name)}': rows and columns explain {share.stored:.1%} of the block scales as they are, "
            f"{share.unswizzled:.1%} with a swizzle undone",
            tensor=info.name, found=f"{share.stored:.1%}", expected=f"at least {share.unswizzled:.1%}",
            badness=share.unswizzled - share.stored,
        )  # fmt: skip
    if info.name.endswith(".w3.weight_scale"):
        view.row_pairs[info.name.removesuffix(".w3.weight_scale")] = order.row_pairs(scale_NG)
