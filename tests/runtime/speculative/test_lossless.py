"""What is emitted has the target's distribution: the program's rule passes, known wrong rules fail the same test.

A toy target with a small vocabulary gives the exact joint distribution of the first tokens; many runs of a rule give a
measured one.  Their total variation has to be within what chance explains.  The wrong rules are controls: each was
found in some program or is an easy mistake.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.sampling import Row, choose
from m27quant.runtime.speculative.acceptance import accept
from m27quant.runtime.speculative.load import DrafterOptions, load_drafter
from m27quant.runtime.speculative.ngram import NgramDrafter
from m27quant.runtime.speculative.proposal import Drafter, DraftRequest, Proposal, chain
from tests.runtime.speculative import makers as m

V, LENGTH = 6, 2
Context = tuple[int, ...]
Probs = list[float]
Rule = Callable[[random.Random], Sequence[int]]
SIGMAS = 6.0
"""Standard deviations of the total variation that chance alone gives; about 40 comparisons are made."""


@cache
def logits(context: Context, seed: int, scale: float = 1.6) -> torch.Tensor:
    """Of the toy: any function of the context."""
    generator = torch.Generator().manual_seed(
        seed * 7919 + sum((t + 1) * 31**i for i, t in enumerate(context[-3:]))
    )
    return scale * torch.randn(V, generator=generator)


def softmax(values: Sequence[float]) -> Probs:
    largest = max(values)
    weights = [math.exp(v - largest) for v in values]
    return [w / sum(weights) for w in weights]


@cache
def p(context: Context) -> Probs:
    return softmax(logits(context, 1).tolist())


@cache
def q(context: Context, temperature: float = 1.0) -> Probs:
    """A drafter that is near the target."""
    mixed = 0.7 * logits(context, 1) + 0.7 * logits(context, 2)
    return softmax((mixed / temperature).tolist())


def joint(of: Callable[[Context], Probs], length: int = LENGTH) -> dict[Context, float]:
    """Exactly, by enumeration."""
    return {
        tokens: math.prod(of(tokens[:i])[t] for i, t in enumerate(tokens))
        for tokens in itertools.product(range(V), repeat=length)
    }


def total_variation(exact: dict[Context, float], counts: Counter[Context]) -> float:
    runs = counts.total()
    assert set(counts) <= set(exact)
    return 0.5 * sum(abs(counts[key] / runs - value) for key, value in exact.items())


def chance(exact: dict[Context, float], runs: int) -> float:
    """What perfect sampling stays below: mean and deviation of its own total variation."""
    values = np.array(list(exact.values()))
    draws = np.random.default_rng(0).multinomial(runs, values / values.sum(), size=200) / runs
    found = 0.5 * np.abs(draws - values).sum(1)
    return float(found.mean() + SIGMAS * found.std())


def pick(rng: random.Random, probs: Sequence[float]) -> int:
    return rng.choices(range(len(probs)), probs)[0]


def residual(target: Probs, draft: Probs) -> Probs:
    return [max(a - b, 0.0) for a, b in zip(target, draft, strict=True)]


def without(probs: Probs, *tokens: int) -> Probs:
    return [0.0 if t in tokens else value for t, value in enumerate(probs)]


# -- rules: one step of speculative decoding from an empty context, as the tokens it emits -----------


def ours(propose: Callable[[random.Random], Proposal]) -> Rule:
    """The program's: the target chooses behind every node, and `accept` walks."""

    def rule(rng: random.Random) -> Sequence[int]:
        proposal = propose(rng)
        paths: list[Context] = []
        for token, parent in zip(*proposal, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        return accept(proposal, [pick(rng, p(context)) for context in [(), *paths]]).tokens

    return rule


def likeliest(rng: random.Random) -> Proposal:
    tokens: Context = ()
    for _ in range(3):
        tokens += (max(range(V), key=q(tokens).__getitem__),)
    return chain(tokens)


def sampled(rng: random.Random) -> Proposal:
    tokens: Context = ()
    for _ in range(3):
        tokens += (pick(rng, q(tokens)),)
    return chain(tokens)


def branching(rng: random.Random) -> Proposal:
    """The three likeliest, below the first of them the two likeliest."""
    first = sorted(range(V), key=q(()).__getitem__, reverse=True)[:3]
    second = sorted(range(V), key=q((first[0],)).__getitem__, reverse=True)[:2]
    return Proposal([*first, *second], [-1, -1, -1, 0, 0])


def chain_rule(
    draft: Callable[[random.Random, Probs], int],
    rate: Callable[[Probs, Probs, int], float],
    after: Callable[[Probs, Probs, int], Probs],
    temperature: float = 1.0,
) -> Rule:
    """Drafts one after another, each kept at a rate; the first that is not is replaced, and that ends the step."""

    def rule(rng: random.Random) -> Sequence[int]:
        tokens: Context = ()
        for _ in range(3):
            target = p(tokens)
            drafted = draft(rng, q(tokens))
            if rng.random() >= rate(target, q(tokens, temperature), drafted):
                return (*tokens, pick(rng, after(target, q(tokens, temperature), drafted)))
            tokens += (drafted,)
        return (*tokens, pick(rng, p(tokens)))

    return rule


def argmax(rng: random.Random, probs: Probs) -> int:
    return max(range(V), key=probs.__getitem__)


def ratio(target: Probs, draft: Probs, token: int) -> float:
    return min(1.0, target[token] / draft[token])


def siblings(renormalised: bool) -> Rule:
    """EAGLE's tree: siblings in turn, a refused one is taken out of the distribution."""

    def rule(rng: random.Random) -> Sequence[int]:
        target = p(())
        for token in branching(rng).tokens[:3]:
            if rng.random() < target[token]:
                return (token, pick(rng, p((token,))))
            target = without(target, token)
            if renormalised:
                target = [value / sum(target) for value in target]
        return (pick(rng, target),)

    return rule


def threshold(single: float, total: float) -> Rule:
    """SGLang's target-only rule; it is lossless where both thresholds are 1."""

    def rule(rng: random.Random) -> Sequence[int]:
        target, coin, reached = p(()), rng.random(), 0.0
        drafted = branching(rng).tokens[:3]
        for token in drafted:
            reached += target[token]
            if coin < reached / total or target[token] >= single:
                return (token, pick(rng, p((token,))))
        return (pick(rng, without(target, *drafted)),)

    return rule


RIGHT: dict[str, Rule] = {
    "ours, likeliest drafts": ours(likeliest),
    "ours, sampled drafts": ours(sampled),
    "ours, tree": ours(branching),
    "ours, nothing drafted": ours(lambda rng: chain([])),
    "Leviathan, sampled drafts": chain_rule(pick, ratio, lambda a, b, t: residual(a, b)),
    "one-hot drafts": chain_rule(argmax, lambda a, b, t: a[t], lambda a, b, t: without(a, t)),
    "EAGLE's tree": siblings(renormalised=True),
    "SGLang, target only": threshold(1.0, 1.0),
}  # fmt: skip
WRONG: dict[str, Rule] = {
    "likeliest draft, accepted as if it were sampled": chain_rule(argmax, ratio, lambda a, b, t: residual(a, b)),
    "drawn from all of p where refused": chain_rule(pick, ratio, lambda a, b, t: a),
    "one-hot drafts, drawn from all of p where refused": chain_rule(argmax, lambda a, b, t: a[t], lambda a, b, t: a),
    "q at another temperature": chain_rule(pick, ratio, lambda a, b, t: residual(a, b), temperature=0.5),
    "siblings, not renormalised": siblings(renormalised=False),
    "SGLang, threshold_acc 0.7": threshold(1.0, 0.7),
    "SGLang, threshold_single 0.15": threshold(0.15, 1.0),
}  # fmt: skip
RUNS = 30_000


def measured(rule: Rule) -> float:
    rng = random.Random(0)
    counts: Counter[Context] = Counter()
    for _ in range(RUNS):
        tokens: Context = tuple(rule(rng))[:LENGTH]
        while len(tokens) < LENGTH:
            tokens += (pick(rng, p(tokens)),)
        counts[tokens] += 1
    return total_variation(joint(p), counts)


@pytest.mark.parametrize("rule", RIGHT.values(), ids=RIGHT)
def test_lossless_rules_pass(rule: Rule) -> None:
    assert measured(rule) < chance(joint(p), RUNS)


@pytest.mark.parametrize("rule", WRONG.values(), ids=WRONG)
def test_wrong_rules_fail_the_same_test(rule: Rule) -> None:
    assert measured(rule) > chance(joint(p), RUNS)


# -- the program's sampler, acceptance and drafters together -----------------------------------------


@dataclass(frozen=True)
class Toy:
    """A target with taps, sampled as the engine samples."""

    temperature: float
    top_k: int
    top_p: float
    prompt: Context = (1, 4, 0, 1, 4)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=0.0,
            repetition_penalty=1.0,
        )

    def probs(self, context: Context) -> Probs:
        """After temperature, then top-k, then top-p: the formulas, not the program's sampler."""
        full = softmax((logits(self.prompt + context, 3, 0.8) / self.temperature).tolist())
        order = sorted(range(V), key=lambda t: -full[t])[: self.top_k]
        kept, reached, whole = [], 0.0, sum(full[t] for t in order)
        for token in order:
            kept.append(token)
            reached += full[token] / whole
            if reached >= self.top_p:
                break
        return [full[t] / sum(full[k] for k in kept) if t in kept else 0.0 for t in range(V)]

    def taps(self, num: int, width: int) -> torch.Tensor:
        return torch.randn(num, width, generator=torch.Generator().manual_seed(4))

    def run(self, seed: int, drafts: Callable[[Context], Proposal]) -> Context:
        """LENGTH tokens."""
        output: Context = ()
        while len(output) < LENGTH:
            proposal = drafts(self.prompt + output)
            output += tuple(accept(proposal, _Choices(self, seed, output, proposal)).tokens)
        return output[:LENGTH]


