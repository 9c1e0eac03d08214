"""Finds the images of a gallery that are nearest to queries, and adds images to a gallery that lasts."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jlml_jax import calibration, contact_sheet, features_file, search_results
from jlml_jax.arguments import Parser
from jlml_jax.calibration import Verdicts
from jlml_jax.errors import UserError, exit_status, first_few, printable
from jlml_jax.extractor import Extractor, check_fingerprint, embed, embed_all, load_extractor
from jlml_jax.features_file import FeaturesFile
from jlml_jax.files import check_output, refuse_replacing, refuse_replacing_images, user_path
from jlml_jax.gallery import Gallery, is_gallery
from jlml_jax.nearest import NearestNeighbours
from jlml_jax.reranking import Reranking
from jlml_jax.search_results import Found, Query
from jlml_jax.tracks import TrackGallery
from jlml_jax.user_images import LoadedImage, UserImage, add_image_options, list_images, track_numbers

_DETAILS = """--gallery is a folder, CSV or glob of images as extract takes them; or a file that extract has made; or a
gallery folder. Images are kept in a gallery folder (--index, or one of their own in RUN/galleries), so that the
next search embeds only what is new; only images that are listed now are searched. A gallery folder given itself
is searched whole. It belongs to the model that made it, and is refused with another one.

--query is an image, or many as extract takes them: each is searched for. --output has a line for each image that was
found: query, its number of images, rank, distance, verdict (if the run is calibrated), image, identity, camera, track,
and the boxes, if there are any. With --same_person all query images are of one person, and the mean of their features
is searched for.

Where a CSV has a column track, or a file of features was made of such a one, the images of one track of one camera are
matched by the mean of their features: each track of --query is searched for, and each of --gallery is found once,
shown by the image in its middle. --exclude_query_images leaves out every track that has an image of the query's. A
gallery folder keeps images, not tracks: give it as --index, beside the CSV.

examples:
  python -m jlml_jax.search --workdir=runs/market1501 --gallery=crops --query=somebody.jpg --picture=found.png
  python -m jlml_jax.search --workdir=runs/market1501 --gallery=monday.csv --index=all_days
  python -m jlml_jax.search --workdir=runs/market1501 --gallery=all_days --query=somebody.jpg --exclude_camera=3
  python -m jlml_jax.search --workdir=runs/market1501 --gallery=all_days --query=missing --output=found.csv
  python -m jlml_jax.search --workdir=runs/market1501 --gallery=all_days --query='ann/*.jpg' --same_person
  python -m jlml_jax.search --workdir=runs/market1501 --gallery=tracks.csv --query=tracks.csv --exclude_own_camera
