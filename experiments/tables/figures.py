"""Pictures with their numbers: training curves, CMC curves, what the sparsity penalties do to the feature layers."""

import csv
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tables.plan import BENCHMARKS, Run
from experiments.tables.report import Figure, Report
from jlml_jax import evaluate, norm_statistics, parallel, protocols
from jlml_jax.checkpoints import RESULTS, load_run, trial_folders
from jlml_jax.errors import UserError
from jlml_jax.files import user_path
from jlml_jax.logs import read_metrics
from jlml_jax.models import build_model, init_variables
from jlml_jax.result_rows import REPORTED_RANKS

NEAR_ZERO = 1e-3  # a weight below this in absolute value counts as near zero
_STYLES = {"global": "-", "local": "--", "joint": ":"}


def check_matplotlib() -> None:
    """Tells of a missing matplotlib before anything is trained."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the tables' figures need matplotlib: pip install -e '.[tables]'")


def draw(report: Report, folder: Path, stem: str) -> list[str]:
    """Draws what the finished rows have and returns the pictures' names; their numbers are in CSV files beside them."""
    finished = {row: outcome.runs for row, outcome in report.rows.items() if not outcome.missing}
    if not finished:
        return []
    names = [_training_curves(finished, folder, f"{stem}_training"), _cmc_curves(report, folder, f"{stem}_cmc")]
    if report.table.name in ("12", "feature", "penalties"):
        names += [_feature_layers(finished, folder, f"{stem}_features"),
                  _feature_scales(finished, folder, f"{stem}_scales")]
    return names


def _save(figure: Any, path: Path) -> str:
    figure.savefig(path, dpi=90, metadata={"Software": None})
    return path.name


