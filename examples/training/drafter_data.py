"""What the drafters learn from: greedy text of the target itself, and what the target's layers saw of it.

    python drafter_data.py --data build/tiny-m27 --checkpoint examples/tiny-m27 --out build/drafters

Prompts are pieces of the training text, a quarter of them beginnings of documents; each is continued by 128 tokens.
One file a group of equally long prompts; files that are there are not made again.  The target computes in BF16.

Shapes: B sequences, P prompt, T = P + 128 positions, D hidden.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import BOS
from fp8_checkpoint import read_weights
from model import KVCache, ModelConfig, Parameters, compute_copies, forward
from tokenizers import Tokenizer
from torch import Tensor
from train import load_tokens

TEXT_LEN = 128
PROMPT_LENS = (64, 128, 32, 64, 256, 64, 16, 96)
"""Of the groups in turn; 64 is what acceptance is measured with."""
TAPS = (2, 3, 4, 5, 6)
"""Hidden states that are kept, counted with the embedding as 0; those of both drafters are among them."""
HELDOUT_PROMPT_LEN, HELDOUT_PROMPTS = 64, 128


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences with one prompt length."""

    ids: Tensor
    """int64 [B, T]."""
    taps: Tensor
    """BF16 [B, T, len(TAPS) * D]; the last position has none (zeros): no token follows from it."""
    final: Tensor
    """BF16 [B, T, D]: what the target's head sees; the last position has none."""
    prompt_len: int

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        data = {"ids": self.ids.to(torch.int16), "taps": self.taps, "final": self.final}
        torch.save(data | {"prompt_len": self.prompt_len}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    @classmethod
    def load(cls, path: Path) -> Group:
        """Hidden states stay on disk until they are read."""
        data = torch.load(path, mmap=True)
        return cls(data["ids"].long(), data["taps"], data["final"], data["prompt_len"])


@torch.no_grad()
def continue_greedily(params: Parameters, bias: Tensor, prompts: Tensor, config: ModelConfig) -> Group:
    """The most likely next token, TEXT_LEN times, for prompts [B, P], with the hidden states on the way."""
    (batch, prompt_len), D = prompts.shape, config.hidden_size
    length = prompt_len + TEXT_LEN
    ids = prompts.new_zeros(batch, length)
    ids[:, :prompt_len] = prompts
    taps = torch.zeros(batch, length, len(TAPS) * D, dtype=torch.bfloat16)
    final = torch.zeros(batch, length, D, dtype=torch.bfloat16)
    cache = KVCache.empty(config, batch, length, params["embed"])
    for position in range(prompt_len, length):
        new = slice(cache.length, position)
        states: list[Tensor] = []
        hidden = forward(params, bias, ids[:, new], config, cache=cache, taps=states)
        kept = [states[index].view(batch, -1, D) for index in TAPS]
        taps[:, new], final[:, new] = torch.cat(kept, -1).bfloat16(), hidden.view(batch, -1, D)
        ids[:, position] = (
            F.linear(final[:, position - 1].to(hidden.dtype), params["head"]).float().argmax(-1)
        )
    return Group(ids, taps, final, prompt_len)


def training_prompts(tokens: Tensor, count: int, prompt_len: int, seed: int, bos: int) -> Tensor:
    """[count, prompt_len]: three quarters from anywhere, the rest where documents begin."""
    generator = torch.Generator().manual_seed(seed)
    anywhere = torch.randint(len(tokens) - prompt_len, (count - count // 4,), generator=generator)
    beginnings = (tokens[:-prompt_len] == bos).nonzero()[:, 0]
    chosen = beginnings[torch.randint(len(beginnings), (count // 4,), generator=generator)]
    return tokens[torch.cat([anywhere, chosen])[:, None] + torch.arange(prompt_len)]


def heldout_prompts(tokens: Tensor) -> Tensor:
    """The prompts of the target's card: pieces of held-out text at even distances."""
    starts = torch.linspace(0, len(tokens) - HELDOUT_PROMPT_LEN - TEXT_LEN, HELDOUT_PROMPTS).long()
    return tokens[starts[:, None] + torch.arange(HELDOUT_PROMPT_LEN)]


def make(args: argparse.Namespace) -> None:
    config = ModelConfig()
    masters, bias = read_weights(args.checkpoint, config)
    params = compute_copies(masters, torch.bfloat16)
    bos = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json")).token_to_id(BOS)
    train, heldout = (load_tokens(args.data / f"{split}.bin") for split in ("train", "heldout"))
    args.out.mkdir(parents=True, exist_ok=True)
    plan = {args.out / "heldout.pt": heldout_prompts(heldout)}
    for number in range(args.groups):
        prompt_len = PROMPT_LENS[number % len(PROMPT_LENS)]
        prompts = training_prompts(train, args.group_size, prompt_len, args.seed + number, bos)
        plan[args.out / f"train-{number:03d}.pt"] = prompts
    for path, prompts in plan.items():
        if path.exists():
            continue
        started = time.monotonic()
        continue_greedily(params, bias, prompts, config).save(path)
        speed = len(prompts) * TEXT_LEN / (time.monotonic() - started)
        print(f"{path.name}: {len(prompts)} prompts of {prompts.shape[1]}, {speed:.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Let the target write the drafters' training text.")
    parser.add_argument(
        "--data", type=Path, default=Path("build/tiny-m27"), help="folder that corpus.py filled"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/tiny-m27"))
    parser.add_argument("--out", type=Path, default=Path("build/drafters"), help="about 190 MB a group")
    parser.add_argument("--groups", type=int, default=20)
    parser.add_argument("--group-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    make(args)


if __name__ == "__main__":
    main()
