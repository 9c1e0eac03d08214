"""Groups unlabelled images by person, as labels to correct by hand or to train on."""

import collections
import csv
import hashlib
import io
import itertools
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jlml_jax import calibration, contact_sheet, features_file, grouping
from jlml_jax.arguments import Parser
from jlml_jax.calibration import format_rate
from jlml_jax.datasets.listing import BOX_COLUMNS, NOBODY
from jlml_jax.errors import UserError, exit_status, first_few
from jlml_jax.extractor import Extractor, check_fingerprint, embed_all, load_extractor
from jlml_jax.features_file import FeaturesFile
from jlml_jax.files import cached_realpath, check_output, refuse_replacing_images, user_path, write_output
from jlml_jax.user_images import UserImage, add_image_options, list_images, track_numbers

_SHOWN = 12  # images of a group in the picture
_USUAL_RATE = 1e-3

_DETAILS = """Groups are joined as long as the mean distance between the images of one and those of the other is at
most a threshold: that of --false_accept_rate in the run's calibration, or --threshold. A lower one parts persons into
more groups, a higher one mixes them. Boxes of one frame are taken for different people. Where images are of tracks,
as search takes them, it is tracks that are grouped, by the mean feature of each.

The CSV is what jlml_jax.prepare takes for a data set folder/NAME: image, identity, camera where all are known, split,
tracks, boxes. Identities are such as 3fa9-00001, the largest of this grouping. Within a group the most typical images
come first, those to look at last. All images are in the split train: a test on these labels would be of the groups, not
of people. When you have corrected them, remove that column. Identities that the images have already are not used, but
if there are any it is told how well the groups agree with them.

--images is as in jlml_jax.extract, or a file that extract has made; at most 30,000 images, or tracks, for which it
takes some 8 GB.

examples:
  python -m jlml_jax.group --workdir=runs/pretrained --images=crops --output=crops/people.csv
  python -m jlml_jax.group --workdir=runs/pretrained --images=crops --output=crops/people.csv --min_images=4
  python -m jlml_jax.group --workdir=runs/adapted --images=features.npz --threshold=1.2 --output=people.csv
"""


def group(workdir: str | Path, images: str, output: str | Path, *, false_accept_rate: float | None = None,
          threshold: float | None = None, min_images: int = 1, picture: str | None = None, keep_going: bool = False,
          clip_boxes: bool = False) -> None:
    """Writes the CSV `output`, with a group of `images` in the place of an identity; the rest is as --help has it.

    Raises:
        UserError: the run has no threshold and none is given, images are bad, too many, or out of the reach of a CSV
            at `output`, or a file cannot be written or is there already.
    """
    output = user_path(output)
    _check_arguments(output, false_accept_rate, threshold, picture)
    listed, table = _listed(images, clip_boxes)
    with_tracks = any(image.track for image in listed)
    grouping.check_number(track_numbers(listed).max() + 1, "tracks" if with_tracks else "images")
    if not 1 <= min_images <= len(listed):
        raise UserError(f"--min_images={min_images} must be from 1 to the number of images, {len(listed):,}")
    if picture is not None:
        refuse_replacing_images("--picture", picture, [image.path for image in listed])
    names = _names_from(output, listed)
    extractor = load_extractor(workdir)
    if threshold is None:
        threshold, told = _calibrated(user_path(workdir), extractor, _USUAL_RATE if false_accept_rate is None else
                                      false_accept_rate, with_tracks)
    else:
        told = f"a mean distance of at most {threshold:g}"
    if table is not None:
        check_fingerprint(images, table.fingerprint, extractor)
        features = table.features
    else:
        embedded, features = embed_all(listed, extractor, keep_going=keep_going)
        listed = [loaded.image for loaded in embedded]
    once, found = _once(listed, names), listed
    if len(once) < len(listed):
        print(f"{len(listed) - len(once):,} images are there twice, and are kept once")
        found, features = [listed[row] for row in once], features[once]
    tracks = track_numbers(found)
    means = extractor.mean_features(features, tracks) if with_tracks else features
    groups = grouping.by_size(grouping.group(means, threshold, _apart(found, names, tracks))[tracks])
    sizes = np.bincount(groups)
    print(f"{len(found):,} images" + f" of {tracks.max() + 1:,} tracks" * with_tracks + f" in {len(sizes):,} groups, "
          f"at {told}; {(sizes == 1).sum():,} groups are of one image, the largest of {sizes[0]:,}")
    known = [row for row, image in enumerate(found) if image.identity not in ("", *NOBODY)]
    if known:
        precision, recall = grouping.agreement(groups[known], np.array([found[row].identity for row in known]))
        print(f"{len(known):,} images have an identity: the groups agree with these by a precision of {precision:.1%} "
              f"and a recall of {recall:.1%} (B-cubed)")
    order = grouping.typical_first(features, groups)
    kept = order[sizes[groups[order]] >= min_images]
    if not len(kept):
        raise UserError(f"no group has {min_images} images; give a lower --min_images, or a higher threshold")
    if picture is not None:  # before the labels, so that there are none where it fails
        _draw(user_path(picture), found, groups, kept)
    _write(output, found, names, groups, kept)
    print(f"{output}: {len(kept):,} images of {len(np.unique(groups[kept])):,} groups"
          + (f"; {len(found) - len(kept):,} images in groups of fewer than {min_images} are left out"
             if len(kept) < len(found) else ""))


