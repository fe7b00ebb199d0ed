"""`DMaxTrainer` as a user of TRL calls it: names, data sets, adapters, held-out loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_llama
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, TrainerCallback, TrainingArguments

from dmax import LLM, DecodingParams
from dmax.checkpoint import load_checkpoint, new_checkpoint, save_checkpoint
from dmax.errors import InputError
from dmax.tiny.tokenizer import build_tokenizer

pytest.importorskip("accelerate")

from dmax import DMaxConfig, DMaxTrainer

RECORDS = [
    {"prompt": f"Tom has {n} mugs and buys {n + 1}.", "completion": f"Tom has {2 * n + 1}."}
    for n in range(2, 8)
]
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
QUICK = {
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "gradient_checkpointing": False,
    "logging_steps": 1,
}


def config(folder: Path, **changes: Any) -> DMaxConfig:
    return DMaxConfig(**{"output_dir": str(folder)} | QUIET | QUICK | changes)


def lora(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | changes)


def logged(trainer: DMaxTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def load(name: Any) -> Any:
    return load_checkpoint(name, dtype=torch.float32, device="cpu")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small dense checkpoint that names its ids."""
    made = small_llama()
    save_checkpoint(made.model, made.tokenizer, tmp_path / "llama", made.special_ids)
    return tmp_path / "llama"


# ---- a model by its name, a data set of the hub's kind ------------------------------------------