"""
# Of a query's nearest images, whose order re-ranking changes; the time grows with their square, to 30 ms a query.
RERANKED = 500


def update_gallery(folder: Path, images: Sequence[UserImage], extractor: Extractor, *, keep_going: bool = False
                   ) -> tuple[Gallery, list[LoadedImage]]:
    """Opens the gallery in `folder`, makes it if there is none, and adds those `images` that are not in it.

    Returns the gallery and those of `images` that are in it now, as they were read. What is added is kept batch by
    batch. Other processes may add to the gallery at the same time; what two of them add is embedded by both, and kept
    once.

    Raises:
        UserError: the gallery is another model's, or images are bad.
    """
    gallery = Gallery(folder) if is_gallery(folder) else Gallery.create(folder, extractor.fingerprint, extractor.dim)
    check_fingerprint(f"the gallery {folder}", gallery.fingerprint, extractor)
    listed, added = [], 0
    for new, seen, features in embed(images, extractor, keep_going=keep_going, known=gallery.digests()):
        with gallery.writing():
            if extractor.cameras:
                _refuse_other_cameras(gallery, [*new, *seen])
            before = len(gallery)
            gallery.add(new, features, seen)
            added += len(gallery) - before
        listed += [dataclasses.replace(loaded, pixels=None) for loaded in [*new, *seen]]
    copies = len(listed) - len({loaded.digest for loaded in listed})
    print(f"{folder}: {added:,} images added, {len(gallery):,} in it"
          + (f"; {copies:,} listed images are copies of others and are kept once" if copies else ""))
    return gallery, listed


def _refuse_other_cameras(gallery: Gallery, images: Sequence[LoadedImage]) -> None:
    """Features depend on the camera: an image cannot be kept as one camera's, and then be another's."""
    first = gallery.cameras_of({loaded.digest for loaded in images})
    for loaded in images:
        camera = loaded.image.camera
        kept = first.setdefault(loaded.digest, camera)
        if camera not in ("", kept):
            raise UserError(f"{loaded.image} is of camera {printable(camera)} now, and in {gallery.folder} of "
                            f"{printable(kept) or 'an unknown one'}, by whose statistics its features are; make the "
                            "gallery anew")


def _open(gallery: str, index: str | None, picture: str | None, workdir: Path, extractor: Extractor, keep_going: bool,
          clip_boxes: bool) -> tuple[Gallery | FeaturesFile | TrackGallery, np.ndarray | None]:
    """What `gallery` names, and the rows of it to search (None: all). `picture` must be none of its images."""
    path = user_path(gallery)
    if index is not None and (is_gallery(path) or path.suffix in features_file.SUFFIXES):
        raise UserError(f"--index keeps images, but {gallery} has features already; leave out --index")
    if features_file.is_features_file(path):
        table = features_file.read(path)
        check_fingerprint(gallery, table.fingerprint, extractor)
        if table.tracks is None:
            return table, None
        rows = np.arange(len(table))
        return TrackGallery(table, [table.image(row) for row in rows], rows, extractor), None
    if is_gallery(path):
        opened, rows = Gallery(path), None
        check_fingerprint(f"the gallery {gallery}", opened.fingerprint, extractor)
    else:
        listing = list_images(gallery, clip_boxes=clip_boxes)
        if picture is not None:
            refuse_replacing_images("--picture", picture, [image.path for image in listing.images])
        for note in listing.notes:
            print(note)
        name = f"{path.stem[:40]}-{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
        folder = user_path(index) if index else workdir / "galleries" / extractor.fingerprint / name
        opened, listed = update_gallery(folder, listing.images, extractor, keep_going=keep_going)
        listed.sort(key=lambda loaded: loaded.place)  # so that a track's middle is that of the list
        row_of = opened.rows_of([loaded.digest for loaded in listed])
        rows = np.array([row_of[loaded.digest] for loaded in listed], np.int64)
        if any(loaded.image.track for loaded in listed):
            named = [dataclasses.replace(loaded.image, file=str(loaded.image.path.absolute())) for loaded in listed]
            return TrackGallery(opened, named, rows, extractor), None  # named as a gallery's images are
    return opened, rows


def _eligible_rows(gallery: Gallery | FeaturesFile | TrackGallery, rows: np.ndarray | None, only: Sequence[str],
                   excluded: Sequence[str]) -> Callable[[frozenset[str]], np.ndarray | None]:
    """A function of a query's own cameras, to be left out, too: which rows may be found, bool [N]; None: all."""
    cameras = functools.cache(lambda: gallery.cameras)
    if only or excluded:
        known = np.unique(cameras()).tolist()
        unknown = sorted({*only, *excluded} - set(known))
        if unknown:
            raise UserError(f"no image of the gallery has camera {first_few(unknown)}; its cameras are "
                            + (first_few([printable(camera) for camera in known if camera]) or "not known"))

    @functools.lru_cache(maxsize=64)  # of a gallery of millions each is megabytes
    def eligible(own: frozenset[str]) -> np.ndarray | None:
        if rows is None and not (only or excluded or own):
            return None
        may_be_found = np.ones(len(gallery), bool)
        if rows is not None:
            may_be_found[:] = False
            may_be_found[rows] = True
        if only:
            may_be_found &= np.isin(cameras(), only)
        if excluded or own:
            may_be_found &= ~np.isin(cameras(), [*excluded, *own])
        return may_be_found

    return eligible


