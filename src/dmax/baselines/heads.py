"""Small trained heads that say which positions may be decoded together, and the files they come in.

Learn2PD's filter sees the confidences of a block, DEMASK's head its hidden states. A head is a few
tensors fitted to one model: training fits them and decoding applies them with the functions below.
B blocks, L positions, D hidden, K inner.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dmax.errors import InputError
from dmax.files import write_atomically
from dmax.tiny import BUNDLED, bundled_head

Kind = Literal["learn2pd", "demask"]
KINDS: tuple[Kind, ...] = ("learn2pd", "demask")
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Head:
    """A trained head and what it was trained on.

    Attributes:
        kind: the strategy it belongs to.
        model: digest of the weights whose confidences or hidden states it learnt from
            (`environment.weights_digest`).
        block_length: L of that model.
        hidden_size: D of that model.
        steps: of training.
        tensors: float32, on the CPU; their names and shapes are `shapes`'.
    """

    kind: Kind
    model: str
    block_length: int
    hidden_size: int
    steps: int
    tensors: Tensors = field(repr=False, compare=False)
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
        """Raises `InputError`, which calls it `name`, if a block is longer than those it was trained on."""
        if length > self.block_length:
            raise InputError(
                f"the {name} takes blocks of up to {self.block_length} positions, got {length}",
                hint=f"lower `block_length`, or train a {name.split()[0]} for this one",
            )

    def on(self, device: torch.device) -> Tensors:
        """The tensors on a device, copied there once."""
        if device not in self._placed:
            self._placed[device] = {
                name: tensor.to(device) for name, tensor in self.tensors.items()
            }
        return self._placed[device]


def shapes(
    kind: Kind, block_length: int, hidden_size: int, inner: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a head's tensors; `inner` K is of the dependency head alone."""
    if kind == "learn2pd":
        square = (block_length, block_length)
        line = (block_length,)
        return {
            "inner.weight": square,
            "inner.bias": line,
            "outer.weight": square,
            "outer.bias": line,
        }
    return {
        "query": (hidden_size, inner),
        "key": (hidden_size, inner),
        "distance": (2 * block_length - 1,),
    }


def filter_logits(tensors: Tensors, confidence: Tensor) -> Tensor:
    """Learn2PD's filter (arXiv 2509.25188): logits [B, L'] that a position's prediction is the final one already.

        f(c) = W_2 relu(W_1 c + b_1) + b_2

    Args:
        tensors: of a `learn2pd` head for blocks of L positions.
        confidence: [B, L'] float32 of all positions of the block, decoded ones included; L' <= L,
            the rest counts as 0.
    """
    length = confidence.shape[1]
    padded = F.pad(confidence, (0, len(tensors["inner.bias"]) - length))  # [B, L]
    inner = F.linear(padded, tensors["inner.weight"], tensors["inner.bias"]).relu()
    return F.linear(inner, tensors["outer.weight"], tensors["outer.bias"])[:, :length]


def dependency_logits(tensors: Tensors, hidden_states: Tensor) -> Tensor:
    """DEMASK's head (arXiv 2604.02560): logits [B, L', L'] of how far deciding i moves the distribution at j.

        D_ij = sigmoid(q_i · k_j / √K + b_{j - i}),   q = h W_q,   k = h W_k

    The scaled dot product is the source's; the sigmoid (the target lies in [0, 1]) and the bias for
    the distance (the last hidden states need not carry positions) are ours.

    Args:
        tensors: of a `demask` head for blocks of L positions.
        hidden_states: [B, L', D] of the model's last layer; L' <= L.
    """
    hidden_states = hidden_states.float()
    # [B, L', K]
    query = hidden_states @ tensors["query"]
    key = hidden_states @ tensors["key"]
    position = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    apart = (
        position[None] - position[:, None] + len(tensors["distance"]) // 2
    )  # [L', L'], j - i from 0 on
    return query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]) + tensors["distance"][apart]


def load_head(name: object, kind: Kind) -> Head:
    """A head by the bundled model that it comes with, by its file, or by the folder of its file `<kind>.safetensors`.

    Read once for as long as the file does not change.

    Raises:
        InputError: no name, no such file, or not a sound head of that kind.
    """
    have = [model for model in BUNDLED if bundled_head(model, kind).is_file()]
    hint = f"train one as recipes/tiny_{kind}.yaml does" + (
        f", or take that of {' or '.join(have)}" if have else ""
    )
    if not isinstance(name, str) or not name:
        raise InputError(
            f"strategy `{kind}` needs the option `head`, the file of a trained head, got {name!r}",
            hint,
        )
    path = bundled_head(name, kind) if name in BUNDLED else Path(name).expanduser()
    path = path / f"{kind}.safetensors" if path.is_dir() else path
    try:
        return _read(path, path.stat().st_mtime_ns, kind)
    except OSError:
        raise InputError(
            f"strategy `{kind}` has no head `{name}`: {path} cannot be read", hint
        ) from None
    except (SafetensorError, KeyError, ValueError) as error:
        reason = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path} is not a sound head of strategy `{kind}`: {reason}", hint
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
    wanted = shapes(kind, length, hidden, tensors["query"].shape[-1] if "query" in tensors else 0)
    for key, shape in wanted.items():
        if tensors[key].shape != shape or not tensors[key].isfinite().all():
            raise ValueError(
                f"`{key}` must be {list(shape)} finite numbers, got {list(tensors[key].shape)}"
            )
    return Head(
        kind,
        about["model"],
        length,
        hidden,
        int(about["steps"]),
        {key: tensors[key].float() for key in wanted},
    )


def save_head(head: Head, path: Path) -> None:
    """Write a head, whole or not at all; raises `InputError` if the place cannot be written."""
    about = {
        name: str(getattr(head, name))
        for name in ("kind", "model", "block_length", "hidden_size", "steps")
    }
    tensors = {name: tensor.contiguous() for name, tensor in head.tensors.items()}
    write_atomically(path, save(tensors, about))
