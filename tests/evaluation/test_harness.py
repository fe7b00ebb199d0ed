"""lm-evaluation-harness runs our models: prompts, decoding and counts are those of `dmax eval`."""

from __future__ import annotations

import json
import logging
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_llm import bare_folder_fixture, folder_fixture  # noqa: F401  (fixtures)

from dmax import LLM, DecodingParams, InputError
from dmax.evaluation.run import Sample, Summary, evaluate
from dmax.outputs import as_record, before_stop
from dmax.tasks import get_task
from dmax.tiny import bundled

# The warnings of lm_eval, and of what it stands on, are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dmax.evaluation import harness  # noqa: E402
from dmax.evaluation.harness import DMaxLM, model_settings, request_settings  # noqa: E402

LIMIT = 6
SEED = 11
TOKENS = 96
ARGUMENTS = {
    "pretrained": "tiny-dmax",
    "strategy": "spd",
    "threshold": 0.7,
    "option.soft_inputs": False,
    "dtype": "float32",
}
PARAMS = DecodingParams(
    strategy="spd", threshold=0.7, max_new_tokens=TOKENS, options={"soft_inputs": False}
)
COUNTS = (
    "generated_tokens num_forwards num_prefill_forwards num_commit_forwards num_positions "
    "num_forced num_capped tpf tpf_paper".split()
)

needs_model = pytest.mark.skipif(
    not (bundled("tiny-dmax") or Path()).is_dir(), reason="tiny-dmax is not built yet"
)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """lm_eval's command sets up its logger for the whole process, once."""
    log = logging.getLogger("lm_eval")
    before = log.level, log.propagate, log.handlers[:]
    yield
    log.setLevel(before[0])
    log.propagate, log.handlers[:] = before[1:]


@pytest.fixture(scope="module", name="ours")
def ours_fixture() -> tuple[Summary, list[Sample]]:
    llm = LLM("tiny-dmax", dtype="float32", device="cpu", max_batch_size=4)
    return evaluate(llm, get_task("word_problems"), PARAMS, limit=LIMIT, seed=SEED)


