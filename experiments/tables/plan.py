"""What each table needs: on which data sets it is defined, the runs behind its rows, and where these stand.

Beside the paper's tables there are some of what it is silent about, the studies, made and shown in the same way.
"""

import dataclasses
import json
import math
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

from jlml_jax import datasets
from jlml_jax.checkpoints import (
    CONFIG,
    FREE_FIELDS,
    RESULTS,
    digests_path,
    latest_step,
    read_results,
    with_defaults,
)
from jlml_jax.errors import UserError, first_few
from jlml_jax.evaluate import NORMALIZE
from jlml_jax.logs import read_training
from jlml_jax.protocols import chosen_trials, joined_name

_STRIPS, _PENALTIES = (1, 2, 4, 8), (5e-6, 5e-5, 5e-4, 5e-3)
_SIZES = ((64, 32), (96, 48), (128, 64), (160, 64), (256, 128), (224, 224))
FEATURES = ("global", "local", "joint")
# What the study of a recipe sets, one at a time, by the name of the row's folder: its line, and the fields.
_INGREDIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "learning_rate_0.02": ("a learning rate of 0.02", {"optim.learning_rate": 0.02}),
    "schedule_step": ("schedule in steps", {"optim.schedule": "step"}),
    "warmup_0": ("no warm-up", {"optim.warmup_steps": 0}),
    "weight_decay_0": ("no weight decay", {"optim.weight_decay": 0.0}),
    "label_smoothing_0": ("no label smoothing", {"loss.label_smoothing": 0.0}),
    "cosine_margin_0.2": ("identity layers by cosine, with a margin of 0.2",
                          {"model.cosine_scale": 30.0, "loss.margin": 0.2}),
    "triplet_1": ("a triplet loss, batches of 4 images a person",
                  {"loss.triplet_weight": 1.0, "train.images_per_identity": 4}),
    "feature_fc": ("no BN on the feature", {"model.feature_norm": False, "model.feature_relu": False}),
    "crop_0": ("no crops", {"augment.crop_padding": 0}),
    "erasing_0.5": ("half of the crops erased", {"augment.erasing_probability": 0.5}),
    "color_0.2": ("colour jitter of 0.2", {"augment.color_jitter": 0.2}),
    "flip_average_off": ("no flip-averaging", {"evaluate.flip_average": False}),
}

# What the rows are trained with, by the name of the row's folder: a delta over the config of all rows.
ROWS: dict[str, dict[str, Any]] = {
    "jlml": {},
    "uni_loss": {"model.loss": "uni"},
    "separate_stems": {"model.shared_stem": False},
    "without_sfl": {"loss.lambda_global": 0.0, "loss.lambda_local": 0.0},
    **{row: fields for row, (_, fields) in _INGREDIENTS.items()},
    **{f"size_{height}x{width}": {"data.height": height, "data.width": width} for height, width in _SIZES},
    **{f"normalize_{normalize}": {"evaluate.normalize": normalize} for normalize in NORMALIZE},
    "feature_fc_bn": {"model.feature_norm": True, "model.feature_relu": False},
    "feature_fc_bn_relu": {"model.feature_norm": True, "model.feature_relu": True},
    **{f"strips_{strips}": {"model.num_strips": strips} for strips in _STRIPS},
    **{f"penalties_{weight:g}": {"loss.lambda_global": weight, "loss.lambda_local": weight} for weight in _PENALTIES},
}
# The full JLML, which the deltas are over: the config of all rows must have these.
FULL = {"model.branches": "both", "model.loss": "multi", "model.shared_stem": True}


@dataclasses.dataclass(frozen=True)
class Table:
    """One of the paper's tables: its lines that are ours, and the comparisons that its text draws from them.

    Or a study, which has a title of its own, and lines that are all ours.
    """

    name: str  # 5 to 13, or a study's
    ours: dict[str, tuple[str, str]]  # line of paper_tables.json -> (row, feature)
    comparisons: tuple[tuple[str, str], ...] = ()  # (better, worse), lines of `ours`
    title: str = ""  # of a study

    def rows(self) -> list[str]:
        """The rows to train, each once."""
        return list(dict.fromkeys(row for row, _ in self.ours.values()))

    def datasets(self) -> tuple[str, ...]:
        """The data sets that the table is defined on; folder/NAME stands for anybody's own."""
        if self.name in BENCHMARKS:
            return BENCHMARKS[self.name]
        return datasets.NAMES if self.name == "13" else tuple(name for name in datasets.NAMES if name not in _NO_TEST)


