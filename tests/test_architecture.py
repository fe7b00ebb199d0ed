"""The shape of the source tree: imports go down, files stay small, the heart can be read in an evening."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"

# Module or package -> layer; the longest matching name decides. A module imports its own layer and
# those below.
LAYERS = {
    **dict.fromkeys(
        (
            "dmax.errors",
            "dmax.params",
            "dmax.special_ids",
            "dmax.environment",
            "dmax.files",
            "dmax.sandbox",
            "dmax.tiny",
            "dmax.baselines.heads",
        ),
        0,
    ),
    **dict.fromkeys(
        ("dmax.attention", "dmax.cache", "dmax.blend", "dmax.confidence", "dmax.kernels"), 1
    ),
    **dict.fromkeys(("dmax.models", "dmax.hub"), 2),
    **dict.fromkeys(("dmax.decoding", "dmax.checkpoint", "dmax.training"), 3),
    **dict.fromkeys(("dmax.engine", "dmax.llm", "dmax.outputs"), 4),
    **dict.fromkeys(("dmax.tasks", "dmax.evaluation", "dmax.benchmark", "dmax.trace"), 5),
    **dict.fromkeys(("dmax.serve", "dmax.integrations", "dmax.cli", "dmax.demo", "dmax"), 6),
    **dict.fromkeys(("dmax.recipe", "dmax_command"), 6),
    **dict.fromkeys(
        ("dmax.tiny.build", "dmax.tiny.tokenizer"), 6
    ),  # the package itself only knows paths
}
# Narrower than the layers: what these packages may import besides themselves and layer 0.
ONLY = {"dmax.decoding": ("dmax.blend", "dmax.confidence"), "dmax.tasks": ()}
# Imported in these places alone.
THIRD_PARTY = {
    "typer": ("dmax.cli", "dmax.demo"),
    "fastapi": ("dmax.serve",),
    "uvicorn": ("dmax.serve",),
    "prometheus_client": ("dmax.serve",),
    "matplotlib": ("dmax.evaluation.plots",),
    "math_verify": ("dmax.tasks.equality_worker",),
    "lm_eval": ("dmax.evaluation.harness",),
    "ray": ("dmax.integrations",),
    "sglang": ("dmax.integrations",),
}
MAX_FILE, MAX_FUNCTION = 500, 80  # 400 and 60 at 120 columns
MAX_HEART = 3270  # lines of 100 columns, one assignment each; 2,750 of 120 columns
LONGER = {  # file or file:function -> lines it may have, and why
    "dmax/models/llada2_moe/modeling.py": 500,  # one architecture, one file
}
HEART = (
    "attention cache blend confidence models/llada2_moe/modeling "
    "training/noise training/clean_stream training/objectives training/rollout "
    "decoding/block decoding/selection decoding/feed decoding/stop decoding/spd "
    "engine/request engine/rows engine/flight engine/scheduler engine/lane engine/runner engine/engine"
).split()

MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SRC.rglob("*.py"))
}


def inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def layer(module: str) -> int:
    return LAYERS[max((name for name in LAYERS if inside(module, name)), key=len)]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names: imports at any depth, and our modules in strings, as lazy tables have them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                full = [f"{module}.{alias.name}" for alias in names]
                yield from (name if name in MODULES else module for name in full)
            case ast.ImportFrom(level=level) if level > 0:
                raise AssertionError(
                    f"{path.relative_to(SRC)}:{node.lineno} has a relative import; write it in full"
                )
            case ast.Constant(value=str(text)) if (
                name := text.partition(":")[0]
            ) in MODULES and name != "dmax":
                yield name


def complaint(module: str, target: str) -> str | None:
    """Why a module may not import another, or None if it may."""
    top = target.partition(".")[0]
    if top in THIRD_PARTY and not inside(module, *THIRD_PARTY[top]):
        return f"only {' and '.join(THIRD_PARTY[top])} may"
    if top != "dmax":
        return None
    if layer(target) > layer(module):
        return f"layer {layer(module)} may not know layer {layer(target)}"
    for package, others in ONLY.items():
        if inside(module, package) and layer(target) > 0 and not inside(target, package, *others):
            return (
                f"{package} may import layer 0{''.join(f' and {other}' for other in others)} only"
            )
    if inside(module, "dmax.training") and inside(target, "dmax.decoding"):
        return "training and decoding do not know each other"
    return None


def test_imports_go_down() -> None:
    wrong = {
        f"{path.relative_to(SRC)} imports {target}: {reason}"
        for module, path in MODULES.items()
        for target in imports(path)
        if (reason := complaint(module, target))
    }
    assert not wrong, "\n" + "\n".join(sorted(wrong))


def test_every_module_has_a_layer() -> None:
    homeless = [
        module
        for module in MODULES
        if module != "dmax" and not inside(module, *(LAYERS.keys() - {"dmax"}))
    ]
    assert not homeless, f"not in the table of layers: {', '.join(homeless)}"


def test_files_and_functions_are_small() -> None:
    sizes: dict[str, tuple[int, int]] = {}
    for path in MODULES.values():
        text, name = path.read_text(encoding="utf-8"), path.relative_to(SRC).as_posix()
        sizes[name] = len(text.splitlines()), LONGER.get(name, MAX_FILE)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                key = f"{name}:{node.name}"
                sizes[key] = (node.end_lineno or 0) - node.lineno + 1, LONGER.get(key, MAX_FUNCTION)
    wrong = [
        f"{name} has {size} lines, {limit} are allowed"
        for name, (size, limit) in sizes.items()
        if size > limit
    ]
    assert not wrong, "usually two ideas; split, or say why in LONGER:\n" + "\n".join(wrong)
    assert not LONGER.keys() - sizes.keys(), "LONGER names files or functions that are gone"


def test_the_heart_reads_in_an_evening() -> None:
    files = [path for pattern in HEART for path in (SRC / "dmax").glob(f"{pattern}.py")]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines < MAX_HEART, f"the heart has {lines} lines, {MAX_HEART} is too many"


def test_no_machine_is_named() -> None:
    # Folders of one machine; a path after a letter, dot, tilde or slash belongs to an address or is
    # relative.
    machine_path = re.compile(
        r"(?<![\w.~/-])/(?:home|root|work|Users|mnt|scratch|opt|data)/\w[^\s\"'`]*"
    )
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".html", ".sh"}
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {found[0]}"
        for folder in ("src", "tests", "docs", "bench", "recipes", "tools")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in kinds and path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (found := machine_path.search(line))
    ]
    assert not wrong, "absolute paths of a machine:\n" + "\n".join(wrong)