@pytest.fixture(name="task")
def task_fixture(tmp_path: Path) -> dict[str, Any]:
    """Our word problems, written as a task of lm_eval over a file."""
    examples = get_task("word_problems").examples(LIMIT, SEED)
    data = tmp_path / "problems.jsonl"
    data.write_text(
        "".join(json.dumps({"question": e.prompt, "answer": e.answer}) + "\n" for e in examples)
    )
    return {
        "task": "local_word_problems",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": ["<|endoftext|>"],
            "do_sample": False,
            "max_gen_toks": TOKENS,
        },
        "filter_list": [
            {
                "name": "strict",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(?m)^#### (-?[0-9]+)\s*\Z"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def run(task: dict[str, Any], **options: Any) -> Any:
    options = {
        "model_args": ARGUMENTS,
        "device": "cpu",
        "batch_size": 4,
        "apply_chat_template": True,
        **options,
    }
    manager = TaskManager(include_defaults=False)  # else thousands of task files are read
    return simple_evaluate(
        model="dmax", tasks=[task], task_manager=manager, bootstrap_iters=0, **options
    )


# --- the same as our own evaluation ---------------------------------------------------------------


@needs_model
def test_lm_eval_measures_what_dmax_eval_measures(
    task: dict[str, Any], ours: tuple[Summary, list[Sample]]
) -> None:
    summary, samples = ours
    results = run(task)
    assert results["results"]["local_word_problems"]["exact_match,strict"] == summary.accuracy > 0
    info = results["config"]["dmax"]
    record = as_record(summary)
    assert {name: info[name] for name in COUNTS} == {name: record[name] for name in COUNTS}
    assert info["tasks"]["local_word_problems"] == {
        name: info[name] for name in ("requests", *COUNTS)
    }
    assert (info["requests"], info["truncated_prompts"], info["batch_size"]) == (LIMIT, 0, 4)
    assert (info["weights"], info["decoding"]) == (summary.weights, summary.decoding)
    found = sorted(results["samples"]["local_word_problems"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in found] == [sample.output for sample in samples]
    json.dumps(info)  # it is written as it is


@needs_model
def test_the_command_line_runs_gsm8k_and_writes_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dmax import cli

    place = tmp_path / "openai" / "gsm8k"  # a folder of the data set's name goes before the hub
    place.mkdir(parents=True)
    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    (place / "README.md").write_text(
        f"---\n{yaml.safe_dump({'configs': [{'config_name': 'main', 'data_files': files}]})}---\n"
    )
    examples = get_task("word_problems").examples(LIMIT, SEED)
    rows = "".join(
        json.dumps({"question": e.prompt, "answer": f"#### {e.answer}"}) + "\n" for e in examples
    )
    for split in ("train", "test"):
        (place / f"{split}.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)

    command = (
        "lm_eval --model dmax --model_args pretrained=tiny-dmax,strategy=spd,threshold=0.5 "
        "--tasks gsm8k --limit 2 --num_fewshot 0 --batch_size 2 --apply_chat_template "
        "--output_path out --log_samples"
    )
    monkeypatch.setattr(sys, "argv", ["dmax", *command.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    shown = capsys.readouterr()
    assert "|gsm8k|" in shown.out
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())
    assert set(results["results"]) == {"gsm8k"}
    info = results["config"]["dmax"]
    assert (
        info["requests"] == 2 and info["tpf"] == info["generated_tokens"] / info["num_forwards"] > 0
    )
    assert (info["params"]["strategy"], info["params"]["threshold"]) == ("spd", 0.5)
    assert f"{info['num_forwards']} forwards, TPF {info['tpf']:.2f}" in shown.err
    (samples,) = (tmp_path / "out").rglob("samples_gsm8k_*.jsonl")
    assert len({json.loads(line)["doc_id"] for line in samples.read_text().splitlines()}) == 2


@needs_model
def test_few_shot_examples_become_turns(task: dict[str, Any]) -> None:
    results = run(task, num_fewshot=1, limit=1, fewshot_as_multiturn=True)
    prompt = results["samples"]["local_word_problems"][0]["arguments"][0][0]
    assert prompt.count("<role>HUMAN</role>") == 2 and prompt.endswith("<role>ASSISTANT</role>")


# --- how lm_eval finds the model ------------------------------------------------------------------


def test_it_is_found_beside_the_built_in_models() -> None:
    assert get_model("dmax") is DMaxLM
    assert get_model("dummy") is not None


def test_the_entry_point_leads_to_it() -> None:
    project = tomllib.loads(
        (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    value = project["entry-points"]["lm_eval.models"]["dmax"]
    assert EntryPoint("dmax", value, "lm_eval.models").load() is DMaxLM


def test_model_arguments_go_before_those_lm_eval_adds(folder: Path) -> None:
    arguments = "threshold=0.5,strategy=credit,option.alpha=0.25,batch_size=3,seed=4,device=cpu"
    added = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    lm = DMaxLM.create_from_arg_string(f"pretrained={folder},{arguments}", added)
    assert lm.params == DecodingParams(
        strategy="credit", threshold=0.5, seed=4, options={"alpha": 0.25}
    )
    assert lm.llm.options.max_batch_size == 3
    assert (lm.device.type, lm.rank, lm.world_size) == ("cpu", 0, 1)


def test_the_default_device_of_lm_eval_is_none_without_cuda(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (
        DMaxLM.create_from_arg_obj({"pretrained": str(folder)}, {"device": "cuda:0"}).device.type
        != "cuda"
    )
    with pytest.raises(InputError, match="cuda"):
        DMaxLM.create_from_arg_obj({"pretrained": str(folder), "device": "cuda:0"})


def test_automatic_batch_sizes(folder: Path) -> None:
    usual = DMaxLM(str(folder), device="cpu", batch_size="auto:4")
    limited = DMaxLM(str(folder), device="cpu", batch_size="auto", max_batch_size=5)
    assert usual.llm.options.max_batch_size == 16
    assert limited.llm.options.max_batch_size == 5


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("strategy=spd", "no model given"),
        (
            "pretrained=X,treshold=0.5",
            "unknown model argument `treshold`; choose from pretrained, ",
        ),
        ("pretrained=X,threshold=1.5", "`threshold` must be a number between 0 and 1, got 1.5"),
        ("pretrained=X,strategy=spdd", "unknown strategy 'spdd'"),
        ("pretrained=X,strategy=spd,option.beta=1", "strategy `spd` has no option `beta`"),
        ("pretrained=X,temperature=0.8", "`temperature` is a task's matter"),
        (
            "pretrained=X,batch_size=many",
            "`batch_size` must be a whole number of at least 1 or auto, got 'many'",
        ),
        ("pretrained=no/such", "`no/such` is neither bundled"),
    ],
)
def test_bad_model_arguments(folder: Path, arguments: str, part: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(part)}"):
        DMaxLM.create_from_arg_string(arguments.replace("X", str(folder)), {"batch_size": 1})


def test_a_model_without_a_tokenizer(bare_folder: Path) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        DMaxLM(str(bare_folder), device="cpu")


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "change", "stops"),
    [
        ({}, {}, []),
        ({"until": "\n"}, {}, ["\n"]),
        ({"until": ["Q:", ""], "do_sample": False, "temperature": 0.0}, {}, ["Q:"]),
        ({"max_gen_toks": 32, "max_tokens": 64}, {"max_new_tokens": 32}, []),
        ({"temperature": 0.7}, {"temperature": 0.7}, []),
        ({"do_sample": True}, {"temperature": 1.0}, []),
        (
            {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
            {"temperature": 0.0},
            [],
        ),
        (
            {"do_sample": True, "temperature": 0.2, "top_p": 1.0, "num_beams": 1},
            {"temperature": 0.2},
            [],
        ),
    ],
)
def test_what_a_task_says_about_generation(
    given: dict[str, Any], change: dict[str, Any], stops: list[str]
) -> None:
    assert request_settings(given, PARAMS) == (replace(PARAMS, **change), stops)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.95}, "`top_p` 0.95 of the task"),
        ({"num_beams": 4}, "`num_beams` 4 of the task"),
        ({"stop": ["a"]}, "unknown generation argument `stop`; choose from until, do_sample"),
        ({"temperature": -1}, "`temperature` must be"),
        ({"max_gen_toks": 0}, "`max_new_tokens` must be"),
    ],
)
def test_what_decoding_does_not_have_is_refused(given: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        request_settings(given, PARAMS)


def test_settings_are_those_of_decoding_params() -> None:
    assert model_settings({}) == DecodingParams()
    assert model_settings({"top_k": 3, "block_length": 8}) == DecodingParams(
        top_k=3, block_length=8
    )


def test_a_text_is_cut_at_its_first_stop_string() -> None:
    assert before_stop("one two three", ["three", "two"]) == "one "
    assert before_stop("one", ["two"]) == before_stop("one", []) == "one"
    assert before_stop("one", ["one"]) == ""


@pytest.fixture(name="lm")
def lm_fixture(folder: Path) -> DMaxLM:
    return DMaxLM(
        str(folder),
        device="cpu",
        batch_size=2,
        max_new_tokens=8,
        strategy="threshold",
        threshold=0.3,
    )


def ask(lm: DMaxLM, texts: list[str], repeats: int = 1, **kwargs: Any) -> list[str]:
    requests = [
        Instance("generate_until", {}, (text, kwargs), 0, ("t", i, repeats))
        for i, text in enumerate(texts)
    ]
    return lm.generate_until(
        [request for request in requests for _ in range(repeats)], disable_tqdm=True
    )


def test_prompts_without_a_template_are_continued_as_they_are(
    lm: DMaxLM, caplog: pytest.LogCaptureFixture
) -> None:
    text = "Tom has 3 apples."
    (answer,) = ask(lm, [text])
    (expected,) = lm.llm.generate([lm.tokenizer.encode(text)], lm.params)
    assert answer == expected.text
    assert "--apply_chat_template" in caplog.text
    assert lm.chat_template(True) == lm.tokenizer.chat_template and lm.chat_template() == ""
    with pytest.raises(InputError, match="by name"):
        lm.chat_template("tools")


def test_a_chat_template_is_bounded_and_may_leave_the_last_message_open(lm: DMaxLM) -> None:
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Well, "}]
    written = "<role>HUMAN</role>Hi.<|role_end|><role>ASSISTANT</role>Well, "
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == written
    assert lm.apply_chat_template(chat[:1]) == written.removesuffix("Well, ")
    own = lm.tokenizer.chat_template
    lm.tokenizer.chat_template = "{% if messages[0] %}{% endif %}" + own  # no longer a plain loop
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == written
    for template in (
        "{% for _ in range(10**5) %}{% for _ in range(10**5) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**8 }}",
        "{{ messages[0].content }}",
    ):
        lm.tokenizer.chat_template = template
        with pytest.raises(InputError, match="the chat template of this checkpoint fails"):
            lm.apply_chat_template(chat, add_generation_prompt=False)


def test_counts_cover_what_a_stop_string_cuts_off(lm: DMaxLM) -> None:
    (whole,) = ask(lm, ["Tom has 3 apples."])
    before = lm.get_model_info()["dmax"]
    assert ask(lm, ["Tom has 3 apples."], until=whole[:1]) == [""]
    after = lm.get_model_info()["dmax"]
    assert all(
        after[name] == 2 * before[name] for name in ("requests", "generated_tokens", "num_forwards")
    )


def test_nothing_asked_counts_nothing(lm: DMaxLM) -> None:
    assert ask(lm, []) == []
    info = lm.get_model_info()["dmax"]
    assert (info["requests"], info["tpf"], info["tpf_paper"], info["tasks"]) == (0, 0.0, 0.0, {})


def test_a_prompt_that_is_too_long_loses_its_beginning(lm: DMaxLM) -> None:
    text = "Tom has 3 apples. " * 200
    (answer,) = ask(lm, [text])
    ids = lm.tokenizer.encode(text)[-(512 - 8) :]
    assert answer == lm.llm.generate([ids], lm.params)[0].text
    assert lm.get_model_info()["dmax"]["truncated_prompts"] == 1


def test_several_samples_of_a_request_differ_and_repeat(folder: Path) -> None:
    lm = DMaxLM(
        str(folder), device="cpu", batch_size=2, max_new_tokens=8, strategy="threshold", seed=5
    )
    first = ask(lm, ["Tom has 3 apples."], repeats=3, do_sample=True, temperature=1.0)
    assert len(set(first)) > 1
    assert ask(lm, ["Tom has 3 apples."], repeats=3, do_sample=True, temperature=1.0) == first


def test_likelihoods_are_refused_in_a_sentence(lm: DMaxLM) -> None:
    for method in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(
            InputError, match="no exact log-likelihood, so dmax runs generative tasks only"
        ):
            method([])


def test_arguments_go_to_lm_eval_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["dmax", "lm_eval"])
    harness.main(["ls", "tasks"])
    assert seen == [["lm_eval", "ls", "tasks"]]
