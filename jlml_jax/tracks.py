"""Tracks: images of a person whom a tracker has followed through one camera, matched by the mean of their features."""

from collections.abc import Sequence

import numpy as np

from jlml_jax.extractor import Extractor
from jlml_jax.features_file import FeaturesFile
from jlml_jax.gallery import Gallery
from jlml_jax.user_images import UserImage, track_numbers


class TrackGallery:
    """The tracks of a gallery's images, to be searched in its place. An image of no track is one by itself.

    Attributes:
        gallery: which has the images.
        features: float32 [T, D], the mean of each track's features, normalised as these are.
        cameras: str [T], empty where not known.
    """

    def __init__(self, gallery: Gallery | FeaturesFile, images: Sequence[UserImage], rows: np.ndarray,
                 extractor: Extractor):
        """`images` are those to be searched, in any number of tracks, and `rows` theirs in `gallery`, int [N]."""
        tracks = track_numbers(images)
        by_row = np.argsort(rows, kind="stable")  # a row is there twice if two tracks have copies of one image
        self.gallery, self._rows, self._tracks = gallery, rows[by_row], tracks[by_row]
        self.features = extractor.mean_features(gallery.features, tracks, rows)
        order = np.argsort(tracks, kind="stable")
        starts, sizes = np.unique(tracks[order], return_index=True, return_counts=True)[1:]
        self._shown = [images[index] for index in order[starts + sizes // 2]]
        self.cameras = np.array([image.camera for image in self._shown], np.str_)

    def __len__(self) -> int:
        return len(self.features)

    def image(self, track: int) -> UserImage:
        """The image that stands for a track: that in its middle."""
        return self._shown[track]

    def tracks_of(self, rows: np.ndarray) -> np.ndarray:
        """The tracks that any of these rows of the gallery belong to, int64 [M]."""
        starts, stops = (np.searchsorted(self._rows, rows, side) for side in ("left", "right"))
        places = [np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return np.unique(self._tracks[np.concatenate([np.empty(0, int), *places])])
