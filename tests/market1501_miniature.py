"""A miniature Market-1501 in the layout of the original, with its traps; the images are noise, nobody is in them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

NUM_JUNK, NUM_DISTRACTORS = 3, 2


def write_market1501(folder: Path, *, num_train_identities: int = 4, num_test_identities: int = 4,
                     images_per_camera: int = 2, cameras: int = 3, seed: int = 0) -> dict[str, dict[str, int]]:
    """Writes the miniature into `folder` and returns its counts, in the form of `Market1501.EXPECTED`.

    An identity has a colour of its own, so that a model can learn something. Train identities are even numbers from
    2, test identities odd ones from 1. Traps: junk, distractors, names that end in .jpg twice, Thumbs.db files.
    """
    rng = np.random.default_rng(seed)
    subfolders = {name: folder / name for name in ("bounding_box_train", "bounding_box_test", "query", "gt_bbox")}
    for subfolder in subfolders.values():
        subfolder.mkdir(parents=True)
        (subfolder / "Thumbs.db").write_bytes(b"not an image")

    def write(subfolder: str, identity: int, camera: int, frame: int, box: int, color: np.ndarray,
              suffix: str = ".jpg") -> None:
        pixels = np.clip(rng.normal(color, 30, (128, 64, 3)), 0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG")
        person = "-1" if identity == -1 else f"{identity:04d}"
        path = subfolders[subfolder] / f"{person}_c{camera}s1_{frame:06d}_{box:02d}{suffix}"
        path.write_bytes(encoded.getvalue())

    train = [2 * number for number in range(1, num_train_identities + 1)]
    test = [2 * number - 1 for number in range(1, num_test_identities + 1)]
    for identity in train + test:
        color = rng.uniform(40, 215, 3)
        boxes = "bounding_box_train" if identity in train else "bounding_box_test"
        suffix = ".jpg.jpg" if identity == test[-1] else ".jpg"  # in the original, all of identity 1488's
        for camera in range(1, cameras + 1):
            for image in range(images_per_camera):
                frame = 100 * identity + image
                write(boxes, identity, camera, frame, 1, color, suffix)
                write("gt_bbox", identity, camera, frame, 0, color, suffix)
            if identity in test:
                write("query", identity, camera, 100 * identity, 0, color, suffix)
    for identity, number in ((-1, NUM_JUNK), (0, NUM_DISTRACTORS)):
        for image in range(number):
            write("bounding_box_test", identity, 1 + image % cameras, 90_000 + image, 1, rng.uniform(40, 215, 3),
                  ".jpg.jpg" if image == 0 else ".jpg")

    per_identity = cameras * images_per_camera
    return {
        "train": {"images": len(train) * per_identity, "identities": len(train), "cameras": cameras},
        "query": {"images": len(test) * cameras, "identities": len(test), "cameras": cameras},
        "gallery": {"images": len(test) * per_identity + NUM_JUNK + NUM_DISTRACTORS, "identities": len(test),
                    "cameras": cameras, "distractors": NUM_DISTRACTORS, "junk": NUM_JUNK},
        "multi_query": {"images": (len(train) + len(test)) * per_identity, "identities": len(train) + len(test),
                        "cameras": cameras},
    }
