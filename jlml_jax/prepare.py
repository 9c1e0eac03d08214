"""Checks the original files of a data set against its published counts, then builds the TFDS data from them."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jlml_jax import datasets
from jlml_jax.arguments import Parser
from jlml_jax.datasets.base import ArrayRecordBuilder, BenchmarkBuilder, Crop, count
from jlml_jax.datasets.images import decode_image
from jlml_jax.errors import UserError, exit_status, first_few, printable
from jlml_jax.files import user_path

_DETAILS = """A CSV for folder/NAME has the columns image,identity[,camera][,split][,x,y,width,height]; its paths are
relative to its folder and cannot leave it. Without camera, every image counts as a camera of its own. A box (pixels
of the upright frame) is cropped, and must lie within the frame, or be cut to it by --clip_boxes.

examples:
  python -m jlml_jax.prepare market1501 --source=Market-1501-v15.09.15
  python -m jlml_jax.prepare folder/shop --source=people.csv
  python -m jlml_jax.prepare viper --source=VIPeR --incomplete="resized to 64x128"
  python -m jlml_jax.prepare synthetic_pedestrians
"""


def print_counts(splits: dict[str, list[Crop]], expected: dict[str, dict[str, int]] | None) -> None:
    """Prints published, if any, and found counts as a table."""
    print(f"{'split':<12} {'count':<12}" + f" {'expected':>9}" * (expected is not None) + f" {'found':>9}")
    for split, crops in splits.items():
        for what, found in count(crops).items():
            published = found if expected is None else expected[split].get(what, 0)
            if published or found:
                shown = f" {published:>9,}" * (expected is not None)
                print(f"{split:<12} {what:<12}{shown} {found:>9,}{'  differs' * (found != published)}")


def check_images(crops: Sequence[Crop], source: Path) -> int:
    """Reads and decodes every image; a UserError names the first that fail. Returns the sum of their sizes in bytes."""
    def check(crop: Crop) -> int | str:
        try:
            encoded = crop.read()
            decode_image(encoded, crop.origin)
        except (OSError, UserError) as error:
            return str(error)
        return len(encoded)

    pool = ThreadPoolExecutor()  # Pillow releases the GIL while it decodes
    try:
        results = list(tqdm(pool.map(check, crops), "decoding", len(crops), unit=" images", leave=False, disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for the rest
    failures = [result for result in results if isinstance(result, str)]
    if failures:
        raise UserError(f"{len(failures)} of {len(crops):,} images in {source} are bad: "
                        f"{first_few(failures, '; ')}; they must be mended or removed, also to build with "
                        "--incomplete=WHY")
    print(f"all {len(crops):,} images decode")
    return sum(results)


def check_room(data_dir: Path, num_bytes: int) -> None:
    """A UserError if `data_dir` cannot be written to or has no room for `num_bytes`."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
        free = shutil.disk_usage(data_dir).free
    except OSError as error:
        raise UserError(f"cannot write to {data_dir} ({error}); give another --data_dir") from error
    if free < num_bytes:
        raise UserError(f"{data_dir} has {free / 1e6:,.1f} MB free, {num_bytes / 1e6:,.1f} MB are needed; make room or "
                        "give another --data_dir")


def prepare(name: str, source: str | Path | None = None, data_dir: str | Path | None = None, *,
            overwrite: bool = False, incomplete: str | None = None, clip_boxes: bool = False) -> None:
    """Checks and builds data set `name`; does nothing if that is done already and `overwrite` is False.

    Args:
        name: one of `datasets.NAMES`.
        source: folder of the original files, or CSV of a user's own; None for a data set that is drawn.
        data_dir: where TFDS keeps data; its own default if None.
        overwrite: build anew, in place of what was built before.
        incomplete: why the original files are known not to be those published, in one line: it is recorded, with the
            counts that differ, in the metadata, and they do not stop the build.
        clip_boxes: of a user's own, cut boxes that cross the edge of their frame to it, rather than refuse them.

    Raises:
        UserError: the original files are not those published, or `data_dir` cannot take the data.
    """
    dataset = datasets.builder(name, data_dir)
    _check_arguments(name, dataset, source, incomplete, clip_boxes)
    options = {"clip_boxes": True} if clip_boxes else {}
    if dataset.is_prepared() and not overwrite:
        print(f"{name} is prepared already in {dataset.data_path} (--overwrite builds it anew)")
        listed, built = user_path(source or ""), Path(dataset.data_path, "dataset_info.json")
        if listed.is_file() and listed.stat().st_mtime > built.stat().st_mtime:
            print(f"{listed} was changed after that")
        _tell_incomplete(name, data_dir)
        return

    source = None if dataset.DRAWN else user_path(source)
    root = Path(dataset.data_dir_root)
    if isinstance(dataset, BenchmarkBuilder):
        crops = check_originals(dataset, source, incomplete, **options)
        check_room(root, 0)  # before the minutes that decoding may take
        num_bytes = check_images(crops, source)
    else:  # TFDS's own builder, if not drawn, which checks the archives while it reads them
        num_bytes = 0 if dataset.DRAWN else dataset.check_archives(source)
    check_room(root, int(1.1 * num_bytes))  # images as they are, plus annotation and index

    print(f"writing {dataset.data_path}")
    try:
        with dataset.alone():
            dataset = datasets.builder(name, data_dir)
            if dataset.is_prepared() and not overwrite:
                print("another process has done so meanwhile")
            elif isinstance(dataset, BenchmarkBuilder):
                dataset.build(source, (incomplete or "").strip(), **options)
            else:
                dataset.build(source)
    except (OSError, RuntimeError) as error:
        # array_record tells of a full disk, and the like, as RuntimeError("... write() failed: No space left ...").
        if isinstance(error, RuntimeError) and "() failed: " not in str(error):
            raise
        raise UserError(f"cannot write {dataset.data_path} ({error}); make room or give another --data_dir") from error
    print(f"{name} is prepared: " + ", ".join(f"{split} {info.num_examples:,}"
                                              for split, info in dataset.info.splits.items()))
    _tell_incomplete(name, data_dir)


