"""Two processes read the same data: one works, the other finds what it cached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def ranks(folder: Path, max_length: int) -> list[dict[str, Any]]:
    """What two processes tell about the data of `folder`."""
    script = folder / "ranks.py"
    script.write_text(RANKS)
    arguments = [str(script), str(folder / "data.jsonl"), str(max_length), str(folder)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*torchrun, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_one_of_two_processes_reads_and_encodes(tmp_path: Path) -> None:
    rows = [{"prompt": f"Tom has {n} apples.", "response": f"He has {n}."} for n in range(50)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = ranks(tmp_path, 200)
    assert first == {"rows": 50, "last": f"{tmp_path / 'data.jsonl'}:50", "worked": 100}
    assert second == first | {"worked": 0}
    first, second = ranks(tmp_path, 200)
    assert first["worked"] == second["worked"] == 0, "a later run finds it, too"

    first, second = ranks(tmp_path, 20)  # nobody waits for ever where an example is too long
    assert first["error"] == second["error"]
    assert "`max_length` 20" in first["error"]
