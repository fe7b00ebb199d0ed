"""The picture of a training run: which values are drawn, and where labels stand."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from dmax import extras
from dmax.errors import InputError
from dmax.evaluation.curves import (
    LABEL_HEIGHT,
    NOISY,
    PANELS,
    Panel,
    draw_history,
    look,
    panel_curves,
    running_mean,
    spread,
)

HISTORY = [
    {"step": 2, "epoch": 0.1, "loss": 3.0, "loss_masked": 2.0, "loss_predicted": 4.0},
    {"step": 2, "eval_accuracy": 0.25, "eval_tpf": 1.5},
    {"step": 4, "epoch": 0.2, "loss": 2.0, "loss_masked": 1.0, "loss_predicted": 3.0},
    {"step": 4, "eval_accuracy": 0.5, "eval_tpf": float("nan")},
    {"step": 4, "train_runtime": 1.0, "train_loss": 2.5},
]


def size(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_a_panel_has_the_values_that_were_logged() -> None:
    loss, rollout, *_, accuracy, tpf = PANELS
    assert panel_curves(HISTORY, loss) == {
        "mean": [(2, 3.0), (4, 2.0)],
        "masked": [(2, 2.0), (4, 1.0)],
        "predicted": [(2, 4.0), (4, 3.0)],
    }
    assert panel_curves(HISTORY, rollout) == {}
    assert panel_curves(HISTORY, accuracy) == {"": [(2, 25.0), (4, 50.0)]}
    assert panel_curves(HISTORY, tpf) == {"": [(2, 1.5)]}


def test_every_part_of_a_loss_is_drawn_whatever_a_plugin_calls_it() -> None:
    line = {"step": 1, "loss": 1.0, "loss_random": 2.0, "loss_of_mine": 3.0}
    assert panel_curves([line], PANELS[0]).keys() == {"mean", "random", "of_mine"}


def test_a_loss_of_either_sign_is_drawn(tmp_path: Path) -> None:
    """That of a policy gradient; a label far outside its panel would leave no room for it."""
    history = [{"step": step, "loss": -3e-7, "mmd_masked": 0.5} for step in (1, 2)]
    draw_history(history, tmp_path / "one.png", "one")
    assert size(tmp_path / "one.png")[0] > 1000


def test_a_running_mean_keeps_both_ends_and_flattens_what_lies_between() -> None:
    curve = [(step, float(step % 2)) for step in range(NOISY)]
    smooth = running_mean(curve)
    assert [step for step, _ in smooth] == [step for step, _ in curve]
    assert (smooth[0], smooth[-1]) == (curve[0], curve[-1])
    assert all(abs(value - 0.5) < 0.2 for _, value in smooth[1:-1])
    line = [(step, 2.0 * step) for step in range(NOISY)]
    assert [value for _, value in running_mean(line)] == pytest.approx([value for _, value in line])


def test_labels_keep_their_order_and_stand_apart_inside_the_picture() -> None:
    places = [0.05, 0.06, 0.9, 0.04]
    moved = spread(places, LABEL_HEIGHT)
    order = sorted(range(4), key=places.__getitem__)
    assert order == sorted(range(4), key=moved.__getitem__)
    gaps = [moved[above] - moved[below] for below, above in zip(order, order[1:], strict=False)]
    assert min(gaps) >= LABEL_HEIGHT - 1e-9
    assert min(moved) >= 0
    assert spread([0.5], LABEL_HEIGHT) == [0.5]


def test_no_two_panel_curves_a_panel_look_alike_in_grey() -> None:
    assert len({look(index)[1] for index in range(5)}) == 5


def test_the_picture_grows_with_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    losses = [line for line in HISTORY if "loss" in line]
    draw_history(losses, tmp_path / "small.png", "a run")
    draw_history(HISTORY, tmp_path / "large.png", "a run")
    small, large = size(tmp_path / "small.png"), size(tmp_path / "large.png")
    assert large[0] > 1.9 * small[0] and large[1] > 1.5 * small[1]


def test_a_long_noisy_log_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    long = [
        {"step": step, "loss": 1 / step, "rollout_error": 0.0, "entropy_right": 0.1}
        for step in range(1, 4 * NOISY)
    ]
    draw_history(long, tmp_path / "curves.png", "a run")
    assert size(tmp_path / "curves.png")[0] > 1000


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": float("nan"), "epoch": 1.0}]])
def test_a_log_without_values_has_no_picture(
    tmp_path: Path, history: list[dict[str, float]]
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="nothing was logged that could be drawn"):
        draw_history(history, tmp_path / "curves.png", "a run")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    monkeypatch.delitem(extras.sys.modules, "matplotlib", raising=False)
    with pytest.raises(InputError, match="needs the package `matplotlib`"):
        draw_history(HISTORY, tmp_path / "curves.png", "a run")


def test_a_pattern_stands_for_its_own_names_only() -> None:
    panel = Panel("losses", {"loss_*": ""})
    assert panel_curves([{"step": 1, "loss": 1.0, "train_loss": 2.0}], panel) == {}
