"""A published table as data: its methods, benchmarks and checkpoints, and the published figures.

Tables are YAML files. Those that come with dmax lie in `tables/`; any other is named by its path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dmax.decoding import check_strategy
from dmax.errors import InputError, did_you_mean, show
from dmax.params import MOST_PROBLEMS, DecodingParams, check_number
from dmax.recipe.file import RecipeFile, read_recipe_file
from dmax.tasks import task_names
from dmax.tasks.published import published_tasks

TABLES = Path(__file__).with_name("tables")
SCORINGS = ("published", "strict")
ENGINES = ("dmax", "vllm", "sglang")
# What is known of a cell.
MEASURED = "measured"
NOT_AVAILABLE = "not available"  # nobody has its weights
CANNOT_RUN = "cannot run here"
NOT_RUN = "not run yet"


@dataclass(frozen=True, slots=True)
class Published:
    """What was published for one cell; None where nothing was.

    Attributes:
        accuracy: in percent.
        tpf: tokens per forward, the prefill counted as one, mean over the examples.
        tps: tokens per second, mean over the examples.
        aup: area under accuracy over parallelism, which several cells give together.
    """

    accuracy: float
    tpf: float | None = None
    tps: float | None = None
    aup: float | None = None

    def __post_init__(self) -> None:
        check_number("accuracy", self.accuracy, low=0, high=100)
        for name in ("tpf", "tps", "aup"):
            check_number(name, getattr(self, name), low=0, optional=True)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the weights of a checkpoint are: one of the two.

    Attributes:
        hub: id on the hub, or a folder.
        missing: why nobody can have them.
    """

    hub: str | None = None
    missing: str | None = None

    def __post_init__(self) -> None:
        if (self.hub is None) == (self.missing is None):
            raise InputError("a model has either `hub` or `missing`")


@dataclass(frozen=True, slots=True)
class BenchmarkColumn:
    """A benchmark.

    Attributes:
        label: as the table calls it.
        examples: how many the published figures were measured on.
    """

    label: str
    examples: int

    def __post_init__(self) -> None:
        check_number("examples", self.examples, low=1, high=MOST_PROBLEMS, whole=True)


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table.

    Attributes:
        label: as the table calls it.
        model: name of its checkpoint in `Table.models`.
        params: how it decodes.
        published: figures by benchmark; a benchmark that is not there has no cell.
        note: what the source leaves open, and what was chosen.
    """

    label: str
    model: str
    params: DecodingParams
    published: Mapping[str, Published]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a table is about besides models and settings.

    Attributes:
        engine: the only engine that it is measured with.
        tensor_parallel: over how many GPUs.
    """

    engine: str = "dmax"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        check_number("tensor_parallel", self.tensor_parallel, low=1, high=1024, whole=True)
        if self.engine not in ENGINES:
            raise InputError(f"`engine` must be one of {', '.join(ENGINES)}")


@dataclass(frozen=True, slots=True)
class Table:
    """A published table.

    Attributes:
        name: of its file, without the ending.
        digest: of the content of its file.
        title: what it shows.
        source: where the figures come from, and how sure they are.
        setting: on what they were measured.
        scoring: how they were scored, one of `SCORINGS`.
        batch_size: sequences decoded together.
        models: checkpoints by name.
        benchmarks: columns, by the name of their task.
        rows: methods by name.
        requires: what it cannot be measured without, if anything.
        mean_tps: published mean of the tokens per second of all cells, if it is what counts.
    """

    name: str
    digest: str
    title: str
    source: str
    setting: str
    scoring: str
    batch_size: int
    models: Mapping[str, ModelSource]
    benchmarks: Mapping[str, BenchmarkColumn]
    rows: Mapping[str, Method]
    requires: Requirement | None = None
    mean_tps: float | None = None

    def cells(self) -> Iterator[Cell]:
        """Every cell for which something was published, benchmark by benchmark."""
        for benchmark in self.benchmarks:
            for row, method in self.rows.items():
                if benchmark in method.published:
                    yield Cell(row, benchmark)


@dataclass(frozen=True, slots=True)
class Cell:
    """A method on a benchmark, by their names."""

    row: str
    benchmark: str

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.row}.{self.benchmark}"


def table_names() -> tuple[str, ...]:
    """Names of the tables that come with dmax."""
    return tuple(sorted(file.stem for file in TABLES.glob("*.yaml")))