def test_a_name_and_a_data_set_are_enough(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    trainer = DMaxTrainer(
        "tiny-base", config(tmp_path), train_dataset=datasets.Dataset.from_list(RECORDS)
    )
    assert trainer.special_ids == load("tiny-base").special_ids
    assert trainer.processing_class.mask_token_id == trainer.special_ids.mask_token_id
    trainer.train()
    assert len(logged(trainer, "loss")) == 2

    trainer.save_model(str(tmp_path / "result"))
    llm = LLM(str(tmp_path / "result"), device="cpu")
    assert llm.resolve(DecodingParams()).strategy == "spd"
    assert llm.checkpoint.special_ids == trainer.special_ids
    saved = llm.model.state_dict()["lm_head.weight"]
    torch.testing.assert_close(saved.float(), trainer.model.lm_head.weight.data, atol=0.01, rtol=0)


def test_a_list_of_records_trains_like_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    runs = []
    for data in (RECORDS, datasets.Dataset.from_list(RECORDS)):
        trainer = DMaxTrainer("tiny-base", config(tmp_path), train_dataset=data)
        trainer.train()
        runs.append(logged(trainer, "loss"))
    assert runs[0] == runs[1]


def test_a_model_in_memory_is_made_one_that_decodes_blocks(tmp_path: Path, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = load(llama).tokenizer
    by_module = DMaxTrainer(
        model, config(tmp_path), train_dataset=RECORDS, processing_class=tokenizer
    )
    by_name = DMaxTrainer(str(llama), config(tmp_path), train_dataset=RECORDS)
    for trainer in (by_module, by_name):
        trainer.train()
    assert logged(by_module, "loss") == logged(by_name, "loss")
    assert by_module.special_ids.block_length == 16


def test_the_tokenizer_of_a_model_in_memory_lies_beside_its_files(
    tmp_path: Path, llama: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    trainer = DMaxTrainer(model, config(tmp_path), train_dataset=RECORDS)
    assert trainer.processing_class.mask_token_id == trainer.special_ids.mask_token_id


def test_a_new_model_without_a_tokenizer_takes_no_texts(tmp_path: Path, llama: Path) -> None:
    model = new_checkpoint(load(llama).model.config).model
    model.name_or_path = ""
    with pytest.raises(InputError, match="there is no tokenizer to encode train_dataset with"):
        DMaxTrainer(model, config(tmp_path), train_dataset=RECORDS)


def test_arguments_for_loading_are_those_of_load_checkpoint(tmp_path: Path, llama: Path) -> None:
    options = {"block_length": 8, "dtype": "bfloat16", "attn_implementation": "eager"}
    trainer = DMaxTrainer(str(llama), config(tmp_path, model_init_kwargs=options))
    assert trainer.special_ids.block_length == 8
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.model.config._attn_implementation == "eager"


def test_long_examples_are_refused_cut_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`max_length`"):
        DMaxTrainer("tiny-base", config(tmp_path, max_length=40), train_dataset=RECORDS)
    records = [*RECORDS, {"prompt": "a " * 50, "completion": "b"}]
    changes = {"max_length": 64, "too_long": "skip"}
    trainer = DMaxTrainer("tiny-base", config(tmp_path, **changes), train_dataset=records)
    assert len(trainer.train_dataset) == len(RECORDS)


def test_no_example_is_longer_than_the_whole_blocks_of_the_context(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id")}
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 60, "bos_token_id": None}
    network = GPT2Config(**shape, **ids, vocab_size=len(tokenizer), block_length=32)
    made = new_checkpoint(network, tokenizer)
    records = [{"prompt": "Tom has 2 mugs.", "completion": "Tom has 5. " * 20}]
    trainer = DMaxTrainer(
        made.model,
        config(tmp_path, too_long="truncate"),
        processing_class=tokenizer,
        train_dataset=records,
    )
    trainer.train()  # positions of a third block would have no embeddings
    [example] = trainer.train_dataset
    assert len(example["prompt_ids"]) + len(example["response_ids"]) == 32


class Steps(TrainerCallback):
    """Counts the steps that it hears of."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.count += 1


def test_callbacks_and_optimizers_are_honoured(tmp_path: Path) -> None:
    model = load("tiny-base").model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = Steps()
    trainer = DMaxTrainer(
        model,
        config(tmp_path),
        train_dataset=RECORDS,
        callbacks=[steps],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert steps.count == 2
    torch.testing.assert_close(dict(model.state_dict()), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"compute_metrics": print}, "takes no `compute_metrics`"),
        ({"data_collator": print}, "takes no `data_collator`"),
        ({"formatting_func": print}, "takes no `formatting_func`"),
        ({"args": TrainingArguments("x", use_cpu=True)}, "must be a DMaxConfig, got Training"),
        ({"model": nn.Linear(1, 1)}, "a name or a PreTrainedModel"),
        ({"model": "tiny-bas"}, "neither bundled"),
        ({"train_dataset": [{"prompt": "a"}]}, "response|columns|answer"),
        ({"train_dataset": []}, "no example"),
    ],
)
def test_what_has_no_place_here_is_one_sentence(
    tmp_path: Path, call: dict[str, Any], message: str
) -> None:
    settings = {"model": "tiny-base", "args": config(tmp_path), "train_dataset": RECORDS}
    with pytest.raises(InputError, match=message):
        DMaxTrainer(**settings | call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "eager"}, "has no `experts`; there are"),
        ({"quantization": "int8"}, "has no `quantization`"),
        ({"block_length": 0}, "`block_length` must be"),
    ],
)
def test_wrong_arguments_for_loading_are_named(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        DMaxTrainer("tiny-base", config(tmp_path, model_init_kwargs=options))
    with pytest.raises(InputError, match="given by its name"):
        DMaxTrainer(load("tiny-base").model, config(tmp_path, model_init_kwargs=options))


# ---- held-out loss ------------------------------------------------------------------------------


def test_held_out_loss_is_the_objectives_with_noise_that_repeats(tmp_path: Path) -> None:
    trainer = DMaxTrainer(
        "tiny-base",
        config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4),
        train_dataset=RECORDS[:4],
        eval_dataset=RECORDS,
        eval_hook=lambda model: {"accuracy": float(model.training), "tpf": 2.0},
    )
    first = trainer.evaluate()
    assert trainer.evaluate()["eval_loss"] == first["eval_loss"]
    mean = (first["eval_loss_masked"] + first["eval_loss_predicted"]) / 2
    assert first["eval_loss"] == pytest.approx(mean)
    assert 0 <= first["eval_rollout_error"] <= 1
    assert (first["eval_accuracy"], first["eval_tpf"]) == (0.0, 2.0)

    # The mean over sequences, whatever the batches: of 6 in batches of 4, the last has 2.
    mask_all = {"objective": "mdlm", "mask_ratio_low": 1.0, "mask_ratio_high": 1.0}
    by_size = [
        DMaxTrainer(
            "tiny-base", config(tmp_path, per_device_eval_batch_size=size, **mask_all)
        ).evaluate(RECORDS)["eval_loss"]
        for size in (4, 1)
    ]
    assert by_size[0] == pytest.approx(by_size[1], rel=1e-4)

    trainer.train()
    after = logged(trainer, "eval_loss")[-2:]
    assert after[0] != after[1]
    assert after[1] < first["eval_loss"]
    assert logged(trainer, "eval_accuracy")[-1] == 0.0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after[1])
    weights = [weight for weight in trainer.model.parameters() if weight.grad is not None]
    assert all(not weight.grad.any() for weight in weights)  # an evaluation leaves no gradient


def test_evaluation_does_not_change_what_is_learnt(tmp_path: Path) -> None:
    runs = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = DMaxTrainer(
            "tiny-base", config(tmp_path, **changes), train_dataset=RECORDS, eval_dataset=RECORDS
        )
        trainer.train()
        runs.append(logged(trainer, "loss"))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("adapts", [False, True])
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, adapts: bool) -> None:
    trainer = DMaxTrainer(
        "tiny-base",
        config(
            tmp_path,
            max_steps=4,
            learning_rate=0.3,  # it gets worse
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
        ),
        train_dataset=RECORDS,
        eval_dataset=RECORDS,
        peft_config=lora() if adapts else None,
    )
    trainer.train()
    each = logged(trainer, "eval_loss")
    assert len(each) == 2
    assert each[0] != each[1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(each), rel=1e-5)


# ---- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-base", "llama"])
def test_adapters_learn_and_the_base_does_not(tmp_path: Path, llama: Path, name: str) -> None:
    model = str(llama) if name == "llama" else name
    trainer = DMaxTrainer(model, config(tmp_path), train_dataset=RECORDS, peft_config=lora())
    assert type(trainer.model).__name__.startswith("PeftModel")
    before = {n: w.clone() for n, w in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, w in trainer.model.named_parameters() if (w != before[n]).any()}
    assert moved
    assert all("lora_" in n for n in moved)

    trainer.save_model(str(tmp_path / "adapters"))
    stored = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == model
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    ids = torch.arange(5, 37)[None]
    found = load(tmp_path / "adapters")
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(found.model(input_ids=ids).logits, expected, atol=1e-3, rtol=0)
    assert found.decoding == "spd"


def test_new_adapters_change_no_loss(tmp_path: Path) -> None:
    """They add zero at first, and the clean stream of the adapted model is the model's own."""
    losses = []
    for peft_config in (None, lora()):
        trainer = DMaxTrainer(
            "tiny-base", config(tmp_path), eval_dataset=RECORDS, peft_config=peft_config
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("name", ["tiny-base", "llama"])
def test_the_clean_stream_meets_no_head(tmp_path: Path, llama: Path, name: str) -> None:
    """The output layer is called for two streams, with or without adapters."""
    model = str(llama) if name == "llama" else name
    rows: dict[bool, list[int]] = {}
    for adapts in (False, True):
        trainer = DMaxTrainer(
            model,
            config(tmp_path),
            train_dataset=RECORDS[:1],
            peft_config=lora() if adapts else None,
        )
        [batch] = trainer.get_train_dataloader()
        calls = rows.setdefault(adapts, [])
        head = trainer.model.get_output_embeddings()
        head.register_forward_hook(
            lambda _, __, out, calls=calls: calls.append(out[..., 0].numel())
        )
        trainer.objective_module(torch.Generator().manual_seed(0), **batch)
    assert rows[True] == rows[False]
    assert len(rows[True]) == 2
    assert max(rows[True]) < batch["clean_ids"].numel()  # and of these, rows that matter


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_adapters_are_the_same_with_checkpointing(
    tmp_path: Path, reentrant: bool
) -> None:
    gradients = []
    for changes in (
        {"gradient_checkpointing": False},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        },
    ):
        torch.manual_seed(0)
        targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        trainer = DMaxTrainer(
            "tiny-base",
            config(tmp_path, max_steps=1, learning_rate=1e-2, **changes),
            train_dataset=RECORDS,
            peft_config=lora(target_modules=["query_key_value", "dense"], **targets),
        )
        trainer.train()
        gradients.append(logged(trainer, "grad_norm"))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)
    assert gradients[0][0] > 0


@pytest.mark.parametrize("objective", ["oput", "mmd"])
def test_a_run_of_adapters_goes_on_from_its_checkpoint(tmp_path: Path, objective: str) -> None:
    """With `mmd`, the adapters of the frozen copy are those of the start, which change nothing."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "objective": objective}

    def run(folder: Path, resume: str | None = None) -> DMaxTrainer:
        torch.manual_seed(0)
        trainer = DMaxTrainer(
            "tiny-base",
            config(folder, **changes),
            train_dataset=RECORDS,
            peft_config=lora(lora_dropout=0.0),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    torch.manual_seed(7)
    resumed = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    for name in ("loss", "rollout_error", "reward_masked"):
        assert logged(resumed, name) == logged(whole, name)
    for (name, one), (_, other) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    # A checkpoint of the run decodes like a result.
    assert load(tmp_path / "whole" / "checkpoint-2").decoding == "spd"


def test_a_peft_model_is_trained_as_it_is(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load("tiny-base").model
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["dense"]))
    trainer = DMaxTrainer(adapted, config(tmp_path), train_dataset=RECORDS)
    trainer.train()
    assert trainer.model is adapted
    trainer.save_model(str(tmp_path / "adapters"))
    assert load(tmp_path / "adapters").decoding == "spd"
    with pytest.raises(InputError, match="has adapters already"):
        DMaxTrainer(adapted, config(tmp_path), peft_config=lora())


def test_adapters_and_balancing_of_experts_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`router_bias_speed`"):
        DMaxTrainer("tiny-base", config(tmp_path, router_bias_speed=0.1), peft_config=lora())


# ---- without accelerate -------------------------------------------------------------------------


def test_without_accelerate_one_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr("dmax.extras.find_spec", lambda _: None)
    with pytest.raises(InputError, match="training a model needs the package `accelerate`"):
        DMaxConfig(output_dir=str(tmp_path))
