"""README.md of a trained drafter: what it is, what it reads, how it was made, how it learned, how it drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import m27quant
from m27quant.checkpoint.card import escape_markdown, licence_of, with_section
from m27quant.drafters.prepare import Prepared
from m27quant.drafters.presets import Objective, Shape

CURVE = "training.svg"
ACCEPTANCE = "How much it drafts right"
BEGIN, END = "<!-- m27quant:eval -->", "<!-- /m27quant:eval -->"
"""Around what `drafter eval --write-card` writes."""
UNMEASURED = (
    "Not measured yet: `m27quant drafter eval` with `--write-card` measures acceptance in generated text and\n"
    "writes it here."
)
NAMES = {"dflash": "DFlash", "eagle3": "EAGLE3"}
SHOWN = 8
"""Positions in a table."""


def render(
    plan: Prepared, config: Mapping[str, Any], result: Mapping[str, Any], *, command: str | None
) -> str:
    """The card.  It holds no times and no paths but those of `command`."""
    shape, target = plan.recipe.shape, _target(plan)
    parts = [
        _front(plan),
        f"# {NAMES[shape.kind]} drafter for {target}",
        _what(shape, target, config),
        _table(_sizes(shape, config, result)),
        f"    m27quant run {_target_argument(plan)} --drafter THIS_FOLDER --stats",
        f"## {ACCEPTANCE}",
        f"{BEGIN}\n{UNMEASURED}\n{END}",
        *_heldout(plan, result.get("heldout")),
        "## How it was trained",
        *_commands(plan, command),
        _data(plan),
        _table(_training(plan, result)),
        f"![Loss and accuracy over the steps]({CURVE})",
        f"Made by m27quant {m27quant.__version__}. The target, its embedding and its head stayed as they are.",
    ]
    return "\n\n".join(parts) + "\n"


def with_evaluation(card: str, section: str) -> str:
    """`card` with `section` (Markdown) in the place of an earlier evaluation, or at its end."""
    return with_section(card, "eval", ACCEPTANCE, section)


# -- the parts -------------------------------------------------------------------------------------


def _front(plan: Prepared) -> str:
    shape = plan.recipe.shape
    lines = [f"base_model: {plan.repo_id}"] if plan.repo_id else []
    lines += [f"{key}: {value}" for key, value in licence_of(plan.target_folder).items()]
    tags = ["minimax_m2", "speculative-decoding", shape.kind]
    return "\n".join(
        ["---", *lines, "library_name: m27quant", "pipeline_tag: text-generation", "tags:"]
        + [f"- {tag}" for tag in tags]
        + ["---"]
    )


def _target(plan: Prepared) -> str:
    return escape_markdown(plan.repo_id.split("/")[-1] if plan.repo_id else plan.target_folder.resolve().name)


def _target_argument(plan: Prepared) -> str:
    return plan.repo_id or "TARGET"


def _what(s: Shape, target: str, config: Mapping[str, Any]) -> str:
    speculators = "speculators_model_type" in config
    if s.kind == "dflash":
        layout = (
            "The layout is that of speculators" if speculators else "The layout is z-lab's and SpecForge's"
        )
        return (
            f"It drafts {s.block_size - 1} tokens at a time for {target}, in one forward pass (arXiv:2602.06036).\n"
            f"{layout}: it has neither embedding nor head, both are the target's."
        )
    layout = "The layout is that of speculators" if speculators else "The layout is SpecForge's"
    return (
        f"It drafts token after token, or a tree, for {target} (arXiv:2503.01840).  {layout}:\n"
        f"a head of its own over {s.draft_vocab_size:,} of {s.vocab_size:,} tokens with `d2t` and `t2d`; "
        "the embedding is the target's."
    )


def _sizes(s: Shape, config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    layers = f"{s.num_hidden_layers} layers" if s.num_hidden_layers > 1 else "one layer"
    facts = {
        "parameters": f"{result['parameters']:,} of its own, {result['tensor_bytes'] / 1e6:,.2f} MB in BF16",
        "architecture": f"{layers}, {s.num_attention_heads}/{s.num_key_value_heads} heads of {s.head_dim}, "
        f"hidden {s.hidden_size}, MLP {s.intermediate_size}, rope_theta {s.rope_theta:g}",
        "taps": taps_statement(s.hidden_states, config),
    }
    if s.kind == "dflash":
        facts["block"] = f"{s.block_size} slots, the anchor's included; mask token {s.mask_token_id}"
    return facts


def taps_statement(hidden_states: Sequence[int], config: Mapping[str, Any]) -> str:
    """Which hidden states are read, and how config.json says so."""
    states, ids = list(hidden_states), [state - 1 for state in hidden_states]
    said = f"hidden states {states} of the target (0 is its embedding), the outputs of layers {ids} counted from 0; "
    if "speculators_model_type" in config:
        key = (
            "aux_hidden_state_layer_ids"
            if "aux_hidden_state_layer_ids" in config
            else "eagle_aux_hidden_state_layer_ids"
        )
        return f"{said}stated as hidden states in `{key}`"
    if "dflash_config" in config:
        return f"{said}stated as `target_layer_ids` {ids}, to which vLLM and SGLang add one"
    return (
        f"{said}stated twice: {ids} in `eagle_config`, to which SGLang adds one, and {states} at the top level, "
        "which vLLM takes as they are"
    )


def _heldout(plan: Prepared, found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    chain = " ".join(f"{share:.3f}" for share in found["c_k"][:SHOWN])
    accuracy = " ".join(f"{share:.3f}" for share in found["accuracy"][:SHOWN])
    return [
        f"While it was trained, from finished text of {len(plan.heldout):,} samples that it did not learn from "
        f"(step {found['step']:,}):",
        _table(
            {
                "validation loss": f"{found['val_loss']:.4f}",
                "accuracy by position, what came before being given": accuracy,
                "tau": f"{found['tau']:.3f} over {found['blocks']:,} steps (m_accept {found['m_accept']:.3f})",
                "C_1 .. C_k": chain or "none",
            }
        ),
    ]


def _commands(plan: Prepared, command: str | None) -> list[str]:
    made = [m["command"] for m in plan.manifests if isinstance(m.get("command"), str)]
    lines = [*made, *([command] if command else [])]
    return ["\n".join(f"    {_one_line(line)}" for line in lines)] if lines else []


def _data(plan: Prepared) -> str:
    tokens = sum(len(sample) for sample in plan.samples)
    heldout = f"; {len(plan.heldout):,} more were held out" if plan.heldout else ""
    digest = plan.fingerprint["data"][:16]
    return (
        f"Data: {len(plan.samples):,} samples of {tokens:,} tokens, {plan.num_learned:,} of which the target wrote and "
        f"the drafter learned (SHA-256 {digest}){heldout}."
    )


def _training(plan: Prepared, result: Mapping[str, Any]) -> dict[str, str]:
    r = plan.recipe
    ranks = plan.fingerprint["ranks"]
    split = f"{ranks} ranks of " * (ranks > 1) + f"{r.grad_accumulation} times {r.batch_size} samples"
    rate = f"lr {r.lr:g}" + f", AdamW {r.adam_lr:g} for the rest" * (r.optimizer == "muon")
    begun = {"begun with": f"the weights of {escape_markdown(plan.start.name)}"} if plan.start else {}
    return begun | {
        "steps": f"{plan.steps:,}, each of {split}",
        "loss": objective_statement(r.shape, r.objective),
        "optimizer": f"{r.optimizer}, {rate}, weight decay {r.weight_decay:g}, warm-up {r.warmup:g}, {r.schedule}, "
        f"gradients clipped at {r.clip:g}",
        "numbers": f"{r.dtype} over F32 masters; seed {r.seed}; samples cut at {r.max_length:,} tokens",
        "loss at the end": f"{result['loss']:.4f} (mean of the last steps); accuracy by position "
        + " ".join(f"{share:.3f}" for share in result["accuracy"][:SHOWN]),
    }


def objective_statement(s: Shape, o: Objective) -> str:
    """The loss in words."""
    mix = {
        0.0: "cross-entropy with the token that the target chose",
        1.0: "distillation from the target's distribution",
    }
    kind = mix.get(o.soft, f"{o.soft:g} distillation from the target's distribution, the rest cross-entropy")
    if s.kind == "eagle3":
        return f"{kind}; training-time test of {o.num_steps} steps, step j weighs {o.loss_decay:g}^j"
    weight = f"{o.loss_decay:g}^(k-1)" if o.loss_gamma is None else f"exp(-(k-1)/{o.loss_gamma:g})"
    blocks = " and ".join(map(str, o.block_sizes))
    return f"{kind}; up to {o.anchors_per_seq} blocks of {blocks} slots a sample, slot k weighs {weight}"


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
