"""Measure the cells of a published table, one checkpoint after another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from dmax.errors import InputError
from dmax.reproduce.cells import decode, measured
from dmax.reproduce.engines import check_strategy_runs, opened
from dmax.reproduce.folder import ANEW, TableFolder
from dmax.reproduce.plan import Plan
from dmax.reproduce.table import CANNOT_RUN, MEASURED, NOT_AVAILABLE, Cell
from dmax.tasks import Task, get_task

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a bar with a title, which is told how many of how many examples are decoded."""


class TableRun:
    """A run over the cells of a plan that its folder does not hold yet.

    What cannot be measured here (weights that nobody has, a checkpoint or rows that cannot be
    reached, a strategy that the engine does not run) gets a record that says why.

    Args:
        plan: what to measure; it has been checked.
        folder: where the cells are kept.
        bar: shows the progress of a cell.
        finished: called after each cell is written.
    """

    def __init__(
        self,
        plan: Plan,
        folder: TableFolder,
        bar: Bar,
        finished: Callable[[], object] = lambda: None,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._bar = bar
        self._finished = finished
        self._tasks: dict[str, Task] = {}
        self._is_decoded = folder.is_decoded

    def run(self) -> None:
        """Measure what is left.

        Raises:
            InputError: a cell was measured with another checkpoint or other rows, a file that was
                named cannot be read, or a prompt cannot be decoded.
        """
        plan = self._plan
        left = [cell for cell in plan.chosen() if not self._is_measured(cell)]
        for benchmark, path in plan.data.items():
            if any(cell.benchmark == benchmark for cell in left):
                self._tasks[benchmark] = get_task(benchmark, path)
        self._folder.begin()
        for model in dict.fromkeys(map(plan.model, left)):
            self._run_model(model, [cell for cell in left if plan.model(cell) == model])
            gc.collect()  # the next model needs the memory of this one

    def _is_measured(self, cell: Cell) -> bool:
        held = self._folder.cell(cell)
        if held is None or held["status"] != MEASURED:
            return False
        now = self._plan.about(cell)
        for name in ("model", "data"):
            if held.get(name) != now[name]:
                was, wanted = (each or "the hub's" for each in (held.get(name), now[name]))
                raise InputError(
                    f"cell `{cell.name}` of {self._folder.path} was measured with {name} {was}, "
                    f"not {wanted}",
                    hint=ANEW,
                )
        return True

    def _run_model(self, model: str | None, cells: Sequence[Cell]) -> None:
        """Measure cells of one checkpoint, which is opened once, and only if it is needed."""
        if model is None:
            for cell in cells:
                source = self._plan.table.models[self._plan.table.rows[cell.row].model]
                self._keep(cell, {"status": NOT_AVAILABLE, "reason": source.missing})
            return
        ready = [cell for cell in cells if self._is_ready(cell)]
        with ExitStack() as stack:
            completer = None
            if not all(map(self._is_decoded, ready)):
                try:
                    completer = stack.enter_context(opened(self._plan.engine, model))
                except InputError as error:
                    self._refuse([each for each in ready if not self._is_decoded(each)], error)
                    ready = list(filter(self._is_decoded, ready))
            for cell in ready:
                task = self._tasks[cell.benchmark]
                if completer is not None and not self._is_decoded(cell):
                    files = self._folder.journal(cell)
                    with self._bar(cell.name) as progress:
                        decode(completer, self._plan, cell, task, files, progress)
                self._keep(cell, measured(self._plan, cell, task, *self._folder.decoded(cell)))

    def _is_ready(self, cell: Cell) -> bool:
        """Whether a cell has its rows, and a strategy that the engine runs."""
        try:
            check_strategy_runs(self._plan.params(cell), self._plan.engine)
            if cell.benchmark not in self._tasks:
                self._tasks[cell.benchmark] = get_task(cell.benchmark)
        except InputError as error:
            self._refuse([cell], error)
            return False
        return True

    def _refuse(self, cells: Sequence[Cell], error: InputError) -> None:
        for cell in cells:
            self._keep(cell, {"status": CANNOT_RUN, "reason": error.message, "hint": error.hint})

    def _keep(self, cell: Cell, found: dict[str, Any]) -> None:
        record = self._plan.about(cell) | found
        self._folder.write_cell(cell, record)
        self._finished()