def search(workdir: str, gallery: str, query: str | None, *, top_k: int = 10, camera: Sequence[str] = (),
           exclude_camera: Sequence[str] = (), exclude_own_camera: bool = False, query_camera: str | None = None,
           exclude_query_images: bool = False, same_person: bool = False, rerank: bool = False,
           output: str | None = None, picture: str | None = None, index: str | None = None, keep_going: bool = False,
           clip_boxes: bool = False) -> None:
    """Prints the `top_k` images of `gallery` that are nearest to each image of `query`; None: adds images only. Where
    images are of tracks, it is tracks that are found and searched for.

    With `same_person`, all images of `query` are of one person: it is their mean feature that is searched for. With
    `rerank`, the `RERANKED` nearest images of each query are ordered by k-reciprocal re-ranking among them; distances
    and verdicts stay the plain ones. The rest is as --help has it.
    """
    folder = user_path(workdir)
    if top_k < 1:
        raise UserError(f"--top_k={top_k} must be at least 1")
    given = {"--same_person": same_person, "--output": output, "--picture": picture}
    if query is None and any(given.values()):
        raise UserError(f"{first_few([name for name, value in given.items() if value])} without --query: give it, too")
    if output is not None:
        check_output(user_path(output))
    if picture is not None:
        contact_sheet.check(user_path(picture))
    refuse_replacing({"--gallery": gallery, "--query": query, "--output": output, "--picture": picture})
    if output is not None and contact_sheet.is_picture(Path(output)):
        raise UserError(f"--output={output} would be a CSV; give it a name that ends in .csv, or --picture={output}")
    extractor = load_extractor(folder)
    calibrated = calibration.load_verdicts(folder, extractor)
    queries = []
    if query is not None:  # first of all: adding may take long
        images = _query_images(query, query_camera, exclude_own_camera, clip_boxes)
        number = 1 if same_person else track_numbers(images).max() + 1
        if picture is not None and number > contact_sheet.MOST_ROWS:
            raise UserError(f"--picture shows {contact_sheet.MOST_ROWS} queries at most, not {number:,}; give "
                            "--output=FILE.csv, or fewer")
        if picture is not None:
            refuse_replacing_images("--picture", picture, [image.path for image in images])
        queries = _embed_queries(images, extractor, same_person, keep_going)
    opened, rows = _open(gallery, index, picture, folder, extractor, keep_going, clip_boxes)
    if not queries:
        return
    eligible = _eligible_rows(opened, rows, camera, exclude_camera)
    verdicts = _verdicts_on(calibrated, queries, opened, same_person)
    left_out = [_rows_of(one, opened) if exclude_query_images else np.empty(0, int) for one in queries]
    own = [frozenset(image.camera for image in one.images) if exclude_own_camera else frozenset() for one in queries]
    wanted = max(top_k, RERANKED) if rerank else top_k
    searches = ((one.feature, wanted + len(own_rows), eligible(own_cameras))
                for one, own_rows, own_cameras in zip(queries, left_out, own, strict=True))
    neighbours, found = NearestNeighbours(opened.features).search_many(searches), []
    bar = tqdm(queries, "searching", unit=" queries", leave=False, disable=None if len(queries) > 1 else True)
    for one, own_rows, (nearest, distances) in zip(bar, left_out, neighbours, strict=True):
        kept = np.flatnonzero(~np.isin(nearest, own_rows))[:wanted]
        if rerank:
            kept = kept[_reranked_order(one.feature, opened.features[nearest[kept]])]
        kept = kept[:top_k]
        found.append(Found(one, [opened.image(row) for row in nearest[kept]], distances[kept],
                           [verdicts.of(distance) if verdicts else "" for distance in distances[kept]]))
    without = [str(one.query) for one in found if not one.images]
    if len(without) == len(found):
        filtered = camera or exclude_camera or exclude_own_camera
        raise UserError(f"{gallery} has no images to search" + (
            " of these cameras" if filtered else " beside the query images" if exclude_query_images else ""))
    if output is not None:
        search_results.write(user_path(output), found)
    else:
        for one in found:
            search_results.show(one, bool(verdicts), headed=len(found) > 1)
    if without:
        print(f"nothing is left to search for {len(without):,} queries: {first_few(without)}")
    if not verdicts:
        print(f"no verdicts: {verdicts.why_none}")
    if picture is not None:
        search_results.draw(user_path(picture), found)


def _verdicts_on(calibrated: Verdicts, queries: Sequence[Query], gallery: Gallery | FeaturesFile | TrackGallery,
                 same_person: bool) -> Verdicts:
    """The thresholds that go for a query and what is found, if they were measured on pairs of such."""
    tracks = isinstance(gallery, TrackGallery)
    if calibrated and same_person and len(queries[0].images) > 1:
        return Verdicts((), "thresholds are measured on pairs of images, or of tracks, not on all images of a person")
    if calibrated and tracks != any(image.track for query in queries for image in query.images):
        return Verdicts((), "thresholds are measured on pairs of images, or of tracks, not on an image and a track")
    return calibrated.on(tracks=tracks)


