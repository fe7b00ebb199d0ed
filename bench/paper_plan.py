"""What `bench/paper.py` decodes and measures."""

from __future__ import annotations

from ablation_training import SEEDS, VARIANTS, folder

from dmax.evaluation.sweep import Curve

HARD = ("soft_inputs", False)
ANYWHERE = ("prefix_only", False)
TAUS = (0.0, 0.5, 0.95)  # of the paper's Table 3
DECODING = (
    Curve("base, threshold", "tiny-base", "threshold", (0.0, 0.3, 0.5, 0.7, 0.95)),
    Curve("base, SPD", "tiny-base", "spd", TAUS),
    Curve("DMax, threshold", "tiny-dmax", "threshold", (0.5, 0.95)),
    Curve("DMax, SPD", "tiny-dmax", "spd", (0.0, 0.3, 0.5, 0.7, 0.9, 0.95)),
    Curve("DMax, hard tokens", "tiny-dmax", "spd", TAUS, (HARD,)),
    Curve("DMax, no prefix rule", "tiny-dmax", "spd", TAUS, (ANYWHERE,)),
    Curve("DMax, hard tokens, no prefix rule", "tiny-dmax", "spd", TAUS, (HARD, ANYWHERE)),
    Curve("DMax, no renormalisation", "tiny-dmax", "spd", TAUS, (("renormalize", False),)),
    Curve(
        "DMax, consistency stop alone", "tiny-dmax", "spd", TAUS, (("stop_on_confidence", False),)
    ),
    Curve(
        "DMax, confidence stop alone", "tiny-dmax", "spd", TAUS, (("stop_on_consistency", False),)
    ),
    Curve("DMax, top-k 2", "tiny-dmax", "spd", TAUS, (("top_k", 2),)),
    Curve("DMax, top-k 4", "tiny-dmax", "spd", TAUS, (("top_k", 4),)),
    *(
        Curve(f"{name}, block {length}", model, strategy, values, (("block_length", length),))
        for length in (8, 16)
        for name, model, strategy, values in (
            ("base, threshold", "tiny-base", "threshold", (0.5, 0.95)),
            ("DMax, SPD", "tiny-dmax", "spd", TAUS),
        )
    ),
)
TRAINING = tuple(
    Curve(f"{variant}, {how}, seed {seed}", str(folder(variant, seed)), strategy, values, settings)
    for seed in SEEDS
    for variant in VARIANTS
    for how, strategy, values, settings in (
        ("SPD", "spd", TAUS, ()),
        ("hard tokens", "spd", (0.5,), (HARD,)),
        ("threshold", "threshold", (0.5, 0.95), ()),
    )
)
MEASURED = {
    "base": "tiny-base",
    "DMax": "tiny-dmax",
    "masks only": str(folder("masks only", 1)),
    "random tokens": str(folder("random tokens", 1)),
    "sampled rollouts": str(folder("sampled rollouts", 1)),
}
