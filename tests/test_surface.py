"""What users and their scripts rely on, written down: a change here is a change for them."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_llm import folder_fixture  # noqa: F401  (fixture)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

import dmax
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM

EXPORTS = (
    "__version__ DMaxConfig DMaxTrainer DecodingParams GenerationOutput InputError LLM StreamEvent "
    "strategies trace".split()
)

DECODING_PARAMS = {
    "strategy": "auto",
    "threshold": None,
    "stop_confidence": 0.9,
    "top_k": 1,
    "block_length": None,
    "max_new_tokens": 256,
    "temperature": 0.0,
    "seed": None,
    "stop": (),
    "ignore_eos": False,
    "deadline": None,
    "max_steps_per_block": None,
    "options": (),
}
GENERATION_OUTPUT = "text token_ids prompt_token_ids finish_reason cost".split()
FIGURES = (
    "num_commit_forwards num_forwards num_positions num_prefill_forwards "
    "tokens_per_forward tokens_per_forward_paper tokens_per_position".split()
)
STREAM_EVENT = (
    "kind text token_ids masked confidence position step output index error "
    "num_forwards written candidates forced capped".split()
)

COMMANDS = {
    "demo": "--json",
    "generate": (
        "prompts --model -m --strategy --threshold --max-new-tokens --top-k --option "
        "--block-length --temperature --seed --stop --ignore-eos --dtype --quantization "
        "--device --json"
    ),
    "chat": (
        "--model -m --strategy --threshold --max-new-tokens --option --temperature --seed "
        "--system --pace --dtype --quantization --device --url --api-key-env"
    ),
    "trace": (
        "prompt --model -m --compare --open --output -o --strategy --threshold --max-new-tokens "
        "--top-k --option --block-length --temperature --seed --stop --ignore-eos --dtype "
        "--quantization --device --json"
    ),
    "convert": "model --output -o --block-length --shift --no-shift --json",
    "train": "recipe --max-steps --fresh --dry-run --gpus --gpu --memory --price --examples --json",
    "distill": (
        "--output -o --model -m --num --prompts --reader --column --config --split --task --data "
        "--seed --part --shard-size --trajectories --strategy --threshold --max-new-tokens "
        "--option --block-length --batch-size --dtype --quantization --compile --device --ray "
        "--ray-address --replicas --gpus-per-replica --engine --min-length --max-length "
        "--max-repetition --filter-score --endpoint --endpoint-model --concurrency --timeout --json"
    ),
    "reproduce": (
        "table --list --engine --engine-option --only --model -m --data --limit --max-new-tokens "
        "--batch-size --dtype --device --trial --output -o --overwrite --json"
    ),
    "serve": (
        "arguments --model -m --host --port --dtype --quantization --device --compile --max-length "
        "--warm-up --no-warm-up --engine --api-key-file --allowed-host --cors-origin "
        "--max-batch-size --max-queue "
        "--max-prompt-tokens --max-new-tokens --max-total-tokens --max-choices --max-body-bytes "
        "--max-json-depth --max-connections --max-buffered-bytes --max-seconds --header-seconds "
        "--body-seconds --shutdown-timeout --log-json --log-file"
    ),
    "eval": (
        "--model -m --task --data --strategy --threshold --limit --seed --max-new-tokens --top-k "
        "--option --block-length --batch-size --dtype --quantization --compile --device "
        "--ray --ray-address --replicas --gpus-per-replica --engine --output -o --overwrite --json"
    ),
    "bench": "--device --quick --output -o --json",
    "lm_eval": "",  # hands its arguments on
    "sweep": (
        "--model -m --output -o --strategies --thresholds --task --data --limit --seed "
        "--max-new-tokens --batch-size --dtype --device --json"
    ),
}

HEAVY = "torch transformers numpy safetensors tokenizers huggingface_hub".split()
NOT_BY_IMPORT = "typer rich matplotlib fastapi uvicorn datasets peft lm_eval openai ray".split()


def test_exports() -> None:
    assert dmax.__all__ == EXPORTS
    assert dir(dmax) == sorted(EXPORTS)
    assert all(getattr(dmax, name) is not None for name in EXPORTS)
    namespace: dict[str, object] = {}
    exec("from dmax import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(EXPORTS)
    with pytest.raises(AttributeError, match="module 'dmax' has no attribute 'Engine'"):
        dmax.Engine  # noqa: B018


def test_strategies() -> None:
    assert {"spd", "threshold"} <= set(dmax.strategies())


def test_decoding_params() -> None:
    fields = dataclasses.fields(dmax.DecodingParams)
    assert {field.name: field.default for field in fields} == DECODING_PARAMS
    assert [field.name for field in fields] == list(DECODING_PARAMS)  # also by position
    with pytest.raises(dataclasses.FrozenInstanceError):
        dmax.DecodingParams().threshold = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "names", "properties"),
    [
        (dmax.GenerationOutput, GENERATION_OUTPUT, FIGURES),
        (dmax.StreamEvent, STREAM_EVENT, []),
    ],
)
def test_results(kind: type, names: list[str], properties: list[str]) -> None:
    assert [field.name for field in dataclasses.fields(kind)] == names  # type: ignore[arg-type]
    found = sorted(name for name, value in vars(kind).items() if isinstance(value, property))
    assert found == properties
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_commands_and_their_flags() -> None:
    pytest.importorskip("typer")
    from dmax.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: [
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option != "--help"
        ]
        for name, command in commands.items()
    }
    assert found == {name: flags.split() for name, flags in COMMANDS.items()}


def run_python(program: str) -> str:
    """What a new process of Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    program = (
        "import sys, time\n"
        "began = time.process_time()\n"
        "import dmax, dmax.errors, dmax.outputs, dmax.params, dmax.cli\n"
        "seconds = time.process_time() - began\n"
        "assert seconds < 1, seconds\n"  # 0.25 on a machine with time
        f"heavy = {[*HEAVY, *NOT_BY_IMPORT]!r}\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}.intersection(heavy)))"
    )
    assert run_python(program) == "['rich', 'typer']"  # of the command line


