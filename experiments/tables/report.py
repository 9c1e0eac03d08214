"""A table in Markdown and CSV: the paper's figures, ours, the differences, and where ours come from."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.tables import published
from experiments.tables.plan import Run, Table, without_paths
from experiments.tables.published import OUR_SCORE, Column, PublishedTable
from jlml_jax.result_rows import SCORES

MULTI_QUERY = "multi-query"
_CSV_FIELDS = ("table", "dataset", "line", "query", "score", "unit", "paper", "citation", "ours", "deviation",
               "samples", "difference", "state")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a row: its runs, and why there is no result if there is none."""

    runs: tuple[Run, ...]
    missing: str  # one line; empty: there is a result


def outcomes(runs: Sequence[Run], failures: dict[Run, str]) -> dict[str, Outcome]:
    """The outcome of every row. A row of which any run is missing has no result."""
    by_row: dict[str, list[Run]] = {}
    for run in runs:
        by_row.setdefault(run.row, []).append(run)
    found = {}
    for row, of_row in by_row.items():
        missing = [f"seed {run.seed} {reason}" for run in of_row
                   if (reason := f"failed: {failures[run]}" if run in failures else run.missing())]
        found[row] = Outcome(tuple(of_row), "; ".join(missing))
    return found


def samples(outcome: Outcome, feature: str, multi_query: bool) -> dict[int, dict[str, float]]:
    """What a line's mean and deviation are over: its scores by seed, each the mean over the trials.

    By trial if there is one seed. Empty if the data set has no such queries.
    """
    by_seed = {}
    for run in outcome.runs:
        by_trial = {row["trial"]: {score: row[score] for score in SCORES} for row in run.results()
                    if row["feature"] == feature and row["protocol"].startswith(MULTI_QUERY) == multi_query}
        if len(outcome.runs) == 1:
            return by_trial
        if by_trial:
            by_seed[run.seed] = {score: float(np.mean([scores[score] for scores in by_trial.values()]))
                                 for score in SCORES}
    return by_seed


@dataclasses.dataclass(frozen=True)
class Figure:
    """A mean over seeds or trials, in per cent."""

    mean: float
    deviation: float | None  # the sample's, None for a single value
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figure":
        values = 100 * np.array(list(values))
        deviation = float(values.std(ddof=1)) if len(values) > 1 else None
        return cls(float(values.mean()), deviation, len(values))

    def text(self, sign: str = "") -> str:
        deviation = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:{sign}.1f}{deviation}"


