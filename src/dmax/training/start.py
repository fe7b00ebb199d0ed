"""What a training begins with: a model by its name or as it is, its tokenizer, ids and adapters."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dmax.adapters import add_adapters, base_name, check_adapted, has_adapters, without_adapters
from dmax.attention import best_for_training
from dmax.checkpoint import as_diffusion_model, load_checkpoint, write_ids
from dmax.checkpoint_files import read_settings
from dmax.environment import DTYPES, has_bfloat16
from dmax.errors import InputError, did_you_mean, show
from dmax.hub import find_folder
from dmax.records.encoding import encode_dataset
from dmax.special_ids import SpecialIds, resolve_special_ids
from dmax.training.config import DMaxConfig
from dmax.training.data import Collator, check_examples
from dmax.training.finite import check_weights
from dmax.training.ranks import rank
from dmax.training.sharding import start_device

logger = logging.getLogger(__name__)

# What other trainers take, and what takes its place here.
ELSEWHERE = {
    "data_collator": "batches are the objective's; `pad_to` gives them one length",
    "compute_metrics": "evaluation keeps no logits; pass an `eval_hook`",
    "preprocess_logits_for_metrics": "evaluation keeps no logits; pass an `eval_hook`",
    "compute_loss_func": "the loss is the objective's; register one of your own in dmax.objectives",
    "formatting_func": "records are read by their columns",
    "model_init": "pass a model or its name",
}
LOADING = set(inspect.signature(load_checkpoint).parameters) - {"name_or_path", "device"}
LOADING -= {"quantization", "autoregressive"}  # neither learns to fill in masks


def check_call(args: DMaxConfig | None, others: Mapping[str, Any]) -> DMaxConfig:
    """The training arguments of a trainer that is called with them and others.

    A CPU that will have to emulate bfloat16 is warned of.

    Raises:
        InputError: they are no `DMaxConfig`, or something has no place here.
    """
    for name in others:
        if name in ELSEWHERE and others[name] is not None:
            raise InputError(f"DMaxTrainer takes no `{name}`", hint=ELSEWHERE[name])
    if args is None:
        return DMaxConfig()
    if not isinstance(args, DMaxConfig):
        raise InputError(f"`args` must be a DMaxConfig, got {type(args).__name__}")
    if args.bf16 and args.device.type == "cpu" and not has_bfloat16(args.device):
        logger.warning(
            "this CPU emulates bfloat16, which makes a step many times slower; with `bf16: auto` "
            "it computes in float32"
        )
    return args


class Start(NamedTuple):
    """What a training begins with.

    Attributes:
        model: a `PreTrainedModel`, or a `peft.PeftModel` around one.
        tokenizer: None for a model that takes and gives token ids.
        special_ids: MASK, EOS, pad and the block length; the model's configuration names them, too.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    special_ids: SpecialIds

    def examples(self, dataset: Any, args: DMaxConfig, name: str = "train_dataset") -> Any:
        """A data set as token ids that the model can learn from.

        Args:
            dataset: what `encode_dataset` takes, or examples that are encoded already.
            args: they say how long an example may be, and what happens to longer ones.
            name: of the data set, for errors.

        Raises:
            InputError: a record is wrong or too long, or holds an id that cannot be learnt.
        """
        encoded = encode_dataset(
            dataset,
            self.tokenizer,
            self.special_ids,
            max_length=longest(args.max_length, self.model.config, self.special_ids),
            eos_labels=args.eos_labels,
            too_long=args.too_long,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        known = self.model.config.vocab_size, self.special_ids.mask_token_id
        examples = check_examples(encoded, *known)
        make_collator(self.special_ids, args).check(examples, known)
        return examples


def longest(asked: int | None, config: Any, special_ids: SpecialIds) -> int:
    """The most tokens of an example: what is asked for, within the whole blocks of the context."""
    block_length = special_ids.block_length
    context: int = config.max_position_embeddings // block_length * block_length
    return min(asked or context, context)


def make_collator(special_ids: SpecialIds, args: DMaxConfig) -> Collator:
    """What makes batches of examples, as the objective takes them."""
    block_length = special_ids.block_length
    eos_labels = block_length if args.eos_labels is None else args.eos_labels
    make = args.objective_class.collator or Collator
    eos_token_id, *others = special_ids.eos_token_ids
    return make(block_length, eos_token_id, eos_labels, args.pad_to, tuple(others))


def start(
    model: str | os.PathLike[str] | PreTrainedModel,
    args: DMaxConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    special_ids: SpecialIds | None = None,
    peft_config: Any = None,
) -> Start:
    """Load and complete what is not given.

    Args:
        model: a bundled name, a folder or a hub id; or a model, with adapters or without.
        args: its `model_init_kwargs` are those of `load_checkpoint`; its objective decides which
            decoding the model's configuration names.
        tokenizer: None takes the one beside the model's files.
        special_ids: None takes those that the model's files name.
        peft_config: what adapters to train in place of the model.

    Raises:
        InputError: there is no such model, it names no ids, or the adapters do not go with it.
    """
    if isinstance(model, (str, os.PathLike)):
        device = start_device(rank()) if args.is_sharded else args.device
        loaded = load_checkpoint(model, device=device, **_loading_options(args))
        network: Any = loaded.model
        tokenizer = tokenizer or loaded.tokenizer
        special_ids = special_ids or loaded.special_ids
        decoding = loaded.decoding
        base = base_name(model) if peft_config is not None else ""
    else:
        network = _prepared(model, args)
        tokenizer = tokenizer or _stored_tokenizer(network)
        config, generation = network.config, getattr(network, "generation_config", None)
        special_ids = special_ids or resolve_special_ids(config, tokenizer, generation)
        decoding = None  # what its configuration names stays
        base = base_name(network.name_or_path) if peft_config is not None else ""
    # Whatever saves the model from now on writes a checkpoint that says how to decode it.
    write_ids(network.config, special_ids, args.objective_class.decoding or decoding)
    if peft_config is not None:
        if has_adapters(network):
            raise InputError("the model has adapters already", hint="leave out `peft_config`")
        network = add_adapters(network, peft_config, base)
    if has_adapters(network):
        _check_adapters(network, args)
    check_weights(network)
    return Start(network, tokenizer, special_ids)


def _loading_options(args: DMaxConfig) -> dict[str, Any]:
    options = dict(args.model_init_kwargs or {})
    for name in options:
        if name not in LOADING:
            raise InputError(
                f"`model_init_kwargs` has no `{name}`; there are {', '.join(sorted(LOADING))}",
                hint=did_you_mean(name, sorted(LOADING)),
            )
    dtype = options.pop("dtype", torch.float32)
    attention = best_for_training(args.device)
    return {"dtype": DTYPES.get(dtype, dtype), "attn_implementation": attention, **options}


def _prepared(model: Any, args: DMaxConfig) -> Any:
    """A model that somebody else has made, as one that decodes blocks."""
    if args.model_init_kwargs:
        raise InputError("`model_init_kwargs` are for a model that is given by its name")
    network = without_adapters(model)
    if not isinstance(network, PreTrainedModel):
        raise InputError(f"a model must be a name or a PreTrainedModel, got {show(model)}")
    as_diffusion_model(network)
    return model


def _stored_tokenizer(network: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the files that a model was read from; None for a new model."""
    name = network.name_or_path
    return read_settings(find_folder(name))[1] if name else None


def _check_adapters(network: Any, args: DMaxConfig) -> None:
    check_adapted(network)
    if args.sharding is not None:
        raise InputError(
            "adapters are not sharded: every process has its model whole", hint="leave out `fsdp`"
        )
    if args.router_bias_speed:
        raise InputError(
            "`router_bias_speed` moves what adapters leave as it is", hint="set it to 0"
        )
    options = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and options.get("use_reentrant"):
        network.enable_input_require_grads()  # else no gradient passes the frozen first layer