def _check_arguments(output: Path, rate: float | None, threshold: float | None, picture: str | None) -> None:
    check_output(output)
    if output.suffix.lower() != ".csv":
        raise UserError(f"--output={output} must end in .csv, as prepare knows a list of images by that")
    if output.exists():
        raise UserError(f"--output={output} is there already, and may have been corrected by hand; remove it or give "
                        "another name")
    if picture is not None:
        contact_sheet.check(user_path(picture))
    if threshold is not None and rate is not None:
        raise UserError("--threshold and --false_accept_rate are two ways to say one thing; give one of them")
    if threshold is not None and not 0 < threshold < math.inf:
        raise UserError(f"--threshold={threshold} must be above 0, and finite")


def _listed(source: str, clip_boxes: bool) -> tuple[list[UserImage], FeaturesFile | None]:
    """The images that `source` names, and their features, if it is a file of these."""
    path = user_path(source)
    if features_file.is_features_file(path):
        table = features_file.read(path)
        if not len(table):
            raise UserError(f"{source} has no images; give a file of features that has")
        return [table.image(row) for row in range(len(table))], table
    listing = list_images(source, clip_boxes=clip_boxes)
    for note in listing.notes:
        print(note)
    return listing.images, None


def _calibrated(workdir: Path, extractor: Extractor, rate: float, with_tracks: bool) -> tuple[float, str]:
    """The distance that the run's calibration has for a false accept rate, and that in words."""
    verdicts = calibration.load_verdicts(workdir, extractor)
    measured = dict(verdicts.thresholds)
    if rate not in measured:
        why = verdicts.why_none if not verdicts else (
            f"the run's calibration has {first_few(list(map(format_rate, measured)))}")
        raise UserError(f"no threshold is known for a false accept rate of {format_rate(rate)}: {why}; or give "
                        "--threshold")
    of = "" if verdicts.of_tracks == with_tracks else " between tracks" if verdicts.of_tracks else " between images"
    return measured[rate], (f"a mean distance of at most {measured[rate]:.4f}, a false accept rate{of} of "
                            f"{format_rate(rate)}")


def _names_from(output: Path, images: Sequence[UserImage]) -> dict[Path, str]:
    """For the path of each image the real one, from the folder of the CSV `output`; a UserError if prepare would not
    take one of them from there."""
    folder, realpath = os.path.realpath(output.parent), cached_realpath()
    real = {path: realpath(path) for path in {image.path for image in images}}
    names = {path: os.path.relpath(file, folder) for path, file in real.items()}
    outside = [str(image) for image in images if names[image.path].split(os.sep)[0] == os.pardir]
    if outside:
        above = os.path.commonpath([os.path.dirname(file) for file in real.values()])
        raise UserError(f"{first_few(outside)} {'is' if len(outside) == 1 else 'are'} not in {folder}, the folder of "
                        f"--output, and a CSV names images in its own folder only; give "
                        f"--output={os.path.join(above, output.name)}")
    spaced = [ascii(names[image.path]) for image in images if names[image.path] != names[image.path].strip()]
    if spaced:
        raise UserError(f"the names of {len(spaced)} images begin or end with a space, which a CSV does not keep: "
                        f"{first_few(spaced)}; rename them")
    return names


