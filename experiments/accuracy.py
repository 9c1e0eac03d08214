"""The runs on real images, a table a benchmark: python -m experiments.accuracy [RUN ...]

Takes what each run's folder says of it (results, config, speed, provenance; how far it came, if it did not end) into
experiments/results/accuracy/RUN.json, without the paths of this machine, and writes experiments/results/accuracy.md
from all that lie there; what is kept of another run is not replaced. Without RUN the page alone is written again.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.tables import published
from experiments.tables.plan import BENCHMARKS, SEEN_IN_RESULTS, is_evaluated, training_seconds, without_paths
from experiments.tables.report import markdown_table
from jlml_jax.arguments import Parser
from jlml_jax.checkpoints import CONFIG, latest_step, read_results, trial_folder, with_defaults
from jlml_jax.errors import UserError, exit_status, first_few
from jlml_jax.files import write_atomically
from jlml_jax.logs import read_training
from jlml_jax.protocols import joined_name
from jlml_jax.result_rows import (
    ACCURACIES,
    RERANKED,
    SCORES,
    TITLES,
    averaged_over,
    format_score,
    norm_statistics_of,
    without_averaged,
)

FOLDER = Path(__file__).parent / "results" / "accuracy"
PAGE = FOLDER.with_suffix(".md")
FINISHED = "finished"

# Fields that no recipe consists of: who runs it, where, how its progress is told, and what has a column of its own.
_NOT_RECIPE = ("name", "seed", "init_from", "data.name", "data.joined_splits", "data.data_dir", "data.trials",
               "data.loader", "log_every", "checkpoint_every", "keep_checkpoints", "profile", "compilation_cache",
               "evaluate.datasets", "evaluate.picture", "evaluate.baselines", "evaluate.batch_size",
               "evaluate.reranking", "evaluate.extra_gallery", "evaluate.every", "data.held_out_identities",
               "data.height", "data.width", "train.steps", "train.batch_size")
_OF_RUN = ("dataset", "seed", "init_from", "held_out_identities", "steps", "batch_size", "size")  # and the recipe
_SHOWN = (*(score for score in SCORES if score != "mean_inp"), f"{RERANKED}rank1", f"{RERANKED}mean_ap",
          *ACCURACIES)


def make_record(folder: Path) -> dict[str, Any]:
    """What is kept of the run in `folder`, as JSON; it has rows if all that is there is trained and evaluated.

    Raises:
        UserError: `folder` is no run's, or a file in it is damaged.
    """
    fields = _read_fields(folder)
    defaults = with_defaults({})
    parts = sorted(folder.glob("trial-*")) or [folder]
    lines = [line for part in parts for line in read_training(part)]
    rates = [line["images_per_second"] for line in lines]
    total = fields["train.steps"]
    results, state = read_results(folder), _state(folder, parts, fields)
    finished = state == FINISHED
    return {
        "run": folder.name,
        "state": state,
        "dataset": joined_name(fields["data.name"], fields["data.joined_splits"]), "seed": fields["seed"],
        "init_from": Path(fields["init_from"]).name,
        "held_out_identities": fields["data.held_out_identities"],
        "recipe": {name: value for name, value in fields.items()
                   # Where evaluate.multi_query is empty, there are no rows whose recipe it could be.
                   if name not in _NOT_RECIPE and value not in ("", defaults.get(name))},
        "steps": total, "batch_size": fields["train.batch_size"],
        "size": [fields["data.height"], fields["data.width"]],
        "images_per_second": statistics.median_high(rates) if rates else None,
        "training_seconds": round(training_seconds(parts, fields["train.batch_size"])),
        "last_metrics": {name: value for name, value in lines[-1].items()
                         if name not in ("images_per_second", "seconds")} if lines else {},
        "rows": results["rows"] if finished else [],
        "provenance": without_paths(results["provenance"]) if finished else {},
    }


def _read_fields(folder: Path) -> dict[str, Any]:
    try:
        return with_defaults(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no run's folder: {CONFIG}: {error}; give the --workdir of a run") from error


def _state(folder: Path, parts: Sequence[Path], fields: dict[str, Any]) -> str:
    """FINISHED, or why the results in `folder` are not of all `parts`, trained and evaluated as `fields` say."""
    total, steps = fields["train.steps"], [latest_step(part) or 0 for part in parts]
    if min(steps) < total:
        return (f"stopped: {sum(done >= total for done in steps)} of {len(parts)} trials finished, the others at step "
                f"{min(steps)} of {total}")
    lacking = []
    for part in dict.fromkeys((*parts, folder)):
        if not is_evaluated(part):
            lacking.append(f"{part.name} is not evaluated since its {CONFIG} was written")
        elif (evaluated := read_results(part)["provenance"].get("steps", total)) < total:
            lacking.append(f"{part.name} is evaluated at step {evaluated} of {total}")
        elif differing := [field for field in SEEN_IN_RESULTS if _read_fields(part)[field] != fields[field]]:
            lacking.append(f"{part.name} is evaluated by another {first_few(differing)}")
    if not lacking:
        tested = {trial_folder(number) for number in _networks(read_results(folder)["rows"])}
        lacking = [f"{part.name} has no rows" for part in parts if part != folder and part.name not in tested]
    return f"to be evaluated again: {first_few(lacking)}" if lacking else FINISHED


def _network(row: dict[str, Any]) -> int | str | None:
    """The trial that the row's network was trained on; mean: of several."""
    return row.get("trained_trial") if "trained_on" in row else row["trial"]