def _check_arguments(name: str, dataset: ArrayRecordBuilder, source: str | Path | None, incomplete: str | None,
                     clip_boxes: bool) -> None:
    """Refuses what `prepare` is given if it makes no sense together."""
    if clip_boxes and not name.startswith("folder/"):
        raise UserError(f"{name} has no boxes to clip: leave out --clip_boxes")
    if dataset.DRAWN and source is not None:
        raise UserError(f"{name} is drawn, not read: leave out --source")
    if dataset.DRAWN and incomplete is not None:
        raise UserError(f"{name} is drawn, nothing of it can be missing: leave out --incomplete")
    if incomplete is not None and not isinstance(dataset, BenchmarkBuilder):
        raise UserError(f"{name} is built from whole archives alone: leave out --incomplete")
    if incomplete is not None and len(incomplete.strip().splitlines()) != 1:
        raise UserError("--incomplete needs one line that says why, such as --incomplete='resized to 64x128'")
    if not dataset.DRAWN and not source:
        raise UserError(f"{name} needs --source=FOLDER. {' '.join(dataset.MANUAL_DOWNLOAD_INSTRUCTIONS.split())}")


def check_originals(dataset: BenchmarkBuilder, source: Path, incomplete: str | None, **options: Any) -> list[Crop]:
    """The crops in the original files in `source`; prints how many there are. `options` are those of `inspect`.

    Raises:
        UserError: they do not read, or are not those published, and it was not said that they are `incomplete`.
    """
    try:
        originals = dataset.inspect(source, **options)
    except OSError as error:
        raise UserError(f"cannot read {source} ({error}); give a readable --source") from error
    if originals.unexpected:
        print(f"{len(originals.unexpected)} files not of the data set are left out: "
              f"{first_few([printable(path) for path in originals.unexpected], '; ')}")
    for note in (*originals.notes, *originals.defects):
        print(note)
    print_counts(originals.splits, dataset.EXPECTED)
    differences = dataset.differences(originals)
    if differences and incomplete is None:
        raise UserError(f"{source} does not hold the data set as published: {first_few(differences, '; ')}; unpack "
                        "or copy the original files again, or build what is known to be incomplete with "
                        "--incomplete=WHY")
    if empty := [split for split, crops in originals.splits.items() if not crops]:
        raise UserError(f"{source} has no images of {', '.join(empty)}; copy at least some of the original files")
    return [crop for crops in originals.splits.values() for crop in crops]


def _tell_incomplete(name: str, data_dir: str | Path | None) -> None:
    if incomplete := datasets.metadata(name, data_dir).get("incomplete"):
        print(f"it is recorded as incomplete: {incomplete}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.prepare", __doc__, _DETAILS)
    parser.add_argument("dataset", metavar="DATASET", help=" or ".join(datasets.NAMES))
    parser.add_argument("--source", metavar="DIR", help="folder of the original files, or CSV for folder/NAME; none "
                                                        "for a set that is drawn")
    parser.add_argument("--data_dir", metavar="DIR", help="where to keep the data (default: $TFDS_DATA_DIR, else "
                                                          "~/tensorflow_datasets)")
    parser.add_argument("--overwrite", action="store_true", help="build anew what is prepared already")
    parser.add_argument("--incomplete", metavar="WHY", help="build a copy that is known to be incomplete or degraded; "
                                                            "why, such as 'resized to 64x128', is recorded in it")
    parser.add_argument("--clip_boxes", action="store_true",
                        help="for folder/NAME, cut boxes that cross the edge of their frame to it, instead of refusing "
                             "them")
    options = parser.parse_args(arguments)
    return exit_status(lambda: prepare(options.dataset, options.source, options.data_dir,
                                       overwrite=options.overwrite, incomplete=options.incomplete,
                                       clip_boxes=options.clip_boxes))


if __name__ == "__main__":
    sys.exit(main())
