"""Weight layouts of `llada2_moe` in files and in memory, as tables for loading and saving.

Per-expert files (the hub) hold `experts.{e}.gate_proj.weight` and its siblings. Merged files
(`llada2_moe_veomni`, training) hold them stacked over experts. In memory, gate and up are one
tensor per layer.
"""

from __future__ import annotations

from torch import Size, nn
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

MERGED = WeightConverter(
    source_patterns=["mlp.experts.gate_proj", "mlp.experts.up_proj"],
    target_patterns="mlp.experts.gate_up_proj",
    operations=[Concatenate(dim=1)],
)
PER_EXPERT = [
    WeightConverter(
        source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        target_patterns="mlp.experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter(
        source_patterns="mlp.experts.*.down_proj.weight",
        target_patterns="mlp.experts.down_proj",
        operations=[MergeModulelist(dim=0)],
    ),
]
# Loading uses the rows that match the files. Saving needs one layout: with both, transformers would
# write gate and up merged, but down per expert.
CONVERSIONS: list[WeightConverter | WeightRenaming] = [MERGED, *PER_EXPERT]


def merged_layout(model: nn.Module) -> dict[str, Size]:
    """Tensor names and shapes of merged files for `model`, which may be on the meta device."""
    layout = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            experts, rows, columns = tensor.shape
            stem = name.removesuffix("gate_up_proj")
            for projection in ("gate_proj", "up_proj"):
                layout[stem + projection] = Size((experts, rows // 2, columns))
        else:
            layout[name] = tensor.shape
    return layout


def per_expert(name: str, shape: Size) -> dict[str, Size]:
    """A tensor of the merged layout in the per-expert one: itself, or one for each expert."""
    stem, experts, projection = name.partition("mlp.experts.")
    if not experts:
        return {name: shape}
    return {f"{stem}{experts}{e}.{projection}.weight": shape[1:] for e in range(shape[0])}
