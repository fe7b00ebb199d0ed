"""The dry run: what it calls exact is exact, and what it counted is what real tensors take."""

# ruff: noqa: F811  (a fixture of another file)

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import share_worker
import torch
import torch.multiprocessing as mp
import yaml
from test_cli import Dmax, assert_refused, dmax_fixture  # noqa: F401  (fixture)
from test_trainer import CONFIG, write_recipe
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Trainer

from dmax.errors import InputError
from dmax.recipe.arguments import make_arguments
from dmax.recipe.build import build_checkpoint
from dmax.recipe.estimate import estimate
from dmax.recipe.estimate.batch import largest_batch, read_examples
from dmax.recipe.estimate.cluster import GPUS, Cluster, Gpu, Traffic, step_time
from dmax.recipe.estimate.result import Estimate
from dmax.recipe.estimate.shape import ModelShape
from dmax.recipe.estimate.state import held_weights, state_bytes
from dmax.recipe.estimate.step import in_one_piece
from dmax.recipe.sections import Recipe, load_recipe
from dmax.training.objectives import ObjectiveModule

pytest.importorskip("accelerate")

ONE = Cluster(GPUS["h100"], 1)
MOE = CONFIG | {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4}
DENSE = {
    "model_type": "llama",
    "block_length": 8,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SIZES = ((2, 64), (3, 160))  # sequences and positions
ELSEWHERE = {"file": "not-here.jsonl"}


def recipe_of(folder: Path, config: dict[str, Any], **training: Any) -> Recipe:
    model = {"config": config, "experts_implementation": training.pop("experts", None)}
    model = {key: value for key, value in model.items() if value is not None}
    return load_recipe(write_recipe(folder, model=model, training=training, data=ELSEWHERE))


def real_parts(recipe: Recipe) -> tuple[nn.Module, Any, dict[str, Tensor], Any]:
    """What a run would train: network, objective's module, the batch, and the arguments."""
    args = make_arguments(recipe.file, recipe.training, recipe.output_dir, recipe.fsdp)
    torch.manual_seed(0)
    checkpoint = build_checkpoint(recipe.model, torch.device("cpu"))
    model: Any = checkpoint.model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = checkpoint.special_ids
    objective = args.objective_class.from_settings(vars(args) | asdict(ids))
    shape = ModelShape(model, ids, checkpoint.tokenizer)
    clean = largest_batch(read_examples(recipe.data, args, shape), recipe.data, args, shape)
    module = ObjectiveModule(model, objective.start(model, torch.device("cpu")))
    return model, module, clean, args


def part(found: Estimate, name: str) -> int:
    [size] = [each.bytes for each in found.memory if each.name == name]
    assert size is not None
    return size


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad"])
@pytest.mark.parametrize("config", [MOE, DENSE], ids=["llada2_moe", "llama"])
def test_weights_gradients_and_states_are_those_of_a_real_step(
    tmp_path: Path, config: dict[str, Any], optim: str
) -> None:
    recipe = recipe_of(tmp_path, config, optim=optim, pad_to=32)
    model, module, clean, args = real_parts(recipe)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = kind(model.parameters(), **options)
    module(torch.Generator().manual_seed(0), **clean)["loss"].backward()
    optimizer.step()

    found = estimate(recipe, ONE)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert part(found, "weights") == sum(
        value.nbytes for value in (*model.parameters(), *model.buffers())
    )
    assert part(found, "gradients") == sum(weight.grad.nbytes for weight in model.parameters())
    assert part(found, "optimiser") == sum(
        value.nbytes for value in states if isinstance(value, Tensor)
    )


def test_the_attention_that_is_told_is_the_one_that_trains(tmp_path: Path) -> None:
    on_gpu = recipe_of(tmp_path, DENSE, use_cpu=False)
    assert "flex_attention attention" in estimate(on_gpu, ONE).settings
    on_cpu = recipe_of(tmp_path, DENSE, use_cpu=True)
    assert "sdpa attention" in estimate(on_cpu, ONE).settings
    asked = replace(on_gpu, model=replace(on_gpu.model, attn_implementation="eager"))
    assert "eager attention" in estimate(asked, ONE).settings


def test_examples_may_be_as_long_as_the_whole_blocks_of_the_context(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, DENSE | {"max_position_embeddings": 509})
    assert estimate(recipe, ONE).batch["positions"] == 504


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_shares_of_fsdp_are_those_that_processes_hold(tmp_path: Path, world_size: int) -> None:
    mp.spawn(share_worker.work, (world_size, str(tmp_path)), nprocs=world_size)
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    file = load_recipe(write_recipe(tmp_path)).file
    args = make_arguments(file, {"use_cpu": True}, tmp_path, None)
    state = state_bytes(held_weights(share_worker.Odd(), world_size, None), [], args)
    assert not any(record.pop("reduced_early") for record in records)  # "unreduced" rests on it
    fullest = {key: max(record[key] for record in records) for key in records[0]}
    assert state.weights == {"float32": fullest["weights"]}
    assert {record["held"] for record in records} == {fullest["weights"]}  # the others are padded
    assert state.gradients == fullest["gradients"]
    assert state.optimizer == fullest["optimiser"]


@pytest.mark.parametrize("targets", [["attention", "shared_experts"], ["experts"]])
def test_adapters_learn_beside_weights_that_stay(tmp_path: Path, targets: list[str]) -> None:
    pytest.importorskip("peft")
    from dmax.adapters import add_adapters

    path = write_recipe(
        tmp_path,
        model={"path": "tiny-base", "dtype": "bfloat16"},
        data={"problems": 4, "seed": 1},
        training={"optim": "adamw_torch", "router_bias_speed": 0.0},
        lora={"r": 4, "targets": targets},
    )
    recipe = load_recipe(path)
    assert recipe.lora is not None
    model, module, clean, args = real_parts(recipe)
    adapted = add_adapters(model, recipe.lora.config(model), "tiny-base")
    learning = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning)
    saved = saved_bytes(module, clean)
    module(torch.Generator().manual_seed(0), **clean)["loss"].backward()
    optimizer.step()

    found = estimate(recipe, ONE)
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = (*adapted.parameters(), *adapted.buffers())
    assert found.learning == sum(weight.numel() for weight in learning)
    assert part(found, "weights") == sum(value.nbytes for value in tensors)
    assert part(found, "gradients") == sum(weight.grad.nbytes for weight in learning)
    assert part(found, "optimiser") == sum(value.nbytes for value in states)
    counted = part(found, "activations") + part(found, "logits")
    assert counted == pytest.approx(saved, rel=0.15)


