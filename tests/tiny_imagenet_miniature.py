"""A miniature Tiny-ImageNet in the layout of the original; the images are noise."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ["n02124075", "n04067472", "n01443537"]  # in no order, as in the original
VALIDATION = dict(zip((f"val_{number}.JPEG" for number in (0, 1, 2, 10, 11, 3)), WNIDS * 2, strict=True))


def _write_image(path: Path, mode: str = "RGB") -> None:
    pixels = np.random.default_rng(list(path.name.encode())).integers(0, 255, (64, 64, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(encoded, "JPEG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded.getvalue())


def write_tiny_imagenet(folder: Path) -> dict[str, dict[str, int]]:
    """Writes the miniature into `folder` and returns its counts, in the form of `TinyImagenet.EXPECTED`."""
    for wnid in WNIDS:
        for number in (0, 1, 10, 499):
            _write_image(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", "L" if number == 10 else "RGB")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    for name in VALIDATION:
        _write_image(folder / "val" / "images" / name)
    _write_image(folder / "test" / "images" / "test_0.JPEG")
    write_annotations(folder, VALIDATION)
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (folder / "words.txt").write_text(
        "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\n")
    return {"train": {"images": 12, "identities": 3, "cameras": 1},
            "validation": {"images": 6, "identities": 3, "cameras": 1}}


def write_annotations(folder: Path, wnids: dict[str, str]) -> None:
    """Writes the classes of the validation images: by file name, the WordNet id."""
    lines = [f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in wnids.items()]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