# The tables that compare methods on one data set.
BENCHMARKS = {"5": ("cuhk03/detected", "cuhk03/labeled"), "6": ("market1501",), "7": ("viper",), "8": ("grid",)}
_NO_TEST = ("imagenet2012", "tiny_imagenet")  # nobody is ranked there

# Tables 9 and 10: global, local and joint (full) features are of one run each; Table 10's lower half is Table 9.
TABLES = {table.name: table for table in (
    *(Table(name, {"JLML": ("jlml", "joint")}) for name in BENCHMARKS),
    Table("9", {f"JLML ({feature.title() if feature != 'joint' else feature})": ("jlml", feature)
                for feature in FEATURES},
          (("JLML (joint)", "JLML (Global)"), ("JLML (joint)", "JLML (Local)"), ("JLML (Local)", "JLML (Global)"))),
    Table("10", {f"{loss}, {line}": (row, feature)
                 for loss, row in (("UniLoss", "uni_loss"), ("MultiLoss", "jlml"))
                 for line, feature in (("Global Feature", "global"), ("Local Feature", "local"), ("Full", "joint"))},
          tuple((f"MultiLoss, {line}", f"UniLoss, {line}") for line in ("Global Feature", "Local Feature", "Full"))),
    Table("11", {"Without Shared Feature": ("separate_stems", "joint"), "With Shared Feature": ("jlml", "joint")},
          (("With Shared Feature", "Without Shared Feature"),)),
    Table("12", {"Without SFL": ("without_sfl", "joint"), "With SFL": ("jlml", "joint")},
          (("With SFL", "Without SFL"),)),
    Table("13", {}),
    Table("normalize", {f"{normalize}, {feature}": (f"normalize_{normalize}", feature)
                        for normalize in NORMALIZE for feature in FEATURES},
          title="L2 normalisation of the matching feature"),
    Table("feature", {f"{line}, {feature}": (row, feature) for row, line in (
        ("feature_fc", "fc"), ("feature_fc_bn", "fc, BN"), ("feature_fc_bn_relu", "fc, BN, ReLU")
    ) for feature in FEATURES}, title="What follows the feature layer"),
    Table("strips", {f"m = {strips}, {feature}": (f"strips_{strips}", feature)
                     for strips in _STRIPS for feature in FEATURES}, title="Strips of the local branch"),
    Table("penalties", {f"{weight:g}, {feature}": (f"penalties_{weight:g}", feature)
                        for weight in _PENALTIES for feature in FEATURES},
          title="Weight of both sparsity penalties"),
    Table("recipe", {"as given": ("jlml", "joint")} | {line: (row, "joint")
                                                       for row, (line, _) in _INGREDIENTS.items()},
          title="The recipe as given, and with one of its ingredients set"),
    Table("size", {f"{height}x{width}, {feature}": (f"size_{height}x{width}", feature)
                   for height, width in _SIZES for feature in FEATURES}, title="Height and width of the input"),
)}


