"""Small trained heads that say which positions may be decoded together, and their files.

Learn2PD's filter sees the confidences of a block, DEMASK's head its hidden states. A head is a few
tensors fitted to one model. Training and decoding both apply them with the functions below.

Shapes: B blocks of L' positions, L positions of the blocks trained on, D hidden size, K inner size.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dmax.errors import InputError, shorten, show
from dmax.files import write_atomically
from dmax.tiny import BUNDLED, bundled_head

Kind = Literal["learn2pd", "demask"]
KINDS: tuple[Kind, ...] = ("learn2pd", "demask")
Tensors = dict[str, Tensor]
SAMPLE = "model.sample"  # its name in the file
SAMPLED = 16  # values of each weight
ROUNDING = 2**-6  # relative, of a weight in 16 bits, with room to spare
MAX_OTHERS = 0.01  # share of the sample that may differ; of a fine-tuned model most does


@dataclass(frozen=True, slots=True)
class Head:
    """A trained head and what it was trained on.

    Attributes:
        kind: the strategy it belongs to.
        model: digest of the weights whose confidences or hidden states it learnt from
            (`environment.weights_digest`).
        block_length: L of that model.
        hidden_size: D of that model.
        steps: how long it was trained.
        tensors: float32, on the CPU; `shapes` gives their names and shapes.
        sample: `weights_sample` of that model; None: nobody recorded it.
        digest: of the tensors.
    """

    kind: Kind
    model: str
    block_length: int
    hidden_size: int
    steps: int
    tensors: Tensors = field(repr=False, compare=False)
    sample: Tensor | None = field(default=None, repr=False, compare=False)
    digest: str = field(init=False)
    _placed: dict[torch.device, Tensors] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        object.__setattr__(self, "digest", digest.hexdigest()[:16])

    def check_length(self, length: int, name: str) -> None:
        """Raises `InputError`, naming the head, for a block longer than those it learnt from."""
        if length > self.block_length:
            raise InputError(
                f"the {name} takes blocks of up to {self.block_length} positions, got {length}",
                hint=f"lower `block_length`, or train a {name.split()[0]} for this one",
            )

    def check_weights(self, weights: Iterable[tuple[str, Tensor]], name: str) -> None:
        """Raises `InputError`, naming the head, for weights of another model than its own.

        The same weights may be rounded to 16 bits, or have quantised experts.
        """
        if self.sample is None:
            return
        found = weights_sample(weights)
        is_alike = found.shape == self.sample.shape
        if is_alike:
            is_close = torch.isclose(found, self.sample, rtol=ROUNDING, atol=1e-6)
            is_alike = is_close.float().mean().item() > 1 - MAX_OTHERS
        if not is_alike:
            raise InputError(
                f"the {name} was trained on another model (weights {self.model})",
                hint=f"train a {name.split()[0]} on this one, or decode the model it belongs to",
            )

    def on(self, device: torch.device) -> Tensors:
        """The tensors on a device, copied there once."""
        if device not in self._placed:
            placed = {name: tensor.to(device) for name, tensor in self.tensors.items()}
            self._placed[device] = placed
        return self._placed[device]


def weights_sample(weights: Iterable[tuple[str, Tensor]]) -> Tensor:
    """The first values of every weight but the experts', [N] float32 on the CPU.

    They tell a model from another, whatever dtype it is loaded in.
    """
    parts = [
        weight.detach().flatten()[:SAMPLED].float()
        for name, weight in weights
        if "experts" not in name
    ]
    return torch.cat(parts).cpu()


def shapes(
    kind: Kind, block_length: int, hidden_size: int, inner: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a head's tensors; only DEMASK's has an `inner` size K."""
    if kind == "learn2pd":
        weight = (block_length, block_length)
        bias = (block_length,)
        return {
            "inner.weight": weight,
            "inner.bias": bias,
            "outer.weight": weight,
            "outer.bias": bias,
        }
    return {
        "query": (hidden_size, inner),
        "key": (hidden_size, inner),
        "distance": (2 * block_length - 1,),
    }


