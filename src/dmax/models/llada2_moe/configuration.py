"""Configuration of LLaDA-2.x models, with the attribute names of the published `config.json`."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, Self

from transformers import PreTrainedConfig

MAY_BE_ZERO = ("first_k_dense_replace", "num_shared_experts", "n_group", "topk_group")

# What other engines ask of a configuration, and what this architecture always is.
ONLY = {"use_qk_norm": True, "use_rmsnorm": True, "norm_head": False, "use_sliding_window": False}
NO_DROPOUT = {"embedding_dropout": 0.0, "output_dropout": 0.0}  # theirs is 0.1 without a value
ROUTER = {"router_dtype": "fp32"}  # they choose experts in the dtype of the weights without it


class LLaDA2MoeConfig(PreTrainedConfig):
    """Configuration of a LLaDA-2.x model; the defaults are those of LLaDA-2.0-mini.

    A published configuration names neither a mask token nor a block length. Its `mask_token_id` and
    `block_length` stay None; the tokenizer and the family's default of 32 then decide. Checkpoints
    written by dmax name both.
    """

    model_type = "llada2_moe"
    keys_to_ignore_at_inference = ["past_key_values"]
    # No `default_theta` of transformers' own: the family's value applies when a config names none.
    default_theta = 600_000.0

    vocab_size: int = 157_184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    hidden_act: str = "silu"
    use_qkv_bias: bool = False
    use_bias: bool = False
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 16_384
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    partial_rotary_factor: float = 0.5
    rope_parameters: dict[str, Any] | None = None

    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 512
    first_k_dense_replace: int = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    score_function: str = "sigmoid"
    moe_router_enable_expert_bias: bool = True

    use_cache: bool = True
    pad_token_id: int | None = 156_892
    eos_token_id: int | list[int] | None = 156_892
    mask_token_id: int | None = None
    block_length: int | None = None

    router_dtype = ROUTER["router_dtype"]  # also where the files say nothing

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A configuration, also one that is unpickled; Auto classes know its model from then on.

        Sooner is too soon: transformers imports its Auto classes while it defines what models
        derive from.
        """
        import_module("dmax.models.auto")
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what router and attention rely on; a `ValueError` names the wrong fields."""
        for name in LLaDA2MoeConfig.__annotations__:
            if not name.endswith("_token_id"):
                self._check_field(name)
        for name, only in ONLY.items():
            if kwargs.get(name, only) is not only:
                raise ValueError(f"`{name}` must be {only} for llada2_moe, got {kwargs[name]!r}")
        kwargs.pop("model_type", None)  # merged training checkpoints name another
        super().__post_init__(**kwargs)
        rope = {"rope_theta": None, "factor": 1} | (self.rope_parameters or {})
        for name in ("rope_theta", "factor"):
            if not isinstance(rope[name], (int, float)) or not 0 < rope[name] < math.inf:
                raise ValueError(f"`{name}` must be a number above 0, got {rope[name]!r}")
        score = self.score_function
        if score != "sigmoid":
            raise ValueError(f"`score_function` must be 'sigmoid' for llada2_moe, got {score!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of "
                f"`num_key_value_heads` ({self.num_key_value_heads})"
            )
        num_groups = max(self.n_group, 1)
        if self.num_experts % num_groups:
            raise ValueError(
                f"`num_experts` ({self.num_experts}) must be a multiple of "
                f"`n_group` ({self.n_group})"
            )
        choice = self.num_experts * min(self.topk_group, self.n_group) // num_groups
        has_experts = self.num_hidden_layers > self.first_k_dense_replace
        if has_experts and not 1 <= self.num_experts_per_tok <= choice:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must lie between 1 and the "
                f"{choice} experts of the `topk_group` ({self.topk_group}) groups that a token may "
                "choose from"
            )

    def _check_field(self, name: str) -> None:
        value = getattr(self, name)
        kind = type(getattr(LLaDA2MoeConfig, name))
        allowed = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(kind)
        if allowed is None:
            return
        if type(value) not in allowed:
            raise ValueError(f"`{name}` must be {kind.__name__}, got {value!r}")
        low = 0 if kind is float or name in MAY_BE_ZERO else 1
        if kind in (int, float) and not low <= value < math.inf:
            raise ValueError(f"`{name}` must be at least {low}, got {value!r}")

    @property
    def rotary_dim(self) -> int:
        """Number of leading dimensions of a head that carry rotary positions."""
        return int(self.head_dim * self.partial_rotary_factor)

    @rotary_dim.setter
    def rotary_dim(self, value: int) -> None:
        # Published configurations store it beside the factor that it follows from.
        expected = self.rotary_dim
        if value != expected:
            product = "`partial_rotary_factor` × `head_dim`"
            raise ValueError(f"`rotary_dim` {value} contradicts {product} {expected}")

    def to_dict(self) -> dict[str, Any]:
        """Published keys beside transformers' own, so that other engines read what we write."""
        record = {**ONLY, **NO_DROPOUT, **ROUTER, **super().to_dict()}
        rope = record["rope_parameters"]
        record["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            names = rope.keys() - {"rope_theta", "partial_rotary_factor"}
            record["rope_scaling"] = {name: rope[name] for name in sorted(names)}
        record["rotary_dim"] = self.rotary_dim
        return record


def register_configuration(auto: Any) -> None:
    """Make `AutoConfig` know the family; `auto` is the module that defines `AutoConfig`."""
    auto.AutoConfig.register(LLaDA2MoeConfig.model_type, LLaDA2MoeConfig, exist_ok=True)
    # Merged training checkpoints name another type; the model and all that it saves have our own.
    auto.CONFIG_MAPPING.register("llada2_moe_veomni", LLaDA2MoeConfig, exist_ok=True)
