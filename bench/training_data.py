"""What training data takes before the first step, as Arrow tables and as lists of Python.

    python bench/training_data.py --records 100000 --output bench/results/training_data.json

Word problems go into a JSONL file, which three processes then read and tokenize: into lists, one
record at a time; into tables, for the first time; and into tables that are cached already. Each
says how long that took with the checks and the order of an epoch, and by how much its memory grew:
at its peak, and in the end by pages of its own, which are not those of files. CPU time is that of
all its processes. The share of padding in batches of some sizes is what packing would save.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from command_line import telling

from dmax.environment import environment
from dmax.files import write_atomically
from dmax.params import check_number
from dmax.records.encoding import encode_dataset, ending_ids
from dmax.records.sources import find_source, load_conversations, read_conversations
from dmax.special_ids import SpecialIds
from dmax.tasks.word_problems import problems
from dmax.tiny.tokenizer import build_tokenizer
from dmax.training.data import LengthSampler, check_examples, num_ids

WAYS = ("lists", "tables", "cached tables")
MAX_LENGTH = 1024
BLOCK = 32
BATCH_SIZES = (1, 8, 32)


def write_records(file: Path, count: int) -> None:
    """Word problems with their worked solutions, as `dmax distill` would write them."""
    with file.open("w") as lines:
        for problem in problems(count, seed=3):
            record = {"prompt": problem.question, "response": problem.response}
            lines.write(json.dumps(record) + "\n")


def encode_lists(file: Path, tokenizer: Any, ids: SpecialIds) -> Any:
    """Token ids in lists, record by record, as `dmax train` had them until tables came."""
    ending = ending_ids(tokenizer, ids.eos_token_ids)
    examples = []
    for messages, response, where, _ in read_conversations(file):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        learnt = [*tokenizer.encode(response, add_special_tokens=False), *ending]
        examples.append({"prompt_ids": prompt, "response_ids": learnt, "where": where})
    return examples


def encode_tables(file: Path, tokenizer: Any, ids: SpecialIds) -> Any:
    """Token ids in Arrow files."""
    conversations = load_conversations(find_source(file))
    return encode_dataset(conversations, tokenizer, ids, max_length=MAX_LENGTH)


def measure(way: str, file: Path) -> dict[str, Any]:
    """Time and memory of one way in this process, checks and the first order included."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = build_tokenizer()
    ids = SpecialIds(tokenizer.mask_token_id, (tokenizer.eos_token_id,), 0, BLOCK)
    before = memory()
    began = time.perf_counter()
    started = sum(os.times()[:4])
    examples = (encode_lists if way == "lists" else encode_tables)(file, tokenizer, ids)
    check_examples(examples, len(tokenizer), ids.mask_token_id)
    first = next(iter(LengthSampler(num_ids(examples), batch_size=8, seed=0)))
    seconds = time.perf_counter() - began
    used = sum(os.times()[:4]) - started
    after = memory()
    shares = {str(size): padding(examples, size) for size in BATCH_SIZES}
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used, 2),
        **{f"{name}_mib": round((after[name] - before[name]) / 2**20) for name in before},
        "records": len(examples),
        "tokens": int(num_ids(examples).sum()),
        "padding": shares,
        "first": examples[first]["where"].rpartition(":")[2],
    }


def padding(examples: Any, batch_size: int) -> float:
    """The share of positions that packing would save: those behind the EOS labels of an example."""
    totals = num_ids(examples).sum(axis=1) + BLOCK
    order = list(LengthSampler(num_ids(examples), batch_size, seed=0))
    batches = [totals[order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    padded = sum(-(-batch.max() // BLOCK) * BLOCK * len(batch) for batch in batches)
    return round(1 - float(totals.sum() / padded), 3)


def memory() -> dict[str, int]:
    """Bytes of this process: the most that were resident, and now those of no file."""
    status = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in status[1:]}
    own = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, "own": own}


@telling()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.file)))
        return
    check_number("records", options.records, low=1, whole=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        write_records(file, options.records)
        child = os.environ | {"HF_DATASETS_CACHE": folder}
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--file", str(file)]
            run = subprocess.run(command, env=child, stdout=subprocess.PIPE, text=True, check=True)
            results[way] = json.loads(run.stdout)
            print(f"{way}: {results[way]}")
    assert len({(each["tokens"], each["first"]) for each in results.values()}) == 1
    if options.output:
        record = {"ways": results, "environment": environment()}
        write_atomically(options.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