def filter_logits(tensors: Tensors, confidence: Tensor) -> Tensor:
    """Learn2PD's filter (arXiv 2509.25188): is a position's prediction already the final one?

        f(c) = W_2 relu(W_1 c + b_1) + b_2

    Args:
        tensors: those of a `learn2pd` head.
        confidence: [B, L'] float32 of all positions of the block, decoded ones included; L' <= L,
            and the rest counts as 0.

    Returns:
        [B, L'] float32, the logit of yes.
    """
    length = confidence.shape[1]
    padded = F.pad(confidence, (0, len(tensors["inner.bias"]) - length))  # [B, L]
    inner = F.linear(padded, tensors["inner.weight"], tensors["inner.bias"]).relu()
    return F.linear(inner, tensors["outer.weight"], tensors["outer.bias"])[:, :length]


def dependency_logits(tensors: Tensors, hidden_states: Tensor) -> Tensor:
    """DEMASK's head (arXiv 2604.02560): how far does deciding i move the distribution at j?

        D_ij = sigmoid(q_i · k_j / √K + b_{j - i}),   q = h W_q,   k = h W_k

    The scaled dot product is the source's. Ours are the sigmoid, as the target lies in [0, 1], and
    the bias for the distance, as the last hidden states need not carry positions.

    Args:
        tensors: those of a `demask` head.
        hidden_states: [B, L', D] of the model's last layer; L' <= L.

    Returns:
        [B, L', L'] float32, the logit of D.
    """
    hidden_states = hidden_states.float()
    query = hidden_states @ tensors["query"]  # [B, L', K]
    key = hidden_states @ tensors["key"]  # [B, L', K]
    product = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])  # [B, L', L']

    position = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    distance = position[None] - position[:, None]  # [L', L'], j - i
    farthest = len(tensors["distance"]) // 2
    return product + tensors["distance"][distance + farthest]


def load_head(name: object, kind: Kind) -> Head:
    """A head by its name: a bundled model that it comes with, its file, or the folder of its file.

    In a folder the file is `<kind>.safetensors`. It is read once for as long as it does not change.

    Raises:
        InputError: no name, no such file, or not a sound head of that kind.
    """
    have = [model for model in BUNDLED if bundled_head(model, kind).is_file()]
    hint = f"train one as recipes/tiny_{kind}.yaml does"
    if have:
        hint += f", or take that of {' or '.join(have)}"
    if not isinstance(name, str) or not name:
        raise InputError(
            f"strategy `{kind}` needs the option `head`, the file of a trained head, "
            f"got {show(name)}",
            hint,
        )
    path = bundled_head(name, kind) if name in BUNDLED else Path(os.path.expanduser(name))
    if os.path.isdir(path):  # unlike Path.is_dir, no name is too long for it
        path = path / f"{kind}.safetensors"
    shown = shorten(str(path))
    try:
        if not os.path.isfile(path):  # a pipe or a device might never end
            raise OSError("no file")
        return _read(path, path.stat().st_mtime_ns, kind)
    except OSError:
        raise InputError(
            f"strategy `{kind}` has no head `{shorten(name)}`: {shown} cannot be read", hint
        ) from None
    except (SafetensorError, KeyError, ValueError) as error:
        reason = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{shown} is not a sound head of strategy `{kind}`: {shorten(reason)}", hint
        ) from None


@lru_cache(maxsize=16)
def _read(path: Path, _modified: int, kind: Kind) -> Head:
    """Raises OSError, SafetensorError, KeyError or ValueError."""
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about["kind"] != kind:
        raise ValueError(f"it belongs to strategy `{about['kind']}`")
    length = int(about["block_length"])
    hidden = int(about["hidden_size"])
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"`{key}` must hold floats, got {tensor.dtype}")
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    sample = tensors.pop(SAMPLE, None)
    query = tensors.get("query")
    inner = query.shape[-1] if query is not None and query.dim() else 0
    wanted = shapes(kind, length, hidden, inner)
    for key, shape in wanted.items():
        if tensors[key].shape != shape or not tensors[key].isfinite().all():
            raise ValueError(
                f"`{key}` must be {list(shape)} finite numbers, got {list(tensors[key].shape)}"
            )
    steps = int(about["steps"])
    tensors = {key: tensors[key] for key in wanted}
    return Head(kind, about["model"], length, hidden, steps, tensors, sample)


def save_head(head: Head, path: Path) -> None:
    """Write a head, whole or not at all; raises `InputError` if the place cannot be written."""
    names = ("kind", "model", "block_length", "hidden_size", "steps")
    about = {name: str(getattr(head, name)) for name in names}
    tensors = {name: tensor.contiguous() for name, tensor in head.tensors.items()}
    if head.sample is not None:
        tensors[SAMPLE] = head.sample
    write_atomically(path, save(tensors, about))
