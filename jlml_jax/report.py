"""Writes one self-contained HTML page about a run: its results, curves, distances, ranked lists and activation maps.

Beside the page, such as report.html, is a CSV, report.queries.csv: each query with its average precision, the rank of
its first true match and its nearest gallery image. Everything but the results table and the training curves is computed
anew, from the latest checkpoint. A run without a test (several data sets trained on together, or ImageNet) gets a page
without what needs queries, and no CSV.
"""

import base64
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from jlml_jax import (
    calibration,
    datasets,
    evaluate,
    metrics,
    norm_statistics,
    parallel,
    pictures,
    protocols,
    result_rows,
)
from jlml_jax.arguments import Parser
from jlml_jax.checkpoints import SavedRun, load_run, read_results
from jlml_jax.datasets import Names
from jlml_jax.datasets.split import DISTRACTOR, Split
from jlml_jax.distances import LazyRows, l2_distances
from jlml_jax.errors import UserError, exit_status
from jlml_jax.extractor import Extractor
from jlml_jax.files import check_output, user_path, write_output
from jlml_jax.logs import TIME_FIELDS, read_metrics
from jlml_jax.models import build_model
from jlml_jax.pictures import Curve
from jlml_jax.protocols import Trial

TOP_K = 10  # gallery images shown of each query
QUERIES = 16  # shown of each group, by default
FIGURES = 3  # queries of each group with large activation maps
HISTOGRAM_BINS = 40

_CROP = (160, 80)  # pixels: height and width of the crops in the page
_LAYER = (64, 32)  # of the activation maps over them, which the browser scales up
_DISTANCES = 32 << 20  # held at a time for the histogram (128 MiB)
_MAP_BATCH = 32
_SEED = 0  # of the random queries
_TABLE_ROWS = 12  # of a curve's values as a table

_EXAMPLE = """example:
  python -m jlml_jax.report --workdir=runs/synthetic
"""


def write_report(workdir: str | Path, output: str | Path | None = None, *, data_dir: str | None = None,
                 queries: int = QUERIES) -> Path:
    """Writes the report of the run in `workdir` and returns its path; beside it, as a CSV, how each query fared.

    Args:
        workdir: folder of a trained run; of several trials, that of one.
        output: the file; an existing one is replaced. None: report.html in `workdir`.
        data_dir: where the TFDS data lie; None: where the run's config says.
        queries: how many to show of the worst, of the best and of the others.

    Raises:
        UserError: the run or its data do not load, or are not of each other, or `output` cannot be written.
    """
    output = user_path(output) if output is not None else user_path(workdir) / "report.html"
    if queries < 1:
        raise UserError(f"--queries={queries} must be at least 1")
    run = load_run(workdir)
    table = output.with_name(f"{output.stem}.queries.csv")
    check_output(output)
    config = run.config
    if data_dir is not None:
        config.data.data_dir = data_dir
    parallel.keep_programs(config.compilation_cache)
    results, history = _read_results(run.workdir), read_metrics(run.workdir)
    protocol = protocols.load(config.data.name, config.data)
    trial, = protocols.add_distractors([protocol.trial(protocol.numbers(config.data.trials)[0])],
                                       config.evaluate.extra_gallery, config.data)
    if trial.train is not None and trial.train.fingerprint() != run.label_map["fingerprint"]:
        raise UserError(f"{workdir} was trained on another version of {trial.dataset} than the one in data.data_dir; "
                        "give --data_dir of the data that it was trained on")
    protocols.refuse_trained_on(trial, run.label_map)

    ranking, queries_table, real_people = None, None, []
    if trial.query is not None:
        check_output(table)
        ranking, queries_table = _ranking(run, trial, results, queries)
        shown = filter(None, [*trial.datasets(), config.evaluate.extra_gallery])
        real_people = [name for name in shown if _shows_real_people(name)]
    page = _environment().get_template("report.html").render(
        run=run, trial=trial, results=_tables(results["rows"]) if results else None, training=_training(history),
        ranking=ranking, real_people=real_people, several_trials=protocol.num_trials > 1,
        provenance=_provenance(run, trial, results), config=config.to_json(indent=1), heat=_heat_gradient())
    write_output(output, page)
    print(f"wrote {output}, {len(page.encode()) / 1e6:.1f} MB")
    if queries_table is not None:
        write_output(table, queries_table)
        print(f"wrote {table}, its {len(trial.query):,} queries one by one")
    if real_people:
        print(f"it has images of {', '.join(real_people)} in it, real people's, which may not be passed on")
    return output


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jlml_jax"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True)
    environment.filters |= {"percent": lambda fraction: f"{100 * fraction:.1f}", "count": lambda n: f"{n:,.10g}"}
    return environment


