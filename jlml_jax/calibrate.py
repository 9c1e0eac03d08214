"""Measures how far apart images of the same and of different people are, and sets the thresholds for "same person"."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# XLA tells of its own tuning flags as errors whenever it takes a CPU program from the compilation cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from tqdm import tqdm

from jlml_jax import calibration, datasets, features_file
from jlml_jax.calibration import format_rate
from jlml_jax.checkpoints import load_run
from jlml_jax.datasets.base import DISTRACTOR, JUNK
from jlml_jax.errors import UserError, exit_status
from jlml_jax.extractor import Extractor, check_fingerprint, load_extractor

_DETAILS = """All pairs of the images count: the same person from different cameras, and different persons. In a file of
features, identity 0 is a distractor (somebody else, who is not told apart from other distractors), -1 is junk
and does not count, and nor does an image without an identity. The thresholds go to RUN/calibration.json, where
search and compare find them.

examples:
  python -m jlml_jax.calibrate --workdir=runs/market1501
  python -m jlml_jax.calibrate --workdir=runs/market1501 --features=my_cameras.npz
"""

# Features, identities (int, persons 1 and up) and cameras (int) of N images.
_Labelled = tuple[np.ndarray, np.ndarray, np.ndarray]


def _labelled_splits(workdir: Path, names: Sequence[str], extractor: Extractor) -> _Labelled:
    """Splits of the run's own data set; a UserError if the run was trained on any of their people."""
    run = load_run(workdir)
    data = run.config.data
    splits = list(datasets.load(data.name, tuple(names), data.data_dir).values())
    identities = np.concatenate([split.identities for split in splits])
    trained = np.intersect1d(identities, run.label_map["identities"])
    if len(trained):
        raise UserError(f"--splits={','.join(names)}: the run was trained on {len(trained)} identities of these, so "
                        "that the thresholds would be too hopeful; give splits of other people")
    features = []
    for split in splits:
        starts = range(0, len(split), extractor.batch_size)
        for start in tqdm(starts, f"features of {len(split):,} images", unit=" batches", leave=False, disable=None):
            rows = split.select(np.arange(start, min(start + extractor.batch_size, len(split))))
            features.append(extractor(rows.decode(extractor.height, extractor.width)))
    return np.concatenate(features), identities, np.concatenate([split.cameras for split in splits])


def _labelled_features(path: Path, extractor: Extractor) -> _Labelled:
    """A file that extract has made. Its identities and cameras are text, and become numbers here."""
    table = features_file.read(path)
    check_fingerprint(str(path), table.fingerprint, extractor)
    _, identities = np.unique(table.identities, return_inverse=True)
    identities += 1
    identities[table.identities == str(DISTRACTOR)] = DISTRACTOR
    identities[np.isin(table.identities, ["", str(JUNK)])] = JUNK
    return table.features, identities, np.unique(table.cameras, return_inverse=True)[1]


def calibrate(workdir: str | Path, splits: Sequence[str], features: str | None = None) -> dict[str, Any]:
    """Measures, writes RUN/calibration.json and returns what is in it (see `calibration.calibrate`).

    Args:
        workdir: the run's folder.
        splits: of the run's data set; not used if `features` is given.
        features: a file that extract has made, of images with identities and cameras.
    """
    workdir = Path(workdir)
    extractor = load_extractor(workdir)
    if features is not None:
        labelled = _labelled_features(Path(features).expanduser(), extractor)
        source = {"features": Path(features).name}
    else:
        labelled = _labelled_splits(workdir, splits, extractor)
        source = {"splits": list(splits)}
    source |= {"images": len(labelled[0]), "identities": len(np.unique(labelled[1][labelled[1] > DISTRACTOR]))}
    result = calibration.calibrate(calibration.count_pairs(*labelled))
    path = calibration.save(workdir, result, extractor, source)
    print(f"{source['images']:,} images of {source['identities']:,} people: {result['pairs']['same']:,} pairs of the "
          f"same person from different cameras, {result['pairs']['different']:,} of different people")
    print(f"{'false accept rate':<20}{'threshold':>12}{'pairs behind it':>18}{'true accept rate':>19}")
    for entry in result["thresholds"]:
        if entry["threshold"] is None:
            print(f"{format_rate(entry['rate']):<20}{'cannot be measured with so few pairs of different people':>49}")
        else:
            print(f"{format_rate(entry['rate']):<20}{entry['threshold']:>12.4f}"
                  f"{entry['different_pairs_accepted']:>18,}{entry['true_accept_rate']:>19.1%}")
    equal = result["equal_error"]
    print(f"equal error rate {equal['rate']:.2%}, at {equal['threshold']:.4f}")
    print(f"written to {path}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m jlml_jax.calibrate", description=__doc__, epilog=_DETAILS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", metavar="RUN", required=True, help="folder of a trained run")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--splits", metavar="NAMES", default="query,gallery",
                        help="splits of the run's data set, of people it was not trained on (default: query,gallery)")
    images.add_argument("--features", metavar="FILE",
                        help="instead: a file that extract has made, of images with identities and cameras")
    options = parser.parse_args(arguments)

    def command() -> None:
        calibrate(options.workdir, options.splits.split(","), options.features)

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
