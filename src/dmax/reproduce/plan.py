"""What of a table is measured, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dmax.errors import InputError, did_you_mean, show
from dmax.hub import find_folder
from dmax.params import DecodingParams
from dmax.reproduce.engines import EngineChoice, check_requirement
from dmax.reproduce.table import Cell, Table


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a table is measured, and how.

    Attributes:
        table: the table.
        engine: what decodes.
        models: folders or hub ids in place of the table's checkpoints, by their names there.
        data: files of rows in place of the hub's, by benchmark.
        only: names of rows and benchmarks; a cell is measured if it is in a row and in a benchmark
            that are named, or if none of their kind is. Empty: all cells.
        limit: examples of each benchmark at most; None: all.
        max_new_tokens: longest completion; None: the table's.
        is_trial: whether the wiring is tried on a machine that is not what the table is about.
    """

    table: Table
    engine: EngineChoice
    models: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    only: Sequence[str] = ()
    limit: int | None = None
    max_new_tokens: int | None = None
    is_trial: bool = False

    def check(self) -> None:
        """Make sure that all can be found that was named, before anything is computed.

        Raises:
            InputError: an unknown name, a missing engine, folder or file, or a machine that the
                table cannot be measured on.
        """
        table = self.table
        _check_names("--model", self.models, table.models)
        _check_names("--data", self.data, table.benchmarks)
        _check_names("--only", self.only, (*table.rows, *table.benchmarks))
        if not self.chosen():
            named = ", ".join(self.only)
            raise InputError(
                f"no cell of `{table.name}` is in all of {named}",
                hint="dmax reproduce --list names rows and benchmarks",
            )
        if not self.is_trial:
            check_requirement(table, self.engine)
        self.engine.check()
        for model in self.models.values():
            find_folder(model, with_weights=False)

    def settings(self) -> dict[str, Any]:
        """What all cells of a folder depend on."""
        return {
            "table": self.table.name,
            "recipe": self.table.digest,
            "engine": asdict(self.engine),
            "limit": self.limit,
            "max_new_tokens": self.max_new_tokens,
            "is_trial": self.is_trial,
        }

    def chosen(self) -> list[Cell]:
        """The cells to measure."""
        rows = [name for name in self.only if name in self.table.rows]
        benchmarks = [name for name in self.only if name in self.table.benchmarks]
        return [
            cell
            for cell in self.table.cells()
            if (cell.row in rows or not rows) and (cell.benchmark in benchmarks or not benchmarks)
        ]

    def model(self, cell: Cell) -> str | None:
        """The checkpoint of a cell; None if nobody can have it."""
        name = self.table.rows[cell.row].model
        return self.models.get(name, self.table.models[name].hub)

    def params(self, cell: Cell) -> DecodingParams:
        """How a cell is decoded."""
        params = self.table.rows[cell.row].params
        if self.max_new_tokens is None:
            return params
        return replace(params, max_new_tokens=self.max_new_tokens)

    def about(self, cell: Cell) -> dict[str, Any]:
        """What a cell is: names, checkpoint, decoding, published figures."""
        row = self.table.rows[cell.row]
        source = self.table.models[row.model]
        model = self.model(cell)
        is_replaced = row.model in self.models
        return {
            "cell": cell.name,
            "table": self.table.name,
            "row": cell.row,
            "benchmark": cell.benchmark,
            "model": model,
            "replaces": source.hub or source.missing if is_replaced else None,
            "data": self.data.get(cell.benchmark),
            "note": row.note,
            "params": asdict(self.params(cell)),
            "published": asdict(row.published[cell.benchmark]),
        }

    def trial(self, cell: Cell, num_examples: int) -> list[str]:
        """In what a cell is less than the published one; empty if it is not."""
        reasons = []
        published = self.table.benchmarks[cell.benchmark].examples
        if num_examples < published:
            reasons.append(f"{num_examples:,} of {published:,} examples")
        usual = self.table.rows[cell.row].params.max_new_tokens
        if self.max_new_tokens not in (None, usual):
            reasons.append(f"{self.max_new_tokens:,} new tokens at most in place of {usual:,}")
        if self.is_trial:
            reasons.append("not on what the table is about")
        return reasons


def _check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise `InputError` for the first name that a table does not have."""
    for name in names:
        if name not in known:
            raise InputError(
                f"{option} names {show(name)}; this table has {', '.join(known)}",
                hint=did_you_mean(name, known),
            )
