"""bench/pretrained.py: stages that go on, that fit each other, and points that stay."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretrained
import pytest
from smollm import measure, stages
from smollm.page import stages as table_of_stages
from smollm.size import CPU
from test_pretrained import (  # tokenizer is a fixture
    SHORT,
    tiny_llama,
    tokenizer,  # noqa: F401
    toy,
)
from test_pretrained_page import SOLVED, record_of
from transformers import PreTrainedTokenizerFast

from dmax.errors import InputError

# --- the autoregressive stages go on --------------------------------------------------------------

THREE = SHORT | {"max_steps": 3, "save_steps": 1, "save_total_limit": 3}
SMALL = replace(toy(CPU), causal=THREE)
AR = Path("runs/pretrained-ar")
RUN = Path("runs/pretrained-ar-run")


@pytest.fixture(scope="module")
def made(
    tokenizer: PreTrainedTokenizerFast,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder in which the original has learnt for three steps."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        parts = (tiny_llama(len(tokenizer)), copy.deepcopy(tokenizer))
        patch.setattr(pretrained.original, "load_original", lambda: parts)
        pretrained.run(SMALL, ["convert", "problems", "ar"])
    return folder


@pytest.fixture
def learnt(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The weights of `ar`, in a folder where only their last write is missing."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    weights = (AR / "model.safetensors").read_bytes()
    shutil.rmtree(AR)
    return weights


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "was not written to its end"),
        (lambda folder: tear(folder / "model.safetensors"), "is damaged, model.safetensors"),
    ],
)
def test_ar_goes_on_from_the_newest_whole_checkpoint(
    damage: Callable[[Path], None],
    flaw: str,
    learnt: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(RUN / "checkpoint-3")
    assert stages.history(AR)[-1]["step"] in (2, 3)
    pretrained.run(SMALL, ["ar"])
    assert f"checkpoint-3 {flaw}" in capsys.readouterr().out
    assert (AR / "model.safetensors").read_bytes() == learnt
    assert [entry["step"] for entry in stages.history(AR) if "loss" in entry] == [1, 2, 3]


def test_ar_starts_over_if_its_first_checkpoint_was_cut_off(learnt: bytes) -> None:
    for step in (2, 3):
        shutil.rmtree(RUN / f"checkpoint-{step}")
    (RUN / "checkpoint-1" / "trainer_state.json").unlink()
    assert stages.history(AR) == []
    pretrained.run(SMALL, ["ar"])
    assert (AR / "model.safetensors").read_bytes() == learnt


def test_what_was_logged_is_that_of_the_newest_state_that_can_be_read(learnt: bytes) -> None:
    tear(RUN / "checkpoint-3" / "trainer_state.json")
    assert stages.history(AR)[-1]["step"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: (RUN / "run.json").unlink(), "holds checkpoints and no record of what trained"),
        (lambda: SMALL.problems.write_text('{"prompt": "a?", "response": "b"}\n' * 9), "`data`"),
        (
            lambda: [tear(path / "model.safetensors") for path in RUN.glob("checkpoint-*")],
            "there is no checkpoint before it",
        ),
    ],
    ids=["an earlier release", "data", "nothing whole"],
)
def test_a_run_that_ar_cannot_go_on_from_is_left_as_it_is(
    change: Callable[[], Any], said: str, learnt: bytes
) -> None:
    change()
    before = sorted(RUN.rglob("*"))
    with pytest.raises(InputError, match=said) as error:
        pretrained.run(SMALL, ["ar"])
    assert f"remove {RUN}, or move it away" in str(error.value.hint)
    assert sorted(RUN.rglob("*")) == before


def test_ar_does_not_go_on_with_other_settings(learnt: bytes) -> None:
    (RUN / "checkpoint-3" / "trainer_state.json").unlink()
    other = replace(SMALL, causal=THREE | {"learning_rate": 0.1, "seed": 9})
    with pytest.raises(InputError, match=r"differs in `training\.learning_rate`, `training\.seed`"):
        pretrained.run(other, ["ar"])
    pretrained.run(replace(SMALL, causal=THREE | {"logging_steps": 2, "eval_steps": 2}), ["ar"])


def test_a_finished_stage_whose_run_is_gone_shows_what_it_has_logged(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = pretrained.summary(SMALL, "ar")
    shutil.rmtree(RUN)
    after = pretrained.summary(SMALL, "ar")
    assert after["steps"] == 3
    assert after["log"][: len(before["log"])] == before["log"]
    stage = {"is_done": True, "steps": 0, "log": [], "sequences": 0, "tokens": 0, "seconds": 720}
    table = "\n".join(table_of_stages(record_of(CPU, SOLVED) | {"stages": {"base": stage}}))
    assert "| base | not kept | 0 | 0 | 0.2 |  |" in table


# --- stages fit each other ------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which stages are run, each in place of the real one, with weights that never come twice."""
    names: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "check_base", lambda size: names.append("check"))
    monkeypatch.setattr(pretrained, "RESULTS", tmp_path)

    def make(size: Any, stage: str) -> None:
        names.append(stage)
        for path in stages.files(size, stage):
            path.parent.mkdir(exist_ok=True)
            lines = {size.responses: size.num_responses, size.held_out_responses: size.num_held_out}
            path.write_text(f"{len(names)}\n" * lines.get(path, 1))
        if not stages.files(size, stage):
            folder = stages.output(size, stage)
            stages.run_folder(folder).mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            (folder / "dmax.json").write_text('{"steps": 3}')
            (folder / "model.safetensors").write_text(str(len(names)))

    for stage in pretrained.STAGES:
        monkeypatch.setitem(pretrained.STAGES, stage, lambda size, stage=stage: make(size, stage))
    return names


