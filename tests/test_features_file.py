"""Files of features: what is written is read again, or told to be damaged."""

import numpy as np
import pytest

from jlml_jax import features_file
from jlml_jax.errors import UserError


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_flipped_bit_of_a_feature_is_told(tmp_path, suffix):
    rng = np.random.default_rng(0)
    table = features_file.FeaturesFile(rng.standard_normal((50, 8)).astype(np.float32), *np.array([["a"] * 50] * 3),
                                       None, "root", "f" * 16)
    path = tmp_path / f"features{suffix}"
    features_file.write(path, table)
    whole = path.read_bytes()
    start = whole.index(table.features.tobytes()[:64])  # NumPy and Parquet both have the numbers as they are
    for position in rng.integers(start, start + table.features.nbytes, 50):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a whole file of features|checksum verification failed"):
            features_file.read(path)


def test_files_that_are_not_whole_or_hold_pickles_are_refused(tmp_path):
    good = features_file.FeaturesFile(np.ones((2, 3), np.float32), np.array(["a", "b"]), np.array(["", ""]),
                                      np.array(["", ""]), None, "/", "f" * 16)
    path = tmp_path / "f.npz"
    features_file.write(path, good)
    whole = path.read_bytes()
    arrays = dict(np.load(path))
    path.write_bytes(whole[:-40])
    damaged = [path]
    for name, change in {
        "pickle": {"files": np.array(["a", {}], object)}, "short": {"cameras": np.array(["a"])},
        "text": {"root": np.array(3)},
        "nan": {"features": np.full((2, 3), np.nan, np.float32)}, "double": {"features": np.ones((2, 3))},
    }.items():
        damaged.append(tmp_path / f"{name}.npz")
        np.savez(damaged[-1], **arrays | change)
    for at, value, name in ((6, 1, "encrypted"), (6, 32, "patched"), (8, 99, "compressed"), (4, 99, "version")):
        damaged.append(tmp_path / f"{name}.npz")
        changed = bytearray(whole)
        changed[whole.index(b"PK\1\2") + 2 + at] = value
        changed[at] = value
        damaged[-1].write_bytes(changed)
    np.savez_compressed(tmp_path / "deflated.npz", **arrays)
    deflated = bytearray((tmp_path / "deflated.npz").read_bytes())
    deflated[60:100] = b"\xff" * 40
    damaged.append(tmp_path / "deflated.npz")
    damaged[-1].write_bytes(deflated)
    for name in ("lacking.npz", "other.parquet"):
        (tmp_path / name).write_bytes(b"text")
        damaged.append(tmp_path / name)
    for bad in damaged:
        with pytest.raises(features_file.UserError, match=bad.name):
            features_file.read(bad)


def test_a_file_beside_the_output_is_left_alone(tmp_path):
    """Two at once write to files of their own, and nobody's file has such a name."""
    table = features_file.FeaturesFile(np.zeros((1, 2), np.float32), *[np.array(["a"])] * 3, None, "/", "f" * 16)
    (tmp_path / "f.npz.part").write_text("mine")
    features_file.write(tmp_path / "f.npz", table)
    assert (tmp_path / "f.npz.part").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
