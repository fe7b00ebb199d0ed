"""The folder of a table: one JSON for each cell, what was decoded for it, and the pages.

reproduce.json           the table and the settings of the whole folder
cells/ROW.BENCHMARK.json a cell: its figures beside the published ones
decoded/…                what was decoded for it, as `dmax eval --output` writes it
report.md, report.html   all cells
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmax.errors import InputError
from dmax.files import check_ours, check_writable, json_lines, read_record, write_atomically
from dmax.reproduce.table import MEASURED, Cell

if TYPE_CHECKING:
    from dmax.evaluation.results import ResultFiles

RECORD = "reproduce.json"
REPORTS = ("report.md", "report.html")
NUM_SHOWN = 3  # differences that an error names
# What is read of records.
ABOUT = {"status", "published", "model", "data"}
FIGURES = ABOUT | {"trial", "scoring", "scores", "tpf", "tpf_paper", "tokens_per_second"}
FIGURES |= {"hardware", "summary"}
OF_SUMMARY = {"tpf", "tokens_per_second", "environment", "generated_tokens", "num_forwards"}
OF_SUMMARY |= {"num_prefill_forwards", "num_commit_forwards", "batch_size"}
OF_SAMPLE = {"prompt", "output", "is_correct", "generated_tokens", "num_forwards"}
OF_SAMPLE |= {"num_prefill_forwards"}
ANEW = "choose another --output, or start anew with --overwrite"


class TableFolder:
    """Where the cells of a table are kept, so that an interrupted run goes on.

    Args:
        path: of the folder; nothing is written before `begin`.
        settings: what all its cells depend on.
        overwrite: forget what it holds.
        report: told how much of a cell an interrupted run had finished.

    Raises:
        InputError: it holds another table or other settings, or something that is not ours.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))  # as they come back from the file
        self._overwrite = overwrite
        self._report = report
        record = path / RECORD
        check_writable(record)
        check_ours(record, "table", "engine")
        if not record.exists():
            self._check_no_reports()
        elif not overwrite:
            self._check_same(read_record(record))

    def _check_no_reports(self) -> None:
        for name in REPORTS:
            if (self.path / name).exists():
                raise InputError(
                    f"{self.path / name} exists and no table wrote it",
                    hint="choose another --output",
                )

    def _check_same(self, held: Mapping[str, Any]) -> None:
        from dmax.evaluation.results import differences

        changed = list(differences(held, self._settings))
        if changed:
            shown = ", ".join(changed[:NUM_SHOWN])
            raise InputError(f"{self.path} holds a table of other settings: {shown}", hint=ANEW)

    def begin(self) -> None:
        """Write down what the folder holds; with `overwrite`, remove what it held."""
        if self._overwrite:
            for folder in ("cells", "decoded"):
                for file in sorted((self.path / folder).glob("*.json*")):
                    file.unlink()
            self._overwrite = False
        write_atomically(self.path / RECORD, json.dumps(self._settings, indent=1) + "\n")

    @property
    def is_to_be_emptied(self) -> bool:
        """Whether `begin` will remove what the folder holds."""
        return self._overwrite

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """What is known of a cell; None if nothing is.

        Raises:
            InputError: its file holds something else.
        """
        path = self._cell_path(cell)
        if self._overwrite or not path.exists():
            return None
        held = read_record(path)
        is_ours = isinstance(held, dict) and held.get("cell") == cell.name
        needed = FIGURES if is_ours and held.get("status") == MEASURED else ABOUT
        if not is_ours or not held.keys() >= needed:
            raise InputError(f"{path} is not a cell of this table", hint=ANEW)
        return dict(held)

    def write_cell(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Write what is known of a cell."""
        text = json.dumps(record, indent=1, ensure_ascii=False)
        write_atomically(self._cell_path(cell), text + "\n")

    def write_report(self, name: str, text: str) -> Path:
        """Write one of the `REPORTS`; gives its path."""
        write_atomically(self.path / name, text)
        return self.path / name

    def is_decoded(self, cell: Cell) -> bool:
        """Whether all of a cell has been decoded."""
        return self._summary_path(cell).exists()

    def journal(self, cell: Cell) -> ResultFiles:
        """The files of what is being decoded for a cell."""
        from dmax.evaluation.results import ResultFiles

        return ResultFiles(self._summary_path(cell), report=self._report)

    def decoded(self, cell: Cell) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The summary and the samples of a cell that has been decoded.

        Raises:
            InputError: they cannot be read.
        """
        path = self._summary_path(cell)
        summary = read_record(path)
        samples = [sample for _, sample in json_lines(path.with_suffix(".samples.jsonl"))]
        records = [(summary, OF_SUMMARY), *((sample, OF_SAMPLE) for sample in samples)]
        if not all(isinstance(held, dict) and held.keys() >= needed for held, needed in records):
            raise InputError(f"{path} and its samples are not an evaluation of dmax", hint=ANEW)
        return summary, samples

    def _cell_path(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.name}.json"

    def _summary_path(self, cell: Cell) -> Path:
        return self.path / "decoded" / f"{cell.name}.json"