TOY = toy(CPU)
EVERY = list(pretrained.STAGES)


def test_stages_note_what_they_were_made_from_and_keep_the_rest(begun: list[str]) -> None:
    pretrained.run(TOY, EVERY)
    assert [name for name in begun if name != "check"] == EVERY
    note = json.loads(Path("runs/pretrained-oput/dmax.json").read_text())
    assert note == {
        "steps": 3,
        "made_from": {name: stages.digest(TOY, name) for name in ("base", "responses")},
    }
    begun.clear()
    pretrained.run(TOY, EVERY)
    assert begun == []


def test_stages_of_an_older_base_are_named_with_what_to_remove(begun: list[str]) -> None:
    pretrained.run(TOY, EVERY)
    shutil.rmtree("runs/pretrained-base")
    pretrained.run(TOY, ["base"])
    begun.clear()
    for asked in (EVERY, ["masks"], ["measure"]):
        with pytest.raises(InputError) as error:
            pretrained.run(TOY, asked)
        assert error.value.message == (
            "what is there of `responses`, `oput`, `masks`, `random` was made before `base` was "
            "made anew"
        )
    folders = [f"runs/pretrained-{name}{end}" for name in EVERY[5:8] for end in ("", "-run")]
    files = ["runs/pretrained_responses.*", "runs/pretrained_held_out_responses.*"]
    assert error.value.hint == (
        f"remove {' '.join(files + folders)}, and run `{TOY.command}` again"
    )
    pretrained.run(TOY, ["ar-longer"])  # the base is no part of it
    assert begun == []
    for path in (*Path("runs").glob("pretrained_*responses.*"), *map(Path, folders)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pretrained.run(TOY, EVERY)
    assert begun == ["check", "responses", "oput", "masks", "random"]


def test_stages_of_earlier_releases_count_as_fitting(begun: list[str]) -> None:
    pretrained.run(TOY, EVERY)
    for path in (*Path("runs").glob("*/dmax.json"), *Path("runs").glob("*.from.json")):
        path.unlink()
    shutil.rmtree("runs/pretrained-base")
    begun.clear()
    pretrained.run(TOY, EVERY)
    assert begun == ["base"]


def test_nothing_is_built_on_a_base_that_has_not_learnt(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained.run(TOY, EVERY)

    def refuse(size: Any) -> None:
        raise InputError("nothing to build on")

    monkeypatch.setattr(pretrained, "check_base", refuse)
    for stage in ("oput", "masks", "random"):
        shutil.rmtree(f"runs/pretrained-{stage}")
        with pytest.raises(InputError, match="nothing to build on"):
            pretrained.run(TOY, [stage])


# --- which points stay ----------------------------------------------------------------------------


@pytest.fixture
def decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What models decode, without one: `here` is where, and `judged` what the judge was asked."""
    told = SimpleNamespace(here={"cpu": "A", "threads": 1, "torch": "2"}, judged=0, references=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "RESULTS", tmp_path)
    for stage in ("original", "ar", "base"):
        folder = Path(f"runs/pretrained-{stage}")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "llama"}')

    class Judge:
        weights = "judge"

        def __init__(self, folder: Path) -> None:
            pass

        def references(self, *_: Any) -> Any:
            told.references += 1
            return SimpleNamespace(per_token=0.4)

        def evaluation(self, path: Path) -> Any:
            told.judged += 1
            return SimpleNamespace(per_token=0.2)

    def decode(size: Any, *_: Any) -> dict[str, Any]:
        figures = dict(accuracy=0.5, correct=size.limit // 2, total=size.limit, tpf=1.0)
        rest = dict(weights="w", interval=[0.4, 0.6], seconds=1.0, environment=told.here)
        return figures | rest

    monkeypatch.setattr(measure, "Judge", Judge)
    monkeypatch.setattr(measure, "open_model", lambda *_: None)
    monkeypatch.setattr(measure, "decode", decode)
    monkeypatch.setattr(pretrained, "environment", lambda *_: told.here)
    monkeypatch.setattr(pretrained, "draw", lambda *_, **__: None)
    return told


def measured(size: Any) -> tuple[dict[str, Any], str]:
    """The record and the page, after measuring."""
    pretrained.measure_all(size)
    page = Path("pretrained.md").read_text()
    return json.loads(Path("pretrained.json").read_text()), " ".join(page.split())


def test_points_of_another_limit_are_measured_and_judged_anew(decoded: SimpleNamespace) -> None:
    record, _ = measured(CPU)
    num_points = len(record["points"])
    assert measured(CPU)[0] == record
    assert (decoded.judged, decoded.references) == (num_points, 1)
    record, page = measured(replace(CPU, limit=500))
    assert {point["total"] for point in record["points"].values()} == {500}
    assert "500 unseen problems" in page
    assert "/200 |" not in page
    assert (decoded.judged, decoded.references) == (2 * num_points, 2)


def test_points_name_the_machine_that_they_were_measured_on(decoded: SimpleNamespace) -> None:
    first, page = measured(CPU)
    assert "greedy; A, threads: 1, torch 2, " in page
    assert all("environment" not in point for point in first["points"].values())
    begun_here = decoded.here
    decoded.here = begun_here | {"cpu": "B", "date": "later"}
    assert measured(CPU)[0] == first  # nothing was measured there
    shutil.copytree("runs/pretrained-base", "runs/pretrained-oput")
    record, page = measured(CPU)
    assert record["environment"] == begun_here
    others = {name: p for name, p in record["points"].items() if name not in first["points"]}
    assert len(others) == 3
    assert all(point["environment"] == decoded.here for point in others.values())
    assert f"; 3 of {len(record['points'])} points: B, threads: 1" in page


@pytest.mark.parametrize(
    "content",
    [
        '{"mine": 1}',
        "[1]",
        "hello",
        "",
        '{"points": [], "stages": {}}',
        '{"points": {"a": 1}, "stages": {}, "environment": {}}',
        '{"points": {',
    ],
)
def test_a_record_of_something_else_stays_as_it_is(
    content: str, decoded: SimpleNamespace, begun: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "pretrained.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"pretrained\.json is not a record of this script"):
        pretrained.run(CPU, ["convert", "measure"])
    assert begun == []
    assert path.read_text() == content
    assert not (tmp_path / "pretrained.md").exists()


def test_a_point_is_decoded_anew_unless_all_of_its_settings_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = replace(CPU, limit=1)
    llm = pretrained.measure.LLM("tiny-dmax", max_batch_size=1)
    task = pretrained.TASK()
    times = []
    evaluate = measure.evaluate
    monkeypatch.setattr(
        measure, "evaluate", lambda *a, **k: (times.append(1), evaluate(*a, **k))[1]
    )
    curve = pretrained.Curve("DMax, SPD", "tiny-dmax", "spd", (0.5,))
    for other, total in (
        (curve, 1),
        (curve, 1),
        (replace(curve, settings=(("top_k", 2),)), 2),
        (replace(curve, strategy="threshold"), 3),
    ):
        point = measure.decode(size, other, 0.5, task, llm)
        assert len(times) == total
    assert point["params"]["strategy"] == "threshold"
    path = Path("runs/pretrained-eval/DMax-SPD-0.5.json")
    path.write_text(json.dumps(point | {"seed": 8}))
    measure.decode(size, replace(curve, strategy="threshold"), 0.5, task, llm)
    assert len(times) == 4