def _networks(rows: Sequence[dict[str, Any]]) -> set[int]:
    return {number for number in map(_network, rows) if isinstance(number, int)}


def page(records: Sequence[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    parts = ["# Accuracy on real images",
             "Made by `python -m experiments.accuracy`; all digits, trials and provenance are in `accuracy/`. "
             "Per cent; ± is the sample standard deviation over trials. mAP trap. is the area by trapezoids, as "
             "Market-1501's own code has it, to be set beside the paper's. The reading is in [README.md](README.md)."]
    tables: dict[tuple[str, bool], list[list[str]]] = {}
    for record in records:
        for row in without_averaged(record["rows"]):
            key = row["dataset"], bool(record["held_out_identities"]) and "trained_on" not in row
            tables.setdefault(key, []).append(_line(record, row))
    for (dataset, held_out), lines in sorted(tables.items(), key=lambda item: (item[0][1], item[0][0])):
        title = f"## {dataset}" + (", people held out of the training set" if held_out else "")
        header = ["run", "trained on", "protocol", "feature", *(TITLES[score] for score in _SHOWN)]
        used = [k for k in range(len(header)) if k < 4 or any(line[k] for line in lines)]
        parts += [title, *([paper] if not held_out and (paper := _paper(dataset)) else []),
                  markdown_table([header[k] for k in used], [[line[k] for k in used] for line in lines])]
    parts += ["## Runs", "Recipe: what differs from `configs/default.py`, which has the paper's values.",
              markdown_table(["run", "data", "starts from", "steps x batch", "input", "seed", "images/s",
                              "minutes of training", "hardware", "commit", "state"], list(map(_run, records))),
              "### Recipes and commands", *map(_recipe, records)]
    return "\n\n".join(parts) + "\n"


def _line(record: dict[str, Any], row: dict[str, Any]) -> list[str]:
    protocol = row["protocol"] + (f", {averaged}" if (averaged := averaged_over(row)) else "")
    # Without the mean over a run's trials, there would be lines that look the same.
    if isinstance(number := _network(row), int) and (number or len(_networks(record["rows"])) > 1):
        protocol += f", network of trial {number}" if "trained_on" in row else f", trial {number}"
    protocol += f", {statistics}" if (statistics := norm_statistics_of(row)) else ""
    return [record["run"], _trained_on(record, row), protocol, row["feature"],
            *(format_score(row, score) if score in row else "" for score in _SHOWN)]


def _trained_on(record: dict[str, Any], row: dict[str, Any]) -> str:
    """The data set; of a run of no steps, where its weights are from."""
    if not record["steps"] and not record["init_from"]:
        return "nothing (random weights)"
    own = record["dataset"] if record["steps"] else f"nothing (weights of {record['init_from']})"
    return row.get("trained_on", own)


def _paper(dataset: str) -> str:
    """The paper's own line of the table that compares methods on the data set."""
    for name, names in BENCHMARKS.items():
        if dataset in names:
            table = published.load(name)
            figures = [f"{column.heading} {value:.1f}" for column, value in
                       zip(table.columns, table.rows["JLML"], strict=True)
                       if column.dataset == dataset and value is not None]
            pretraining = "ImageNet, then CUHK03 and Market-1501," if dataset in ("grid", "viper") else "ImageNet"
            return f"The paper's Table {name}, pre-trained on {pretraining} at 224x224: {', '.join(figures)}."
    return ""


def _run(record: dict[str, Any]) -> list[str]:
    provenance, rate = _training(record)[-1], record["images_per_second"]
    hardware = provenance.get("hardware", {})
    return [record["run"], record["dataset"], record["init_from"] or "random weights",
            f"{record['steps']} x {record['batch_size']}", "x".join(map(str, record["size"])), str(record["seed"]),
            f"{rate:.0f}" if rate else "", f"{record['training_seconds'] / 60:.0f}",
            f"{hardware['devices']} {hardware['device_kind']}, {hardware['cpus']} core(s)" if hardware else "",
            (provenance.get("commit") or "")[:7], record["state"]]


def _training(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the weights come from: where the results do, if it is not said that other commands have trained."""
    provenance = record["provenance"]
    return provenance.get("training", [provenance])


def _recipe(record: dict[str, Any]) -> str:
    recipe = ", ".join(f"{name} {value}" for name, value in record["recipe"].items()) or "as published"
    commands = dict.fromkeys(start["command"] for start in _training(record) if "command" in start)
    return f"**{record['run']}**: {recipe}" + ("\n\n```\n{}\n```".format("\n".join(commands)) if commands else "")


_RENAME = "give one by a link (ln -s) that has a name of its own"


def _refuse_other_run(record: dict[str, Any]) -> None:
    """A UserError if what is kept by the name of `record` is of a run of another config, or trained on other data."""
    path = FOLDER / f"{record['run']}.json"
    if not path.exists():
        return
    kept = json.loads(path.read_text())
    old, new = ({name: one[name] for name in _OF_RUN} | one["recipe"] for one in (kept, record))
    differing = [f"{name} ({old.get(name)!r} there, {new.get(name)!r} here)" for name in sorted(old | new)
                 if old.get(name) != new.get(name)]
    old, new = map(_fingerprints, (kept, record))
    if old and new and old.isdisjoint(new):  # the same run may have got further trials
        differing.append("other images or people trained on")
    if differing:
        raise UserError(f"{path} is of another run: {first_few(differing)}; {_RENAME}, or delete that file to replace "
                        "it")


def _fingerprints(record: dict[str, Any]) -> set[str]:
    """The fingerprints of what a run, or each of its trials, was trained on; empty if the record has none."""
    found = record["provenance"].get("train_fingerprint", [])
    return {found} if isinstance(found, str) else set(found)


def _command(argv: Sequence[str]) -> None:
    parser = Parser("experiments.accuracy", __doc__)
    parser.add_argument("run", nargs="*", type=Path, help="the folder of a run")
    folders: dict[str, Path] = {}
    for folder in parser.parse_args(argv).run:
        if folder.name in folders:
            raise UserError(f"{folders[folder.name]} and {folder} would both be kept as {folder.name}.json; {_RENAME}")
        folders[folder.name] = folder
    records = list(map(make_record, folders.values()))
    for record in records:
        _refuse_other_run(record)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for record in records:
        write_atomically(FOLDER / f"{record['run']}.json", json.dumps(record, indent=1) + "\n")
        if record["state"] != FINISHED:
            print(f"{record['run']} is shown without figures: {record['state']}")
    kept = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    if not kept:
        raise UserError(f"{FOLDER} has no run; give the folder of one")
    write_atomically(PAGE, page(kept))
    print(f"{len(kept)} runs in {PAGE}")


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: _command(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