def _new_figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    figure = Canvas(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


# --- Training curves

def _training_curves(rows: dict[str, Sequence[Run]], folder: Path, stem: str) -> str:
    """Cross-entropy and training accuracy of every classifier, the mean over a row's runs; a band is their range."""
    records = [{"row": row, "seed": run.seed, "trial": trial.name if trial != run.folder else "", "step": line["step"],
                "classifier": name.partition("/")[2], "cross_entropy": value,
                "accuracy": line[name.replace("cross_entropy", "accuracy")]}
               for row, runs in rows.items() for run in runs for trial in run.trials() for line in read_metrics(trial)
               for name, value in line.items() if name.startswith("cross_entropy/")]
    _write_csv(folder / f"{stem}.csv", records)
    figure, axes = _new_figure(2)
    for axis, quantity in zip(axes[0], ("cross_entropy", "accuracy"), strict=True):
        for color, row in enumerate(rows):
            for classifier in dict.fromkeys(record["classifier"] for record in records if record["row"] == row):
                by_step: dict[int, list[float]] = {}
                for record in records:
                    if (record["row"], record["classifier"]) == (row, classifier):
                        by_step.setdefault(record["step"], []).append(record[quantity])
                steps, values = list(by_step), list(by_step.values())
                axis.plot(steps, [np.mean(of_step) for of_step in values], f"C{color}{_STYLES[classifier]}",
                          label=f"{row}, {classifier}", marker="." if len(steps) < 3 else None)
                axis.fill_between(steps, [min(of_step) for of_step in values], [max(of_step) for of_step in values],
                                  color=f"C{color}", alpha=0.15, linewidth=0)
        axis.set(xlabel="step", ylabel=f"training {quantity.replace('_', ' ')}")
    axes[0][0].legend(fontsize="small")
    return _save(figure, folder / f"{stem}.png")


# --- CMC

def _cmc_curves(report: Report, folder: Path, stem: str) -> str:
    """The reported ranks of every line of ours, and the paper's where its table has them; single-query."""
    figure, axes = _new_figure(1)
    axis = axes[0][0]
    for color, line in enumerate(report.table.ours):
        found = report.samples(line, multi_query=False).values()
        if found:
            figures = [Figure.of(row[f"rank{rank}"] for row in found) for rank in REPORTED_RANKS]
            axis.errorbar(REPORTED_RANKS, [one.mean for one in figures], [one.deviation or 0 for one in figures],
                          color=f"C{color}", marker="o", capsize=3,
                          label="ours" if report.table.name in BENCHMARKS else line)
    if report.comparable and report.table.name in ("5", "7", "8"):
        for number, (line, values) in enumerate(report.published.rows.items(), 1):  # C0 is ours
            points = [(int(column.score.removeprefix("rank")), values[k]) for k in report.columns
                      if (column := report.published.columns[k]) and values[k] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), linestyle="--", marker=".", linewidth=1,
                          label=f"{line}, published", color="black" if line == "JLML" else f"C{number}")
    axis.set(xscale="log", xlabel="rank", ylabel="matched within that rank (%)", title=report.dataset)
    axis.set_xticks(REPORTED_RANKS, [str(rank) for rank in REPORTED_RANKS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower right")
    return _save(figure, folder / f"{stem}.png")


# --- Table 12: the feature layers

@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups that a penalty selects among in one feature layer, or in one strip of it."""

    branch: str
    strip: int | None
    norms: np.ndarray  # global: ||K[i, :]||_2 by input i; local: sum_k |K[j, k, o]| by output o
    weights: np.ndarray

    def record(self) -> dict[str, Any]:
        """The numbers of a line of the CSV."""
        low, middle, high = np.percentile(self.norms, [10, 50, 90])
        return {"branch": self.branch, "strip": "" if self.strip is None else self.strip, "groups": len(self.norms),
                "group_norm_mean": self.norms.mean(), "group_norm_min": self.norms.min(), "group_norm_p10": low,
                "group_norm_median": middle, "group_norm_p90": high, "group_norm_max": self.norms.max(),
                "weight_rms": np.sqrt(np.square(self.weights).mean()), "near_zero_share": self.near_zero()}

    def near_zero(self) -> float:
        return float((np.abs(self.weights) < NEAR_ZERO).mean())


def groups_of(params: dict[str, Any], num_strips: int) -> list[Groups]:
    """The groups of the global feature layer's kernel (Eq. 1) and, strip by strip, of the local one's (Eq. 2)."""
    kernel = np.asarray(params["global_head"]["fc"]["kernel"])
    local = np.asarray(params["local_head"]["fc"]["kernel"])
    local = local.reshape(num_strips, -1, local.shape[-1])
    return [Groups("global", None, np.linalg.norm(kernel, axis=1), kernel),
            *(Groups("local", j, np.abs(strip).sum(axis=0), strip) for j, strip in enumerate(local))]


def _before_and_after(runs: Sequence[Run]) -> Iterator[tuple[int, str, list[Groups]]]:
    """(seed, before or after, groups): the weights that each run's first trial starts from, and those it ends with."""
    for run in runs:
        config = run.config
        trained = load_run(next(folder for folder in run.trials() if (folder / RESULTS).exists()))
        if config.init_from:
            start = user_path(config.init_from)
            before = load_run(start / trained.workdir.name if trial_folders(start) else start).variables
        else:
            before = init_variables(build_model(config, 0), run.seed, config.data.height, config.data.width)
        yield run.seed, "before", groups_of(before["params"], config.model.num_strips)
        yield run.seed, "after", groups_of(trained.variables["params"], config.model.num_strips)


def _feature_layers(rows: dict[str, Sequence[Run]], folder: Path, stem: str) -> str:
    """Group norms, sorted, and shares of weights near zero, before and after, with the penalties and without."""
    layers = {row: list(_before_and_after(runs)) for row, runs in rows.items()}
    _write_csv(folder / f"{stem}.csv", [
        {"row": row, "seed": seed, "when": when} | groups.record()
        for row, found in layers.items() for seed, when, layer in found for groups in layer])
    # The starts of the rows are one and the same.
    first = next(iter(layers.values()))
    shown = {"before": [layer for _, when, layer in first if when == "before"]}
    shown |= {f"after, {row}": [layer for _, when, layer in found if when == "after"] for row, found in layers.items()}
    figure, axes = _new_figure(3)
    for color, (label, of_seeds) in enumerate(shown.items()):
        for axis, branch in zip(axes[0], ("global", "local"), strict=False):
            for strip in sorted({groups.strip or 0 for groups in of_seeds[0] if groups.branch == branch}):
                norms = np.mean([np.sort(groups.norms)[::-1] for layer in of_seeds for groups in layer
                                 if groups.branch == branch and (groups.strip or 0) == strip], axis=0)
                axis.plot(np.arange(len(norms)), norms, color=f"C{color}", linewidth=1,
                          label=None if strip else label)
        shares = np.mean([[groups.near_zero() for groups in layer] for layer in of_seeds], axis=0)
        names = ["global", *(f"strip {groups.strip}" for groups in of_seeds[0][1:])]
        offset = (color - (len(shown) - 1) / 2) / (len(shown) + 1)
        axes[0][2].bar(np.arange(len(names)) + offset, 100 * shares, 1 / (len(shown) + 1), color=f"C{color}")
    axes[0][0].set(title="global feature layer", xlabel="input, sorted", ylabel="norm of its row (l2)", yscale="log")
    axes[0][1].set(title="local feature layer, a line a strip", xlabel="output, sorted",
                   ylabel="its sum of magnitudes in the strip (l1)", yscale="log")
    axes[0][2].set(title=f"weights below {NEAR_ZERO:g} in magnitude", ylabel="share (%)")
    axes[0][2].set_xticks(np.arange(len(names)), names, fontsize="small")
    axes[0][0].legend(fontsize="small")
    return _save(figure, folder / f"{stem}.png")


# --- the branches' scales in the concatenation

def _feature_scales(rows: dict[str, Sequence[Run]], folder: Path, stem: str) -> str:
    """How long each branch's features of the queries are, and how much of the squared distances is the local one's."""
    records = [{"row": row, "seed": run.seed} | _scales(run) for row, runs in rows.items() for run in runs]
    _write_csv(folder / f"{stem}.csv", records)
    figure, axes = _new_figure(2)
    for axis, fields, label in ((axes[0][0], ("global_norm", "local_norm"), "mean length of a feature (l2)"),
                                (axes[0][1], ("local_share",), "local branch's share of squared distances (%)")):
        for place, field in enumerate(fields):
            values = [np.mean([record[field] for record in records if record["row"] == row]) for row in rows]
            offset = (place - (len(fields) - 1) / 2) / (len(fields) + 1)
            axis.bar(np.arange(len(rows)) + offset, values, 1 / (len(fields) + 1), label=field.partition("_")[0])
        axis.set_xticks(np.arange(len(rows)), rows, fontsize="small", rotation=20)
        axis.set(ylabel=label)
    axes[0][0].legend(fontsize="small")
    return _save(figure, folder / f"{stem}.png")


def _scales(run: Run) -> dict[str, float]:
    """Of the run's first trial. Two images' mean squared distance is twice the variance, summed over dimensions."""
    trained = load_run(next(folder for folder in run.trials() if (folder / RESULTS).exists()))
    config, mesh = trained.config, parallel.make_mesh()
    trial = protocols.load(config.data.name, config.data).trial(int(config.data.trials))
    model = build_model(config, len(trial.identities()))
    features = norm_statistics.features_of(
        trial, evaluate.make_forward(model, config, mesh), norm_statistics.make_statistics(model, config, mesh),
        parallel.replicate(trained.variables, mesh), config, mesh)(trial.query)
    spread = {branch: float(values[:].var(axis=0).sum()) for branch, values in features.items()}
    lengths = {f"{branch}_norm": float(np.linalg.norm(values[:], axis=1).mean()) for branch, values in features.items()}
    return lengths | {"local_share": 100 * spread["local"] / sum(spread.values())}