class Report:
    """A table on a data set, with what has become of its rows."""

    def __init__(self, table: Table, dataset: str, rows: dict[str, Outcome]):
        self.table, self.dataset, self.rows = table, dataset, rows
        self.published = _of_study(table) if table.title else published.load(table.name)
        of_dataset = [k for k, column in enumerate(self.published.columns) if column.dataset == dataset]
        held_out = {run.config.data.held_out_identities for outcome in rows.values() for run in outcome.runs} - {0}
        self.tested_on = dataset + "".join(f", {number} training identities held out" for number in held_out)
        distractors = {run.config.evaluate.extra_gallery for outcome in rows.values() for run in outcome.runs} - {""}
        self.tested_on += "".join(f", {name} as extra distractors" for name in distractors)
        # The paper's figures are of this data set's test: a difference means something.
        self.comparable = bool(of_dataset) and not held_out and not distractors
        self.columns = of_dataset if self.comparable else [k for k, column in enumerate(self.published.columns)
                                      if column.protocol != MULTI_QUERY]

    def samples(self, line: str, multi_query: bool) -> dict[int, dict[str, float]]:
        """Of one of our lines, as `samples`; empty where there is no result."""
        row, feature = self.table.ours[line]
        return {} if self.rows[row].missing else samples(self.rows[row], feature, multi_query)

    def figure(self, line: str, score: str, multi_query: bool) -> Figure | None:
        """Ours for a line; None where there is none."""
        found = self.samples(line, multi_query).values() if line in self.table.ours else ()
        return Figure.of(row[score] for row in found) if found else None

    def gain(self, better: str, worse: str, column: Column) -> Figure | None:
        """How far a line of ours is above another, seed by seed (or trial by trial)."""
        score = _our_score(column)
        above, below = (self.samples(line, column.protocol == MULTI_QUERY) for line in (better, worse))
        both = sorted(above.keys() & below.keys())
        return Figure.of(above[key][score] - below[key][score] for key in both) if both else None

    def spread(self) -> str:
        """What the deviations are over, in words."""
        counts = {len(self.samples(line, False)) for line in self.table.ours} - {0}
        if not counts or counts == {1}:
            return "one run a row, so no deviation is known"
        what = "trials" if all(len(outcome.runs) == 1 for outcome in self.rows.values()) else "seeds"
        return f"± is the sample standard deviation over {'/'.join(map(str, sorted(counts)))} {what}"

    def heading(self, column: Column) -> str:
        """Off the paper's data set there is one kind of query."""
        return column.heading if self.comparable else dataclasses.replace(column, group="").heading

    # --- Markdown

    def markdown(self, figures: Sequence[str] = ()) -> str:
        """To be put into a page under a heading of the second level; `figures` are names of files beside it."""
        paper = "paper" if self.comparable else "paper, Market-1501"
        kinds = (paper, "ours", "difference") if self.comparable else ("ours",) if self.table.title else (paper, "ours")
        header = ["line"]
        columns = [self.published.columns[k] for k in self.columns]
        header += [self.heading(column) + (f", {kind}" if len(kinds) > 1 else "") for column in columns
                   for kind in kinds]
        body = [[line, *(text for k, column in zip(self.columns, columns, strict=True)
                         for text in self._texts(line, values[k], column))]
                for line, values in self.published.rows.items()]
        name = f"Table {self.table.name}: " if not self.table.title else ""
        parts = [f"### {name}{self.published.title} ({self.tested_on})",
                 f"Per cent; {self.spread()}. {self._caption()}", markdown_table(header, body)]
        if missing := [f"- {row}: {outcome.missing}" for row, outcome in self.rows.items() if outcome.missing]:
            parts.append("Without a result:\n\n" + "\n".join(missing))
        if self.table.comparisons:
            parts.append(self._comparisons(columns, paper))
        if runs := self._runs():
            parts.append(runs)
        parts += [f"![{name.rpartition('.')[0].replace('_', ' ')}]({name})" for name in figures]
        return "\n\n".join(parts) + "\n"

    def _caption(self) -> str:
        caption = "mAP of ours is the area by trapezoids, as Market-1501's own code has it."
        return caption if any(self.published.columns[k].score == "mean_ap" for k in self.columns) else ""

    def _texts(self, line: str, value: float | None, column: Column) -> list[str]:
        ours = self.figure(line, _our_score(column), column.protocol == MULTI_QUERY)
        text = ours.text() if ours else ""
        if line in self.table.ours and (missing := self.rows[self.table.ours[line][0]].missing):
            text = "failed" if "failed: " in missing else "unfinished"
        texts = [text] if self.table.title else ["-" if value is None else f"{value:.1f}", text]
        if self.comparable:
            texts.append("" if ours is None or value is None else f"{ours.mean - value:+.1f}")
        return texts

    def _comparisons(self, columns: Sequence[Column], paper: str) -> str:
        header = ["gain", *(f"{self.heading(column)}, {kind}" for column in columns
                            for kind in (paper, "ours", "does the order hold?"))]
        body = []
        for better, worse in self.table.comparisons:
            texts = [f"{better} over {worse}"]
            for k, column in zip(self.columns, columns, strict=True):
                theirs = self.published.rows[better][k] - self.published.rows[worse][k]
                ours = self.gain(better, worse, column)
                texts += [f"{theirs:+.1f}", ours.text("+") if ours else "", _verdict(ours)]
            body.append(texts)
        return ("Gains, ours seed by seed (or trial by trial); an order holds if the mean gain is above the gain's own "
                "standard deviation.\n\n" + markdown_table(header, body))

    def _runs(self) -> str:
        body = []
        for row, outcome in self.rows.items():
            if outcome.missing:
                continue
            sources = [run.provenance() for run in outcome.runs]
            first, hardware = sources[0], sources[0]["hardware"]
            rates = [source["images_per_second"] for source in sources if source["images_per_second"]]
            commits = sorted({(source["commit"] or "unknown")[:7]
                              + (" with changes" if source["uncommitted_changes"] else "") for source in sources})
            prints = list(dict.fromkeys(mark[:12] for source in sources for mark in source["train_fingerprint"]))
            body.append([
                row, ", ".join(str(run.seed) for run in outcome.runs), str(first["steps"]),
                " to ".join(dict.fromkeys(f"{rate:.0f}" for rate in (min(rates), max(rates)))) if rates else "",
                f"{sum(source['training_seconds'] for source in sources) / 60:.0f}", ", ".join(commits),
                f"{hardware['devices']} {hardware['device_kind']}, {hardware['cpus']} cores, "
                f"jax {first['versions']['jax']}",
                first["incomplete"] or "complete", prints[0] + (", ..." if len(prints) > 1 else "")])
        if not body:
            return ""
        return "Runs:\n\n" + markdown_table(
            ["row", "seeds", "steps", "images/s", "minutes of training", "commit", "hardware", "data",
             "training images"], body)

    # --- files for machines

    def csv(self) -> str:
        """One line a figure: the paper's columns, then the scores of ours that the paper has not; all digits."""
        out = io.StringIO()
        writer = csv.DictWriter(out, _CSV_FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        for line, values in self.published.rows.items():
            about = {"table": self.table.name, "dataset": self.dataset, "line": line}
            if line in self.table.ours:
                about["state"] = self.rows[self.table.ours[line][0]].missing or "finished"
            shown = set()
            for k in self.columns:
                column = self.published.columns[k]
                score, multi_query = _our_score(column), column.protocol == MULTI_QUERY
                shown.add((score, multi_query))
                ours = self.figure(line, score, multi_query)
                record = about | {"query": _query(multi_query), "score": score, "unit": column.unit,
                                  "paper": values[k], "citation": "" if self.table.title else published.citation(line)}
                record |= _digits(ours)
                if ours and self.comparable and values[k] is not None:
                    record["difference"] = f"{ours.mean - values[k]:.4f}"
                writer.writerow(record)
            for multi_query in (False, True):
                for score in SCORES:
                    ours = self.figure(line, score, multi_query)
                    if ours and (score, multi_query) not in shown:
                        writer.writerow(about | {"query": _query(multi_query), "score": score, "unit": "per cent"}
                                        | _digits(ours))
        return out.getvalue()

    def runs(self) -> str:
        """JSON: the results and the provenance of every finished run."""
        return json.dumps([{"row": run.row, "seed": run.seed, "rows": run.results(),
                            "provenance": without_paths(run.provenance())}
                           for outcome in self.rows.values() if not outcome.missing for run in outcome.runs], indent=1)


def _of_study(table: Table) -> PublishedTable:
    """A table without a published figure."""
    columns = tuple(Column(score, "per cent") for score in ("rank1", "rank10", "mean_ap"))
    return PublishedTable(table.title, columns, dict.fromkeys(table.ours, (None,) * len(columns)))


def _verdict(gain: Figure | None) -> str:
    if gain is None:
        return ""
    if gain.deviation is None:
        return ("yes" if gain.mean > 0 else "no") + ", one run"
    if abs(gain.mean) <= gain.deviation:
        return "within the spread"
    return "yes" if gain.mean > 0 else "no"


def _our_score(column: Column) -> str:
    return OUR_SCORE.get(column.score, column.score)


def _query(multi_query: bool) -> str:
    return "multi" if multi_query else "single"


def _digits(figure: Figure | None) -> dict[str, str | int]:
    if figure is None:
        return {}
    deviation = {} if figure.deviation is None else {"deviation": f"{figure.deviation:.4f}"}
    return {"ours": f"{figure.mean:.4f}", "samples": figure.samples} | deviation


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
