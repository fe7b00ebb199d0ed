"""Any dense transformers decoder (Llama, Qwen2, Qwen3, …) as a block-diffusion model.

There is no modelling file of ours for them. A causal language model differs from what we need in
three things. It hides later positions by itself unless it is given a 4-D mask. It wants that mask
in a form that depends on its attention implementation. It takes its cache under a name that depends
on the release of transformers. All three are settled in the inputs of the model; its weights, class
and files stay as they were published.

Shapes: B sequences, L new positions, T cached positions.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from dmax.attention import prepare_mask
from dmax.errors import InputError, show
from dmax.special_ids import MASK_TOKEN

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")  # those that take any mask
LINEAR_HEADS = ("llama", "qwen2", "qwen3", "sdar", "sdar_moe")  # logits are a product, no more


def as_block_diffusion(model: PreTrainedModel) -> PreTrainedModel:
    """Make a causal language model one in which only the mask decides what a position sees.

    The same object is returned. From then on `forward` takes what `LLaDA2MoeModelLM.forward` takes:
    a bool or additive mask [B, 1, L, T + L], or None for "everything visible", and any cache as
    `past_key_values`. Its logits are read as predictions of the token *at* each position, or of the
    next one if its configuration says `shift`.

    Raises:
        InputError: an architecture that would not obey the mask, or an attention implementation
            that takes none.
    """
    if reason := _unsuitable(model):
        raise InputError(
            f"{type(model).__name__} cannot be a block-diffusion backbone: {reason}",
            hint="most dense decoders can, such as Llama, Qwen2 and Qwen3; docs/backbones.md lists "
            "those that are tested",
        )
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
        if isinstance(module, GradientCheckpointingLayer):
            # A `ContextCache` records a layer once, however often backward replays it.
            module._can_checkpoint_with_cache = True
    for module in (model, model.base_model):
        parameters = inspect.signature(module.forward).parameters
        cache_name = "cache" if "cache" in parameters else "past_key_values"
        module.register_forward_pre_hook(partial(_prepare_inputs, cache_name), with_kwargs=True)
    model.has_linear_head = model.config.model_type in LINEAR_HEADS
    return model


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a model, whatever it calls them, with or without adapters of peft."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    lists = (each for each in network.base_model.modules() if isinstance(each, nn.ModuleList))
    # The outermost list comes first.
    return next(each for each in lists if len(each) == network.config.num_hidden_layers)


def _prepare_inputs(
    cache_name: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put mask and cache into the form that `model` expects, unless they are in it already."""
    cache = kwargs.pop("past_key_values", None)
    renamed = kwargs.pop("cache", None)
    if cache is None:
        cache = renamed
    mask = kwargs.get("attention_mask")
    if mask is None:  # the model would take it for "causal"
        given = (*args[:1], kwargs.get("inputs_embeds"), kwargs.get("input_ids"))
        new = next(tensor for tensor in given if tensor is not None)
        length = new.shape[1]
        seen = 0 if cache is None else cache.get_seq_length()
        mask = torch.ones(1, 1, length, seen + length, dtype=torch.bool, device=new.device)
    mask = prepare_mask(mask, model.dtype, model.config._attn_implementation)
    # Without `use_cache=False`, a model that is given no cache builds one of its own.
    return args, kwargs | {"attention_mask": mask, cache_name: cache, "use_cache": False}


def _unsuitable(model: Any) -> str | None:
    """Why visibility cannot be left to the mask in this model, or None if it can."""
    config = model.config
    implementation = config._attn_implementation
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        names = ", ".join(ATTENTION_IMPLEMENTATIONS)
        return f"`attn_implementation` must be one of {names}, got {implementation!r}"
    num_attentions = sum(hasattr(module, "is_causal") for module in model.modules())
    if (
        not model._supports_attention_backend
        or model.base_model is model
        or num_attentions != config.num_hidden_layers
    ):
        return "not each of its layers attends through transformers' attention interface"
    # Without a list of layer types, all layers have the window. A window as long as the context
    # hides nothing.
    window = getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    harmless = {"full_attention"}
    if window is None or (isinstance(window, int) and window >= config.max_position_embeddings):
        harmless.add("sliding_attention")
    if layer_types - harmless:
        return f"some of its layers see only a part of the context (`sliding_window` {window})"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return (
            "its rotary frequencies depend on the longest sequence of the batch "
            "(`rope_type` longrope)"
        )
    uneven = ("kv_lora_rank", "per_layer_attributes")
    if any(getattr(config, name, None) is not None for name in uneven):
        return (
            "its keys and values are of different sizes (latent attention, or layers that differ), "
            "which the cache does not hold"
        )
    head = model.get_output_embeddings()
    before = [part for part in model.children() if head not in part.modules()]
    if sum(next(part.parameters(), None) is not None for part in before) > 1:
        return "more than its layers stands before its output embedding"
    return None


@torch.no_grad()
def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Give a model that has none a mask token, `<|mask|>`, and its tokenizer too; returns its id.

    Its rows in the embedding and the output layer start as the means of all others, which are close
    to none of them. Spare rows of tables that are longer than the vocabulary are used before new
    ones are made; all new ones start so, those of other tokens that had none too. Without a
    tokenizer, which alone knows the spare ones, the row is a new one. A tokenizer that names a mask
    token, for which the model has no row, keeps it.
    """
    size = model.config.vocab_size
    mask = size
    if tokenizer is not None:
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
            _check_free(tokenizer, tokenizer.mask_token_id)
        mask = int(tokenizer.mask_token_id)
    if mask >= size:
        model.resize_token_embeddings(mask + 1, mean_resizing=False)
    known = min(mask, size)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight[known : mask + 1] = table.weight[:known].float().mean(dim=0)
    return mask


def _check_free(tokenizer: PreTrainedTokenizerBase, mask: int) -> None:
    """Raise `InputError` if the id of a new mask token is that of another token, too.

    A new token gets the number of those that there are, which is taken where ids leave a gap.
    """
    names = [name for name, token_id in tokenizer.get_vocab().items() if token_id == mask]
    others = [name for name in names if name != tokenizer.mask_token]
    if others:
        raise InputError(
            f"a mask token would get the id {mask}, which is that of {show(others[0])}: the ids of "
            "the tokenizer have gaps",
            hint="give its tokens the ids 0, 1, 2, … without a gap",
        )