class _Choices(Sequence[int]):
    """What the target chooses behind the last token and each draft, computed when it is looked at."""

    def __init__(self, toy: Toy, seed: int, output: Context, proposal: Proposal) -> None:
        self.toy, self.seed = toy, seed
        self.paths = [output]
        for token, parent in zip(*proposal, strict=True):
            self.paths.append((*self.paths[parent + 1], token))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]  # one at a time
        return chosen(self.toy, self.seed, self.toy.prompt + self.paths[index])


@cache
def chosen(toy: Toy, seed: int, context: Context) -> int:
    """By the program's sampler; it is given nothing but these, so no drafter can tell it anything."""
    row = Row(toy.params, seed, context, len(toy.prompt), frozenset())
    return choose(logits(context, 3, 0.8)[None], [row])[0]


TARGET = replace(m.TARGET, vocab_size=V)


def small(folder: Path, kind: str, **options: int) -> Drafter:
    """A real drafter over the toy's vocabulary."""
    embed, head = (t[:V] for t in m.target_weights())
    if kind == "dflash":
        config, tensors = m.dflash(vocab_size=V)
        config["dflash_config"]["mask_token_id"] = V - 1
    else:
        config, tensors = m.eagle3(draft_vocab=None, vocab_size=V, draft_vocab_size=V)
    m.write(folder, config, tensors)
    return load_drafter(folder, TARGET, embed, head, DrafterOptions(**options), dtype=torch.float32).drafter