def _shows_real_people(dataset: str) -> bool:
    """Whether its images are other people's, and not to be passed on: all but drawn ones and the user's own."""
    return dataset != "synthetic_pedestrians" and not dataset.startswith("folder/")


# What the run has left.


def _read_results(workdir: Path) -> dict[str, Any] | None:
    """results.json; in a trial's folder, with the means over all trials that lie beside it. None before evaluation."""
    results = read_results(workdir)
    if results and workdir.absolute().name.startswith("trial-") and (
            together := read_results(workdir.absolute().parent)):
        results["rows"] = results["rows"] + [row for row in together["rows"]
                                             if row.get("trained_trial", row.get("trial")) == "mean"]
    return results


# Tables and curves.

_GROUPED_BY = ("dataset", "protocol", "trained_on", "norm_statistics", "incomplete")


def _tables(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of results.json, in tables by data set and protocol, in per cent."""
    groups = {}
    for row in rows:
        key = (*(row.get(field) for field in _GROUPED_BY), "top1" in row)
        groups.setdefault(key, []).append(row)
    tables = []
    for (dataset, protocol, trained_on, _, incomplete, _), group in groups.items():
        columns = result_rows.columns_of(group)
        sizes = [("images", "num_images"), ("classes", "num_classes"), ("queries", "num_queries"),
                 ("gallery images", "num_gallery")]
        size = {f"{row[field]:,.10g} {what}": None for what, field in sizes for row in group[:1] if field in row}
        trials = len({str(row["trial"]) for row in group}) > 1 or any(map(result_rows.averaged_over, group))
        tables.append({
            "title": f"{dataset}, {protocol}" + (f", by the network trained on {trained_on}" if trained_on else "")
                     + (f"; {statistics}" if (statistics := result_rows.norm_statistics_of(group[0])) else ""),
            "size": ", ".join(size), "incomplete": incomplete, "trials": trials,
            "columns": [result_rows.TITLES[column] for column in columns],
            "rows": [{"trial": f"mean of {mean}" if (mean := result_rows.averaged_over(row)) else row["trial"],
                      "mean": bool(mean), "feature": row["feature"],
                      "normalize": row.get("normalize", ""),
                      "cells": [(row.get(column), row.get(f"{column}_std")) for column in columns]} for row in group],
        })
    return tables


def _figure(curves: Sequence[Curve], *, title: str, note: str = "", **labels: Any) -> dict[str, Any]:
    """A chart and, for those who cannot see it, its values as a table."""
    xs = sorted({float(x) for curve in curves for x in curve.x})
    shown = xs if len(xs) <= _TABLE_ROWS else [xs[i] for i in np.linspace(0, len(xs) - 1, _TABLE_ROWS).astype(int)]
    values = [dict(zip(map(float, curve.x), curve.y, strict=True)) for curve in curves]
    return {"title": title, "note": note, "svg": pictures.chart(curves, title=title, **labels),
            "x_label": labels["x_label"], "names": [curve.name for curve in curves],
            "rows": [(f"{x:,.6g}", [f"{value[x]:,.4g}" if x in value else "" for value in values]) for x in shown]}


_COLORS = {"global": 0, "local": 1, "joint": 2}
_OTHER = 3


def _training(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Figures of metrics.jsonl: loss terms, accuracy, evaluations, and whatever else was logged but times."""
    if not history:
        return []
    names = [name for name in dict.fromkeys(name for line in history for name in line)
             if name != "step" and name not in TIME_FIELDS]

    def curves(prefixes: Sequence[str], scale: float = 1) -> list[Curve]:
        found = []
        for name in names:
            kind, _, head = name.partition("/")
            if kind in prefixes:
                lines = [line for line in history if name in line]
                shown = head if len(prefixes) == 1 and head else name.replace("_", " ").replace("/", ", ")
                found.append(Curve(shown, [line["step"] for line in lines],
                                   [scale * line[name] for line in lines], _COLORS.get(head, _OTHER),
                                   dashed=kind == "penalty"))
        return found

    figures = []
    for title, prefixes, y_label, scale in (
            ("Cross-entropy", ("cross_entropy",), "nats", 1),
            ("Loss and its other terms", ("loss", "penalty", "triplet"), "loss", 1),
            ("Training accuracy", ("accuracy",), "per cent", 100),
            ("Rank-1 while training", ("rank1",), "per cent", 100),
            ("mAP while training", ("mean_ap",), "per cent", 100),
            ("Learning rate", ("learning_rate",), "learning rate", 1), ("Gradient", ("gradient_norm",), "norm", 1)):
        if drawn := curves(prefixes, scale):
            figures.append(_figure(drawn, title=title, x_label="step", y_label=y_label))
    return figures


# What is computed anew.


def _ranking(run: SavedRun, trial: Trial, results: dict[str, Any] | None, per_group: int) -> tuple[dict[str, Any], str]:
    """What the page says of queries and gallery, and the CSV of all queries."""
    config = run.config.copy_and_resolve_references()
    evaluate.check_fields(config.evaluate)
    mesh = parallel.make_mesh()
    config.evaluate.batch_size = -(-config.evaluate.batch_size // mesh.size) * mesh.size  # of whatever devices
    # Which refuses other weights' before the work.
    verdicts = calibration.load_verdicts(run.workdir, Extractor(run, mesh))
    model = build_model(config, num_identities=0)
    forward = evaluate.make_forward(model, config, mesh)
    features = norm_statistics.features_of(trial, forward, norm_statistics.make_statistics(model, config, mesh),
                                           parallel.replicate(run.variables, mesh), config, mesh)
    query, gallery = (evaluate.matching_features(features(split), config.evaluate.normalize)
                      for split in (trial.query, trial.gallery))
    feature = list(query)[-1]  # what is matched by: joint, or the only branch
    scores = {name: metrics.evaluate_ranking(
        query[name], gallery[name], *evaluate.labels_of(trial), max_rank=config.evaluate.max_rank,
        single_gallery_shot=trial.single_gallery_shot) for name in query}
    first_ranks, precisions = metrics.query_scores(query[feature], gallery[feature], *evaluate.labels_of(trial))

    names = datasets.names(trial.dataset, config.data.data_dir)
    groups = _choose(precisions, per_group)
    lists = [_ranked_list(trial, names, group, q, distances, first_ranks, precisions)
             for group, queries in groups.items()
             for q, distances in zip(queries, l2_distances(query[feature][queries], gallery[feature]), strict=True)]
    units = _add_pictures(run, trial, model, lists)
    other = ""  # than these distances: what the run's thresholds are of
    if verdicts and verdicts.of_tracks:
        other = "of tracks, not of images"
    elif verdicts and (config.evaluate.norm_statistics != "run" or run.cameras):  # the extractor goes by the run's
        other = "of features by other statistics than those of this page"
    histogram, thresholds = _histogram(trial, query[feature], gallery[feature], () if other else verdicts.thresholds)
    ranks = np.arange(1, config.evaluate.max_rank + 1)
    page = {
        "feature": feature, "scores": scores[feature], "differs": _difference(run, trial, results, feature, scores),
        "cmc": _figure(
            [Curve(name, ranks, 100 * score.cmc, _COLORS.get(name, _OTHER)) for name, score in scores.items()],
            title="CMC curve", x_label="rank", y_label="queries matched by it (per cent)"),
        "histogram": histogram, "thresholds": thresholds, "other_thresholds": other,
        "by_camera": bool(run.cameras),
        "lists": lists, "counts": {group: len(queries) for group, queries in groups.items()},
        "identities": _options(lists, "identity"), "cameras": _options(lists, "camera"),
        "figures": [item for group in groups for item in [one for one in lists if one["group"] == group][:FIGURES]],
        "strips": config.model.num_strips, "units": units, "top_k": TOP_K,
    }
    return page, _queries_table(trial, names, query[feature], gallery[feature], first_ranks, precisions)


def _difference(run: SavedRun, trial: Trial, results: dict[str, Any] | None, feature: str,
                scores: Mapping[str, metrics.RankingMetrics]) -> str:
    """In words, if results.json does not have what was computed anew."""
    anew = {"rank1": float(scores[feature].cmc[0]), "mean_ap": scores[feature].mean_ap}
    expected = {"dataset": trial.dataset, "protocol": trial.protocol, "trial": trial.number, "feature": feature}
    for row in results["rows"] if results else ():
        if expected.items() <= row.items() and "trained_on" not in row and any(
                abs(row[score] - value) > 5e-4 for score, value in anew.items()):
            return (f"results.json says R1 {100 * row['rank1']:.1f} and mAP {100 * row['mean_ap']:.1f}, of step "
                    f"{results['provenance'].get('steps')}; checkpoint {run.step}, of which all that follows is, gives "
                    f"{100 * anew['rank1']:.1f} and {100 * anew['mean_ap']:.1f}. Evaluate the run again with python -m "
                    "jlml_jax.main --mode=evaluate.")
    return ""


def _choose(precisions: np.ndarray, per_group: int) -> dict[str, list[int]]:
    """Queries with a true match: the worst, random ones of the rest, the best; each in one group, a third at most."""
    order = np.argsort(precisions, kind="stable")[:np.isfinite(precisions).sum()]  # NaN is last
    number = min(per_group, -(-len(order) // 3))
    worst, rest = order[:number], order[number:]
    best, rest = rest[::-1][:number], rest[:max(0, len(rest) - number)]
    random = np.random.default_rng(_SEED).permutation(np.sort(rest))[:number]
    return {"worst": worst.tolist(), "random": np.sort(random).tolist(), "best": best.tolist()}


def _ranked_list(trial: Trial, names: Names, group: str, q: int, distances: np.ndarray, first_ranks: np.ndarray,
                 precisions: np.ndarray) -> dict[str, Any]:
    ranked = pictures.ranked_gallery(trial, q, distances, TOP_K)

    def crop(split: Split, index: int) -> dict[str, Any]:
        return {"index": index, "name": str(split.names[index]), "identity": names.identity(split.identities[index]),
                "camera": _camera(trial, names, split.cameras[index]) or "unknown"}

    return crop(trial.query, q) | {
        "group": group, "precision": precisions[q], "first_rank": int(first_ranks[q]),
        "gallery": [crop(trial.gallery, int(g)) | {
            "rank": rank, "distance": float(distances[g]),
            "right": bool(trial.gallery.identities[g] == trial.query.identities[q])}
            for rank, g in enumerate(ranked, 1)]}


def _camera(trial: Trial, names: Names, number: int) -> str:
    """What the camera is called; empty if not known, as of all images of joined sets if one has none."""
    return names.camera(number) if trial.cameras_known else ""


def _queries_table(trial: Trial, names: Names, query: LazyRows, gallery: LazyRows, first_ranks: np.ndarray,
                   precisions: np.ndarray) -> str:
    """A CSV with a line a query; without a true match, it has no rank and no average precision."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["query", "identity", "camera", "first_match_rank", "average_precision", "nearest",
                    "nearest_identity", "nearest_camera", "nearest_distance"])

    def of(split: Split, index: int) -> tuple[str, str, str]:
        return (str(split.names[index]), names.identity(split.identities[index]),
                _camera(trial, names, split.cameras[index]))

    step = max(1, _DISTANCES // len(gallery))
    for start in range(0, len(query), step):
        for q, distances in enumerate(l2_distances(query[start:start + step], gallery), start):
            scores = (int(first_ranks[q]), f"{precisions[q]:.6f}") if first_ranks[q] else ("", "")
            nearest = pictures.ranked_gallery(trial, q, distances, 1)
            found = (*of(trial.gallery, nearest[0]), f"{distances[nearest[0]]:.6f}") if len(nearest) else [""] * 4
            table.writerow([*of(trial.query, q), *scores, *found])
    return text.getvalue()


def _options(lists: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    """What there is to filter by; numbers in their order."""
    found = {one[field] for one in lists}
    return sorted(found, key=int) if all(value.isdecimal() for value in found) else sorted(found)


def _add_pictures(run: SavedRun, trial: Trial, model: Any, lists: Sequence[dict[str, Any]]
                  ) -> dict[str, str]:
    """Puts the pixels and the activation maps of every crop in `lists` into it, as data URIs.

    Returns in words, by branch, what the maps are of.
    """
    activation_maps, units = pictures.make_activation_maps(model, run.config.data)
    for split, crops in ((trial.query, lists), (trial.gallery, [crop for one in lists for crop in one["gallery"]])):
        indices, rows = np.unique([crop["index"] for crop in crops], return_inverse=True)
        shown = split.select(indices)
        uris = [_uri(Image.fromarray(pixels), "JPEG", quality=82) for pixels in shown.decode(*_CROP)]
        images = shown.decode(run.config.data.height, run.config.data.width)
        layers = []
        for start in range(0, len(images), _MAP_BATCH):
            batch = images[start:start + _MAP_BATCH]
            padding = [(0, _MAP_BATCH - len(batch)), (0, 0), (0, 0), (0, 0)]
            maps = {branch: np.asarray(values)[:len(batch)] for branch, values in
                    activation_maps(run.variables, np.pad(batch, padding)).items()}
            layers += [{branch: values[row] for branch, values in maps.items()} for row in range(len(batch))]
        encoded = [{branch: _uri(pictures.heat_layer(maps, *_LAYER), "PNG", optimize=True)
                    for branch, maps in one.items()} for one in layers]
        for crop, row in zip(crops, rows, strict=True):
            crop |= {"image": uris[row], "layers": encoded[row],
                     "peaks": {branch: _peaks(maps) for branch, maps in layers[row].items()}}
    return {branch: "{}, {} by {} cells".format(unit, *layers[0][branch].shape[1:]) for branch, unit in units.items()}


def _peaks(maps: np.ndarray) -> str:
    """In words where each of [towers, h, w] is strongest: from the left and from the top of what it sees."""
    places = [np.unravel_index(one.argmax(), one.shape) for one in maps]
    return "; ".join((f"strip {number}: " if len(maps) > 1 else "")
                     + f"{100 * (column + 0.5) / maps.shape[2]:.0f} % from the left, "
                       f"{100 * (row + 0.5) / maps.shape[1]:.0f} % from the top"
                     for number, (row, column) in enumerate(places, 1))


def _uri(image: Image.Image, file_format: str, **options: Any) -> str:
    encoded = io.BytesIO()
    image.save(encoded, file_format, **options)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _histogram(trial: Trial, query: np.ndarray, gallery: np.ndarray, thresholds: Sequence[tuple[float, float]]
               ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Distances from queries to gallery images: the same person by another camera, and different people.

    `thresholds` are (false accept rate, distance), as calibrated. Returns the figure, and for each of them the shares
    of both kinds of pairs that it accepts here.
    """
    number = min(len(query), max(1, _DISTANCES // len(gallery)))
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(query))[:number])
    distances = l2_distances(query[rows], gallery)
    equal = trial.query.identities[rows, None] == trial.gallery.identities
    same = distances[equal & (trial.query.cameras[rows, None] != trial.gallery.cameras)]
    different = distances[~equal & (trial.gallery.identities >= DISTRACTOR)]
    pairs = [("same person" + ", another camera" * trial.cameras_known, same, 0), ("different people", different, 1)]
    edges = np.histogram_bin_edges(np.concatenate([same, different]), HISTOGRAM_BINS)
    curves = [Curve(name, (edges[1:] + edges[:-1]) / 2, 100 * np.histogram(values, edges)[0] / max(1, len(values)),
                    color) for name, values, color in pairs]
    of = "all" if number == len(query) else f"{number:,} random ones of {len(query):,}"
    figure = _figure(
        curves, title="Distances", x_label="L2 distance", y_label="pairs (per cent)", filled=True,
        marks=[(threshold, calibration.format_rate(rate)) for rate, threshold in thresholds],
        note=f"{len(same):,} pairs of the same person and {len(different):,} of different people: {of} queries against "
             "the gallery.")
    return figure, [{"rate": calibration.format_rate(rate), "threshold": threshold,
                     "accepted": [float(np.mean(values < threshold)) if len(values) else 0.0 for _, values, _ in pairs]}
                    for rate, threshold in sorted(thresholds, reverse=True)]


# Where it comes from.


def _provenance(run: SavedRun, trial: Trial, results: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What there is to know of the run, as names and values."""
    source = dict(results["provenance"]) if results else {}
    lines = [("data set", f"{trial.dataset}, {trial.protocol}"),
             ("copy of the data", f"incomplete or degraded: {trial.incomplete}" if trial.incomplete else "complete")]
    label_map, what = run.label_map, "trained on"
    while label_map is not None:
        people = sum(map(len, label_map["identities"].values()))
        lines.append((what, f"{label_map['dataset']}, {people:,} identities, SHA-256 {label_map['fingerprint']}"))
        label_map, what = label_map["init_from"], "weights from a run on"
    for part in ("query", "gallery"):
        if (split := getattr(trial, part)) is not None:
            lines.append((part, f"{len(split):,} images, SHA-256 {split.fingerprint()}"))
    lines.append(("checkpoint", f"step {run.step:,} of {run.config.train.steps:,}"))
    for start in source.pop("training", []):  # where other commands have trained than the one that evaluated
        commit = start["commit"] or "unknown"
        lines.append((f"trained from step {start['first_step']:,}", f"{start['command']} (commit {commit})"))
    for name in ("command", "commit"):
        if name in source:
            lines.append((name, str(source.pop(name) or "unknown: not run from a git checkout")))
    if source.pop("uncommitted_changes", None):
        lines[-1] = (lines[-1][0], lines[-1][1] + ", with uncommitted changes")
    source.pop("train_fingerprint", None)
    for name, value in source.items():
        shown = ", ".join(f"{key.replace('_', ' ')} {one}" for key, one in value.items()) if isinstance(
            value, dict) else str(value)
        lines.append((name.replace("_", " "), shown))
    return lines


def _heat_gradient() -> str:
    """The colours of the activation maps as CSS."""
    return ", ".join(f"rgb({red} {green} {blue} / {alpha / 255:.2f})" for red, green, blue, alpha in pictures.HEAT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.report", __doc__, _EXAMPLE)
    parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--output", metavar="FILE", help="the page to write, or to replace (default: RUN/report.html); "
                                                         "the CSV goes beside it")
    parser.add_argument("--data_dir", metavar="DIR", help="where the data are kept (default: where the run found them)")
    parser.add_argument("--queries", type=int, default=QUERIES, metavar="N",
                        help="how many to show of the worst, of the best and of the others (default: %(default)s)")
    options = parser.parse_args(arguments)
    return exit_status(lambda: write_report(options.workdir, options.output, data_dir=options.data_dir,
                                            queries=options.queries))


if __name__ == "__main__":
    sys.exit(main())
