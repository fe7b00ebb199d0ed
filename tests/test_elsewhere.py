"""What is saved here is read elsewhere: by transformers 4.57, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import load
from transformers import AutoTokenizer

from dmax.checkpoint import save_checkpoint
from dmax.models import LLaDA2MoeConfig
from dmax.tiny import BUNDLED, bundled
from dmax.tiny.tokenizer import build_tokenizer

CHAT = [{"role": "user", "content": "Tom has 3 apples. <role>"}]
# Runs there. The configuration has the defaults of the published class where they matter.
SCRIPT = """
import json, sys
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, __version__

class Published(PretrainedConfig):
    model_type = "llada2_moe"
    def __init__(self, use_bias=True, use_qk_norm=None, use_rmsnorm=None, norm_head=True,
                 embedding_dropout=0.1, output_dropout=0.1, attention_dropout=0.1,
                 rope_theta=1e4, rope_scaling=None, num_shared_experts=0, head_dim=None, **kwargs):
        names = locals()
        for name in ("use_bias", "use_qk_norm", "use_rmsnorm", "norm_head", "embedding_dropout",
                     "output_dropout", "attention_dropout", "rope_theta", "rope_scaling",
                     "num_shared_experts", "head_dim"):
            setattr(self, name, names[name])
        super().__init__(**kwargs)

AutoConfig.register("llada2_moe", Published)
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
config = AutoConfig.from_pretrained(folder)
generation = GenerationConfig.from_pretrained(folder)
with safe_open(folder + "/model.safetensors", "np") as file:
    shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
print(json.dumps({
    "version": __version__,
    "config": config.to_dict(),
    "eos": generation.eos_token_id,
    "ids": tokenizer.apply_chat_template(json.loads(sys.argv[2]), add_generation_prompt=True),
    "special": sorted(tokenizer.all_special_ids),
    "mask": tokenizer.mask_token_id,
    "shapes": shapes,
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with transformers 4.57 and nothing of ours."""
    folder = tmp_path_factory.mktemp("elsewhere") / "env"
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    done = subprocess.run(
        [*pip, "--no-compile", "--retries=0", "--timeout=5", "transformers==4.57.6", "jinja2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed: {done.stderr.strip()[-300:]}")
    return python


def read_elsewhere(python: Path, folder: Path) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", SCRIPT, str(folder), json.dumps(CHAT)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BUNDLED, "saved"])
def test_transformers_4_57_reads_what_is_saved_here(
    python: Path, name: str, tmp_path: Path
) -> None:
    folder = bundled(name) or tmp_path / name
    if name == "saved":
        found = load("tiny-dmax")
        save_checkpoint(found.model, build_tokenizer(), folder, found.special_ids)
    read = read_elsewhere(python, folder)
    assert read["version"].startswith("4.57.")

    here = AutoTokenizer.from_pretrained(folder)
    assert read["ids"] == here.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    assert read["special"] == sorted(here.all_special_ids)
    assert (read["mask"], read["eos"]) == (here.mask_token_id, here.eos_token_id)

    config = LLaDA2MoeConfig.from_pretrained(folder).to_dict()
    written = json.loads((folder / "config.json").read_text())
    del written["transformers_version"]
    assert {key for key in written if read["config"][key] != written[key]} == set()
    assert read["config"]["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert read["config"]["rope_scaling"] is None

    shapes = read["shapes"]
    model = "model.layers.1."
    assert shapes["model.word_embeddings.weight"] == [config["vocab_size"], config["hidden_size"]]
    assert shapes[f"{model}mlp.experts.3.up_proj.weight"] == [160, 256]
    assert shapes[f"{model}attention.query_layernorm.weight"] == [config["head_dim"]]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_saved_configuration_says_what_other_engines_ask_for(name: str, tmp_path: Path) -> None:
    found = load(name)
    save_checkpoint(found.model, found.tokenizer, tmp_path / "saved", found.special_ids)
    folder = bundled(name)
    assert folder is not None
    assert json.loads((tmp_path / "saved/config.json").read_text())["router_dtype"] == "fp32"
    assert found.model.config.router_dtype == "fp32"  # also where the files say nothing
    for saved in (folder, tmp_path / "saved"):
        config = json.loads((saved / "config.json").read_text())
        assert config["use_qk_norm"] is config["use_rmsnorm"] is True
        assert config["norm_head"] is config["use_sliding_window"] is False
        assert config["embedding_dropout"] == config["output_dropout"] == 0
        tokenizer = json.loads((saved / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "<role>" in tokenizer["additional_special_tokens"]


def test_a_scaled_rotary_embedding_is_saved_in_both_forms(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    config = LLaDA2MoeConfig(rope_parameters=rope)
    config.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["rope_scaling"] == {"factor": 4.0, "rope_type": "linear"}
    again = LLaDA2MoeConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert again.rotary_dim == config.rotary_dim


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_qk_norm", False),
        ("use_rmsnorm", False),
        ("norm_head", True),
        ("use_sliding_window", True),
    ],
)
def test_variants_that_are_not_built_here_are_refused(name: str, value: bool) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be {not value}"):
        LLaDA2MoeConfig(**{name: value})


def test_a_dropout_of_the_published_file_is_carried(tmp_path: Path) -> None:
    config = LLaDA2MoeConfig(embedding_dropout=0.25)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["embedding_dropout"] == 0.25
