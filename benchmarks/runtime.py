"""Generation by the runtime beside transformers' `generate` on the same weights, and at full size on a GPU.

    python -m benchmarks.runtime tiny [--save]               tiny-m27, quantized on the fly
    python -m benchmarks.runtime wide [--experts 256]        two layers of M2.7's widths
    python -m benchmarks.runtime full [--layers 62] [--save]   62 layers of random weights on one GPU

`tiny` and `wide` compare answers first: a runtime that says something else is not timed.  What is timed takes turns.
transformers computes in BF16 on the dequantized weights, with the fastest of its ways for experts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import m27quant
from benchmarks import machine, transformers_model
from benchmarks.synthetic import Size
from benchmarks.synthetic_nvfp4 import nvfp4_bytes, write_nvfp4
from m27quant import LLM, GenerateResult, SamplingParams
from m27quant.runtime.probe import logits_of

RESULTS = Path(__file__).parent / "results"
TINY = Path(__file__).parents[1] / "examples/tiny-m27"
MIN_SQNR_DB = 25.0
"""Logits in BF16 against logits in BF16, over whole layers: the two round in other places."""
PROMPT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("tiny", "wide", "full"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=64, help="of each output")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--drafter", default="ngram")
    parser.add_argument("--save", action="store_true", help="write JSON and markdown to benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = machine.facts()
    if args.model == "full":
        from benchmarks.runtime_gpu import measure

        results = measure(layers=args.layers or 62, tokens=args.tokens)
    else:
        with tempfile.TemporaryDirectory(prefix="m27quant-") as folder:
            checkpoint = _checkpoint(args, Path(folder) / "model")
            results = _beside_transformers(args, checkpoint)
    results = {"machine": before, "date": datetime.date.today().isoformat(), "model": args.model} | results
    page = markdown(results)
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / f"runtime-{args.model}-{results['date']}"
        stem.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        stem.with_suffix(".md").write_text(page)


def _checkpoint(args: argparse.Namespace, folder: Path) -> Path:
    if args.model == "tiny":
        rows = str(TINY / "calibration.jsonl")
        m27quant.quantize_checkpoint(str(TINY), folder, dataset=rows, num_samples=64, seq_len=256)
        return folder
    size = Size(num_hidden_layers=args.layers or 2, num_local_experts=args.experts)
    print(f"writing {nvfp4_bytes(size) / 1e9:.1f} GB", file=sys.stderr)
    return write_nvfp4(folder, size)


def _beside_transformers(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    # without reuse: what was computed in the round before is no measurement
    llm = m27quant.load(checkpoint, check=False, prefix_caching=False, drafter=args.drafter)
    theirs = transformers_model.load(checkpoint)
    ids = _prompts(checkpoint, llm, 64)
    sqnr_db = agreement(llm, theirs, ids[0] + ids[1])
    if sqnr_db < MIN_SQNR_DB:
        sys.exit(f"the logits agree to {sqnr_db:.1f} dB only: nothing is timed")
    rows = [
        row for batch in map(int, args.batch.split(",")) for row in _times(llm, theirs, ids[:batch], args)
    ]
    model = {"layers": llm.model.config.num_hidden_layers, "experts": llm.model.config.num_local_experts}
    return {"logit_sqnr_db": sqnr_db, "shape": model, "tokens": args.tokens, "rows": rows}


def _prompts(checkpoint: Path, llm: LLM, count: int) -> list[list[int]]:
    """Pieces of text where there is any, else random ids, all of one length: transformers pads others."""
    heldout = TINY / "heldout.txt"
    if llm.tokenizer is not None:
        ids = llm.tokenizer.text(heldout.read_text())
    else:
        ids = torch.randint(
            llm.model.config.vocab_size, (count * PROMPT,), generator=torch.Generator().manual_seed(0)
        ).tolist()
    step = len(ids) // count
    return [ids[at * step : at * step + PROMPT] for at in range(count)]


def agreement(llm: LLM, theirs: Any, ids: list[int]) -> float:
    """SQNR in dB of our logits against transformers' on one text, the median of its tokens.

    transformers routes in BF16: of some tokens an expert is another one, which says nothing about the others.
    """
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].double()
    found = logits_of(llm.model, ids).double()
    signal, noise = expected.square().sum(-1), (expected - found).square().sum(-1)
    return float(10 * torch.log10(signal / noise).median())


def _times(llm: LLM, theirs: Any, prompts: list[list[int]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of the same answers by all, in turns."""
    tokens = args.tokens
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    batch = torch.tensor(prompts)
    drafting, experts = f"m27quant, {args.drafter}", transformers_model.best_mode(theirs, batch[:, :1])
    answers: dict[str, list[GenerateResult]] = {}

    def plain() -> None:
        with llm.without_drafter():
            answers["m27quant"] = llm.generate(prompts, params)

    def drafted() -> None:
        answers[drafting] = llm.generate(prompts, params)

    def generate() -> None:
        with torch.inference_mode():
            out = theirs.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False,
            )  # fmt: skip
        assert out.shape[1] == batch.shape[1] + tokens

    rival = f"transformers ({experts})"
    seconds = machine.interleaved({"m27quant": plain, drafting: drafted, rival: generate}, args.rounds)
    assert [r.token_ids for r in answers["m27quant"]] == [r.token_ids for r in answers[drafting]]
    rows = []
    for name, best in seconds.items():
        steps = [r.stats.acceptance.num_steps + 1 for r in answers.get(name, [])] or [tokens]
        rows.append({
            "engine": name, "batch": len(prompts), "tokens_per_s": len(prompts) * tokens / best,
            "ms_per_step": best / max(steps) * 1e3, "tau": tokens * len(steps) / sum(steps),
            "times_transformers": seconds[rival] / best,
        })  # fmt: skip
    return rows


def markdown(results: dict[str, Any]) -> str:
    m = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    page = [
        f"# Generation, {results['model']}, {results['date']}",
        "",
        f"{m['cpu']['model']}, {m['cpu']['usable']} cores, {m['threads']} threads, "
        f"{m['memory_bytes'] / 2**30:.0f} GiB; {m['system']}, {m['python']}; {versions}. "
        f"Load before: {m['load_before']}.",
        "",
    ]
    if "logit_sqnr_db" in results:
        page += [
            f"{results['shape']['layers']} layers of {results['shape']['experts']} experts. Greedy, prompts of "
            f"{PROMPT} tokens, {results['tokens']} tokens each; logits agree with transformers' to a median of "
            f"{results['logit_sqnr_db']:.1f} dB. transformers: BF16, with the fastest of its ways for experts. "
            "Ours: NVFP4 weights, batch-invariant, FP8 cache; with the drafter the same tokens.",
            "",
            "| engine | batch | tokens/s | ms per step | tokens per step | transformers' time / this |",
            "|---|---|---|---|---|---|",
            *(
                f"| {r['engine']} | {r['batch']} | {r['tokens_per_s']:.1f} | {r['ms_per_step']:.2f} | "
                f"{r['tau']:.2f} | {r['times_transformers']:.2f} |"
                for r in results["rows"]
            ),
        ]
    else:
        page += results["lines"]
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    main()
