"""The paper's tables with our figures beside them: python -m experiments.tables --table=N --dataset=NAME

N is 5 to 13, or what the paper is silent about: normalize, feature (BN and ReLU on it), strips, penalties, size (of the
input), recipe (its ingredients, one at a time).

Trains what is missing, reuses what is there, and writes into WORKDIR/DATASET table_N.md, .csv and _runs.json (the
results and the provenance of every run), and figures. A row's run lies in WORKDIR/DATASET/ROW/seed-S, for all tables
that have the row.

Examples:
  python -m experiments.tables --table=9 --dataset=synthetic_pedestrians --seeds=0,1,2
  python -m experiments.tables --table=12 --dataset=market1501 --config.init_from=runs/imagenet --dry_run
  python -m experiments.tables --table=recipe --dataset=market1501 --config=configs/modern.py \\
      --config.data.held_out_identities=500
  python -m experiments.tables --table=10 --dataset=market1501 --only=uni_loss --seeds=1      one run, for a cluster

The config of all rows is configs/DATASET.py (for msmt17 that of Market-1501) with all trials of the protocol, or
--config=FILE; --config.k=v changes a field for all rows. In init_from, {row} stands for the row's name: a row of
another network needs its own pre-training.
"""

import shutil
import sys
import traceback
from pathlib import Path

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

import configs
from experiments.tables import figures, size, timing
from experiments.tables.plan import ROWS, TABLES, Run, check_config, find_table, parse_seeds, plan_runs
from experiments.tables.report import Report, outcomes
from jlml_jax import parallel
from jlml_jax.checkpoints import RESULTS
from jlml_jax.config_fields import refuse_unknown_field
from jlml_jax.errors import UserError, exit_status
from jlml_jax.files import user_path, write_atomically
from jlml_jax.new_run import new_folder
from jlml_jax.train import train_and_evaluate

_CONFIG_NAMES = {"imagenet2012": "imagenet", "msmt17": "market1501", "synthetic_pedestrians": "synthetic",
                 "tiny_imagenet": "imagenet"}
_OTHER_FLAGS = {"data.name": "--dataset", "seed": "--seeds"}


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("table", None, f"The paper's table, or a study: {', '.join(TABLES)}.", flag_values=values)
    flags.DEFINE_string("dataset", None, "A data set that the table is defined on.", flag_values=values)
    flags.DEFINE_string("workdir", "runs/tables", "The folder of all tables and their runs.", flag_values=values)
    flags.DEFINE_string("seeds", "0", "Each row is trained once by each of these: 0,1,2.", flag_values=values)
    flags.DEFINE_string("only", None, f"Train this row alone: {', '.join(ROWS)}.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "List the runs and how long they would take, and train nothing.",
                      flag_values=values)
    return values


def _parse_config(arguments: list[str], dataset: str) -> ml_collections.ConfigDict:
    """The config of all rows, from what is left of the command line."""
    name = _CONFIG_NAMES.get(dataset, dataset.partition("/")[0])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", str(Path(configs.__file__).parent / f"{name}.py"), flag_values=values,
                                    sys_argv=arguments)
    extra = values(arguments)[1:]
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; see --help")
    config, given = values.config, config_flags.get_override_values(values["config"])
    for field, flag in _OTHER_FLAGS.items():
        if field in given:
            raise UserError(f"--config.{field} cannot be given here; use {flag}")
    config.data.name = dataset
    # The paper averages over all trials, and the tables show neither baselines nor ranked lists.
    defaults = {"data.trials": "all", "evaluate.baselines": False, "evaluate.picture": False}
    config.update_from_flattened_dict({field: value for field, value in defaults.items() if field not in given})
    return config


