"""The rows of results.json: what one says, their means over trials, and the tables that are printed of them."""

from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from jlml_jax import metrics
from jlml_jax.datasets.split import DISTRACTOR
from jlml_jax.protocols import Trial

REPORTED_RANKS = (1, 5, 10, 20)
SCORES = (*(f"rank{rank}" for rank in REPORTED_RANKS), "mean_ap", "mean_ap_trapezoid", "mean_inp")
ACCURACIES = ("top1", "top5")
TITLES = dict(zip(SCORES + ACCURACIES, (*(f"R{rank}" for rank in REPORTED_RANKS), "mAP", "mAP trap.", "mINP", "top-1",
                                        "top-5"), strict=True))
RERANKED = "reranked_"  # before the name of a score of k-reciprocal re-ranking
TITLES |= {f"{RERANKED}{score}": f"{TITLES[score]} re-r." for score in ("rank1", "mean_ap")}

SETTINGS = "evaluated_by"  # in the provenance of results.json, what `settings_of` gives


def settings_of(evaluate: ml_collections.ConfigDict) -> dict[str, Any]:
    """Of a `config.evaluate` what changes features, queries or the gallery, and is not in the rows."""
    return {name: evaluate[name] for name in ("flip_average", "multi_query", "extra_gallery")}


def make_row(trial: Trial, protocol: str, feature: str, normalize: str, scores: metrics.RankingMetrics
             ) -> dict[str, Any]:
    """One row of results.json."""
    num_gallery = len(trial.gallery)
    if trial.single_gallery_shot:  # one of a person's; every distractor is somebody else
        people = trial.gallery.identities[trial.gallery.identities > DISTRACTOR]
        num_gallery = len(np.unique(people)) + int((trial.gallery.identities == DISTRACTOR).sum())
    return {
        "dataset": trial.dataset, "protocol": protocol, "trial": trial.number, "feature": feature,
        "normalize": normalize, **scores_of(scores), "num_queries": scores.num_valid_queries,
        "num_gallery": num_gallery,
    } | note_of(trial)


def scores_of(scores: metrics.RankingMetrics) -> dict[str, float]:
    """The `SCORES`, by name; fractions, 0 to 1."""
    return {f"rank{rank}": float(scores.cmc[rank - 1]) for rank in REPORTED_RANKS} | {
        score: getattr(scores, score) for score in SCORES[len(REPORTED_RANKS):]}


def note_of(trial: Trial) -> dict[str, str]:
    """What a row says of a copy of the data that is incomplete or degraded; nothing of another."""
    return {"incomplete": trial.incomplete} if trial.incomplete else {}


_NOT_AVERAGED = ("dataset", "protocol", "feature", "normalize", "norm_statistics", "incomplete", "trained_on")


def mean_rows(rows: Sequence[dict[str, Any]], over: str = "trial") -> list[dict[str, Any]]:
    """For rows of several trials, those of their means, with sample standard deviations as `SCORE_std`.

    With over="trained_trial" the means are over networks, each trained on another trial, that took the same test.
    """
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field) for field in _NOT_AVERAGED), []).append(row)
    means = []
    for group in groups.values():
        if len(group) == 1:
            continue
        common = set.intersection(*map(set, group))  # some may be re-ranked, and some not
        mean = {field: value for field, value in group[0].items() if field in common}
        mean |= {over: "mean", f"{over}s": [row[over] for row in group]}
        for score in [field for field in mean if field.removeprefix(RERANKED) in SCORES]:
            values = [row[score] for row in group]
            mean |= {score: float(np.mean(values)), f"{score}_std": float(np.std(values, ddof=1))}
        for count in ("num_queries", "num_gallery"):
            mean[count] = float(np.mean([row[count] for row in group]))
        means.append(mean)
    return means


def without_averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those of single trials or networks that a row of means among them summarises."""
    def test(row: dict[str, Any]) -> tuple[str, ...]:
        return row["dataset"], row["protocol"], row.get("trained_on", "")

    for over in ("trial", "trained_trial"):
        averaged = {test(row) for row in rows if row.get(over) == "mean"}
        rows = [row for row in rows if row.get(over) == "mean" or test(row) not in averaged]
    return list(rows)


def averaged_over(row: dict[str, Any]) -> str:
    """What a row of means is the mean of, such as 10 trials; nothing of another row."""
    if "trained_trials" in row:
        return f"{len(row['trained_trials'])} networks"
    return f"{len(row['trials'])} trials" if "trials" in row else ""


def format_score(row: dict[str, Any], score: str) -> str:
    """A row's score in per cent, with its standard deviation if it is a mean."""
    deviation = f" ± {100 * row[f'{score}_std']:.1f}" if f"{score}_std" in row else ""
    return f"{100 * row[score]:.1f}{deviation}"


def norm_statistics_of(row: dict[str, Any]) -> str:
    """In words, what BN normalised by, if it was not the run's own running statistics."""
    of = {"data": "the data set's training images", "camera": "each camera's training images"}
    return f"BN by {of[row['norm_statistics']]}, without labels" if "norm_statistics" in row else ""


def columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The scores that any of the rows has: baselines are not re-ranked."""
    return [column for column in TITLES if any(column in row for row in rows)]


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as tables in per cent, one for each data set and protocol: of the mean of its trials if there is one.

    Where trials were evaluated in several ways, each has a table of its own.
    """
    tables = {}
    for row in without_averaged(rows):
        tables.setdefault((row["dataset"], row["protocol"], row["trial"]), []).append(row)
    return "\n\n".join(_format_table(part, len(parts) > 1) for table in tables.values()
                       for parts in [_by_evaluation(table)] for part in parts)


def _by_evaluation(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One table's rows, in parts if a feature is there more than once."""
    if len({(row["feature"], row.get("trained_on")) for row in rows}) == len(rows):
        return [list(rows)]
    parts = {}
    for row in rows:
        key = row.get("normalize"), row.get("norm_statistics"), averaged_over(row)
        parts.setdefault(key, []).append(row)
    return list(parts.values())


def _format_table(rows: Sequence[dict[str, Any]], with_normalize: bool) -> str:
    first = rows[0]
    title = f"{first['dataset']}, {first['protocol']}"
    if with_normalize and "normalize" in first:
        title += f", evaluate.normalize={first['normalize']}"
    if averaged := averaged_over(first):
        title += f", mean of {averaged} and standard deviation"
    elif first["trial"]:
        title += f", trial {first['trial']}"
    columns = columns_of(rows)
    title += (f", {first['num_images']} images of {first['num_classes']} classes" if "top1" in first else
              f", {first['num_queries']:g} queries, {first['num_gallery']:g} gallery images") + "; per cent"
    if statistics := next(filter(None, map(norm_statistics_of, rows)), ""):
        title += f"\n{statistics}"
    if "incomplete" in first:
        title += f"\nan incomplete or degraded copy of the data: {first['incomplete']}"

    width = 14 if averaged else 10
    lines = [title, f"{'feature':<20}" + "".join(f"{TITLES[column]:>{width}}" for column in columns)]
    for row in rows:
        cells = (format_score(row, column) if column in row else "" for column in columns)
        lines.append((f"{row['feature']:<20}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip())
    return "\n".join(lines)
