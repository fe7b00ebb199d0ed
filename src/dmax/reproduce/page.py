"""All cells of a table beside the published ones: as lines, as Markdown and as a page of HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from html import escape
from typing import Any

from dmax.evaluation import document
from dmax.evaluation.document import Column
from dmax.reproduce.table import MEASURED, NOT_AVAILABLE, NOT_RUN, Table

Record = Mapping[str, Any]
"""A cell as its file has it."""

COLUMNS = (
    Column("benchmark"),
    Column("method"),
    Column("accuracy", "%, paper"),
    Column("published scoring", "%, right answers, 95 % interval"),
    Column("strict scoring", "%, right answers, 95 % interval"),
    Column("accuracy agrees"),
    Column("TPF", "paper"),
    Column("tpf_paper", "95 % interval"),
    Column("tpf"),
    Column("TPF agrees"),
    Column("tokens/s", "paper"),
    Column("tokens/s", "here"),
    Column("hardware"),
)
MISSING = "none"
LEGEND = (
    "The paper's accuracy is inside if it lies within the 95 % Wilson interval of ours, scored as "
    "published. Its TPF is inside if it lies within a bootstrap interval of tpf_paper: tokens per "
    "forward, the prefill counted as one, mean over the examples. tpf is all tokens over all "
    "denoising forwards. Speed is generated tokens over seconds of decoding, and compares only on "
    "the same hardware. The paper's AUP takes several thresholds: dmax sweep measures it."
)


def cells_of(table: Table, records: Mapping[str, Record]) -> Iterator[tuple[str, str, Record]]:
    """Benchmark, method and record of every cell, the ones that were not run included."""
    for cell in table.cells():
        method = table.rows[cell.row]
        missing = table.models[method.model].missing
        unknown = {
            "cell": cell.name,
            "status": NOT_AVAILABLE if missing else NOT_RUN,
            "reason": missing,
            "published": asdict(method.published[cell.benchmark]),
        }
        yield table.benchmarks[cell.benchmark].label, method.label, records.get(cell.name, unknown)


def lines(table: Table, records: Mapping[str, Record]) -> Iterator[str]:
    """Every cell on a few lines, for a terminal of any width."""
    yield table.title
    yield f"published: {table.setting}"
    before = None
    for benchmark, method, record in cells_of(table, records):
        if benchmark != before:
            yield f"\n{benchmark}"
        before = benchmark
        yield f"  {method}"
        yield from (f"    {line}" for line in _lines_of_cell(record))
    if mean := mean_speed(table, records):
        yield f"\n{mean}"


def _lines_of_cell(record: Record) -> Iterator[str]:
    published = record["published"]
    if record["status"] != MEASURED:
        reason = f": {record['reason']}" if record.get("reason") else ""
        yield f"{record['status']}{reason}; {_published(published)} in the paper"
        return
    yield f"model     {_model(record)}"
    paper = f"{published['accuracy']:.1f} in the paper"
    for name, score in record["scores"].items():
        verdict = _verdict(record, score["accuracy"])
        yield f"accuracy  {_score(score)}, {name} scoring; {paper}: {verdict}"
    tpf = record["tpf_paper"]
    paper = _or_missing(published["tpf"], ".2f")
    verdict = _verdict(record, tpf)
    yield f"tpf_paper {_with_interval(tpf)}; {paper} in the paper: {verdict}"
    yield f"tpf       {record['tpf']:.2f}: {_forwards(record['summary'])}"
    paper = _or_missing(published["tps"], ".0f")
    speed = f"{record['tokens_per_second']:.0f} tokens/s at batch {record['summary']['batch_size']}"
    yield f"speed     {speed} on {record['hardware']}; {paper} in the paper"
    if record["trial"]:
        yield f"trial     {'; '.join(record['trial'])}"
    if record.get("note"):
        yield f"note      {record['note']}"


def _forwards(summary: Mapping[str, Any]) -> str:
    tokens = f"{summary['generated_tokens']:,} tokens / {summary['num_forwards']:,} forwards"
    prompts = f"{summary['num_prefill_forwards']:,} encoded prompts"
    return f"{tokens}; {prompts}, {summary['num_commit_forwards']:,} only finished blocks"


def markdown(table: Table, records: Mapping[str, Record]) -> str:
    """The table in Markdown."""
    heads = [f"{column.name} ({column.unit})" if column.unit else column.name for column in COLUMNS]
    rows = [_row(*cell) for cell in cells_of(table, records)]
    grid = [heads, ["---"] * len(heads), *rows]
    body = "\n".join(f"| {' | '.join(row)} |" for row in grid)
    parts = [f"# {table.title}", _about(table), body, *_notes(table, records), LEGEND]
    return "\n\n".join(parts) + "\n"


def html(table: Table, records: Mapping[str, Record]) -> str:
    """The table as a self-contained page."""
    rows = [[document.Cell(text) for text in _row(*cell)] for cell in cells_of(table, records)]
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in _notes(table, records))
    body = (
        f"<p>{escape(_about(table))}</p>\n"
        f'<div class="wide">{document.table(LEGEND, COLUMNS, rows)}</div>\n{notes}'
    )
    return document.document(table.title, body)


def mean_speed(table: Table, records: Mapping[str, Record]) -> str | None:
    """The mean of the speeds of all cells beside the published one, if that is what counts."""
    if table.mean_tps is None:
        return None
    published = f"{table.mean_tps:,.0f} tokens/s published on {table.setting}"
    found = [records.get(cell.name, {}) for cell in table.cells()]
    speeds = [each["tokens_per_second"] for each in found if each.get("status") == MEASURED]
    if len(speeds) < len(found):
        return f"mean of all cells: {len(speeds)} of {len(found)} are measured; {published}"
    return f"mean of all cells: {sum(speeds) / len(speeds):,.0f} tokens/s; {published}"


def _about(table: Table) -> str:
    return f"Published: {table.source}. Measured there on: {table.setting}."


def _notes(table: Table, records: Mapping[str, Record]) -> list[str]:
    """The mean speed, and what is to be known of single cells."""
    mean = mean_speed(table, records)
    notes = [mean] if mean else []
    for benchmark, method, record in cells_of(table, records):
        where = f"{method} on {benchmark}"
        if record.get("reason"):
            notes.append(f"{where}: {record['status']}, {record['reason']}.")
        if record.get("trial"):
            notes.append(f"{where} is a trial: {'; '.join(record['trial'])}.")
        if record.get("replaces"):
            notes.append(f"{where} was measured with {_model(record)}.")
    notes += [f"{each.label}: {each.note}." for each in table.rows.values() if each.note]
    return notes


def _row(benchmark: str, method: str, record: Record) -> list[str]:
    published = record["published"]
    paper_tpf = _or_missing(published["tpf"], ".2f")
    paper_tps = _or_missing(published["tps"], ".0f")
    paper = f"{published['accuracy']:.1f}"
    if record["status"] != MEASURED:
        status = record["status"]
        nothing = [status] * 3
        return [benchmark, method, paper, *nothing, paper_tpf, *nothing, paper_tps, status, MISSING]
    scores = record["scores"]
    tpf = record["tpf_paper"]
    return [
        benchmark,
        method,
        paper,
        _score(scores["published"]) if "published" in scores else MISSING,
        _score(scores["strict"]),
        _verdict(record, scores[record["scoring"]]["accuracy"]),
        paper_tpf,
        _with_interval(tpf),
        f"{record['tpf']:.2f}",
        _verdict(record, tpf),
        paper_tps,
        f"{record['tokens_per_second']:.0f}",
        f"{record['hardware']}, batch {record['summary']['batch_size']}",
    ]


def _model(record: Record) -> str:
    replaced = record.get("replaces")
    return f"{record['model']}, in place of {replaced}" if replaced else str(record["model"])


def _published(published: Mapping[str, Any]) -> str:
    parts = [f"{published['accuracy']:.1f} %"]
    parts += [f"TPF {published['tpf']:.2f}"] if published["tpf"] is not None else []
    parts += [f"{published['tps']:.0f} tokens/s"] if published["tps"] is not None else []
    return ", ".join(parts)


def _score(score: Mapping[str, Any]) -> str:
    low, high = score["accuracy"]["interval"]
    value = score["accuracy"]["value"]
    return f"{value:.1f} ({score['correct']}/{score['total']}; {low:.1f} to {high:.1f})"


def _with_interval(comparison: Mapping[str, Any]) -> str:
    low, high = comparison["interval"]
    return f"{comparison['value']:.2f} ({low:.2f} to {high:.2f})"


def _or_missing(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _verdict(record: Record, comparison: Mapping[str, Any]) -> str:
    """A verdict; that of a trial says so, since it is of other or fewer examples."""
    return f"{comparison['verdict']} (trial)" if record["trial"] else comparison["verdict"]
