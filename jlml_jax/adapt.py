"""Adapts a run to other cameras: batch normalisation by the statistics of unlabelled images, without training."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlml_jax import camera_statistics, norm_statistics, parallel
from jlml_jax.arguments import Parser
from jlml_jax.checkpoints import CONFIG, LABEL_MAP, SavedRun, load_finished_run
from jlml_jax.errors import UserError, exit_status, first_few, printable
from jlml_jax.files import user_path
from jlml_jax.models import build_model
from jlml_jax.new_run import new_folder, write_checkpoint
from jlml_jax.user_images import NothingRead, UserImage, add_image_options, list_images, read_batches, tell_clipped

FEWEST_IMAGES = 16  # statistics of less would be those of single pictures

_DETAILS = f"""The running statistics of batch normalisation are replaced by those of your images (AdaBN, Li et al.
2016): of at most {norm_statistics.MOST_IMAGES:,} of them, at random. Give crops as they will be searched, of anybody,
from all cameras that are to be compared. With --by_camera each camera's images are normalised by that camera's own
statistics (Zhuang et al. 2020), which is better wherever cameras differ. The images then need a camera each, from a
CSV's column or from names like Market-1501's, and so do the images that are searched later. The folder is that of a
finished run, which every command takes; its features cannot be compared with those of the run before. --images is as
in jlml_jax.extract.

examples:
  python -m jlml_jax.adapt --workdir=runs/pretrained --images=crops --output=runs/adapted
  python -m jlml_jax.adapt --workdir=runs/pretrained --images=crops.csv --by_camera --output=runs/adapted
"""


def adapt(workdir: str, images: str, output: str | Path, *, by_camera: bool = False, keep_going: bool = False,
          clip_boxes: bool = False) -> None:
    """Writes the run in `workdir`, normalising by `images`, to the new folder `output`, whole or not at all.

    Raises:
        UserError: the run does not load or has not ended, images are bad, fewer than `FEWEST_IMAGES` or, with
            `by_camera`, of unknown cameras, or `output` is there already or cannot be written.
    """
    output = user_path(output)
    with new_folder(output, "--output") as part:
        listing = list_images(images, clip_boxes=clip_boxes)
        for note in listing.notes:
            print(note)
        cameras = sorted({image.camera for image in listing.images}) if by_camera else []
        if "" in cameras:
            unknown = [str(image) for image in listing.images if not image.camera]
            raise UserError(f"{len(unknown)} images tell no camera: {first_few(unknown)}; give a CSV with a column "
                            "camera, or names like Market-1501's, or leave out --by_camera")
        run = load_finished_run(workdir)
        measure = _Measure(run, keep_going)
        batch_stats, number = measure(listing.images)
        if number < FEWEST_IMAGES:
            raise UserError(f"{number} images are too few to adapt to; give at least {FEWEST_IMAGES}, better hundreds")
        told = f"{number:,} images"
        if by_camera:
            of_cameras = {}
            for camera in cameras:
                of_camera = [image for image in listing.images
                             if image.camera == camera and _key(image) not in measure.bad]
                try:
                    own, count = measure(of_camera)
                except NothingRead:
                    print(f"camera {printable(camera)} is left out: none of its images can be read", file=sys.stderr)
                    continue
                of_cameras[camera] = norm_statistics.of_camera(own, count, batch_stats)
                told += f", {count:,} of camera {printable(camera)}"
            (part / camera_statistics.FILE).write_bytes(
                camera_statistics.to_bytes(camera_statistics.stack(of_cameras)))
        tell_clipped(len(measure.clipped))
        # Not the results or the thresholds, which are those of other statistics.
        (part / CONFIG).write_text(run.config.to_json(indent=1))
        (part / LABEL_MAP).write_text(json.dumps(run.label_map))
        write_checkpoint(part, SavedRun(part, run.config, run.label_map, run.step,
                                        run.variables | {"batch_stats": batch_stats}))
    print(f"{output}: {workdir}, step {run.step}, adapted to {told}")


def _key(image: UserImage) -> tuple[Path, int | None]:
    """What an image is known by, whatever became of its box."""
    return image.path, image.row


class _Measure:
    """A function of images to the `batch_stats` over them, and how many there are: `MOST_IMAGES` at most.

    `bad` are those, by their keys, that it could not read, and was to keep going; `clipped` those whose box it has cut.
    """

    def __init__(self, run: SavedRun, keep_going: bool):
        self._run, self._keep_going = run, keep_going
        self.bad: set[tuple[Path, int | None]] = set()
        self.clipped: set[tuple[Path, int | None]] = set()
        self._mesh, config = parallel.make_mesh(jax.local_devices()), run.config
        parallel.keep_programs(config.compilation_cache)
        self._statistics = norm_statistics.make_statistics(build_model(config, num_identities=0), config, self._mesh)
        self._variables = parallel.replicate(run.variables, self._mesh)
        self._batch_size = -(-config.evaluate.batch_size // self._mesh.size) * self._mesh.size

    def __call__(self, images: Sequence[UserImage]) -> tuple[Any, int]:
        chosen = [images[index] for index in np.sort(norm_statistics.chosen_images(len(images)))]
        data = self._run.config.data
        batches = read_batches(chosen, data.height, data.width, self._batch_size, "reading",
                               keep_going=self._keep_going)
        loaded = sorted((image for read, _ in batches for image in read), key=lambda image: image.place)
        self.bad |= {*map(_key, chosen)} - {_key(one.image) for one in loaded}
        self.clipped |= {_key(one.image) for one in loaded if one.clipped}
        pixels = np.array([one.pixels for one in loaded])
        in_random_order = pixels[norm_statistics.chosen_images(len(pixels))]
        return norm_statistics.of_batches(self._statistics, self._variables, norm_statistics.full_batches(
            in_random_order, self._batch_size), self._mesh), len(pixels)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.adapt", __doc__, _DETAILS)
    parser.add_argument("--workdir", metavar="RUN", required=True, help="folder of a trained run")
    parser.add_argument("--images", metavar="DIR|CSV|GLOB", required=True,
                        help="a folder (searched to the bottom), a CSV, or a glob in quotes")
    parser.add_argument("--output", metavar="RUN", required=True, help="the folder to make")
    parser.add_argument("--by_camera", action="store_true", help="each camera's images by that camera's own statistics")
    add_image_options(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: adapt(
        options.workdir, options.images, options.output, by_camera=options.by_camera, keep_going=options.keep_going,
        clip_boxes=options.clip_boxes))


if __name__ == "__main__":
    sys.exit(main())