def find_table(name: str | None, dataset: str | None) -> Table:
    """The table, if there is one of that name and it is defined on the data set."""
    if name not in TABLES:
        studies = ", ".join(name for name, table in TABLES.items() if table.title)
        raise UserError(f"--table={name or ''} is not a table made here; give one of 5 to 13, or of {studies}")
    known = TABLES[name].datasets()
    family, _, own = (dataset or "").partition("/")
    if ("folder/NAME" if family == "folder" and own else dataset) not in known:
        raise UserError(f"--dataset={dataset or ''}: table {name} is defined on {', '.join(known)}")
    return TABLES[name]


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts):
        raise UserError(f"--seeds={text} is not a list of whole numbers from 0 on; give such as 0,1,2")
    seeds = [int(part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={text} names a seed twice; the same run would count as two")
    return seeds


def check_config(table: Table, config: ml_collections.ConfigDict) -> None:
    """Refuses a config of all rows that has a row's own change in it."""
    flat = flatten_dict(config.to_dict(), sep=".")
    for field, value in FULL.items():
        if table.rows() and flat[field] != value:
            raise UserError(f"{field}={flat[field]!r} is for all rows, but it is what the rows differ in; leave it out")
    if table.name == "12" and not config.loss.lambda_global and not config.loss.lambda_local:
        raise UserError("loss.lambda_global and loss.lambda_local are 0 for all rows, so that both lines of table 12 "
                        "would be the same; leave one out")
    if table.name == "5" and config.data.cuhk03_protocol != "single-shot":
        raise UserError(f"data.cuhk03_protocol={config.data.cuhk03_protocol!r}: table 5 is single-shot; leave it out")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One row by one seed."""

    row: str
    seed: int
    folder: Path
    config: ml_collections.ConfigDict
    trained_in: Path | None = None  # of the run that differs from this one in its evaluation alone

    def __str__(self) -> str:
        return f"{self.row} seed {self.seed}"

    def trials(self) -> list[Path]:
        """The folders of the trials asked for, as far as they are begun; the run's own where there are no trials."""
        return self._trials_in(self.folder)

    def _trials_in(self, run: Path) -> list[Path]:
        folders = sorted(run.glob("trial-*"))
        if (asked := chosen_trials(self.config.data.trials)) is not None:
            folders = [folder for folder in folders if int(folder.name.removeprefix("trial-")) in asked]
        return folders or [run]

    def other_weights(self) -> str:
        """In one line, that the run is an evaluation of other weights than `trained_in` has; empty if it is not."""
        if self.trained_in is None:
            return ""
        for trained in self._trials_in(self.trained_in):
            if (step := latest_step(trained)) is None:
                continue
            # A copy has the digests of what it was copied from; those of another training differ.
            original, copy = (digests_path(folder, step) for folder in (
                trained, self.folder / trained.relative_to(self.trained_in)))
            if original.exists() and not (copy.exists() and copy.read_bytes() == original.read_bytes()):
                return (f"{self.folder} has other weights than {self.trained_in}, which it is to evaluate; delete it, "
                        "and it is made of these")
        return ""

    def missing(self) -> str:
        """What the run lacks, in one line; empty if it is trained to the end and evaluated, and by this very config.

        A run that is only evaluated must have the weights that `trained_in` has.
        """
        config = self.folder / CONFIG
        try:
            made = json.loads(config.read_text())
        except FileNotFoundError:
            return "not begun"
        except ValueError:
            return f"{config} is damaged"
        if differing := self._differing(made):
            return f"{self.folder} was made by another config: {first_few(differing)}"
        if other := self.other_weights():
            return other
        total = self.config.train.steps
        for folder in self.trials():
            if (steps := latest_step(folder) or 0) < total:
                name = f"{folder.name} is at " if folder != self.folder else ""
                return f"unfinished: {name}step {steps} of {total}"
        if not is_evaluated(self.folder):
            return "unfinished: not all that is trained is evaluated"
        return ""

    def _differing(self, made: dict[str, Any]) -> list[str]:
        old, new = (with_defaults(fields) for fields in (made, json.loads(self.config.to_json())))
        several = any(self.folder.glob("trial-*"))
        return [f"{field} ({old.get(field)!r} there, {new.get(field)!r} here)" for field in sorted(old | new)
                if old.get(field) != new.get(field)
                and (field in SEEN_IN_RESULTS or not field.startswith(FREE_FIELDS))
                and (several or field != "data.trials")]  # "all" and "0" are the same where there is one trial

    def results(self) -> list[dict[str, Any]]:
        """The rows of results.json, trial by trial, that are of the table's data set, ranked as its config says."""
        rows = [row for folder in self.trials() for row in read_results(folder)["rows"]]
        dataset = joined_name(self.config.data.name, self.config.data.joined_splits)
        return [row for row in rows if row["dataset"] == dataset and "trained_on" not in row
                and row.get("normalize") == self.config.evaluate.normalize]

    def provenance(self) -> dict[str, Any]:
        """Where the results come from, with what the folder has beside results.json."""
        of_trials = [read_results(folder)["provenance"] for folder in self.trials()]
        rates = [line["images_per_second"] for folder in self.trials() for line in read_training(folder)]
        return of_trials[0] | {
            "config": json.loads((self.folder / CONFIG).read_text()),
            "wall_time_seconds": round(sum(source["wall_time_seconds"] for source in of_trials), 1),
            "train_fingerprint": [source["train_fingerprint"] for source in of_trials],
            "images_per_second": sorted(rates)[len(rates) // 2] if rates else None,
            "training_seconds": round(training_seconds(self.trials(), self.config.train.batch_size)),
            "incomplete": next((row["incomplete"] for row in self.results() if "incomplete" in row), ""),
        }


def without_paths(provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance with a command and, if it has one, a config that say what was done, not where on this machine."""
    words = [re.sub(r"^(--config\.init_from=).*/", r"\1runs/", word) for word in shlex.split(provenance["command"])
             if not re.match(r"--(workdir|config\.data\.data_dir|config\.compilation_cache)=", word)]
    found = provenance | {"command": shlex.join(words)}
    if starts := provenance.get("training"):
        found["training"] = list(map(without_paths, starts))
    if config := provenance.get("config"):
        start = re.sub(r"^.*/", "runs/", config["init_from"])
        found["config"] = config | {"data": config["data"] | {"data_dir": ""}, "init_from": start,
                                    "compilation_cache": ""}
    return found


# Of the fields that may differ between calls on a run, those that its results depend on.
SEEN_IN_RESULTS = ("evaluate.normalize", "evaluate.norm_statistics", "evaluate.flip_average", "evaluate.multi_query",
                   "evaluate.extra_gallery")


def is_evaluated(folder: Path) -> bool:
    """Whether the results in the folder of a run, or of a trial's, are of the config there."""
    # It gets its config at the start of every call, and its results at the end, after all trials'.
    config, results = folder / CONFIG, folder / RESULTS
    return results.exists() and results.stat().st_mtime_ns >= config.stat().st_mtime_ns


def training_seconds(parts: Sequence[Path], batch_size: int) -> float:
    """Of all steps, by the rates they were logged with, whatever number of starts they took.

    A step that was logged alone after a start has no rate, as its time is the compiler's: it takes that of others.
    """
    seconds = 0.0
    for part in parts:
        lines = read_training(part)
        rates = [line["images_per_second"] for line in lines if line["images_per_second"]]
        done = 0
        for line in lines:
            rate = line["images_per_second"] or statistics.median(rates or [math.inf])
            seconds += (line["step"] - done) * batch_size / rate
            done = line["step"]
    return seconds


def plan_runs(table: Table, config: ml_collections.ConfigDict, workdir: Path, seeds: list[int]) -> list[Run]:
    """The runs behind the table, row by row; those that others are evaluated from come first.

    A row that changes nothing is the full JLML, whose runs are those of every table that has it.
    """
    runs = []
    for row in table.rows():
        flat = flatten_dict(config.to_dict(), sep=".")
        changed = {field for field, value in ROWS[row].items() if flat[field] != value}
        name = row if changed else "jlml"
        for seed in seeds:
            of_run = config.copy_and_resolve_references()
            of_run.update_from_flattened_dict(ROWS[row])
            of_run.name, of_run.seed = name, seed
            evaluated_only = changed and all(field.startswith("evaluate.") for field in changed)
            of_run.init_from = of_run.init_from.replace("{row}", "jlml" if evaluated_only else name)
            folders = {row: workdir / row / f"seed-{seed}" for row in (name, "jlml")}
            runs.append(Run(row, seed, folders[name], of_run, folders["jlml"] if evaluated_only else None))
    return sorted(runs, key=lambda run: run.trained_in is not None)
