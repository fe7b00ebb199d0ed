"""Measure how much a reader of the heart has to read: python tools/measure_heart.py [REVISION ...]

The heart is what DMax is: model, decoding, engine, training, the kernels' PyTorch twins, and what
these call. What is not DMax, the annex, is left out of every count, also in revisions where it
still stood among the heart: moving a file there saves nothing. Tokens are Python's own, without
comments, docstrings, line ends and indentation. Without arguments the working tree is measured.
`--trace` also runs one prompt and counts the classes whose methods run, and the files they lie in:
methods that dmax defines or that a dataclass generates, of the model too.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDEST = 100
HEART = (
    "attention blend cache checkpoint confidence llm messages outputs params special_ids "
    "decoding engine kernels models training"
).split()
# What other rooms call is counted only as far as the heart calls it, name by name.
BASELINES = (
    "autoregressive credit d2f demask dparallel entropy_bound fast_dllm hierarchy iter_smooth "
    "joint_threshold learn2pd llada lopa mbd sched"
).split()
ANNEX = (
    "baselines",
    "heads",
    "training.heads",
    "training.head_states",
    "training.rivals",
    *(f"decoding.{name}" for name in BASELINES),
)
# Definitions of the annex that stood in files of the heart before it had a place of its own.
ANNEX_NAMES = {
    "decoding.selection": "top within_error run_maxima within_entropy entropy".split(),
    "decoding.block": ["Branching"],
    "engine.versions": ["choose", "branch", "_pick"],
    "training.noise": ["rising_ratios"],
    "training.objectives": ["confident_prefix"],
}
SKIPPED = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


TRACE = """
import json, sys, threading
from dmax.llm import LLM
from dmax.params import DecodingParams

llm = LLM("tiny-dmax", dtype="float32", device="cpu")
params = DecodingParams(strategy="spd", max_new_tokens=64)
classes, files = set(), set()

def follow(frame, event, argument):
    code = frame.f_code
    is_ours = "/dmax/" in code.co_filename
    if event != "call" or not (is_ours or code.co_filename == "<string>"):
        return
    if is_ours and code.co_name != "<module>":
        files.add(code.co_filename)
    first = code.co_varnames[:1]
    if first in (("self",), ("cls",), ("_cls",)):
        owner = frame.f_locals.get(first[0])
        owner = owner if isinstance(owner, type) else type(owner)
        if owner.__module__.startswith("dmax."):
            classes.add(owner.__qualname__)

sys.setprofile(follow)
threading.setprofile(follow)  # of the thread that runs the model
llm.generate("Liam has 8 apples. Liam buys 5 apples more. How many apples are there?", params)
sys.setprofile(None)
threading.setprofile(None)
print(json.dumps([sorted(classes), sorted(files)]))
"""


@dataclass(frozen=True)
class Reading:
    """What a reader has before them.

    Attributes:
        tokens: of the heart.
        code_lines: lines that hold a token.
        wide_lines: lines of more than 100 columns, comments and docstrings included.
        depth: files in the longest chain of imports that Python follows when it loads a module.
    """

    tokens: int
    code_lines: int
    wide_lines: int
    depth: int

    @property
    def tokens_per_line(self) -> float:
        """Tokens per code line."""
        return self.tokens / self.code_lines


def modules_of(source: Path) -> dict[str, Path]:
    """Every module of the package `dmax` under `source`, by its name without the package."""
    found = {}
    for path in sorted((source / "dmax").rglob("*.py")):
        parts = path.relative_to(source / "dmax").with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = path
    return found


def inside(module: str, rooms: Iterable[str]) -> bool:
    """Whether a module is one of the rooms or stands in one."""
    return any(module == room or module.startswith(room + ".") for room in rooms)


def is_heart(module: str) -> bool:
    """Whether all of a module is counted."""
    return inside(module, HEART) and not inside(module, ANNEX) and not module.endswith("_triton")


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST, *, lazily: bool) -> Iterator[tuple[str, str]]:
    """Modules of ours and the names taken from them; `lazily`: also those inside functions."""
    nodes = ast.walk(tree) if lazily else at_load(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dmax":
            module = (node.module or "").removeprefix("dmax").removeprefix(".")
            for alias in node.names:
                yield module, alias.name


def at_load(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when a module is loaded: no function bodies, nothing for type checkers."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not is_function and not for_types:
            yield node
            yield from at_load(node)


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Functions, classes and constants of a module, by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {name.id: node for name in node.targets if isinstance(name, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def called_outside(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Names outside heart and annex that the heart uses, with what these use in their turn."""
    trees = {name: parse(path) for name, path in modules.items()}
    wanted: dict[str, set[str]] = {}
    open_names: list[tuple[str, str]] = []

    def want(module: str, name: str) -> None:
        if f"{module}.{name}".lstrip(".") in modules or module not in modules:
            return
        if is_heart(module) or inside(module, ANNEX) or module.endswith("_triton"):
            return
        if name in definitions(trees[module]) and name not in wanted.setdefault(module, set()):
            wanted[module].add(name)
            open_names.append((module, name))

    for module, tree in trees.items():
        if is_heart(module):
            for source, name in imported(tree, lazily=True):
                want(source, name)
    while open_names:
        module, name = open_names.pop()
        tree = trees[module]
        used = {n.id for n in ast.walk(definitions(tree)[name]) if isinstance(n, ast.Name)}
        for other in used & definitions(tree).keys():
            want(module, other)
        for source, taken in imported(tree, lazily=True):
            if taken in used:
                want(source, taken)
    return wanted


