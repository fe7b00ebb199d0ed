"""LLaDA-2.x mixture-of-experts transformer: the one implementation, for training, reference and engine.

Shapes: B sequences, L new positions, T cached positions, D hidden, H query heads, G key/value
    heads, d head size,
E experts, K experts per token, V vocabulary. Nothing here is causal by itself: the attention mask
alone decides what a position sees, which is what lets one network be trained on [noisy | clean] and
decoded block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dmax.attention import prepare_mask
from dmax.kernels.attention import ATTENTION_FUNCTIONS
from dmax.kernels.block_attention import block_attention, can_attend
from dmax.kernels.norm import add_rms_norm, rms_norm
from dmax.kernels.quant import check_savable
from dmax.kernels.router import Routing, route
from dmax.models.llada2_moe.configuration import LLaDA2MoeConfig
from dmax.models.llada2_moe.conversion import PER_EXPERT
from dmax.models.llada2_moe.files import check_before_loading


class LLaDA2MoeRMSNorm(nn.Module):
    """Root-mean-square norm in float32, cast back before the weight is applied."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor, more: Tensor | None = None, *, is_normal: bool = False) -> Any:
        """Of `x` [..., D], or with `more` of their sum, which comes first; `is_normal`: only the weight is applied."""
        if is_normal:
            return self.weight * x
        return (
            rms_norm(x, self.weight, self.eps)
            if more is None
            else add_rms_norm(x, more, self.weight, self.eps)
        )