def load_table(name: str) -> Table:
    """The table of that name, or of the YAML file at that path.

    Raises:
        InputError: there is none, or its file is wrong: naming file, line and key.
    """
    is_ours = name in table_names()
    if not is_ours and not name.endswith((".yaml", ".yml")):
        raise InputError(
            f"unknown table {show(name)}; choose from {', '.join(table_names())}, or name a file",
            hint=did_you_mean(name, table_names()) or "dmax reproduce --list says what they are",
        )
    path = TABLES / f"{name}.yaml" if is_ours else Path(name)
    if not path.is_file():
        raise InputError(
            f"table {show(name)} is not a file",
            hint="dmax reproduce --list shows the tables that come with dmax",
        )
    return _Reader(read_recipe_file(path)).table()


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the sections of one file; every error names its line."""

    file: RecipeFile
    content: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", self.file.content)

    def table(self) -> Table:
        known = {entry.name for entry in fields(Table)} - {"name", "digest"} | {"decoding"}
        self.file.check_keys("", self.content, known)
        needed = ("title", "source", "setting", "scoring", "models", "benchmarks", "rows")
        for key in needed:
            if key not in self.content:
                raise InputError(f"{self.file.path}: `{key}` is missing")
        texts = {key: self.text(key) for key in ("title", "source", "setting")}
        models = self.mapping("models", ModelSource)
        benchmarks = self.mapping("benchmarks", BenchmarkColumn)
        for benchmark in benchmarks:
            self.check_task(benchmark)
        requires = None
        if "requires" in self.content:
            requires = self.section("requires", Requirement)
        return Table(
            name=self.file.path.stem,
            digest=hashlib.sha256(self.file.path.read_bytes()).hexdigest()[:16],
            **texts,
            scoring=self.choice("scoring", SCORINGS),
            batch_size=self.number("batch_size", 1, low=1, high=2**16, whole=True),
            models=models,
            benchmarks=benchmarks,
            rows={name: self.row(name, models, benchmarks) for name in self.names("rows")},
            requires=requires,
            mean_tps=self.number("mean_tps", None, low=0, optional=True),
        )

    def row(self, name: str, models: Mapping[str, Any], benchmarks: Mapping[str, Any]) -> Method:
        prefix = f"rows.{name}"
        content = self.content["rows"][name]
        self.file.check_keys(prefix, content, {"label", "model", "decoding", "note", "paper"})
        model = content.get("model")
        if model not in models:
            raise self.file.wrong(
                f"{prefix}.model",
                f"`{prefix}.model` must be one of {', '.join(models)}, got {show(model)}",
                did_you_mean(model, models),
            )
        published = {}
        for benchmark in self.names(f"{prefix}.paper", content.get("paper")):
            key = f"{prefix}.paper.{benchmark}"
            if benchmark not in benchmarks:
                raise self.file.wrong(key, f"`{benchmark}` is not among the `benchmarks`")
            published[benchmark] = self.section(key, Published, content["paper"][benchmark])
        return Method(
            label=self.text(f"{prefix}.label", content.get("label")),
            model=model,
            params=self.params(prefix, content.get("decoding", {})),
            published=published,
            note=self.text(f"{prefix}.note", content["note"]) if "note" in content else "",
        )

    def params(self, prefix: str, own: Any) -> DecodingParams:
        """The settings of all cells, and over them those of the row."""
        shared = self.content.get("decoding", {})
        names = {entry.name for entry in fields(DecodingParams)}
        self.file.check_keys("decoding", shared, names)
        self.file.check_keys(f"{prefix}.decoding", own, names)
        with self.file.at(f"{prefix}.decoding"):
            params = DecodingParams(**(shared | own))
            check_strategy(params)
        return params

    def check_task(self, benchmark: str) -> None:
        is_published = self.content.get("scoring") == "published"
        choices = published_tasks() if is_published else task_names()
        if benchmark not in choices:
            scored = "tasks with a published scoring" if is_published else "tasks"
            raise self.file.wrong(
                f"benchmarks.{benchmark}",
                f"`{benchmark}` is none of the {scored}: {', '.join(choices)}",
                did_you_mean(benchmark, choices),
            )

    def mapping(self, key: str, kind: Callable[..., Any]) -> dict[str, Any]:
        return {
            name: self.section(f"{key}.{name}", kind, self.content[key][name])
            for name in self.names(key)
        }

    def section(self, key: str, kind: Any, content: Any = None) -> Any:
        """A dataclass from a mapping of its fields."""
        content = self.content[key] if content is None else content
        self.file.check_keys(key, content, {entry.name for entry in fields(kind)})
        self.file.check_types(key, content, kind)
        with self.file.at(key):
            try:
                return kind(**content)
            except TypeError as error:  # a field without a default is missing
                missing = str(error).rpartition(": ")[2].replace("'", "`")
                raise InputError(f"{missing} is missing") from None

    def names(self, key: str, content: Any = None) -> list[str]:
        """The keys of a mapping that has some, all fit to be names of files."""
        content = self.content[key] if content is None else content
        if not isinstance(content, dict) or not content:
            raise self.file.wrong(key, f"`{key}` must be a mapping with at least one entry")
        for name in content:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise self.file.wrong(
                    f"{key}.{name}", f"a name has letters, digits, - _ and . only, got {show(name)}"
                )
        return list(content)

    def text(self, key: str, value: Any = None) -> str:
        value = self.content.get(key) if value is None else value
        if not isinstance(value, str) or not value.strip():
            raise self.file.wrong(key, f"`{key}` must be a text, got {show(value)}")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.content[key]
        if value not in choices:
            raise self.file.wrong(key, f"`{key}` must be {' or '.join(choices)}, got {show(value)}")
        return value

    def number(self, key: str, default: Any, **bounds: Any) -> Any:
        value = self.content.get(key, default)
        with self.file.at(key):
            check_number(key, value, **bounds)
        return value
