"""The same drafters as a plain training loop has them: transformers' modules, a dense mask over all keys, autograd.

DFlash is put together as z-lab's module is (Qwen3's parts, context and block side by side as keys), EAGLE3 as
SpecForge's (Llama's parts, the keys of all steps side by side).  Parameters bear the names of the checkpoints.

Shapes: B sequences, T positions, A anchors, K slots of a block, N slots of a step, S keys, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from m27quant.drafters.batch import Batch, Shared
from m27quant.drafters.dflash import DFlashSpec
from m27quant.drafters.eagle3 import Eagle3Spec, Vocabulary
from m27quant.drafters.layers import LayerSpec

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps",
)  # fmt: skip


def _sizes(spec: LayerSpec) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta}
    return {name: getattr(spec, name) for name in SIZES} | {
        "rope_parameters": rope,
        "attn_implementation": "sdpa",
    }


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=module.scaling)
    return module.o_proj(out.flatten(2))


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(*x.shape[:2], -1, head_dim)


def _cross_entropy(logits: Tensor, teacher: Tensor, tokens: Tensor, soft: float) -> Tensor:
    log_q = F.log_softmax(logits.float(), -1)
    distilled = -(F.softmax(teacher.float(), -1) * log_q).sum(-1)
    return soft * distilled + (1 - soft) * F.nll_loss(log_q, tokens, reduction="none")


class PlainDFlash(nn.Module):
    def __init__(self, spec: DFlashSpec) -> None:
        super().__init__()
        self.spec, config = spec, Qwen3Config(**_sizes(spec))
        D, eps = spec.hidden_size, spec.rms_norm_eps
        self.fc = nn.Linear(len(spec.hidden_states) * D, D, bias=False)
        self.hidden_norm, self.norm = (modeling_qwen3.Qwen3RMSNorm(D, eps) for _ in range(2))
        self.layers = nn.ModuleList(
            modeling_qwen3.Qwen3DecoderLayer(config, n) for n in range(spec.num_hidden_layers)
        )
        self.rope = modeling_qwen3.Qwen3RotaryEmbedding(config)

    def hidden(self, batch: Batch, anchors_BA: Tensor, shared: Shared, block: int) -> Tensor:
        """[B, A, K, D], after the final norm."""
        (B, T), A, K = batch.ids_BT.shape, anchors_BA.shape[1], block
        device = anchors_BA.device
        ids = torch.full((B, A, K), self.spec.mask_token_id, device=device)
        ids[..., 0] = batch.ids_BT.gather(1, anchors_BA)
        at = (anchors_BA[..., None] + torch.arange(K, device=device)).flatten(1)
        before = torch.arange(T, device=device) < anchors_BA.repeat_interleave(K, 1)[..., None]
        group = torch.arange(A * K, device=device) // K
        own = (group[:, None] == group).expand(B, -1, -1)
        mask = torch.cat((before, own), -1)[:, None]
        x = F.embedding(ids.flatten(1), shared.embed_VD)
        context = self.hidden_norm(self.fc(batch.taps_BTF))
        positions = torch.cat((torch.arange(T, device=device).expand(B, -1), at), 1)
        cos, sin = self.rope(x, positions)
        for layer in self.layers:
            h = layer.input_layernorm(x)
            x = x + self._attention(layer.self_attn, h, torch.cat((context, h), 1), cos, sin, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x).view(B, A, K, -1)

    def loss(
        self, batch: Batch, anchors_BA: Tensor, shared: Shared, slot_weights_K1: Tensor, soft: float
    ) -> Tensor:
        K, T, device = len(slot_weights_K1) + 1, batch.ids_BT.shape[1], anchors_BA.device
        hidden = self.hidden(batch, anchors_BA, shared, K)[:, :, 1:]
        at = anchors_BA[..., None] + torch.arange(1, K, device=device)
        counted = at < batch.lengths_B[:, None, None]
        row = torch.arange(len(at), device=device)[:, None, None]
        at = at.clamp(max=T - 1)
        teacher = F.linear(batch.final_BTD[row, at - 1][counted], shared.head_VD)
        logits = F.linear(hidden[counted], shared.head_VD)
        losses = _cross_entropy(logits, teacher, batch.ids_BT[row, at][counted], soft)
        weights = slot_weights_K1.expand_as(at)[counted]
        return (losses * weights).sum() / weights.sum()

    def _attention(self, a: Any, h: Tensor, both: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        C, R = self.spec.head_dim, h.shape[1]
        q = a.q_norm(_heads(a.q_proj(h), C)).transpose(1, 2)
        k = a.k_norm(_heads(a.k_proj(both), C)).transpose(1, 2)
        v = _heads(a.v_proj(both), C).transpose(1, 2)
        q, _ = modeling_qwen3.apply_rotary_pos_emb(q, q, cos[:, -R:], sin[:, -R:])
        k, _ = modeling_qwen3.apply_rotary_pos_emb(k, k, cos, sin)
        return _attend(a, q, k, v, mask)


class PlainEagle3(nn.Module):
    def __init__(self, spec: Eagle3Spec) -> None:
        super().__init__()
        self.spec, config = spec, LlamaConfig(**_sizes(spec))
        D, eps, C = spec.hidden_size, spec.rms_norm_eps, spec.head_dim
        self.fc = nn.Linear(len(spec.hidden_states) * D, D, bias=False)
        self.midlayer = modeling_llama.LlamaDecoderLayer(config, 0)
        for name, count in (
            ("q", spec.num_attention_heads),
            ("k", spec.num_key_value_heads),
            ("v", spec.num_key_value_heads),
        ):
            setattr(self.midlayer.self_attn, f"{name}_proj", nn.Linear(2 * D, count * C, bias=False))
        self.midlayer.hidden_norm, self.norm = (modeling_llama.LlamaRMSNorm(D, eps) for _ in range(2))
        self.lm_head = nn.Linear(D, spec.draft_vocab_size, bias=False)
        self.rope = modeling_llama.LlamaRotaryEmbedding(config)

    def hidden(self, batch: Batch, shared: Shared, num_steps: int) -> list[Tensor]:
        """[B, N, D] of each step, after the final norm; slots that reach beyond the text hold rubbish."""
        (B, T), layer, C = batch.ids_BT.shape, self.midlayer, self.spec.head_dim
        N, device, a = T - 2, batch.ids_BT.device, self.midlayer.self_attn
        hidden = self.fc(batch.taps_BTF[:, :N])
        causal = torch.ones(N, N, dtype=torch.bool, device=device).tril()
        own = torch.eye(N, dtype=torch.bool, device=device)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outputs = []
        for j in range(num_steps):
            ids = F.pad(batch.ids_BT, (0, num_steps))[:, 1 + j : 1 + j + N]
            embedded = F.embedding(ids, shared.embed_VD)
            u = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(hidden)), -1)
            q, k, v = (_heads(f(u), C).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
            cos, sin = self.rope(u, torch.arange(j, j + N, device=device).expand(B, -1))
            q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
            keys.append(k)
            values.append(v)
            mask = torch.cat((causal, *[own] * j), -1)[None, None].expand(B, 1, -1, -1)
            hidden = hidden + _attend(a, q, torch.cat(keys, 2), torch.cat(values, 2), mask)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            outputs.append(self.norm(hidden))
        return outputs

    def loss(
        self, batch: Batch, shared: Shared, vocabulary: Vocabulary, num_steps: int, decay: float, soft: float
    ) -> Tensor:
        B, N = len(batch.ids_BT), batch.ids_BT.shape[1] - 2
        learned, tokens_BT = batch.learned_BT(), vocabulary.rows_V()[batch.ids_BT].roll(-1, 1)
        with torch.no_grad():
            target = F.linear(batch.final_BTD, shared.head_VD)
            known = vocabulary.rows_V()[target.argmax(-1)] >= 0
            known &= (tokens_BT >= 0) | (soft == 1)
            target = target[..., vocabulary.tokens_W]
        written, losses, first = learned.new_ones(B, N), [], 0
        for j, hidden in enumerate(self.hidden(batch, shared, num_steps)):
            n = N - j
            written = written[:, :n] & learned[:, 2 + j : 2 + j + n]
            counted = F.pad(written & known[:, 1 + j : 1 + j + n], (0, j))
            at = counted.nonzero()
            teacher, tokens = (x[at[:, 0], at[:, 1] + 1 + j] for x in (target, tokens_BT))
            loss = _cross_entropy(self.lm_head(hidden[counted]), teacher, tokens.clamp(min=0), soft)
            losses.append(decay**j * loss.sum())
            first = first or len(at)
        return torch.stack(losses).sum() / first
