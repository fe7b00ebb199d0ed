"""The shape of the source tree: imports go down, nothing goes in circles, the heart stays small.

docs/architecture.md explains the rules; tools/measure_heart.py prints the figures.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
sys.path.insert(0, str(ROOT / "tools"))

import measure_heart  # noqa: E402

# Module or package -> layer; the longest name decides. Imports go to the same layer or a lower one.
LAYERS = {
    **dict.fromkeys(("dmax.errors", "dmax.params", "dmax.outputs", "dmax.environment"), 0),
    **dict.fromkeys(("dmax.extras", "dmax.files", "dmax.messages"), 0),
    **dict.fromkeys(("dmax.sandbox", "dmax.tiny", "dmax.web", "dmax.worker"), 0),
    **dict.fromkeys(("dmax.attention", "dmax.cache", "dmax.blend", "dmax.confidence"), 1),
    "dmax.kernels": 1,
    **dict.fromkeys(("dmax.models", "dmax.special_ids", "dmax.hub", "dmax.decoding"), 2),
    **dict.fromkeys(("dmax.chat_template", "dmax.chat_template_worker", "dmax.records"), 2),
    **dict.fromkeys(
        ("dmax.checkpoint", "dmax.checkpoint_files", "dmax.checkpoint_kind", "dmax.training"), 3
    ),
    **dict.fromkeys(("dmax.adapters", "dmax.convert"), 3),
    **dict.fromkeys(("dmax.engine", "dmax.llm", "dmax.prompts"), 4),
    **dict.fromkeys(("dmax.baselines", "dmax.tasks", "dmax.evaluation"), 5),
    **dict.fromkeys(("dmax.completers", "dmax.trace"), 5),
    **dict.fromkeys(("dmax.recipe", "dmax.distill", "dmax.benchmark", "dmax.reproduce"), 6),
    **dict.fromkeys(("dmax.integrations", "dmax.serve", "dmax.chat"), 6),
    **dict.fromkeys(("dmax.cli", "dmax.demo", "dmax"), 6),
    "dmax.tiny.tokenizer": 6,  # the package itself only knows paths
    **dict.fromkeys(("dmax_command", "dmax.__main__"), 6),
}
HEART = tuple(f"dmax.{room}" for room in measure_heart.HEART)
ANNEX = "dmax.baselines"
# Where the annex may be named, to be loaded when somebody asks for it.
TABLES = ("dmax.decoding", "dmax.training")
# Narrower than the layers: what these may import besides themselves and layer 0.
ONLY = {"dmax.decoding": ("dmax.blend", "dmax.confidence"), "dmax.tasks": ()}
# Imported in these places only.
THIRD_PARTY = {
    "typer": ("dmax.cli", "dmax.demo"),
    "matplotlib": ("dmax.evaluation.plots", "dmax.evaluation.curves"),
    "math_verify": ("dmax.tasks.equality_worker",),
    "lm_eval": ("dmax.evaluation.harness",),
    "openai": ("dmax.distill.server", "dmax.chat.server"),
    **dict.fromkeys(("starlette", "uvicorn", "pydantic"), ("dmax.serve",)),
    "fastapi": ("dmax.serve", "dmax.integrations.sglang"),
    "prometheus_client": ("dmax.serve", "dmax.integrations.vllm"),
    "vllm": ("dmax.integrations.vllm",),
    "sglang": ("dmax.integrations.sglang",),
    "ray": ("dmax.integrations.ray",),
}
MAX_FILE = 450
MAX_FUNCTION = 60
LONGER = {  # file or file:function -> lines it may have, and why
    "dmax/models/llada2_moe/modeling.py": 480,  # one architecture, one file
    "dmax/checkpoint.py:load_checkpoint": 70,  # thirteen arguments, with their lines
    # three launches that hand their tensors on
    "dmax/kernels/block_attention_triton.py:block_attention": 72,
    "dmax/kernels/block_attention_triton.py:_attend_kernel": 61,  # one loop over keys
    # scores, the choice, and the lists that it goes to
    "dmax/kernels/router_triton.py:_select_kernel": 68,
    # two launches that hand their tensors on
    "dmax/kernels/moe_triton.py:expert_terms": 62,
    # a step of SPD from what was to its flags, in the order of the paper
    "dmax/kernels/decide_triton.py:_decide_kernel": 72,
}
# What a reader of the heart has before them (docs/architecture.md).
MAX_TOKENS = 62_500
MAX_TOKENS_PER_LINE = 9.5
MAX_DEPTH = 10
MAX_CLASSES = 31
MAX_FILES_OF_A_PROMPT = 26  # without kernels

MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SRC.rglob("*.py"))
}


def inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def layer(module: str) -> int:
    return LAYERS[max((name for name in LAYERS if inside(module, name)), key=len)]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions and for type checkers too."""
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