def test_what_loads_torch_loads_little_else() -> None:
    # transformers imports some by itself where they are installed; what counts is what comes on top
    # of it.
    program = (
        "import sys; import transformers, transformers.modeling_utils; before = set(sys.modules)\n"
        "from dmax import LLM\n"
        f"heavy = {['accelerate', *NOT_BY_IMPORT]!r}\n"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(added.intersection(heavy)))"
    )
    assert run_python(program) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForCausalLM; import dmax",
        # While these are imported, transformers imports its Auto classes: that is too soon for us.
        "import dmax, transformers.models.glm4_moe.modeling_glm4_moe",
        "import pickle; pickle.loads({config!r})",
    ],
)
def test_auto_classes_give_ours_whatever_is_imported_first(folder: Path, imports: str) -> None:
    config = pickle.dumps(LLaDA2MoeConfig.from_pretrained(folder))
    program = (
        f"{imports.replace('{config!r}', repr(config))}\n"
        "import threading\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        f"load = lambda: models.append(AutoModelForCausalLM.from_pretrained({str(folder)!r}))\n"
        "models = [AutoModelForCausalLM.from_config(AutoConfig.for_model('llada2_moe', **small))]\n"
        "threads = [threading.Thread(target=load) for _ in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print({type(model).__module__ for model in models}, len(models))"
    )
    small = {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 8, "pad_token_id": 0}
    sizes = small | {"intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 8}
    found = run_python(f"small = {sizes!r}\n{program}")
    assert found == "{'dmax.models.llada2_moe.modeling'} 5"


def test_auto_classes_give_ours(folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is LLaDA2MoeConfig
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model) is LLaDA2MoeModelLM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("Tom has 3 apples.")])
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    with torch.no_grad():
        logits = model(
            ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]
        ).logits
        embeds = model.get_input_embeddings()(ids)
        from_embeds = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert logits.shape == (1, ids.shape[1], model.config.vocab_size)
    assert torch.equal(logits, from_embeds)
