"""Measures how far apart images of the same and of different people are, and sets the thresholds for "same person"."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jlml_jax import calibration, datasets, features_file, protocols
from jlml_jax.arguments import Parser
from jlml_jax.calibration import format_rate
from jlml_jax.checkpoints import load_run
from jlml_jax.datasets.listing import NOBODY
from jlml_jax.datasets.split import DISTRACTOR, JUNK
from jlml_jax.errors import UserError, exit_status, printable
from jlml_jax.extractor import Extractor, check_fingerprint, load_extractor, tell_unknown_cameras
from jlml_jax.files import user_path
from jlml_jax.protocols import Trial
from jlml_jax.user_images import track_numbers

_DETAILS = """All pairs of the images count: the same person from different cameras, and different persons. In a file of
features, the identity distractor is somebody else, who is not told apart from other distractors; junk does not
count, and nor does an image without an identity. Where no camera is known, all pairs of a person's images count. Where
images are of tracks, all pairs of tracks count, and the thresholds are for tracks alone. They go to
RUN/calibration.json, where search, compare and group find them.

examples:
  python -m jlml_jax.calibrate --workdir=runs/market1501
  python -m jlml_jax.calibrate --workdir=runs/market1501 --features=my_cameras.npz
"""

# Features, identities (int, persons 1 and up) and cameras (int) of N images.
_Labelled = tuple[np.ndarray, np.ndarray, np.ndarray]


def _labelled_test(workdir: Path, dataset: str | None, extractor: Extractor) -> tuple[_Labelled, Trial]:
    """The query and gallery images of the run's own trial, or of the first trial of another `dataset`; and that trial.

    Raises:
        UserError: it has none, or the run was trained on any of their people.
    """
    run = load_run(workdir)
    data = run.config.data.copy_and_resolve_references()
    if dataset:  # the run's own may have held people out
        data.held_out_identities = 0
    protocol = protocols.load(dataset or data.name, data)
    trial = protocol.trial(0 if dataset else protocol.numbers(data.trials)[0])
    if trial.query is None:
        raise UserError(f"{trial.dataset} has no queries and gallery; give --dataset or --features")
    protocols.refuse_trained_on(trial, run.label_map)
    in_gallery = set(trial.gallery.keys())  # as queries are of people held out
    only_queries = trial.query.select(np.array([row for row, image in enumerate(trial.query.keys())
                                                if image not in in_gallery], int))
    splits = [split for split in (only_queries, trial.gallery) if len(split)]
    called = datasets.names(trial.dataset, data.data_dir)
    # Those of several data sets have no names in common.
    cameras = [[called.camera(camera) if not trial.offsets else "" for camera in split.cameras] for split in splits]
    known = sorted({*itertools.chain(*cameras)}.intersection(extractor.cameras))
    if known:
        print(f"{', '.join(map(printable, known))}: cameras whose images go by the statistics that the run was adapted "
              "to under these names")
    tell_unknown_cameras(itertools.chain(*cameras), extractor)
    features = []
    for split, names in zip(splits, cameras, strict=True):
        starts = range(0, len(split), extractor.batch_size)
        for start in tqdm(starts, f"features of {len(split):,} images", unit=" batches", leave=False, disable=None):
            rows = split.select(np.arange(start, min(start + extractor.batch_size, len(split))))
            features.append(extractor(rows.decode(extractor.height, extractor.width),
                                      names[start:start + extractor.batch_size]))
    labels = (np.concatenate([getattr(split, field) for split in splits]) for field in ("identities", "cameras"))
    return (np.concatenate(features), *labels), trial


def _labelled_features(path: Path, extractor: Extractor) -> tuple[_Labelled, bool, bool]:
    """A file that extract has made, by tracks, where its images are of such; whether any camera is known, if not, each
    image counts as one of its own; and whether there are tracks.

    Its identities and cameras are text, and become numbers here.
    """
    table = features_file.read(path)
    check_fingerprint(str(path), table.fingerprint, extractor)
    features, names, of_cameras = table.features, table.identities, table.cameras
    if table.tracks is not None:
        of = track_numbers([table.image(row) for row in range(len(table))])
        features, first = extractor.mean_features(features, of), np.unique(of, return_index=True)[1]
        names, of_cameras = names[first], of_cameras[first]
    _, identities = np.unique(names, return_inverse=True)
    identities += 1
    for word, number in {**NOBODY, "": JUNK}.items():
        identities[names == word] = number
    known = bool((of_cameras != "").any())
    cameras = np.unique(of_cameras, return_inverse=True)[1] if known else np.arange(len(features))
    return (features, identities, cameras), known, table.tracks is not None


def calibrate(workdir: str | Path, *, dataset: str | None = None, features: str | None = None) -> None:
    """Measures, writes RUN/calibration.json and prints the thresholds in it.

    Args:
        workdir: the run's folder.
        dataset: whose queries and gallery to measure on; None: the run's own.
        features: instead, a file that extract has made, of images with identities and cameras.
    """
    workdir = user_path(workdir)
    extractor = load_extractor(workdir)
    what = "images"
    if features is not None:
        labelled, cameras_known, of_tracks = _labelled_features(user_path(features), extractor)
        source = {"features": Path(features).name}
        what = "tracks" if of_tracks else what
    else:
        labelled, trial = _labelled_test(workdir, dataset, extractor)
        cameras_known, source = trial.cameras_known, {"dataset": trial.dataset}
    if not cameras_known:
        print(f"where cameras are not known, all pairs of a person's {what} count, also those by one camera, which are "
              "nearer")
    source |= {what: len(labelled[0]), "identities": len(np.unique(labelled[1][labelled[1] > DISTRACTOR]))}
    result = calibration.calibrate(calibration.count_pairs(*labelled, what))
    path = calibration.save(workdir, result, extractor, source)
    pairs, same = result["pairs"], "the same person" + " from different cameras" * cameras_known
    print(f"{source[what]:,} {what} of {source['identities']:,} people: {pairs['same']:,} pairs of {same}, "
          f"{pairs['different']:,} of different people")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.calibrate", __doc__, _DETAILS)
    parser.add_argument("--workdir", metavar="RUN", required=True, help="folder of a trained run")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--dataset", metavar="NAME",
                        help="a prepared data set, whose queries and gallery to take (default: the run's own)")
    images.add_argument("--features", metavar="FILE",
                        help="instead: a file that extract has made, of images with identities and cameras")
    options = parser.parse_args(arguments)
    return exit_status(lambda: calibrate(options.workdir, dataset=options.dataset, features=options.features))


if __name__ == "__main__":
    sys.exit(main())