class LLaDA2MoeRotaryEmbedding(nn.Module):
    """Rotary positions for the first `rotary_dim` dimensions of every head (half-split convention)."""

    inv_freq: Tensor

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        parameters = config.rope_parameters or {}
        self.rope_type = parameters.get("rope_type", "default")
        self.config = config
        inv_freq, self.attention_scaling = self.compute_default_rope_parameters(config)
        if self.rope_type != "default":
            inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config, None)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: LLaDA2MoeConfig, *_: Any, **__: Any
    ) -> tuple[Tensor, float]:
        """Inverse frequencies `[rotary_dim / 2]` float32 and the cosine/sine scale; the name is transformers' own."""
        theta = (config.rope_parameters or {}).get("rope_theta", config.default_theta)
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
        return 1.0 / theta**exponents, 1.0

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`position_ids` [B, L] int64 to cosine, and sine with a sign, each [B, L, 1, rotary_dim] in `dtype`."""
        angles = (
            position_ids[..., None, None].float() * self.inv_freq.float()
        )  # [B, L, 1, rotary_dim / 2]
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of `x` [B, L, heads, d]; dimensions past the rotary ones pass through."""
    rotary_dim = cos.shape[-1]
    rotary, passthrough = x.split_with_sizes((rotary_dim, x.shape[-1] - rotary_dim), dim=-1)
    swapped = rotary.roll(rotary_dim // 2, dims=-1)  # its halves
    return torch.cat((rotary * cos + swapped * sin, passthrough), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention, softmax in float32. `attention_mask`: additive [B, 1, L, T + L] or None.

    Returns the heads' outputs [B, L, H, d] and the attention weights [B, H, L, T + L].
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # [B, H, L, T + L]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class LLaDA2MoeAttention(nn.Module):
    """Grouped-query attention with per-head query/key RMSNorm and partial rotary positions."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = (config.num_attention_heads, config.num_key_value_heads)
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.use_qkv_bias)
        self.query_layernorm = LLaDA2MoeRMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_layernorm = LLaDA2MoeRMSNorm(config.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(
            self.num_heads[0] * config.head_dim, config.hidden_size, bias=config.use_bias
        )

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`hidden_states` [B, L, D] to [B, L, D]; keys and values go through `cache.update` if given."""
        batch, length, _ = hidden_states.shape
        heads = self.query_key_value(hidden_states).view(batch, length, -1, self.head_dim)
        norms = self.query_layernorm.weight, self.key_layernorm.weight
        if can_attend(heads, norms, cache):
            eps = self.query_layernorm.eps
            return self.dense(
                block_attention(heads, norms, eps, rotary, cache, self.layer_idx, self.scaling)
            )
        query_key, value = heads.split_with_sizes((sum(self.num_heads), self.num_heads[1]), dim=2)
        # Norm and rotation take queries and keys together, [B, L, H + G, d]; only the norms'
        # weights differ.
        query_key = F.rms_norm(query_key, (self.head_dim,), eps=self.query_layernorm.eps)
        query, key = query_key.split_with_sizes(self.num_heads, dim=2)
        query_key = torch.cat(
            (self.query_layernorm(query, is_normal=True), self.key_layernorm(key, is_normal=True)),
            dim=2,
        )
        query_key = apply_rotary(query_key, *rotary).transpose(1, 2)
        query, key = query_key.split_with_sizes(self.num_heads, dim=1)  # [B, H, L, d], [B, G, L, d]
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        return self.dense(output.reshape(batch, length, -1))


class LLaDA2MoeMLP(nn.Module):
    """Gated feed-forward network: down(act(gate(x)) · up(x))."""

    def __init__(self, config: LLaDA2MoeConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@use_experts_implementation
class LLaDA2MoeExperts(nn.Module):
    """All routed experts of a layer, stacked; this forward is the `eager` entry of transformers' experts interface."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        inner = config.moe_intermediate_size
        hidden = config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over each token's experts; tokens [N, D], index [N, K] int64, weights [N, K] to [N, D]."""
        order = top_k_index.flatten().argsort(stable=True)  # token-expert pairs, sorted by expert
        counts = top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
        inner = self.down_proj.shape[-1]
        outputs = []
        for expert, rows in enumerate(hidden_states[order // top_k_index.shape[1]].split(counts)):
            # Two products, and below a sum in the router's order: bit for bit what the published
            # model computes.
            gate = F.linear(rows, self.gate_up_proj[expert, :inner])
            up = F.linear(rows, self.gate_up_proj[expert, inner:])
            outputs.append(F.linear(self.act_fn(gate) * up, self.down_proj[expert]))
        sorted_outputs = torch.cat(outputs)
        pairs = torch.empty_like(sorted_outputs).index_copy(0, order, sorted_outputs)
        weighted = pairs.view(*top_k_index.shape, -1) * top_k_weights[..., None]  # [N, K, D]
        return weighted.sum(dim=1).to(hidden_states.dtype)


class LLaDA2MoeRouter(nn.Module):
    """Sigmoid router in float32 with group-limited selection; `expert_bias` steers the choice, never the weights."""

    expert_bias: Tensor | None

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        top_k = config.num_experts_per_tok
        normalizes = config.norm_topk_prob and top_k > 1
        self.routing = Routing(
            top_k, config.n_group, config.topk_group, normalizes, config.routed_scaling_factor
        )
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, D] to expert indices [N, K] int64 and their weights [N, K] float32."""
        return route(x, self.weight, self.expert_bias, self.routing)


class LLaDA2MoeSparseBlock(nn.Module):
    """Routed experts plus the always-on shared expert."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.gate = LLaDA2MoeRouter(config)
        self.experts = LLaDA2MoeExperts(config)
        self.shared_experts = (
            LLaDA2MoeMLP(config, config.moe_intermediate_size * config.num_shared_experts)
            if config.num_shared_experts
            else None
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(0, 1)  # [B * L, D]
        index, weights = self.gate(tokens)
        output = self.experts(tokens, index, weights.to(tokens.dtype))
        if self.shared_experts is not None:
            output = self.shared_experts(tokens) + output
        return output.view_as(hidden_states)


class LLaDA2MoeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward; the first `first_k_dense_replace` layers have no experts."""

    # The cache that training passes records a layer once, however often backward replays it
    # (`ContextCache`).
    _can_checkpoint_with_cache = True

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        self.mlp: nn.Module = (
            LLaDA2MoeMLP(config, config.intermediate_size)
            if layer_idx < config.first_k_dense_replace
            else LLaDA2MoeSparseBlock(config)
        )
        self.input_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = self.attention(self.input_layernorm(hidden_states), **kwargs)
        hidden_states, normal = self.post_attention_layernorm(hidden_states, attended)
        return hidden_states + self.mlp(normal)


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    config: LLaDA2MoeConfig
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # expert_bias is balanced in float32 while the weights may be bf16
    _keep_in_fp32_modules_strict = ["expert_bias"]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the published per-expert layout, also for a model that was read from merged files."""
        check_savable(self)
        self._weight_conversions = deepcopy(
            PER_EXPERT
        )  # transformers would otherwise write the layout it read
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LLaDA2MoeExperts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, LLaDA2MoeRouter):
            nn.init.normal_(module.weight, std=std)
            if module.expert_bias is not None:
                nn.init.zeros_(module.expert_bias)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """Embedding, decoder layers and final norm; what a position sees is decided by `attention_mask` alone."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LLaDA2MoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LLaDA2MoeRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `LLaDA2MoeModelLM.forward`; returns the final hidden states [B, L, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given")
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(
                start, start + hidden_states.shape[1], device=hidden_states.device
            )[None]
        rotary = self.rotary_emb(position_ids, hidden_states.dtype)
        mask = prepare_mask(attention_mask, hidden_states.dtype, self.config._attn_implementation)
        for layer in self.layers:
            # `cache`, not `past_key_values`: that one transformers drops under gradient
            # checkpointing, and with it the clean context that the noisy streams of training attend
            # to (`ContextCache`).
            hidden_states = layer(
                hidden_states, rotary=rotary, attention_mask=mask, cache=past_key_values, **kwargs
            )
        # By position: the name of the second field depends on the release of transformers.
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)


class LLaDA2MoeModelLM(LLaDA2MoePreTrainedModel):
    """LLaDA-2.x with its language-model head; the class name is the `architectures` entry of published checkpoints."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}
    has_linear_head = True  # logits are hidden states times `lm_head.weight`, nothing more: the engine may fuse them

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but damaged or foreign files in a local folder raise one clear `InputError` first."""
        check_before_loading(cls, pretrained_model_name_or_path, args, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | slice = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the token *at* each position (no shift), as masked diffusion does.

        Args:
            input_ids: [B, L] int64 token ids; or `inputs_embeds` instead, exactly one of the two.
            attention_mask: bool (True = visible) or additive [B, 1, L, T + L], padding [B, T + L]
                (1 = visible), a flex_attention `BlockMask`, or None for "everything visible".
            position_ids: [B, L] int64; counted on from the cache when absent.
            past_key_values: any transformers `Cache`, or `dmax.cache.BlockCache`.
            inputs_embeds: [B, L, D], mixtures of embeddings included (`dmax.blend`).
            labels: [B, L] int64, -100 where no loss is wanted; adds the mean cross-entropy as
                `loss`.
            logits_to_keep: number of last positions to compute logits for, or a slice of positions;
                0 means all.

        Returns:
            `.logits` [B, L or kept, V] in the model's dtype, `.loss` if labels were given,
            `.past_key_values`.

        Raises:
            ValueError: neither or both of ids and embeddings, or a mask of another rank.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else logits_to_keep
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states[:, kept] if isinstance(kept, slice) else hidden_states)
        loss = (
            None
            if labels is None
            else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        )
        return CausalLMOutputWithPast(loss, logits, past_key_values)
