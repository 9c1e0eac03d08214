"""Who trained a run: the provenance of each start, in training.json, beside that of the evaluation in results.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlml_jax.checkpoints import TRAINING
from jlml_jax.errors import UserError
from jlml_jax.files import write_atomically


def record_start(workdir: Path, provenance: dict[str, Any], first_step: int) -> None:
    """Adds to training.json that `provenance` trains from `first_step` on, unless it is what trained before that."""
    starts = read(workdir) if first_step else []
    if not starts or not _is_of(starts[-1], provenance):
        starts.append(provenance | {"first_step": first_step})
        write_atomically(workdir / TRAINING, json.dumps(starts, indent=1))


def read(workdir: Path) -> list[dict[str, Any]]:
    """The starts of the run in `workdir`, in order, without those that went on as the one before them.

    Raises:
        UserError: the file is damaged.
    """
    path = workdir / TRAINING
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and who trained this run is not known") from error


def with_training(results: dict[str, Any], provenance: dict[str, Any], starts: Sequence[dict[str, Any]]
                  ) -> dict[str, Any]:
    """`results`, the provenance of what `provenance` has evaluated; with `training`, the starts, if another trained."""
    if all(_is_of(start, provenance) for start in starts):
        return results
    return results | {"training": list(starts)}


def of_trials(trials: Sequence[dict[str, Any]], provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance of the results of several trials, from that of each trial's and the command that collects them."""
    together = provenance | {
        "seed": trials[0]["seed"], "steps": max(trial["steps"] for trial in trials),
        "train_fingerprint": [trial["train_fingerprint"] for trial in trials],
        "wall_time_seconds": round(sum(trial["wall_time_seconds"] for trial in trials), 1)}
    starts = []
    for start in (start for trial in trials for start in trial.get("training", [trial])):
        if (start := {name: start.get(name) for name in provenance}) not in starts:
            starts.append(start)
    return with_training(together, provenance, starts)


def _is_of(start: dict[str, Any], provenance: dict[str, Any]) -> bool:
    """Whether the start was of the same command, code and machine."""
    return all(start.get(name) == value for name, value in provenance.items())
