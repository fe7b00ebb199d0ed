"""What no captured step may do, found in the source: the meta device sees only a part of it.

A number that is written through an index tensor, `x[rows] = 0`, goes to CUDA as a tensor of the
host and waits for it. On a device without numbers the line is one operation like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmax
from dmax.decoding import _STRATEGIES

SOURCE = Path(dmax.__file__).parent
FILES = """
    engine/step.py engine/blocks.py engine/runner.py engine/batch.py
    attention.py blend.py cache.py confidence.py decoding/*.py kernels/*.py
    models/backbone.py models/llada2_moe/modeling.py baselines/selection.py baselines/heads.py
""".split()
ROOTS = """
    step decide forward branches _prepare_inputs
    dense_mm_experts_forward fused_moe_experts_forward grouped_mm_experts_forward
""".split()
FROM_HOST = ("tensor", "as_tensor", "from_numpy", "frombuffer")  # of torch
TO_HOST = ("cpu", "cuda", "item", "tolist", "numpy", "nonzero", "pin_memory")
# Functions that may, and why.
KNOWN = {
    "engine/batch.py:Batch.to": "before the step",
    "engine/batch.py:_numbers": "before the step",
    "cache.py:BlockCache.release": "lengths are a list of the host, and slots leave between steps",
    "baselines/heads.py:Head.on": "once for a device, in the eager step before the capture",
    "kernels/moe.py:routed": "many tokens and few experts, on a CPU",
    "models/llada2_moe/modeling.py:LLaDA2MoeExperts.forward": '"eager" waits, and runs eagerly',
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """All functions and methods by their qualified names; what is nested belongs to its outer."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")


def names(function: Function) -> set[str]:
    """What a function calls or reads by name."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def reachable(found: dict[str, Function]) -> dict[str, Function]:
    """Those that the roots lead to; a name leads to all functions that have it."""
    by_name: dict[str, list[str]] = {}
    for key in found:
        by_name.setdefault(key.rpartition(":")[2].rpartition(".")[2], []).append(key)
    reached = dict.fromkeys(key for root in ROOTS for key in by_name.get(root, ()))
    queue = list(reached)
    while queue:
        for name in names(found[queue.pop()]) & by_name.keys():
            new = [key for key in by_name[name] if key not in reached]
            reached |= dict.fromkeys(new)
            queue += new
    return {key: found[key] for key in reached}


def is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    is_infinite = isinstance(node, ast.Call) and ast.unparse(node.func) == "float"
    return is_infinite or (isinstance(node, ast.Constant) and isinstance(node.value, int | float))


def is_plain(index: ast.expr) -> bool:
    """Whether an index is of slices and written-out numbers only, which make a view."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(isinstance(part, ast.Slice) or is_constant(part) for part in parts)


def is_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or is_number(node)


def complaints(function: Function) -> Iterator[str]:
    """What of a function no CUDA graph can hold, or would wait for the host."""
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Subscript(slice=index)], value=value) if is_number(value):
                if not is_plain(index):
                    yield f"line {node.lineno} writes a number through an index"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                if name in FROM_HOST:
                    yield f"line {node.lineno} makes a tensor of numbers of the host"
            case ast.Call(func=ast.Attribute(attr=name)) if name in TO_HOST:
                yield f"line {node.lineno} calls .{name}()"
            case ast.Call(func=ast.Attribute(attr="to"), args=[first, *_]):
                if "device" in ast.unparse(first) or is_constant(first):
                    yield f"line {node.lineno} moves a tensor to a device"


def all_functions() -> dict[str, Function]:
    """Of the engine, the models and all strategies, by file and qualified name."""
    paths = [path for pattern in FILES for path in SOURCE.glob(pattern)]
    strategies = [place.partition(":")[0] for place in _STRATEGIES.values()]
    paths += [SOURCE.parent / f"{module.replace('.', '/')}.py" for module in strategies]
    return {
        f"{path.relative_to(SOURCE).as_posix()}:{name}": function
        for path in paths
        for name, function in functions(ast.parse(path.read_text(encoding="utf-8")))
    }


def test_captured_code_does_nothing_that_a_graph_cannot_hold() -> None:
    reached = reachable(all_functions())
    assert {
        "engine/blocks.py:OpenBlocks.store",
        "engine/runner.py:ModelRunner.forward",
        "decoding/spd.py:SoftParallelDecoding.step",
        "baselines/lopa.py:Lookahead.branches",
        "kernels/lm_head.py:lm_head_top_k_torch",
        "models/llada2_moe/modeling.py:LLaDA2MoeSparseBlock.forward",
    } <= reached.keys()
    wrong = {
        f"{key}, {complaint}"
        for key, function in reached.items()
        if key not in KNOWN
        for complaint in complaints(function)
    }
    assert not wrong, "\n" + "\n".join(sorted(wrong))


def test_what_is_known_is_still_there() -> None:
    reached = reachable(all_functions())
    assert [key for key in KNOWN if not list(complaints(reached[key]))] == []


@pytest.mark.parametrize(
    ("line", "is_wrong"),
    [
        ("x[rows] = False", True),
        ("x[rows, :2] = -1.0", True),
        ("x[x > 0] = float('-inf')", True),
        ("x[:, 0] = 1", False),
        ("x[rows] = other", False),
        ("x[rows] = x.new_zeros(())", False),
        ("torch.tensor([1, 2])", True),
        ("torch.zeros(3)", False),
        ("x.sum().item()", True),
        ("x.to(self.device)", True),
        ("x.to('cuda')", True),
        ("x.to(x.dtype)", False),
        ("x.masked_fill(rows, 0)", False),
    ],
)
def test_the_lint(line: str, is_wrong: bool) -> None:
    ((_, function),) = functions(ast.parse(f"def step(x, rows, other):\n    {line}"))
    assert bool(list(complaints(function))) == is_wrong