DRAFTERS: dict[str, Callable[[Path], Drafter]] = {
    "n-gram": lambda folder: NgramDrafter(4),
    "DFlash": lambda folder: small(folder, "dflash"),
    "EAGLE3 chain": lambda folder: small(folder, "eagle3"),
    "EAGLE3 tree": lambda folder: small(folder, "eagle3", num_steps=3, eagle_topk=4, num_draft_tokens=8),
}  # fmt: skip
TOYS = [Toy(0.7, 5, 0.95), Toy(1.0, 5, 0.9)]
SEEDS = 1500


@pytest.mark.parametrize("toy", TOYS, ids=["0.7", "1.0"])
@pytest.mark.parametrize("make", DRAFTERS.values(), ids=DRAFTERS)
def test_every_drafter_leaves_the_distribution_alone(
    tmp_path: Path, make: Callable[[Path], Drafter], toy: Toy
) -> None:
    drafter = make(tmp_path)
    accepted = 0

    @cache
    def drafts(tokens: Context) -> Proposal:
        taps = toy.taps(len(tokens) - 1, len(drafter.taps) * m.D) if drafter.taps else None
        (proposal,) = drafter.propose([DraftRequest(0, list(tokens), taps, 99)])
        drafter.forget(0)
        return proposal

    counts: Counter[Context] = Counter()
    for seed in range(SEEDS):
        output = toy.run(seed, drafts)
        assert output == plain(toy, seed)
        counts[output] += 1
        accepted += output[0] in [t for t, parent in zip(*drafts(toy.prompt), strict=True) if parent < 0]
    exact = joint(toy.probs)
    assert total_variation(exact, counts) < chance(exact, SEEDS)
    assert 0 < accepted < SEEDS, "some drafts are accepted, and not all"


@cache
def plain(toy: Toy, seed: int) -> Context:
    """Without a drafter."""
    return toy.run(seed, lambda tokens: chain([]))
