"""Two processes read the same data: one works, the other finds what it cached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from two_ranks import launch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

RANKS = """
import json, os, sys
from accelerate import PartialState

state = PartialState(cpu=True)
from dmax.errors import InputError
from dmax.records import encoding, readers, sources, tables
from dmax.special_ids import SpecialIds
from dmax.tiny.tokenizer import build_tokenizer

worked = []
def counting(module, name):
    function = getattr(module, name)
    def counted(*args, **kwargs):
        worked.append(name)
        return function(*args, **kwargs)
    setattr(module, name, counted)
counting(sources, "read_conversation")
counting(encoding, "_example")

tokenizer = build_tokenizer()
ids = SpecialIds(tokenizer.mask_token_id, (tokenizer.eos_token_id,), tokenizer.pad_token_id, 8)
told = {}
try:
    table = sources.load_conversations(sources.find_source(sys.argv[1]))
    encoded = encoding.encode_dataset(table, tokenizer, ids, max_length=int(sys.argv[2]))
    told = {"rows": len(encoded), "last": encoded[len(encoded) - 1]["where"]}
except InputError as error:
    told = {"error": error.message}
with open(f"{sys.argv[3]}/{state.process_index}.json", "w") as file:
    json.dump(told | {"worked": len(worked)}, file)
state.destroy_process_group()
"""


TRAINING = """
import json, sys
import torch
from dmax.checkpoint import load_checkpoint
from dmax.records.sources import find_source, load_conversations
from dmax.training.config import DMaxConfig
from dmax.training.trainer import DMaxTrainer

seen = []
compute_loss = DMaxTrainer.compute_loss
def noting(self, model, inputs, *args, **kwargs):
    seen.extend(self.processing_class.batch_decode(inputs["clean_ids"]))
    return compute_loss(self, model, inputs, *args, **kwargs)
DMaxTrainer.compute_loss = noting

checkpoint = load_checkpoint("tiny-base", dtype=torch.float32, device="cpu")
args = DMaxConfig(
    output_dir=sys.argv[3], objective="mdlm", max_steps=int(sys.argv[2]), use_cpu=True,
    per_device_train_batch_size=2, gradient_accumulation_steps=1, gradient_checkpointing=False,
    report_to="none", save_strategy="no", disable_tqdm=True,
)
stream = load_conversations(find_source(sys.argv[1]), streaming=True)
trainer = DMaxTrainer(
    checkpoint.model, args, stream, special_ids=checkpoint.special_ids,
    processing_class=checkpoint.tokenizer,
)
trainer.train()
with open(f"{sys.argv[3]}/{args.process_index}.json", "w") as file:
    json.dump({"seen": seen}, file)
trainer.accelerator.end_training()
"""


def ranks(folder: Path, script: str, number: int) -> list[dict[str, Any]]:
    """What two processes of a script tell about the data of `folder`."""
    file = folder / "ranks.py"
    file.write_text(script)
    done = launch(
        file,
        folder / "data.jsonl",
        number,
        folder,
        environment={"HF_DATASETS_CACHE": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def write(folder: Path, count: int) -> Path:
    """Records, every second of them longer than its neighbours."""
    file = folder / "data.jsonl"
    rows = [
        {"prompt": f"Tom has {n} apples." + " Well." * (n % 2 * 9), "response": f"He has {n}."}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_one_of_two_processes_reads_and_encodes(tmp_path: Path) -> None:
    file = write(tmp_path, 50)
    first, second = ranks(tmp_path, RANKS, 200)
    assert first == {"rows": 50, "last": f"{file}:50", "worked": 100}
    assert second == first | {"worked": 0}
    first, second = ranks(tmp_path, RANKS, 200)
    assert first["worked"] == second["worked"] == 0, "a later run finds it, too"

    first, second = ranks(tmp_path, RANKS, 20)  # nobody waits for ever where an example is too long
    assert first["error"] == second["error"]
    assert "`max_length` 20" in first["error"]


@pytest.mark.slow
def test_two_processes_share_a_stream(tmp_path: Path) -> None:
    """Each has batches of its own, which need not be of one length."""
    write(tmp_path, 12)
    first, second = (set(each["seen"]) for each in ranks(tmp_path, TRAINING, 3))
    texts = first | second
    learnt = {text.partition(" apples.")[0].rpartition(" has ")[2].strip() for text in texts}
    assert len(first) == len(second) == 6
    assert learnt == {str(n) for n in range(12)}
