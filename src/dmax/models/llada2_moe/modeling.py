"""LLaDA-2.x mixture-of-experts transformer: the one implementation, for training and decoding.

Nothing here is causal by itself: only the attention mask decides what a position sees. So one
network can be trained on [noisy | clean] and decoded block by block.

Shapes: B sequences, L new positions, T cached positions, D hidden, H query heads, G key/value
heads, d head size, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeMLP,
    Glm4MoeRotaryEmbedding,
    eager_attention_forward,
)

from dmax.attention import ATTENTION_FUNCTIONS, Mask, prepare_mask
from dmax.cache import BlockCache, CacheWindow
from dmax.kernels import can_fuse
from dmax.kernels.block_attention import block_attention
from dmax.kernels.moe import EXPERTS_FUNCTIONS, SILU, expert_terms, fits_kernels
from dmax.kernels.norm import add_and_norm, rms_norm
from dmax.kernels.router import route_tokens, router_logits, select_experts
from dmax.models.llada2_moe.configuration import LLaDA2MoeConfig
from dmax.models.llada2_moe.conversion import PER_EXPERT
from dmax.models.llada2_moe.files import check_before_loading
from dmax.models.quantization import QuantizedExperts, check_savable

Stream = Tensor | tuple[Tensor, Tensor]
"""The residual stream [B, L, D], or with it terms [B, L, T, D] that it still has to add."""


class LLaDA2MoeRMSNorm(nn.RMSNorm):
    """Root-mean-square norm in float32, cast back before the weight is applied."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """The norm of `x` [..., D], times the weight."""
        return rms_norm(x, self.weight, self.eps)


def sum_and_norm(stream: Stream, norm: LLaDA2MoeRMSNorm) -> tuple[Tensor, Tensor]:
    """The stream with its terms added, and its norm, each [B, L, D]."""
    hidden_states, terms = stream if isinstance(stream, tuple) else (stream, None)
    return add_and_norm(hidden_states, terms, norm)


class LLaDA2MoeRotaryEmbedding(Glm4MoeRotaryEmbedding):
    """Rotary positions for the first `rotary_dim` dimensions of every head, in split halves.

    Unlike those of the base class, the frequencies never change with the positions of a batch.
    """

    inv_freq: Tensor

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine, and sine with its sign, of positions [B, L] int64: each [B, L, 1, rotary_dim]."""
        # [B, L, 1, rotary_dim / 2]
        angles = position_ids[..., None, None].float() * self.inv_freq.float()
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        cos = torch.cat((cos, cos), dim=-1)
        sin = torch.cat((-sin, sin), dim=-1)
        return cos.to(dtype), sin.to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of `x` [B, L, heads, d]; the others pass through."""
    rotary_dim = cos.shape[-1]
    rotary, rest = x.split_with_sizes((rotary_dim, x.shape[-1] - rotary_dim), dim=-1)
    swapped_halves = rotary.roll(rotary_dim // 2, dims=-1)
    return torch.cat((rotary * cos + swapped_halves * sin, rest), dim=-1)


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
        columns = config.num_attention_heads * config.head_dim
        self.dense = nn.Linear(columns, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Mask,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """From hidden states [B, L, D] to [B, L, D], with keys and values through `cache`."""
        heads = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim))
        if isinstance(cache, CacheWindow) and cache.in_place:
            norms = self.query_layernorm.weight, self.key_layernorm.weight
            eps = self.query_layernorm.eps
            inputs = heads, norms, eps, rotary, cache, self.layer_idx, self.scaling
            return self.dense(block_attention(*inputs))
        query, key, value = heads.split_with_sizes((*self.num_heads, self.num_heads[1]), dim=2)
        # Rotation takes queries and keys together, [B, L, H + G, d].
        query_key = torch.cat((self.query_layernorm(query), self.key_layernorm(key)), dim=2)
        query_key = apply_rotary(query_key, *rotary).transpose(1, 2)
        query, key = query_key.split_with_sizes(self.num_heads, dim=1)  # [B, H, L, d], [B, G, L, d]
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        attend = ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        options = {"scaling": self.scaling, "dropout": dropout}
        output, _ = attend(self, query, key, value, attention_mask, **options, **kwargs)
        return self.dense(output.flatten(2))


class LLaDA2MoeMLP(Glm4MoeMLP):
    """Gated feed-forward network: down(act(gate(x)) · up(x))."""


@use_experts_implementation(experts_interface=EXPERTS_FUNCTIONS)
class LLaDA2MoeExperts(nn.Module):
    """All routed experts of a layer, stacked; transformers calls this `forward` "eager"."""

    config: Any

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        inner = config.moe_intermediate_size
        hidden = config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def runs_fused(self) -> bool:
        """Whether these experts are to run as `fused_moe`, all of them in one place."""
        is_fused = self.config._experts_implementation == "fused_moe"
        return is_fused and not getattr(self, "_is_expert_parallel", False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum over each token's experts [N, D]; arguments as in `dmax.kernels.moe`."""
        experts = top_k_index.flatten()  # [N * K], one for each pair of token and expert
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=self.num_experts).tolist()
        tokens = order // top_k_index.shape[1]
        inner = self.down_proj.shape[-1]
        outputs = []
        for expert, rows in enumerate(hidden_states[tokens].split(counts)):
            # Two products, and a sum in the router's order, are what the published model computes.
            gate = F.linear(rows, self.gate_up_proj[expert, :inner])
            up = F.linear(rows, self.gate_up_proj[expert, inner:])
            outputs.append(F.linear(self.act_fn(gate) * up, self.down_proj[expert]))
        sorted_outputs = torch.cat(outputs)
        pairs = torch.empty_like(sorted_outputs).index_copy(0, order, sorted_outputs)
        weighted = pairs.view(*top_k_index.shape, -1) * top_k_weights[..., None]  # [N, K, D]
        return weighted.sum(dim=1).to(hidden_states.dtype)


