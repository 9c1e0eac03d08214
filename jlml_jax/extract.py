"""Embeds a user's own images: a folder, a CSV or a glob in, one file of features out."""

import sys
from collections.abc import Sequence

import numpy as np

from jlml_jax import features_file
from jlml_jax.arguments import Parser
from jlml_jax.errors import exit_status
from jlml_jax.extractor import embed_all, load_extractor
from jlml_jax.features_file import FeaturesFile
from jlml_jax.files import user_path
from jlml_jax.user_images import add_image_options, list_images

_DETAILS = """A CSV has the columns image[,identity][,camera][,track][,x,y,width,height]; its paths are relative to its
folder and cannot leave it; a box (pixels of the upright frame) is cropped first, and must lie within the frame, or be
cut to it by --clip_boxes; the file has the boxes as they were cropped.
Images are turned as their EXIF tags say, and what is transparent is laid over mid-grey; more than 8 bits a
channel are refused. Identity and camera are also read from names like Market-1501's, where all are like that.
The file has a row an image, in the order of the list (jlml_jax/features_file.py describes it), also where images are
of tracks: search, group and calibrate take the mean of each track's features.

examples:
  python -m jlml_jax.extract --workdir=runs/market1501 --images=crops --output=features.npz
  python -m jlml_jax.extract --workdir=runs/market1501 --images=boxes.csv --output=features.parquet --keep_going
  python -m jlml_jax.extract --workdir=runs/market1501 --images='video/**/*.png' --output=features.npz
"""


def extract(workdir: str, images: str, output: str, *, keep_going: bool = False, clip_boxes: bool = False) -> None:
    """Writes the features of `images` to `output`; a UserError tells what is wrong with any of the three."""
    output = user_path(output)
    features_file.check_output(output)
    listing = list_images(images, clip_boxes=clip_boxes)
    for note in listing.notes:
        print(note)
    extractor = load_extractor(workdir)
    embedded, features = embed_all(listing.images, extractor, keep_going=keep_going)
    done = [loaded.image for loaded in embedded]
    boxes = [image.box for image in done if image.box]
    tracks = np.array([image.track for image in done])
    features_file.write(output, FeaturesFile(
        features=features,
        files=np.array([image.file for image in done]),
        identities=np.array([image.identity for image in done]),
        cameras=np.array([image.camera for image in done]),
        boxes=np.array(boxes, np.int32) if boxes else None,
        root=str(listing.root.resolve()),
        fingerprint=extractor.fingerprint,
        tracks=tracks if tracks.any() else None,
    ))
    print(f"{output}: {len(done):,} images, {extractor.dim} features each, model {extractor.fingerprint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.extract", __doc__, _DETAILS)
    parser.add_argument("--workdir", metavar="RUN", required=True, help="folder of a trained run")
    parser.add_argument("--images", metavar="DIR|CSV|GLOB", required=True,
                        help="a folder (searched to the bottom), a CSV, a glob in quotes, or one image")
    parser.add_argument("--output", metavar="FILE", required=True,
                        help="features.npz or features.parquet; replaced, when all is done, if it is there")
    add_image_options(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: extract(options.workdir, options.images, options.output,
                                       keep_going=options.keep_going, clip_boxes=options.clip_boxes))


if __name__ == "__main__":
    sys.exit(main())