def _rows_of(query: Query, gallery: Gallery | FeaturesFile | TrackGallery) -> np.ndarray:
    """Where the gallery has the query's own images, or the tracks that have them: by their bytes, or in a file of
    features by their files."""
    if isinstance(gallery, TrackGallery):
        return gallery.tracks_of(_rows_of(query, gallery.gallery))
    if isinstance(gallery, Gallery):
        return np.array(list(gallery.rows_of(query.digests).values()), np.int64)
    return gallery.rows_of(query.images)


def _reranked_order(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The gallery's rows [N, D] by their re-ranked distance from the query [D], int [N]."""
    if not len(gallery):
        return np.empty(0, int)
    distances = Reranking(query[None], gallery).distances(np.arange(1), np.arange(len(gallery)))
    return np.argsort(distances[0], kind="stable")


def _query_images(source: str, camera: str | None, camera_needed: bool, clip_boxes: bool) -> list[UserImage]:
    """The images to search for, of `camera` if that is given."""
    listing = list_images(source, clip_boxes=clip_boxes)
    if len(listing.images) > 1:
        for note in listing.notes:
            print(note)
    of_tracks = sorted({image.camera for image in listing.images if image.track})
    if camera is not None and len(of_tracks) > 1:  # whose tracks of one name would become one
        raise UserError(f"--query_camera={printable(camera)} is one camera, and {source} has tracks of "
                        f"{len(of_tracks)}: {first_few([printable(name) or 'an unknown one' for name in of_tracks])}; "
                        "leave out --query_camera, or give the tracks of one camera")
    images = [image if camera is None else dataclasses.replace(image, camera=camera) for image in listing.images]
    unknown = [str(image) for image in images if not image.camera]
    if camera_needed and unknown:
        raise UserError(f"the camera of {first_few(unknown)} is told neither by a CSV nor by a name like "
                        "Market-1501's; give --query_camera=CAMERA")
    return images


def _embed_queries(images: Sequence[UserImage], extractor: Extractor, same_person: bool, keep_going: bool
                   ) -> list[Query]:
    embedded, features = embed_all(images, extractor, keep_going=keep_going)
    of = np.zeros(len(embedded), int) if same_person else track_numbers([loaded.image for loaded in embedded])
    if of.max() + 1 < len(of):
        features = extractor.mean_features(features, of)
    queries = [Query([], [], feature) for feature in features]
    for number, loaded in zip(of, embedded, strict=True):
        queries[number].images.append(loaded.image)
        queries[number].digests.append(loaded.digest)
    return queries


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.search", __doc__, _DETAILS)
    parser.add_argument("--workdir", metavar="RUN", required=True, help="folder of a trained run")
    parser.add_argument("--gallery", metavar="DIR|CSV|GLOB|FILE", required=True, help="what to search; see below")
    parser.add_argument("--query", metavar="IMAGE|DIR|CSV|GLOB",
                        help="images of persons to search for; none: only add to the gallery")
    parser.add_argument("--same_person", action="store_true", help="the query images are all of one person")
    parser.add_argument("--top_k", type=int, default=10, metavar="K", help="how many to find (default: 10)")
    parser.add_argument("--camera", type=_names, default=[], metavar="NAMES", help="search these cameras only")
    parser.add_argument("--exclude_camera", type=_names, default=[], metavar="NAMES", help="leave these cameras out")
    parser.add_argument("--query_camera", metavar="NAME",
                        help="the camera of the query (default: what a CSV or a name like Market-1501's tells)")
    parser.add_argument("--exclude_own_camera", action="store_true", help="leave out the camera of the query")
    parser.add_argument("--output", metavar="FILE", help="write what was found to this CSV, rather than print it")
    parser.add_argument("--rerank", action="store_true",
                        help=f"order the {RERANKED} nearest images by k-reciprocal re-ranking; for galleries with "
                             "several images of a person; distances stay the plain ones")
    parser.add_argument("--exclude_query_images", action="store_true",
                        help="leave out the query's own image, where the gallery has it, too")
    parser.add_argument("--picture", metavar="FILE", help="draw the query and what was found, such as found.png")
    parser.add_argument("--index", metavar="DIR", help="the gallery folder to keep the images in (default: one in RUN)")
    add_image_options(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: search(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
