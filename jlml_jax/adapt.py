"""Makes of a run one that suits other cameras, by images of theirs, without labels and without training."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlml_jax import norm_statistics, parallel
from jlml_jax.checkpoints import SavedRun, load_run
from jlml_jax.errors import UserError, exit_status
from jlml_jax.models import build_model
from jlml_jax.new_run import new_folder, write_checkpoint
from jlml_jax.pack import CONFIG, LABEL_MAP
from jlml_jax.user_images import UserImage, list_images, read_batches

FEWEST_IMAGES = 16  # statistics of less would be those of single pictures

_DETAILS = f"""Batch normalisation, which goes by what the training cameras saw, goes by what these images show in its
place (AdaBN, Li et al. 2016): at most {norm_statistics.MOST_IMAGES:,} of them, at random. Give crops of people as they
will be searched, from all cameras that are to be compared, of anybody. The folder is that of a finished run, which
every command takes; features of the run before cannot be compared with its own. --images is as in jlml_jax.extract.

example:
  python -m jlml_jax.adapt --workdir=runs/pretrained --images=crops --output=runs/adapted
"""


def adapt(workdir: str, images: str, output: str | Path, *, keep_going: bool = False) -> None:
    """Writes the run in `workdir`, normalising by `images`, to the new folder `output`, whole or not at all.

    Raises:
        UserError: the run does not load, images are bad or fewer than `FEWEST_IMAGES`, or `output` is there already or
            cannot be written.
    """
    output = Path(output).expanduser()
    with new_folder(output, "--output") as part:
        listing = list_images(images)
        for note in listing.notes:
            print(note)
        run = load_run(workdir)
        # In the list's order, in which the boxes of one frame follow each other: it is then decoded once.
        chosen = np.sort(norm_statistics.chosen_images(len(listing.images)))
        pixels = _read([listing.images[index] for index in chosen], run, keep_going)
        batch_stats = _statistics(run, pixels)
        # Not the results or the thresholds, which are those of other statistics.
        (part / CONFIG).write_text(run.config.to_json(indent=1))
        (part / LABEL_MAP).write_text(json.dumps(run.label_map))
        write_checkpoint(part, SavedRun(part, run.config, run.label_map, run.step,
                                        run.variables | {"batch_stats": batch_stats}))
    print(f"{output}: {workdir}, step {run.step}, adapted to {len(pixels):,} images")


def _read(images: Sequence[UserImage], run: SavedRun, keep_going: bool) -> np.ndarray:
    """uint8 [N, height, width, 3]."""
    data = run.config.data
    batches = read_batches(images, data.height, data.width, run.config.evaluate.batch_size, "reading",
                           keep_going=keep_going)
    pixels = np.array([image.pixels for read, _ in batches for image in read])
    if len(pixels) < FEWEST_IMAGES:
        raise UserError(f"{len(pixels)} images are too few to adapt to; give at least {FEWEST_IMAGES}, better hundreds")
    return pixels


def _statistics(run: SavedRun, pixels: np.ndarray) -> dict[str, Any]:
    """`batch_stats` over the images, in random order."""
    mesh, config = parallel.make_mesh(jax.local_devices()), run.config
    parallel.keep_programs(config.compilation_cache)
    statistics = norm_statistics.make_statistics(build_model(config, num_identities=0), config, mesh)
    batch_size = -(-config.evaluate.batch_size // mesh.size) * mesh.size
    batches = norm_statistics.full_batches(pixels[norm_statistics.chosen_images(len(pixels))], batch_size)
    return norm_statistics.of_batches(statistics, parallel.replicate(run.variables, mesh), batches, mesh)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m jlml_jax.adapt", description=__doc__, epilog=_DETAILS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", metavar="RUN", required=True, help="folder of a trained run")
    parser.add_argument("--images", metavar="DIR|CSV|GLOB", required=True,
                        help="a folder (searched to the bottom), a CSV, or a glob in quotes")
    parser.add_argument("--output", metavar="RUN", required=True, help="the folder to make")
    parser.add_argument("--keep_going", action="store_true",
                        help="list bad images at the end and leave them out, instead of stopping")
    options = parser.parse_args(arguments)
    return exit_status(lambda: adapt(options.workdir, options.images, options.output, keep_going=options.keep_going))


if __name__ == "__main__":
    sys.exit(main())
