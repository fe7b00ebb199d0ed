"""DMax's strategies inside SGLang, as its diffusion algorithm `DMax`.

SGLang calls `register` in each of its processes. Nothing of SGLang is imported before that, and the
algorithm itself comes when SGLang imports its own.
"""

from __future__ import annotations

import logging
from typing import Any

from wrapt import register_post_import_hook

from dmax.integrations.versions import complaint

logger = logging.getLogger(__name__)

SUPPORTED = ("0.5.23",)
"""SGLang's diffusion algorithms, their states and their soft inputs are new, and change from
release to release. These are the releases that `make test-engines` was run with."""


def register() -> None:
    """Entry point of SGLang's plugins; called in every process of it, maybe more than once.

    With an SGLang that this was never run with, a line in the log says so, and SGLang goes on
    without us.
    """
    problem = complaint("sglang", SUPPORTED)
    if problem is not None:
        logger.warning("%s: there is no --dllm-algorithm DMax", problem)
        return

    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from dmax.integrations.sglang import checkpoint, graphs, requests

    register_post_import_hook(_add_algorithm, "sglang.srt.dllm.algorithm")
    register_post_import_hook(
        graphs.open_runner, "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
    )
    register_resolution_hook("handle_missing_default_values")(checkpoint.choose_algorithm)
    for target, hook in {
        "sglang.srt.dllm.config.DllmConfig.from_server_args": checkpoint.read_checkpoint,
        "sglang.srt.configs.model_config.ModelConfig.get_default_sampling_params": (
            requests.greedy_by_default
        ),
    }.items():
        HookRegistry.register(target, hook, HookType.AFTER)


def _add_algorithm(module: Any) -> None:
    """Put the algorithm into SGLang's table."""
    from dmax.integrations.sglang.algorithm import DMax

    module.algo_name_to_cls[DMax.__name__] = DMax
