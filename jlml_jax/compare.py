"""Compares two images: how far apart they are, and whether they show the same person."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlml_jax import calibration
from jlml_jax.arguments import Parser
from jlml_jax.errors import exit_status
from jlml_jax.extractor import load_extractor, tell_unknown_cameras
from jlml_jax.files import user_path
from jlml_jax.user_images import load_query

_EXAMPLE = """example:
  python -m jlml_jax.compare a.jpg b.jpg --workdir=runs/market1501
"""


def compare(workdir: str | Path, images: tuple[str, str], cameras: tuple[str, str] | None = None) -> None:
    """Prints the distance of two images, and the verdict if the run is calibrated.

    `cameras` are theirs; None: what their names tell, if they are like Market-1501's.
    """
    extractor = load_extractor(workdir)
    verdicts = calibration.load_verdicts(user_path(workdir), extractor).on(tracks=False)
    loaded = [load_query(image, extractor.height, extractor.width) for image in images]
    if cameras is not None:
        loaded = [(dataclasses.replace(image, camera=camera), pixels)
                  for (image, pixels), camera in zip(loaded, cameras, strict=True)]
    tell_unknown_cameras([image.camera for image, _ in loaded], extractor)
    # One at a time: as many as there are devices go through in a small batch.
    a, b = (extractor(pixels[None], [image.camera])[0].astype(np.float64) for image, pixels in loaded)
    distance = float(np.linalg.norm(a - b))
    print(f"distance {distance:.4f}")
    print(verdicts.of(distance) if verdicts else f"no verdict: {verdicts.why_none}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.compare", __doc__, _EXAMPLE)
    parser.add_argument("images", nargs=2, metavar="IMAGE", help="an image of a person")
    parser.add_argument("--workdir", metavar="RUN", required=True, help="folder of a trained run")
    parser.add_argument("--cameras", nargs=2, metavar="NAME",
                        help="theirs (default: what the images' names tell, if they are like Market-1501's)")
    options = parser.parse_args(arguments)
    return exit_status(lambda: compare(options.workdir, options.images, options.cameras))


if __name__ == "__main__":
    sys.exit(main())
