"""The training scripts: gradients, cached decoding, batches, the FP8 layout; no training is done."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

Script = Callable[[str], ModuleType]
SMALL = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "intermediate_size": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def small(script: Script) -> tuple[ModuleType, Any, dict[str, torch.Tensor], torch.Tensor]:
    """(module, config, F32 parameters, bias that changes choices) of a model with 2 layers."""
    model = script("model")
    config = model.ModelConfig(**SMALL)
    params = model.init_parameters(config, seed=0)
    bias = torch.randn(
        config.num_hidden_layers, config.num_local_experts, generator=torch.Generator().manual_seed(1)
    )
    return model, config, params, bias * 0.1


def test_experts_gradients_are_autograds(script: Script) -> None:
    model = script("model")
    N, K, E, D, I = 13, 2, 5, 12, 6
    generator = torch.Generator().manual_seed(0)
    x, w13, w2 = (torch.randn(*s, generator=generator) for s in ((N, D), (E, 2 * I, D), (E, D, I)))
    coefficients = torch.rand(N, K, generator=generator)
    # Expert 4 gets no token at all.
    chosen = torch.stack([torch.randperm(4, generator=generator)[:K] for _ in range(N)])
    inputs = [t.requires_grad_() for t in (x, coefficients, w13, w2)]

    def plain(x: torch.Tensor, c: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("nd,nkid->nki", x, w13[chosen]).chunk(2, -1)
        return torch.einsum("nk,nki,nkdi->nd", c, F.silu(gate) * up, w2[chosen])

    ours = model.MixtureOfExperts.apply(x, coefficients, chosen, w13, w2)
    reference = plain(x, coefficients, w13, w2)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    grad = torch.randn(N, D, generator=generator)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(reference, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_attention_and_its_gradients_are_torchs(script: Script) -> None:
    model = script("model")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 8, generator=generator).requires_grad_() for heads in (6, 2, 2))
    ours = model.CausalAttention.apply(q, k, v)
    reference = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    grad = torch.randn(ours.shape, generator=generator)
    pairs = (torch.autograd.grad(out, (q, k, v), grad) for out in (ours, reference))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cached_decoding_equals_the_whole_forward(script: Script, small: Any) -> None:
    model, config, params, bias = small
    generation = script("generation")
    prompts = torch.randint(config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(2))
    ids = generation.generate_greedy(params, bias, prompts, 12, config)
    with torch.no_grad():
        hidden = model.forward(params, bias, ids[:, :-1], config).view(3, -1, config.hidden_size)
    assert torch.equal(F.linear(hidden, params["head"]).argmax(-1)[:, 8:], ids[:, 9:])


def test_repeats_mark_the_ends_of_ngrams_seen_before(script: Script) -> None:
    repeats = script("generation").repeats
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 9]])
    assert repeats(ids, prompt_len=0, n=3).tolist() == [[False] * 6 + [True, False]]
    assert not repeats(ids, prompt_len=7, n=3).any()  # the repetition lies in the prompt
    assert repeats(torch.zeros(1, 12, dtype=torch.long), prompt_len=4, n=3)[0, 4:].all()


def test_a_batch_depends_on_seed_and_step_alone(script: Script) -> None:
    batch = script("train").batch
    tokens = torch.arange(10_000)
    first = batch(tokens, 3, 4, 16, seed=0)
    assert torch.equal(first, batch(tokens, 3, 4, 16, seed=0))
    assert not torch.equal(first, batch(tokens, 3, 4, 16, seed=1))
    assert (first.diff(dim=1) == 1).all()  # each row is one piece of the text
    epoch = torch.cat([batch(tokens, step, 4, 16, seed=0)[:, 0] for step in range(155)])
    assert len(epoch.unique()) == len(epoch)


def test_the_rate_falls_to_zero_at_the_last_step(script: Script) -> None:
    schedule = script("train").Schedule(steps=1000, decay=0.5, unlikelihood=0.7)
    assert schedule.lr_scale(100) == schedule.lr_scale(500) == 1.0
    assert schedule.lr_scale(750) == pytest.approx(0.5)
    assert schedule.lr_scale(999) == pytest.approx(0.002)
    assert (schedule.window(499), schedule.window(500)) == (256, 512)


@pytest.mark.parametrize("shape", [(64, 272), (272, 64), (128, 128), (1, 1), (130, 257)])
def test_fp8_blocks_reach_the_whole_range_and_round_within_it(script: Script, shape: tuple[int, int]) -> None:
    layout = script("fp8_checkpoint")
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    quantized, scale_inv = layout.quantize_fp8(weight)
    assert quantized.dtype == torch.float8_e4m3fn
    assert scale_inv.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert quantized.float().abs().max() == 448
    error = (layout.dequantize_fp8(quantized, scale_inv) - weight).abs()
    # Half a step of 3 mantissa bits, or half the smallest subnormal.
    assert (error <= weight.abs() / 16 + scale_inv.max() * 2**-10).all()


def test_written_weights_read_back_and_come_out_the_same_twice(
    script: Script, small: Any, tmp_path: Path
) -> None:
    _, config, params, bias = small
    layout = script("fp8_checkpoint")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        layout.write_weights(tmp_path / name, params, bias, config)
    files = [path.name for path in sorted((tmp_path / "a").iterdir())]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    read, read_bias = layout.read_weights(tmp_path / "a", config)
    assert torch.equal(read_bias, bias)
    assert {name: w.shape for name, w in read.items()} == {name: w.shape for name, w in params.items()}
    for name, w in params.items():
        torch.testing.assert_close(read[name], w, rtol=1 / 16, atol=1e-3)


def test_orthogonalised_matrices_have_singular_values_near_one(script: Script) -> None:
    matrices = torch.randn(3, 64, 272, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(script("optimizer").orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_heldout_files_are_whole_and_in_no_training_part(script: Script) -> None:
    corpus = script("corpus")
    documents = [corpus.Document(f"m{i}.py", "x = 1\n" * 3000) for i in range(100)]
    train, heldout = corpus.split_heldout(documents)
    assert len(train) + len(heldout) == 100
    assert not {d.name for d in train} & {d.name for d in heldout}
    assert corpus.MAX_HELDOUT_BYTES - 18_000 < sum(len(d.text) for d in heldout) <= corpus.MAX_HELDOUT_BYTES


def test_bundled_modules_are_code_of_the_wheels_alone(script: Script, tmp_path: Path) -> None:
    folder = tmp_path / "ensurepip/_bundled"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "tool-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tool/code.py", "def add(a, b):\n    return a + b\n" * 4)
        wheel.writestr("tool/table.py", "VALUES = [1, 22, 333, 4444, 55555]\n" * 4)
        wheel.writestr("tool/short.py", "x = 1\n")
        wheel.writestr("tool/notes.txt", "def add(a, b): no code\n" * 10)
    assert [d.name for d in script("corpus").bundled_documents(tmp_path)] == [
        "tool-1-py3-none-any.whl/tool/code.py"
    ]