def test_an_optimiser_that_packs_its_states_is_unknown(tmp_path: Path) -> None:
    found = estimate(recipe_of(tmp_path, MOE, optim="adafactor", pad_to=16), ONE)
    assert found.record()["memory_per_gpu"]["optimiser"]["basis"] == "unknown"
    assert found.record()["memory_per_gpu"]["optimiser"]["bytes"] is None
    assert found.peak > part(found, "weights")


# --- counted --------------------------------------------------------------------------------------


def saved_bytes(module: nn.Module, clean: dict[str, Tensor]) -> int:
    """What autograd keeps of a real forward, weights not included."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    kept: dict[int, Any] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(torch.Generator().manual_seed(0), **clean)
    return sum(storage.nbytes() for storage in kept.values())


def allocated_bytes(module: nn.Module, clean: dict[str, Tensor]) -> tuple[int, int]:
    """What a real step has allocated when its forward is over, and at its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = module(torch.Generator().manual_seed(0), **clean)["loss"]
        with record_function("backward begins"):
            pass
        loss.backward()
    events = profiled.profiler.kineto_results.events()
    [turn] = [event.start_ns() for event in events if event.name() == "backward begins"]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = waiting = peak = 0
    for when, change in sorted(changes):
        held += change
        peak = max(peak, held)
        if when < turn:
            waiting = held
    return waiting, peak


@pytest.mark.parametrize(("sequences", "positions"), SIZES)
@pytest.mark.parametrize(
    ("config", "choices"),
    [
        (MOE, {"experts": "eager"}),
        (MOE, {"experts": "grouped_mm"}),
        (DENSE, {}),
        (DENSE, {"objective": "mdlm"}),
        (MOE, {"objective": "mmd", "mmd_groups": 2}),
        (MOE, {"objective": "cforce"}),
    ],
    ids=["llada2_moe, eager", "llada2_moe, grouped_mm", "llama", "llama, mdlm", "mmd", "cforce"],
)
def test_activations_are_what_autograd_saves(
    tmp_path: Path, config: dict[str, Any], choices: dict[str, Any], sequences: int, positions: int
) -> None:
    recipe = recipe_of(
        tmp_path,
        config,
        per_device_train_batch_size=sequences,
        pad_to=positions,
        **choices,
    )
    _, module, clean, _ = real_parts(recipe)
    found = estimate(recipe, ONE)
    assert found.batch["sequences"] == sequences and found.batch["positions"] == positions
    counted = part(found, "activations") + part(found, "logits")
    assert counted == pytest.approx(saved_bytes(module, clean), rel=0.05)