def docstring_lines(tree: ast.AST) -> set[int]:
    """Lines of texts that stand alone: docstrings, of attributes too."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def tokens_of(path: Path) -> list[int]:
    """The line of every token of a file that is code."""
    text = path.read_text(encoding="utf-8")
    docstrings = docstring_lines(ast.parse(text))
    return [
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in SKIPPED and token.start[0] not in docstrings
    ]


def lines_of(node: ast.stmt) -> range:
    """The lines of a definition, its decorators included."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(each.lineno for each in decorators)])
    return range(first, (node.end_lineno or first) + 1)


def heart_lines(modules: dict[str, Path]) -> Iterator[tuple[Path, set[int]]]:
    """Every file that is counted, and which of its lines are."""
    outside = called_outside(modules)
    for module, path in modules.items():
        names = definitions(parse(path))
        every = set(range(1, len(path.read_text(encoding="utf-8").splitlines()) + 1))
        if is_heart(module):
            annex = [names[name] for name in ANNEX_NAMES.get(module, []) if name in names]
            yield path, every - {line for node in annex for line in lines_of(node)}
        elif module in outside:
            yield path, {line for name in outside[module] for line in lines_of(names[name])}


def import_depth(modules: dict[str, Path]) -> int:
    """Files in the longest chain of imports at load time."""
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = set()
        for source, name in imported(parse(path), lazily=False):
            full = f"{source}.{name}".lstrip(".")
            targets.add(full if full in modules else source)
        edges[module] = {target for target in targets if target and target != module}
    depths: dict[str, int] = {}

    def depth(module: str) -> int:
        if module not in depths:
            depths[module] = 1
            below = [depth(target) for target in edges.get(module, ())]
            depths[module] = 1 + max(below, default=0)
        return depths[module]

    return max(depth(module) for module in edges)


def measure(source: Path) -> Reading:
    """Measure the package under a source folder."""
    modules = modules_of(source)
    tokens = 0
    code_lines = 0
    wide_lines = 0
    for path, lines in heart_lines(modules):
        counted = [line for line in tokens_of(path) if line in lines]
        tokens += len(counted)
        code_lines += len(set(counted))
        text = path.read_text(encoding="utf-8").splitlines()
        wide_lines += sum(len(text[line - 1]) > WIDEST for line in lines)
    return Reading(tokens, code_lines, wide_lines, import_depth(modules))


def trace(source: Path) -> tuple[list[str], list[str]]:
    """Classes whose methods run in one generate call, and files whose functions do."""
    environment = os.environ | {"PYTHONPATH": str(source)}
    command = [sys.executable, "-c", TRACE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    classes, files = json.loads(run.stdout)
    return classes, [name.rpartition("/dmax/")[2] for name in files]


@contextmanager
def tree_of(revision: str) -> Iterator[Path]:
    """The source folder as a revision has it."""
    archive = subprocess.run(
        ["git", "archive", revision, "src"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder) / "src"


def main() -> None:
    """Print a row for every revision."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revisions", nargs="*", help="revisions to measure beside the working tree")
    parser.add_argument("--trace", action="store_true", help="also run one prompt")
    options = parser.parse_args()
    columns = ["tokens", "code lines", "per line", "wide", "depth"]
    print(f"{'':16}" + "".join(f"{name:>12}" for name in [*columns, "classes", "files"]))
    with ExitStack() as stack:
        trees = {name: stack.enter_context(tree_of(name)) for name in options.revisions}
        for name, source in (trees | {"working tree": ROOT / "src"}).items():
            reading = measure(source)
            classes, files = trace(source) if options.trace else ([], [])
            values = (
                reading.tokens,
                reading.code_lines,
                f"{reading.tokens_per_line:.1f}",
                reading.wide_lines,
                reading.depth,
                len(classes),
                len(files),
            )
            print(f"{name[:15]:16}" + "".join(f"{value:>12}" for value in values))


if __name__ == "__main__":
    main()