def _command(argv: list[str]) -> None:
    options = _define_flags()
    try:
        rest = options(argv, known_only=True)
        table = find_table(options.table, options.dataset)
        config = _parse_config(rest, options.dataset)
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError, OSError, ImportError) as error:
        if isinstance(error, LookupError | AttributeError):
            refuse_unknown_field(argv)
        raise UserError(f"{error}; see --help, and configs/default.py for every field") from error
    check_config(table, config)
    parallel.keep_memory()
    parallel.keep_programs(config.compilation_cache)
    seeds = parse_seeds(options.seeds)
    if options.only is not None and options.only not in table.rows():
        known = f"its rows are {', '.join(table.rows())}" if table.rows() else "it has nothing to train"
        raise UserError(f"--only={options.only} is not a row of table {table.name}; {known}")
    folder = user_path(options.workdir) / options.dataset.replace("/", "_")
    runs = plan_runs(table, config, folder, seeds)
    chosen = [run for run in runs if options.only in (None, run.row)]
    if options.dry_run:
        _list(chosen)
        return
    if not runs:
        _write(folder, "table_13", dict(zip((".md", ".csv"), size.write(config), strict=True)))
        return
    figures.check_matplotlib()
    failures = {run: reason for run in chosen if (reason := _make(run))}
    _report(Report(table, options.dataset, outcomes(runs, failures)), folder)
    if failures:
        told = "; ".join(f"{run}: {reason}" for run, reason in failures.items())
        raise UserError(f"{len(failures)} of {len(chosen)} runs failed, {told}; the others are in the table; "
                        "mend the cause and run the same command again")


def _make(run: Run) -> str:
    """Trains and evaluates what the run lacks; why it failed, in one line, or an empty string."""
    if not (missing := run.missing()):
        print(f"{run}: finished, in {run.folder}", flush=True)
        return ""
    print(f"{run}: {missing}", flush=True)
    try:
        if run.trained_in and not run.folder.exists():  # the same weights, evaluated otherwise
            if not (run.trained_in / "checkpoints").exists() and not list(run.trained_in.glob("trial-*/checkpoints")):
                return f"{run.trained_in}, which has its weights, is not trained"
            with new_folder(run.folder, "--workdir") as part:
                shutil.copytree(run.trained_in, part, dirs_exist_ok=True,
                                ignore=shutil.ignore_patterns(RESULTS, "lock"))
        elif other := run.other_weights():
            return other
        train_and_evaluate(run.config, run.folder)
    except UserError as error:
        return " ".join(str(error).split())
    except Exception as error:  # a bug or a device out of memory in one row; the others go on
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        jax.clear_caches()  # another row's programs are others; those of other seeds are on disk
    return ""


def _report(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"table_{report.table.name}"
    names = figures.draw(report, folder, stem)
    _write(folder, stem, {".csv": report.csv(), "_runs.json": report.runs(), ".md": report.markdown(names)})


def _write(folder: Path, stem: str, texts: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            write_atomically(folder / f"{stem}{suffix}", text)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; give another --workdir") from error
    print(f"\n{texts['.md']}\nwritten to {folder / stem}.md", flush=True)


def _list(runs: list[Run]) -> None:
    estimates: dict[str, timing.Estimate] = {}
    total = 0.0
    for run in runs:
        missing, seconds = run.missing(), 0.0
        if missing:
            if not (compiled := run.row in estimates):
                estimates[run.row] = timing.estimate(run.config)
                jax.clear_caches()
            seconds = estimates[run.row].run(0 if run.trained_in else run.config.train.steps, compiled)
        total += seconds
        print(f"{run}: {run.config.train.steps} steps, {missing or 'finished'}; {seconds:.0f} s; {run.folder}")
    for row, found in estimates.items():
        print(f"{row}: {found.compilation:.1f} s to compile, {1000 * found.step:.0f} ms a step, "
              f"{found.evaluation:.1f} s of features for the test, {found.trials} trial(s)")
    print(f"{total / 60:.0f} minutes in all on this machine, one after the other, each run from its beginning")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv if argv is None else argv
    if "--help" in argv:
        print(__doc__, _define_flags().get_help(), sep="\n")
        return 0
    return exit_status(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())