@pytest.mark.parametrize(("sequences", "positions"), SIZES)
@pytest.mark.parametrize("config", [MOE, DENSE], ids=["llada2_moe", "llama"])
def test_checkpointed_layers_take_what_the_allocator_gives_them(
    tmp_path: Path, config: dict[str, Any], sequences: int, positions: int
) -> None:
    recipe = recipe_of(
        tmp_path,
        config,
        per_device_train_batch_size=sequences,
        pad_to=positions,
        gradient_checkpointing=True,
    )
    _, module, clean, _ = real_parts(recipe)
    found = estimate(recipe, ONE)
    with in_one_piece():  # as on a GPU
        waiting, peak = allocated_bytes(module, clean)
    counted = part(found, "activations") + part(found, "logits")
    assert counted == pytest.approx(waiting, rel=0.1)
    # Gradients come into being while activations go, and are counted apart.
    most = counted + part(found, "working")
    assert 0.95 * most <= peak <= 1.05 * (most + part(found, "gradients"))


def test_logits_are_apart_where_they_wait_for_backward(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, DENSE, pad_to=64)
    found = estimate(recipe, ONE)
    vocab_size = real_parts(recipe)[0].config.vocab_size
    once = found.batch["labelled"] * vocab_size * 4  # in float32
    assert part(found, "logits") >= 2 * once  # of both streams
    assert part(found, "logits") % (vocab_size * 4) == 0


def test_what_an_objective_keeps_of_the_model_is_apart(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, MOE, pad_to=64, objective="mmd", mmd_groups=2, mmd_layer=0)
    model, *_ = real_parts(recipe)
    layer, norm = model.base_model.layers[0], model.base_model.norm
    kept = (layer, norm, model.get_input_embeddings())
    weights = [weight for module in kept for weight in module.parameters()]
    buffers = [*layer.buffers(), *model.base_model.rotary_emb.buffers()]
    found = estimate(recipe, ONE)
    assert part(found, "objective") == sum(value.nbytes for value in (*weights, *buffers))
    assert "objective" not in {each.name for each in estimate(recipe_of(tmp_path, MOE), ONE).memory}


# --- estimated ------------------------------------------------------------------------------------


def test_time_is_work_over_speed_and_traffic_over_bandwidth() -> None:
    gpu = Gpu("round", memory=1e9, bfloat16=1e12, float32=1e11, link=4e9, price=2.0)
    traffic = Traffic(gathered=5e9, reduced=1e9)
    fast = step_time(Cluster(gpu, 2), 6e11, traffic, in_bfloat16=True)
    assert fast.compute == pytest.approx(0.6 / 0.3)
    assert fast.communication == pytest.approx(6 / (4 * 0.75))
    assert (fast.least, fast.most) == (pytest.approx(2.0), pytest.approx(4.0))
    assert step_time(Cluster(gpu, 2), 6e11, traffic, in_bfloat16=False).compute == 20.0


def test_operations_are_those_of_the_products(tmp_path: Path) -> None:
    config = DENSE | {"num_hidden_layers": 1}
    recipe = recipe_of(tmp_path, config, pad_to=64, per_device_train_batch_size=1, objective="mdlm")
    found = estimate(recipe, ONE)
    model, *_ = real_parts(recipe)
    layer = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
    head = model.lm_head.weight.numel()
    noisy, clean, labelled = (
        56,
        56,
        56,
    )  # the last clean block and the prompt's noisy one do not run
    forward = 2 * (layer * (noisy + clean) + head * labelled)
    attention = 4 * (noisy + clean) ** 2 * 64
    assert found.run.flops == pytest.approx(3 * forward + 3.5 * attention, rel=0.1)