class LLaDA2MoeRouter(nn.Module):
    """Sigmoid router in float32 with a choice by groups; `expert_bias` steers only the choice."""

    expert_bias: Tensor | None

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "top_k": config.num_experts_per_tok,
            "num_groups": config.n_group,
            "num_kept_groups": config.topk_group,
            "normalizes": config.norm_topk_prob and config.num_experts_per_tok > 1,
            "scaling": config.routed_scaling_factor,
        }
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of tokens [N, D]: indices [N, K] int64 and weights [N, K] float32."""
        logits = router_logits(x, self.weight)
        return select_experts(logits, self.expert_bias, **self.settings)

    def route(self, x: Tensor, idle: Tensor | None, num_terms: int) -> Any:
        """The same as lists of every expert's tokens (`dmax.kernels.router.route_tokens`)."""
        bias = self.expert_bias
        return route_tokens(x, self.weight, bias, idle, num_terms, **self.settings)


FUSED_MODULES = (LLaDA2MoeExperts, QuantizedExperts, nn.Linear, *SILU)


class LLaDA2MoeSparseBlock(nn.Module):
    """Routed experts plus the shared expert, which sees every token."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.gate = LLaDA2MoeRouter(config)
        self.experts = LLaDA2MoeExperts(config)
        self.top_k = config.num_experts_per_tok
        self.has_one_width = config.num_shared_experts <= 1
        self.shared_experts: nn.Module | None = None
        if config.num_shared_experts:
            width = config.moe_intermediate_size * config.num_shared_experts
            self.shared_experts = LLaDA2MoeMLP(config, width)

    def forward(self, hidden_states: Tensor, idle: Tensor | None = None) -> Tensor:
        """The sum over experts [B, L, D], or with kernels its terms [B, L, T, D].

        Args:
            hidden_states: [B, L, D].
            idle: [B] bool, rows that stand for nothing: kernels send them to no routed expert.
        """
        tokens = hidden_states.flatten(0, 1)  # [B * L, D]
        shared = self.shared_experts
        if self._is_fused(tokens):
            routing = self.gate.route(tokens, idle, self.top_k + (shared is not None))
            experts = self.experts.gate_up_proj, self.experts.down_proj
            shared_weights: Any = None if shared is None else tuple(shared.parameters())
            terms = expert_terms(tokens, routing, *experts, shared_weights, is_whole=idle is None)
            return terms.unflatten(0, hidden_states.shape[:2])
        index, weights = self.gate(tokens)
        output = self.experts(tokens, index, weights.to(tokens.dtype))
        if shared is not None:
            output = shared(tokens) + output
        return output.view_as(hidden_states)

    def _is_fused(self, tokens: Tensor) -> bool:
        """Whether kernels serve the routed experts and the shared one together.

        Modules of other types, as those with adapters, run by themselves.
        """
        if not can_fuse(tokens):
            return False
        shared = () if self.shared_experts is None else self.shared_experts.children()
        return (
            all(type(module) in FUSED_MODULES for module in (self.experts, *shared))
            and self.has_one_width
            and self.experts.runs_fused()
            and fits_kernels(tokens, len(tokens) * self.top_k, *self.parameters())
        )


class LLaDA2MoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward; the first `first_k_dense_replace` layers have no experts."""

    # A `ContextCache` records a layer once, however often backward replays it.
    _can_checkpoint_with_cache = True

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        self.mlp: nn.Module
        if layer_idx < config.first_k_dense_replace:
            self.mlp = LLaDA2MoeMLP(config, config.intermediate_size)
        else:
            self.mlp = LLaDA2MoeSparseBlock(config)
        self.input_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, stream: Stream, cache: Any = None, **kwargs: Any) -> Stream:
        hidden_states, normal = sum_and_norm(stream, self.input_layernorm)
        attended = self.attention(normal, cache=cache, **kwargs)
        norm = self.post_attention_layernorm
        hidden_states, normal = add_and_norm(hidden_states, attended, norm)
        if not isinstance(self.mlp, LLaDA2MoeSparseBlock):
            return hidden_states + self.mlp(normal)
        output = self.mlp(normal, getattr(cache, "idle", None))
        # The next norm sums terms in its own kernel.
        return (hidden_states, output) if output.dim() == 4 else hidden_states + output


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    config: LLaDA2MoeConfig
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # `expert_bias` is balanced in float32, also where the weights are bfloat16.
    _keep_in_fp32_modules_strict = ["expert_bias"]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the published per-expert layout, even if the model was read from merged files."""
        check_savable(self)
        # Without this, transformers would write the layout that it read.
        self._weight_conversions = deepcopy(PER_EXPERT)
        super().save_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LLaDA2MoeExperts | LLaDA2MoeRouter):
            for weight in module.parameters():
                nn.init.normal_(weight, std=self.config.initializer_range)
            for bias in module.buffers():
                nn.init.zeros_(bias)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """Embedding, decoder layers and final norm; only the mask decides what a position sees."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LLaDA2MoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LLaDA2MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LLaDA2MoeRotaryEmbedding(config)
        self.post_init()

    @property
    def takes_staircase(self) -> bool:
        """Whether `forward` takes a `Staircase` for a mask."""
        return self.config._attn_implementation == "sdpa"

    def fits_in_place(self, cache: BlockCache) -> bool:
        """Whether `forward` takes a `CacheWindow` in place over this cache, if kernels run there.

        Not if weights are elsewhere (offloaded) or of another dtype.
        """
        store = cache.keys[0]
        norms = [module for module in self.modules() if isinstance(module, LLaDA2MoeRMSNorm)]
        kinds = {(norm.weight.dtype, norm.weight.device) for norm in norms}
        return kinds == {(store.dtype, store.device)}

    def _rotary_table(self, cache: BlockCache) -> tuple[Tensor, Tensor]:
        """Cosine and sine of all positions of a cache, as of `rotary_emb`, computed once."""
        if cache.rotary is None:
            store = cache.keys[0]
            positions = torch.arange(cache.capacity, device=store.device)
            cache.rotary = self.rotary_emb(positions[None], store.dtype)
        return cache.rotary

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The final hidden states [B, L, D]; for the arguments see `LLaDA2MoeModelLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given")
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if isinstance(past_key_values, CacheWindow) and past_key_values.in_place:
            rotary = self._rotary_table(past_key_values.cache)
        else:
            if position_ids is None:
                start = 0 if past_key_values is None else past_key_values.get_seq_length()
                end = start + hidden_states.shape[1]
                position_ids = torch.arange(start, end, device=hidden_states.device)[None]
            rotary = self.rotary_emb(position_ids, hidden_states.dtype)
        mask = prepare_mask(attention_mask, hidden_states.dtype, self.config._attn_implementation)
        stream: Stream = hidden_states
        for layer in self.layers:
            # `cache`, not `past_key_values`: that one transformers drops under gradient
            # checkpointing, and with it the clean context that the noisy streams of training attend
            # to (`ContextCache`).
            stream = layer(
                stream, rotary=rotary, attention_mask=mask, cache=past_key_values, **kwargs
            )
        # By position, as the name of the second field depends on the release of transformers.
        _, normal = sum_and_norm(stream, self.norm)
        return BaseModelOutputWithPast(normal, past_key_values)


class LLaDA2MoeModelLM(LLaDA2MoePreTrainedModel):
    """LLaDA-2.x with its LM head; published checkpoints name this class in `architectures`."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}
    has_linear_head = True  # logits are hidden states times `lm_head.weight` and nothing else

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As in transformers, but damaged files in a local folder raise an `InputError` first."""
        check_before_loading(cls, pretrained_model_name_or_path, args, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | slice = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the token *at* each position (no shift), as masked diffusion does.

        Args:
            input_ids: [B, L] int64 token ids; exactly one of these and `inputs_embeds` is given.
            attention_mask: bool (True = visible) or additive [B, 1, L, T + L], padding [B, T + L]
                (1 = visible), a flex_attention `BlockMask`, a `Staircase` with "sdpa", or None for
                "everything visible".
            position_ids: [B, L] int64; without them, positions count on from the cache.
            past_key_values: any transformers `Cache`, a `CacheWindow` or the `ContextCache` of
                training. A window that is in place (see `fits_in_place`) says itself what its rows
                see, and where they stand.
            inputs_embeds: [B, L, D], which may be mixtures of embeddings (`dmax.blend`).
            labels: [B, L] int64, -100 where no loss is wanted; `loss` is the mean cross-entropy.
            logits_to_keep: number of last positions to compute logits for (0: all), or a slice.

        Returns:
            `.logits` [B, L or fewer, V] in the model's dtype, `.loss` if labels were given, and
            `.past_key_values`.

        Raises:
            ValueError: neither or both of ids and embeddings, or a mask of another rank.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs
        )
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None)
        logits = self.lm_head(outputs.last_hidden_state[:, logits_to_keep])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return CausalLMOutputWithPast(loss, logits, past_key_values)
