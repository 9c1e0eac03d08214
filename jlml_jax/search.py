"""Finds the images of a gallery that are nearest to a query, and adds images to a gallery that lasts."""

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jlml_jax import calibration, features_file
from jlml_jax.errors import UserError, exit_status, first_few, printable
from jlml_jax.extractor import Extractor, check_fingerprint, embed, load_extractor, tell_unknown_cameras
from jlml_jax.features_file import FeaturesFile
from jlml_jax.files import user_path
from jlml_jax.gallery import Gallery, NearestNeighbours, is_gallery
from jlml_jax.user_images import LoadedImage, UserImage, list_images, load_one, load_query

_DETAILS = """--gallery is a folder, CSV or glob of images as extract takes them; or a file that extract has made; or a
gallery folder. Images are kept in a gallery folder (--index, or one of their own in RUN/galleries), so that the
next search embeds only what is new; only images that are listed now are searched. A gallery folder given itself
is searched whole. It belongs to the model that made it, and is refused with another one.

examples:
  python -m jlml_jax.search --workdir=runs/market1501 --gallery=crops --query=somebody.jpg --picture=found.png
  python -m jlml_jax.search --workdir=runs/market1501 --gallery=monday.csv --index=all_days
  python -m jlml_jax.search --workdir=runs/market1501 --gallery=all_days --query=somebody.jpg --exclude_camera=3
"""

_CROP, _GAP, _CAPTION = (96, 192), 8, 16  # pixels: width and height of a crop, the space around it, its line of text


def update_gallery(folder: Path, images: Sequence[UserImage], extractor: Extractor, *, keep_going: bool = False
                   ) -> tuple[Gallery, np.ndarray]:
    """Opens the gallery in `folder`, makes it if there is none, and adds those `images` that are not in it.

    Returns the gallery and the rows of `images` in it, int64 [M]. What is added is kept batch by batch.

    Raises:
        UserError: the gallery is another model's, another process is adding to it, or images are bad.
    """
    gallery = Gallery(folder) if is_gallery(folder) else Gallery.create(folder, extractor.fingerprint, extractor.dim)
    check_fingerprint(f"the gallery {folder}", gallery.fingerprint, extractor)
    digests, before = [], len(gallery)
    with gallery.writing():
        for new, seen, features in embed(images, extractor, keep_going=keep_going, known=gallery.digests()):
            if extractor.cameras:
                _refuse_other_cameras(gallery, [*new, *seen])
            gallery.add(new, features, seen)
            digests += [loaded.digest for loaded in [*new, *seen]]
    rows = gallery.rows(digests)
    copies = len(digests) - len(rows)
    print(f"{folder}: {len(gallery) - before:,} images added, {len(gallery):,} in it"
          + (f"; {copies:,} listed images are copies of others and are kept once" if copies else ""))
    return gallery, rows


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


def _open(gallery: str, index: str | None, workdir: Path, extractor: Extractor, keep_going: bool
          ) -> tuple[Gallery | FeaturesFile, np.ndarray | None]:
    """What `gallery` names, and the rows of it to search (None: all)."""
    path = user_path(gallery)
    if index is not None and (is_gallery(path) or path.suffix in features_file.SUFFIXES):
        raise UserError(f"--index keeps images, but {gallery} has features already; leave out --index")
    if path.suffix in features_file.SUFFIXES and not path.is_dir():
        table = features_file.read(path)
        check_fingerprint(gallery, table.fingerprint, extractor)
        return table, None
    if is_gallery(path):
        opened, rows = Gallery(path), None
        check_fingerprint(f"the gallery {gallery}", opened.fingerprint, extractor)
    else:
        listing = list_images(gallery)
        for note in listing.notes:
            print(note)
        name = f"{path.stem[:40]}-{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
        folder = user_path(index) if index else workdir / "galleries" / extractor.fingerprint / name
        opened, rows = update_gallery(folder, listing.images, extractor, keep_going=keep_going)
    return opened, rows


def _eligible(gallery: Gallery | FeaturesFile, rows: np.ndarray | None, only: Sequence[str], excluded: Sequence[str],
              own: str) -> np.ndarray | None:
    """Which rows may be found, bool [N]; None: all. `own`: the query's camera, left out if it is there."""
    if rows is None and not only and not excluded and not own:
        return None
    eligible = np.ones(len(gallery), bool)
    if rows is not None:
        eligible[:] = False
        eligible[rows] = True
    if only or excluded or own:
        cameras = gallery.cameras
        known = np.unique(cameras).tolist()
        unknown = sorted({*only, *excluded} - set(known))
        if unknown:
            raise UserError(f"no image of the gallery has camera {first_few(unknown)}; its cameras are "
                            + (first_few([printable(camera) for camera in known if camera]) or "not known"))
        if only:
            eligible &= np.isin(cameras, only)
        eligible &= ~np.isin(cameras, [*excluded, own] if own else excluded)
    return eligible