def _once(images: Sequence[UserImage], names: Mapping[Path, str]) -> list[int]:
    """The first row of each image, whatever links lead to it, or of each of its boxes."""
    return list({(names[image.path], image.box): row for row, image in reversed(list(enumerate(images)))
                 }.values())[::-1]


def _apart(images: Sequence[UserImage], names: Mapping[Path, str], tracks: np.ndarray) -> np.ndarray:
    """The pairs of tracks that are in one frame, and so of different people, int [P, 2]."""
    in_frame = collections.defaultdict(set)
    for image, track in zip(images, tracks.tolist(), strict=True):
        if image.box:
            in_frame[names[image.path]].add(track)
    pairs = {pair for frame in in_frame.values() for pair in itertools.combinations(sorted(frame), 2)}
    return np.array(sorted(pairs), int).reshape(-1, 2)


def _write(output: Path, images: Sequence[UserImage], names: Mapping[Path, str], groups: np.ndarray,
           rows: np.ndarray) -> None:
    with_boxes, cameras = any(image.box for image in images), {images[row].camera for row in rows}
    with_camera, with_tracks = "" not in cameras, any(images[row].track for row in rows)
    if not with_camera and len(cameras) > 1:
        print(f"some images tell no camera, so that the CSV has none{', and no tracks' * with_tracks}: it would need "
              "those of all")
        with_tracks = False  # whose names are unique within a camera
    files = [names[images[row].path] for row in rows]
    # Another grouping's names are others, so that nobody takes its people for these.
    these = hashlib.sha256(repr(sorted(zip(files, groups[rows].tolist(), strict=True))).encode()).hexdigest()[:4]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "identity", *["camera"] * with_camera, "split", *["track"] * with_tracks,
                    *BOX_COLUMNS * with_boxes])
    for row, file in zip(rows, files, strict=True):
        image = images[row]
        table.writerow([file, f"{these}-{_number(groups[row])}", *[image.camera] * with_camera, "train",
                        *[image.track] * with_tracks, *(image.box or [""] * 4) * with_boxes])
    write_output(output, text.getvalue())


def _number(group: int) -> str:
    return f"{group + 1:05}"


def _draw(path: Path, images: Sequence[UserImage], groups: np.ndarray, rows: np.ndarray) -> None:
    """The largest groups, a row each: some of its images, from the most typical to the least."""
    lines = []
    for number in range(min(contact_sheet.MOST_ROWS, groups[rows].max() + 1)):
        of_group = rows[groups[rows] == number]
        shown = of_group[np.unique(np.linspace(0, len(of_group) - 1, _SHOWN).round().astype(int))]
        lines.append([(images[row], f"{_number(number)}: {len(of_group)}" if row == shown[0] else images[row].camera)
                      for row in shown])
    contact_sheet.draw(path, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.group", __doc__, _DETAILS)
    parser.add_argument("--workdir", metavar="RUN", required=True, help="folder of a trained run")
    parser.add_argument("--images", metavar="DIR|CSV|GLOB|FILE", required=True, help="what to group; see below")
    parser.add_argument("--output", metavar="CSV", required=True,
                        help="the labels, in the folder that the images are in, or above it")
    parser.add_argument("--false_accept_rate", type=float, metavar="RATE",
                        help="join groups up to the distance that the run's calibration has for this rate "
                             f"(default: {format_rate(_USUAL_RATE)})")
    parser.add_argument("--threshold", type=float, metavar="DISTANCE", help="or up to this distance")
    parser.add_argument("--min_images", type=int, default=1, metavar="N", help="leave out groups of fewer images")
    parser.add_argument("--picture", metavar="FILE",
                        help=f"draws up to {_SHOWN} images of each of the {contact_sheet.MOST_ROWS} largest groups; "
                             "the suffix names the format")
    add_image_options(parser)
    options = vars(parser.parse_args(arguments))
    return exit_status(lambda: group(**options))


if __name__ == "__main__":
    sys.exit(main())
