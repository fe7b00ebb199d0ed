"""Published weight layouts of `llada2_moe` and the stacked one in memory, as tables used for loading and saving.

Per-expert files (the hub) hold `experts.{e}.gate_proj.weight` and its siblings; merged files
(`llada2_moe_veomni`, training) hold them stacked over experts. In memory gate and up are one tensor
per layer.
"""

from __future__ import annotations

from torch import Size, nn
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

MERGED = [
    WeightConverter(
        source_patterns=["mlp.experts.gate_proj", "mlp.experts.up_proj"],
        target_patterns="mlp.experts.gate_up_proj",
        operations=[Concatenate(dim=1)],
    ),
]
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
# Loading uses whichever rows match the files. Saving must be given one layout: with both,
# transformers would write gate and up merged but down per expert.
CONVERSIONS: list[WeightConverter | WeightRenaming] = [*MERGED, *PER_EXPERT]


def merged_layout(model: nn.Module) -> dict[str, Size]:
    """Tensor names and shapes of merged files for `model` (the meta device suffices)."""
    layout = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            experts, rows, columns = tensor.shape
            stem = name.removesuffix("gate_up_proj")
            layout[f"{stem}gate_proj"] = layout[f"{stem}up_proj"] = Size(
                (experts, rows // 2, columns)
            )
        else:
            layout[name] = tensor.shape
    return layout


def per_expert(name: str, shape: Size) -> dict[str, Size]:
    """What one tensor of the merged layout is called in the per-expert one: itself, or one tensor for each expert."""
    stem, is_expert, projection = name.partition("mlp.experts.")
    if not is_expert:
        return {name: shape}
    return {
        f"{stem}mlp.experts.{expert}.{projection}.weight": shape[1:] for expert in range(shape[0])
    }


def published_layout(model: nn.Module) -> dict[str, Size]:
    """Tensor names and shapes of per-expert files for `model`, as on the hub and as `save_pretrained` writes them."""
    layout: dict[str, Size] = {}
    for name, shape in merged_layout(model).items():
        layout |= per_expert(name, shape)
    return layout