def search(workdir: str | Path, gallery: str, query: str | None, *, top_k: int = 10, cameras: Sequence[str] = (),
           excluded_cameras: Sequence[str] = (), exclude_own_camera: bool = False, query_camera: str | None = None,
           picture: str | None = None, index: str | None = None, keep_going: bool = False) -> None:
    """Prints the `top_k` images of `gallery` that are nearest to the image `query`; without one, adds images only."""
    workdir = user_path(workdir)
    if top_k < 1:
        raise UserError(f"--top_k={top_k} must be at least 1")
    extractor = load_extractor(workdir)
    verdicts = calibration.load_verdicts(workdir, extractor)
    if query is not None:  # first of all: adding may take long
        query_image, pixels = load_query(query, extractor.height, extractor.width)
        if query_camera is not None:
            query_image = dataclasses.replace(query_image, camera=query_camera)
        if exclude_own_camera and not query_image.camera:
            raise UserError(f"{query}: the name does not tell its camera, as Market-1501's do; give "
                            "--query_camera=CAMERA")
        tell_unknown_cameras([query_image.camera], extractor)
        query_feature, = extractor(pixels[None], [query_image.camera])
    opened, rows = _open(gallery, index, workdir, extractor, keep_going)
    if query is None:
        return
    own = query_image.camera if exclude_own_camera else ""
    eligible = _eligible(opened, rows, cameras, excluded_cameras, own)
    found, distances = NearestNeighbours(opened.features).search(query_feature, top_k, eligible)
    if not len(found):
        raise UserError(f"{gallery} has no images to search" + (" of these cameras" if eligible is not None else ""))
    images = [opened.image(row) for row in found]
    told = [verdicts.of(distance) if verdicts else "" for distance in distances]
    width = max(map(len, told))
    print(f"{'rank':>4} {'distance':>10}  " + (f"{'verdict':<{width}}  " if verdicts else "")
          + f"{'identity':<10} {'camera':<8} file")
    for rank, (image, distance, verdict) in enumerate(zip(images, distances, told, strict=True), 1):
        print(f"{rank:>4} {distance:>10.4f}  " + (f"{verdict:<{width}}  " if verdicts else "")
              + f"{printable(image.identity) or '-':<10} {printable(image.camera) or '-':<8} {printable(image.file)}"
              + (f" box {','.join(map(str, image.box))}" if image.box else ""))
    if not verdicts:
        print(f"no verdicts: {verdicts.why_none}")
    if picture is not None:
        _draw(user_path(picture), query_image, images, distances)


def _draw(path: Path, query: UserImage, images: Sequence[UserImage], distances: np.ndarray) -> None:
    """The query and what was found, side by side, with the distances."""
    width, height = _CROP[0] + _GAP, _CROP[1] + 2 * _GAP + _CAPTION
    sheet = Image.new("RGB", (_GAP + width * (1 + len(images)) + 2 * _GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    captions = ["query", *(f"{distance:.4f}" for distance in distances)]
    for column, (image, caption) in enumerate(zip([query, *images], captions, strict=True)):
        left = _GAP + column * width + (2 * _GAP if column else 0)  # a wider space after the query
        try:
            sheet.paste(Image.fromarray(load_one(image, _CROP[1], _CROP[0])), (left, _GAP))
        except UserError:  # moved or removed since it was embedded
            draw.rectangle((left, _GAP, left + _CROP[0] - 1, _GAP + _CROP[1] - 1), outline="grey")
            draw.text((left + _GAP, _GAP + _CROP[1] // 2), "file is gone", fill="grey")
        draw.text((left, 2 * _GAP + _CROP[1]), caption, fill="black")
    try:
        sheet.save(path)
    except (OSError, ValueError, KeyError) as error:  # a suffix of no format, or of one that is only read
        raise UserError(f"cannot write {path} ({error}); give another --picture, such as found.png") from error
    print(f"picture in {path}")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m jlml_jax.search", description=__doc__, epilog=_DETAILS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", metavar="RUN", required=True, help="folder of a trained run")
    parser.add_argument("--gallery", metavar="DIR|CSV|GLOB|FILE", required=True, help="what to search; see below")
    parser.add_argument("--query", metavar="IMAGE", help="an image of a person; none: only add to the gallery")
    parser.add_argument("--top_k", type=int, default=10, metavar="K", help="how many to find (default: 10)")
    parser.add_argument("--camera", type=_names, default=[], metavar="NAMES", help="search these cameras only")
    parser.add_argument("--exclude_camera", type=_names, default=[], metavar="NAMES", help="leave these cameras out")
    parser.add_argument("--query_camera", metavar="NAME",
                        help="the camera of the query (default: what its name tells, if it is like Market-1501's)")
    parser.add_argument("--exclude_own_camera", action="store_true", help="leave out the camera of the query")
    parser.add_argument("--picture", metavar="FILE", help="draw the query and what was found, such as found.png")
    parser.add_argument("--index", metavar="DIR", help="the gallery folder to keep the images in (default: one in RUN)")
    parser.add_argument("--keep_going", action="store_true", help="list bad images and leave them out")
    options = parser.parse_args(arguments)
    return exit_status(lambda: search(
        options.workdir, options.gallery, options.query, top_k=options.top_k, cameras=options.camera,
        excluded_cameras=options.exclude_camera, exclude_own_camera=options.exclude_own_camera,
        query_camera=options.query_camera, picture=options.picture, index=options.index,
        keep_going=options.keep_going))


if __name__ == "__main__":
    sys.exit(main())
