"""Weights rearranged once, at load, so that a tensor core's left operand unpacks in a few instructions a weight.

`twiddle` is for products on BF16 tensor cores (`gpu_tile.product_bf16`).  Columns are cut into chunks of 32, a chunk
into four words of 32 bits: word t holds what lane t of a quad needs for two steps of 16 columns, g = 0 and 1 (PTX ISA,
"Register fragments for wgmma.m64nNk16": columns 2t, 2t+1, 2t+8, 2t+9).  Either half of a word holds, for one of two
neighbouring columns, four codes s e e m as

    bits 15 8 7 6      s e e m of column 16*0 + 2t      P0: the word as it is
    bits 21 14 13 12   s e e m of column 16*0 + 2t + 8  P1: rotated right by 6 (bit 21 lies in the other half)
    bits 9 2 1 0       s e e m of column 16*1 + 2t      P2: shifted left by 6
    bits 11 4 3 10     s e e m of column 16*1 + 2t + 8  P3: shifted left by 4, its last bit right by 4

so that shifts of the whole word bring each to the bits 15 8 7 6, where as BF16 it is E2M1 * 2**-126 (subnormals
included).  Block scales become unsigned E5M3 bytes u, of which 0x7000 | u << 4 is BF16 scale * 2**119: every positive
E4M3 value, subnormals too, has one.  A negative scale gives its sign to the codes, a zero scale zeroes them.
Nothing is lost and nothing grows.

Shapes: N out features, K in features, C = ceil(K/32) chunks; any dimensions before them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.kernels.nvfp4_pack import reference as nvfp4_pack

CHUNK = 32
"""Columns whose codes are rearranged among each other."""

SIGN = 8
_PLACES = ((15, 8, 7, 6), (21, 14, 13, 12), (9, 2, 1, 0), (11, 4, 3, 10))
"""Where bits 3 to 0 of the four codes lie in the word, for its lower half; 16 further, cyclically, for its upper."""


def twiddle(codes_NK2: Tensor, scale_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Words int32 [.., N, C * 4] and pairs of scale bytes as int16 [.., N, C].

    Of codes U8 [.., N, K/2], the even column in the low half, and block scales E4M3 [.., N, K/16].
    """
    codes_NK2, scale_NG = codes_NK2.contiguous(), scale_NG.contiguous().view(torch.uint8)
    codes_NK = torch.stack((codes_NK2 & 15, codes_NK2 >> 4), -1).flatten(-2)
    if codes_NK.shape[-1] % CHUNK:  # half a chunk of zeros
        codes_NK, scale_NG = F.pad(codes_NK, (0, 16)), F.pad(scale_NG, (0, 1))
    codes_NG16 = _split(codes_NK, 16)
    codes_NG16 = codes_NG16 ^ ((scale_NG >> 7) << 3)[..., None]
    codes_NG16 = torch.where(((scale_NG & 0x7F) == 0)[..., None], codes_NG16 & SIGN, codes_NG16)
    return _words(codes_NG16.flatten(-2)), _e5m3(scale_NG).view(torch.int16)


def untwiddle(words_NC4: Tensor, scales_NC: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The inverse: U8 [.., N, K/2] and F32 [.., N, K/16], the absolute values of the block scales (1 for 0)."""
    word = _split(words_NC4, 4)  # [.., C, t]
    columns = [_take(word, places, lane) for places in _PLACES for lane in (0, 1)]
    codes = _split(torch.stack(columns, -1), 2, 2, 2).squeeze(-4)  # [.., C, t, g, h, lane]
    codes_NK = codes.movedim(-4, -2).flatten(-5)[..., :K].to(torch.uint8)
    # The E5M3 byte, as BF16 bits of scale * 2**119
    bits_NG = scales_NC.contiguous().view(torch.uint8).to(torch.int32)[..., : K // 16] << 4 | 0x7000
    scale_NG = (bits_NG << 16).view(torch.float32) * 2.0**-119
    return codes_NK[..., 0::2] | codes_NK[..., 1::2] << 4, scale_NG


def unpack(words_NC4: Tensor, scales_NC: Tensor, weight_scale_2: Tensor, K: int) -> Tensor:
    """The F32 [N, K] values of one twiddled matrix."""
    return nvfp4_pack.unpack(*untwiddle(words_NC4, scales_NC, K), weight_scale_2)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of two matrices [I, ..], I a multiple of 8, in turns of 8: a thread then holds both of a feature.

    In the accumulator of a tensor core one thread has the rows r and r + 8.
    """
    turns = [rows.reshape(-1, 8, *rows.shape[1:]) for rows in (gate, up)]
    return torch.stack(turns, 1).flatten(0, 2)


def deinterleave(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `interleave`: gate and up."""
    turns = rows.reshape(-1, 2, 8, *rows.shape[1:])
    return turns[:, 0].flatten(0, 1), turns[:, 1].flatten(0, 1)


def unswizzle(scale: Tensor, N: int, G: int) -> Tensor:
    """Block scales E4M3 [N, G] from their swizzled form: undoes `nvfp4_quantize.reference.swizzle`."""
    tiles, columns = scale.shape[:2]
    bytes_ = scale.view(torch.uint8).permute(0, 3, 2, 1, 4).reshape(tiles * 128, columns * 4)
    return bytes_[:N, :G].contiguous().view(torch.float8_e4m3fn)


def _split(x: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several, the first of them as long as it takes."""
    return x.reshape(*x.shape[:-1], -1, *sizes)


def _words(codes_NK: Tensor) -> Tensor:
    codes = _split(codes_NK, 2, 2, 4, 2).to(torch.int32)  # [.., C, g, h, t, lane]
    word = torch.zeros_like(codes[..., 0, 0, :, 0])  # [.., C, t]
    for pair, places in enumerate(_PLACES):
        for lane in (0, 1):
            code = codes[..., pair // 2, pair % 2, :, lane]
            for bit, place in zip((3, 2, 1, 0), places, strict=True):
                word |= (code >> bit & 1) << (place + 16 * lane) % 32
    return word.flatten(-2)


def _take(word: Tensor, places: tuple[int, ...], lane: int) -> Tensor:
    code = torch.zeros_like(word)
    for bit, place in zip((3, 2, 1, 0), places, strict=True):
        code |= (word >> (place + 16 * lane) % 32 & 1) << bit
    return code


def _e5m3(scale: Tensor) -> Tensor:
    """Bytes u of E4M3 codes U8; the exponent's bias is 22, that of 2**-9 is 13."""
    values = (scale & 0x7F).view(torch.float8_e4m3fn).float()
    bits = torch.where(values == 0, 1.0, values).view(torch.int32)
    return ((bits >> 20) - ((127 - 22) << 3)).to(torch.uint8)