def named(path: Path) -> Iterator[str]:
    """Every module of ours that a file names in a string, as lazy tables do."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if name in MODULES and name != "dmax":
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
    if inside(module, *HEART) and inside(target, ANNEX):
        return "the heart knows the annex by name only"
    if inside(module, "dmax.training") and inside(target, "dmax.decoding"):
        return "training does not know decoding"
    return None


def test_imports_go_down() -> None:
    wrong = {
        f"{path.relative_to(SRC)} imports {target}: {reason}"
        for module, path in MODULES.items()
        for target in imports(path)
        if (reason := complaint(module, target))
    }
    assert not wrong, "\n" + "\n".join(sorted(wrong))


def test_the_annex_is_named_in_tables_only() -> None:
    wrong = {
        f"{path.relative_to(SRC)} names {target}"
        for module, path in MODULES.items()
        for target in named(path)
        if inside(target, ANNEX) and inside(module, *HEART) and module not in TABLES
    }
    assert not wrong, "\n" + "\n".join(sorted(wrong))


def test_nothing_imports_in_a_circle() -> None:
    below = {name: set(imports(path)) & MODULES.keys() for name, path in MODULES.items()}
    reached = {name: set(targets) for name, targets in below.items()}
    while True:
        more = {
            name: {far for near in targets for far in below[near]}
            for name, targets in reached.items()
        }
        if all(more[name] <= reached[name] for name in reached):
            break
        for name in reached:
            reached[name] |= more[name]
    circles = [name for name in reached if name in reached[name]]
    assert not circles, f"these import each other in a circle: {', '.join(circles)}"


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    homeless = [
        name for name in MODULES if name != "dmax" and not inside(name, *LAYERS.keys() - {"dmax"})
    ]
    assert not homeless, f"not in the table of layers: {', '.join(homeless)}"
    assert not LAYERS.keys() - MODULES.keys(), "the table names what does not exist"


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
    reading = measure_heart.measure(SRC)
    assert reading.tokens <= MAX_TOKENS
    assert reading.tokens_per_line <= MAX_TOKENS_PER_LINE
    assert reading.depth <= MAX_DEPTH
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    [told] = re.findall(r"\| tokens of the heart \|.*\| ([\d,]+) \|", page)
    assert abs(int(told.replace(",", "")) - reading.tokens) < 300


def test_no_line_of_the_sources_is_wider_than_100_columns() -> None:
    wide = [
        f"{path.relative_to(SRC)}:{number}"
        for path in MODULES.values()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > measure_heart.WIDEST
    ]
    assert not wide, "\n".join(wide)


def test_one_prompt_is_followed_through_few_classes_and_files() -> None:
    classes, files = measure_heart.trace(SRC)
    assert len(classes) <= MAX_CLASSES, ", ".join(classes)
    ours = [name for name in files if "kernels" not in Path(name).parts]
    assert len(ours) <= MAX_FILES_OF_A_PROMPT, ", ".join(ours)


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