@pytest.mark.parametrize(
    ("training", "examples", "steps"),
    [
        ({"max_steps": 7}, None, 7),
        ({"max_steps": -1, "num_train_epochs": 2}, 16, 2 * 2),
        ({"max_steps": -1, "num_train_epochs": 2}, 17, 2 * 3),
        ({"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2}, 17, 2),
        ({"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": True}, 17, 2),
    ],
)
def test_steps_are_those_that_trainer_takes(
    tmp_path: Path, training: dict[str, Any], examples: int | None, steps: int
) -> None:
    recipe = recipe_of(tmp_path, DENSE, pad_to=16, per_device_train_batch_size=2, **training)
    found = estimate(recipe, Cluster(GPUS["h100"], 4), examples=examples)
    assert found.run.steps == steps
    hours, dollars = found.run.hours, found.dollars
    assert hours is not None and dollars is not None
    assert hours[0] == pytest.approx(steps * found.run.step.least / 3600)
    assert dollars[1] == pytest.approx(hours[1] * 4 * GPUS["h100"].price)


def test_the_largest_batch_is_of_the_examples_that_are_here(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    texts = ["a cat", "a dog and a cat and a bird and a fish", "a dog", "a bird and a cat"]
    records = [{"prompt": "say it", "response": text} for text in texts]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    training = {"per_device_train_batch_size": 2, "max_steps": -1, "num_train_epochs": 3}
    path = write_recipe(tmp_path, data={"file": str(data)}, training=training)
    found = estimate(load_recipe(path), ONE)
    assert found.record()["batch_per_gpu"]["is_from"] == "the longest of the 4 examples"
    assert found.batch["sequences"] == 2 and found.batch["positions"] < 100
    assert 2 * 8 < found.batch["labelled"] < 2 * found.batch["positions"]
    assert found.run.steps == 3 * 2
    data.write_text(json.dumps(records[0]) + "\n" + json.dumps({"prompt": "say it"}) + "\n")
    with pytest.raises(InputError, match="data.jsonl:2"):
        estimate(load_recipe(path), ONE)


def test_whole_models_on_several_gpus_exchange_gradients_once_a_step(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, DENSE, pad_to=16, gradient_accumulation_steps=3)
    found = estimate(recipe, Cluster(GPUS["h100"], 4))
    assert found.run.traffic == Traffic(0, 2 * 3 / 4 * part(found, "gradients"))
    assert part(found, "buckets") == part(found, "gradients")
    assert found.run.tokens == 2 * 16 * 3 * 4


# --- the command ----------------------------------------------------------------------------------


def paper_recipe(folder: Path, **model: Any) -> Path:
    path = folder / "paper.yaml"
    recipe = {
        "output_dir": str(folder / "out"),
        "model": {"path": "inclusionAI/LLaDA2.0-mini"} | model,
        "data": {"file": str(folder / "not-here.jsonl"), "max_length": 2048},
        "training": {"bf16": True},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_shared_model_gathers_layers_and_holds_gradients_until_they_are_done(
    tmp_path: Path,
) -> None:
    def shared(**fsdp: Any) -> Estimate:
        model = {"config": DENSE}
        training = {"pad_to": 16, "gradient_accumulation_steps": 3}
        path = write_recipe(tmp_path, model=model, training=training, data=ELSEWHERE, fsdp=fsdp)
        return estimate(load_recipe(path), Cluster(GPUS["h100"], 4))

    model, *_ = real_parts(recipe_of(tmp_path, DENSE))
    layers = sum(weight.nbytes for weight in model.model.layers.parameters())
    others = sum(weight.nbytes for weight in model.parameters()) - layers
    found = shared()
    assert part(found, "weights") < (layers + others) / 4 * 1.1
    assert part(found, "gathered") == layers + others  # it has two layers
    assert part(found, "unreduced") == layers + others + layers / 2  # those of one as they travel
    sent = 3 / 4 * 3  # other GPUs' share of three micro-batches
    assert found.run.traffic.gathered == pytest.approx(sent * (4 * layers + others))
    assert found.run.traffic.reduced == pytest.approx(sent * (layers + others))
    assert shared(reduce_dtype="bfloat16").run.traffic.reduced == found.run.traffic.reduced / 2
    kept = shared(reshard_after_forward=False).run.traffic.gathered
    assert kept == pytest.approx(sent * (layers + others))
    offloaded = shared(cpu_offload=True)
    assert offloaded.peak == found.peak - sum(
        part(found, name) for name in ("weights", "gradients", "optimiser")
    )


def test_a_forward_without_gradient_gathers_layers_and_keeps_no_gradients(tmp_path: Path) -> None:
    training = {"pad_to": 16, "objective": "cforce"}
    path = write_recipe(
        tmp_path, model={"config": DENSE}, training=training, data=ELSEWHERE, fsdp={}
    )
    found = estimate(load_recipe(path), Cluster(GPUS["h100"], 4))
    model, *_ = real_parts(recipe_of(tmp_path, DENSE))
    layers = sum(weight.nbytes for weight in model.model.layers.parameters())
    others = sum(weight.nbytes for weight in model.parameters()) - layers
    assert part(found, "unreduced") == others + layers / 2 * 2  # one layer, and as it travels
    assert found.run.traffic.gathered == pytest.approx(3 / 4 * (3 * layers + others))


def test_the_papers_model_is_counted_without_its_files(dmax: Dmax, tmp_path: Path) -> None:
    recipe = paper_recipe(tmp_path)
    before = sorted(tmp_path.iterdir())
    words = ("train", "--dry-run", "--gpus", 8, "--gpu", "h200", "--examples", 700_000)
    result = dmax(*words, recipe, "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["parameters"] == 16_255_638_528
    memory = record["memory_per_gpu"]
    assert memory["optimiser"]["bytes"] > 2 * 4 * record["parameters"]
    assert {memory[name]["basis"] for name in ("weights", "gradients", "optimiser")} == {"exact"}
    assert {memory[name]["basis"] for name in ("activations", "logits")} == {"counted"}
    assert not record["fits"] and "fsdp" in record["advice"]
    assert record["estimates"]["steps"] == 2 * -(-700_000 // 64)
    assert record["constants"]["utilisation"] == 0.3
    assert sorted(tmp_path.iterdir()) == before


def test_a_person_reads_what_is_exact_and_what_is_not(dmax: Dmax, tmp_path: Path) -> None:
    result = dmax("train", "--dry-run", write_recipe(tmp_path), "--price", 2.5)
    assert result.code == 0, result.err
    for words in ("exact", "counted", "together", "It fits one h100", "2.50 $", "measured"):
        assert words in result.out
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-run").exists()


def test_another_card_is_given_by_its_memory(dmax: Dmax, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    record = json.loads(dmax("train", "--dry-run", recipe, "--memory", 0.001, "--json").out)
    assert record["gpu"]["memory"] == 1e6
    assert not record["fits"] and record["advice"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run", "--gpus", 0], "`gpus` must be"),
        (["--dry-run", "--gpu", "h1000"], "`gpu` must be one of h100"),
        (["--dry-run", "--memory", 0], "`memory` must be"),
        (["--dry-run", "--price", -1], "`price` must be"),
        (["--dry-run", "--examples", 0], "`examples` must be"),
        (["--gpus", 8], "`--gpus` belongs to `--dry-run`"),
    ],
)
def test_a_cluster_that_cannot_be_is_one_sentence(
    dmax: Dmax, tmp_path: Path, words: list[Any], message: str
) -> None:
    assert_refused(dmax("train", write_recipe(tmp_path), *words), message)


def test_a_model_that_is_nowhere_is_one_sentence(dmax: Dmax, tmp_path: Path) -> None:
    recipe = paper_recipe(tmp_path, path=str(tmp_path / "no-model"))
    assert_refused(dmax("train", "--dry-run", recipe), "no-model` is neither bundled")


def test_a_model_too_large_for_this_machine_is_counted(tmp_path: Path) -> None:
    config = DENSE | {"hidden_size": 2**15, "intermediate_size": 2**21, "num_hidden_layers": 6}
    model = {"config": config}
    path = write_recipe(tmp_path, model=model, training={"pad_to": 8}, data=ELSEWHERE)
    with pytest.raises(InputError, match="more than fit into"):
        load_recipe(path)
    found = estimate(load_recipe(path, elsewhere=True), ONE)
    assert found.parameters > 10**12 and not found.fits


def test_advice_names_what_takes_most(tmp_path: Path) -> None:
    small = Cluster.of(2, memory=0.001)
    of_step = {"pad_to": 512, "per_device_train_batch_size": 4}
    assert "gradient_checkpointing" in estimate(recipe_of(tmp_path, DENSE, **of_step), small).advice
    of_step["gradient_checkpointing"] = True
    assert "batch_size" in estimate(recipe_of(tmp_path, DENSE, **of_step), small).advice
    of_state = {"pad_to": 8, "per_device_train_batch_size": 1}
    assert "fsdp" in estimate(recipe_of(tmp_path, DENSE, **of_state), small).advice
    alone = Cluster.of(1, memory=0.001)
    assert "lora" in estimate(recipe_of(tmp_path, DENSE, **of_state), alone).advice
    model = {"config": DENSE}
    path = write_recipe(tmp_path, model=model, training={"pad_to": 8}, data=ELSEWHERE, fsdp={})
    assert "whole for a while" in estimate(load_recipe(path), small).advice
