"""The gallery folder."""

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import child_environment

from jlml_jax import gallery as gallery_module
from jlml_jax.errors import UserError
from jlml_jax.gallery import Gallery, is_gallery
from jlml_jax.user_images import LoadedImage, UserImage

DIM = 16


def entries(first, count, **fields):
    return [LoadedImage(UserImage(Path(f"/x/{i}.png"), f"{i}.png", **fields), bytes([i]) * 32)
            for i in range(first, first + count)]


def features(first, count):
    return np.arange(first, first + count, dtype=np.float32)[:, None].repeat(DIM, 1)


def filled(folder):
    gallery = Gallery.create(folder, "f" * 16, DIM)
    with gallery.writing():
        gallery.add(entries(0, 3, identity="7", camera="1"), features(0, 3))
        gallery.add(entries(3, 2), features(3, 2))
    return gallery


def test_what_is_added_lasts(tmp_path):
    filled(tmp_path / "g").close()
    assert is_gallery(tmp_path / "g") and not is_gallery(tmp_path)
    gallery = Gallery(tmp_path / "g")
    assert (len(gallery), gallery.fingerprint, gallery.dim) == (5, "f" * 16, DIM)
    np.testing.assert_array_equal(gallery.features, features(0, 5))
    assert gallery.image(1) == UserImage(Path("/x/1.png"), "/x/1.png", "7", "1", None)
    assert gallery.cameras.tolist() == ["1", "1", "1", "", ""]
    assert gallery.digests() == {bytes([i]) * 32 for i in range(5)}
    assert gallery.rows_of([bytes([4]) * 32, bytes([2]) * 32, bytes([99]) * 32]) == {bytes([2]) * 32: 2,
                                                                                     bytes([4]) * 32: 4}
    assert gallery.cameras_of([bytes([4]) * 32, bytes([2]) * 32]) == {bytes([2]) * 32: "1", bytes([4]) * 32: ""}


def test_many_images_are_looked_up_as_one_by_one_but_by_few_queries(tmp_path):
    gallery = Gallery.create(tmp_path / "g", "f" * 16, DIM)
    many = [LoadedImage(UserImage(Path("/x"), "x", camera=str(number % 3)), number.to_bytes(32, "big"))
            for number in range(1234)]
    with gallery.writing():
        gallery.add(many, features(0, 1234))
    digests = [loaded.digest for loaded in many[::-1]] + [b"?" * 32]
    rows, cameras = ({digest: value for digest in digests for digest, value in lookup([digest]).items()}
                     for lookup in (gallery.rows_of, gallery.cameras_of))
    queries = []
    gallery._database.set_trace_callback(queries.append)
    assert gallery.rows_of(digests) == rows and len(rows) == 1234
    assert gallery.cameras_of(digests) == cameras
    assert len(queries) < 10


def test_an_image_again_takes_its_last_name_and_what_is_new_of_it(tmp_path):
    gallery = filled(tmp_path)
    moved = LoadedImage(UserImage(Path("/y/z.png"), "z.png", identity="8", box=(1, 2, 3, 4)), bytes([1]) * 32)
    new = LoadedImage(UserImage(Path("/y/n.png"), "n.png", box=(1, 2, 3, 4)), b"n" * 32)
    copy = LoadedImage(UserImage(Path("/y/m.png"), "m.png", camera="5"), b"n" * 32)
    with gallery.writing():
        gallery.add([new, copy], features(8, 2), [moved])
    assert len(gallery) == 6
    assert (gallery.image(1).file, gallery.image(1).identity, gallery.image(1).camera) == ("/y/z.png", "8", "1")
    assert gallery.image(5) == UserImage(Path("/y/m.png"), "/y/m.png", "", "5", (1, 2, 3, 4))
    np.testing.assert_array_equal(gallery.features[5], features(8, 1)[0])


ADDING = """
import sys, numpy as np
from pathlib import Path
from jlml_jax.gallery import Gallery
from jlml_jax.user_images import LoadedImage, UserImage
gallery = Gallery.create(Path(sys.argv[1]), "f" * 16, 256)
for i in range(0, int(sys.argv[2]), 64):
    rows = range(i, i + 64)
    with gallery.writing():
        gallery.add([LoadedImage(UserImage(Path(f"/{r}"), str(r)), r.to_bytes(32, "big")) for r in rows],
                    np.repeat(np.array(rows, np.float32)[:, None], 256, 1))
    print(i + 64, flush=True)
"""


def test_an_image_that_an_earlier_batch_has_added_is_not_added_again(tmp_path):
    gallery = filled(tmp_path)
    with gallery.writing():
        gallery.add(entries(3, 4, camera="9"), features(13, 4))  # 3 and 4 are there
    assert len(gallery) == 7 and gallery.features[:, 0].tolist() == [0, 1, 2, 3, 4, 15, 16]
    assert gallery.cameras.tolist() == ["1", "1", "1", "9", "9", "9", "9"]


def start_adding(folder, count):
    return subprocess.Popen([sys.executable, "-c", ADDING, folder, str(count)], stdout=subprocess.PIPE, text=True,
                            env=child_environment())


def test_two_processes_add_the_same_images_at_the_same_time_once(tmp_path):
    adding = [start_adding(tmp_path / "g", 2560) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].splitlines()[-1] for process in adding] == ["2560", "2560"]
    gallery = Gallery(tmp_path / "g")
    assert len(gallery) == 2560
    assert gallery.features[:, 0].tolist() == [int(gallery.image(row).file[1:]) for row in range(2560)]
    assert sorted(gallery.features[:, 255]) == list(range(2560))


def test_it_survives_being_killed_in_the_middle_of_an_add(tmp_path):
    folder = tmp_path / "g"
    process = start_adding(folder, 10**9)
    for line in process.stdout:
        if int(line) >= 640:
            break
    assert len(Gallery(folder)) >= 640  # another process may look meanwhile
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    told = [int(line) for line in process.stdout]
    process.wait()

    gallery = Gallery(folder)
    count = len(gallery)
    assert count % 64 == 0 and count >= max(told, default=640)
    np.testing.assert_array_equal(gallery.features, np.arange(count, dtype=np.float32)[:, None].repeat(256, 1))
    assert gallery.image(count - 1).file == f"/{count - 1}"
    # What it had appended beyond that is cut off by the next one.
    with open(folder / "features.f32", "ab") as file:
        file.write(b"half a row")
    assert len(Gallery(folder)) == count
    with gallery.writing():
        gallery.add([LoadedImage(UserImage(Path("/last"), "last"), b"l" * 32)], np.full((1, 256), -1, np.float32))
    gallery = Gallery(folder)
    assert len(gallery) == count + 1 and (gallery.features[count] == -1).all()
    assert (folder / "features.f32").stat().st_size == (count + 1) * 256 * 4


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    gallery = filled(tmp_path)

    def fsync(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, gallery.writing():
        patch.setattr(gallery_module.os, "fsync", fsync)
        with pytest.raises(UserError, match="No space left.*is as it was"):
            gallery.add(entries(5, 2), features(5, 2))
    with gallery.writing():  # the database is full, the features are not
        gallery._database.execute(f"PRAGMA max_page_count = {gallery._query('PRAGMA page_count')[0][0]}")
        with pytest.raises(UserError, match="full.*is as it was"):
            gallery.add(entries(5, 200), features(5, 200))
    gallery = Gallery(tmp_path)
    np.testing.assert_array_equal(gallery.features, features(0, 5))
    with gallery.writing():
        gallery.add(entries(5, 2), features(5, 2))
    np.testing.assert_array_equal(Gallery(tmp_path).features, features(0, 7))


def damage_features(folder):
    (folder / "features.f32").write_bytes(b"")


def damage_database(folder):
    (folder / "gallery.sqlite").write_text("text " * 1000)


def another_version(folder):
    with sqlite3.connect(folder / "gallery.sqlite") as database:
        database.execute("PRAGMA user_version = 99")


def statement(text):
    """Damage by an SQL statement that the tables' own constraints would not let through."""
    def damage(folder):
        with sqlite3.connect(folder / "gallery.sqlite") as database:
            database.executescript(f"""
                PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = replace(sql, 'NOT NULL', '');
                PRAGMA writable_schema = RESET; {text};""")
    return damage


@pytest.mark.parametrize("damage", [
    damage_features, damage_database, another_version, statement("DELETE FROM model"),
    statement("INSERT INTO model VALUES ('f', 16)"), statement("UPDATE model SET fingerprint = CAST(x'ff' AS TEXT)"),
    *(statement(f"UPDATE model SET dim = {dim}") for dim in ("NULL", "0", "-16", "1 << 40", "'many'")),
    statement("UPDATE images SET file = NULL"), statement("UPDATE images SET camera = x'00'"),
    statement("UPDATE images SET identity = CAST(x'ff' AS TEXT)"), statement("UPDATE images SET x = 'left'"),
])
def test_a_damaged_gallery_is_refused(tmp_path, damage):
    filled(tmp_path).close()
    damage(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        gallery = Gallery(tmp_path)
        assert len(gallery.cameras) == len(gallery)
        gallery.image(0)


def test_where_nothing_can_be_written_is_told(tmp_path, monkeypatch):
    gallery = filled(tmp_path / "g")

    def lock(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(gallery_module, "lock", lock)
    with pytest.raises(UserError, match=r"cannot write to .*g \(Read-only file system\); give another --index, or .* "
                                        "by --gallery=.*g$"), gallery.writing():
        pass
    with pytest.raises(UserError, match=r"cannot make a gallery in .*new \(.*Read-only file system\); give --index=F"):
        Gallery.create(tmp_path / "new", "f" * 16, DIM)


def test_a_gallery_is_not_made_amid_other_files(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(UserError, match="has files in it"):
        Gallery.create(tmp_path, "f" * 16, DIM)


def test_a_row_that_is_missing_is_told(tmp_path):
    opened = filled(tmp_path)
    opened._database.execute("DELETE FROM images WHERE row = 2")
    opened.close()
    with pytest.raises(UserError, match=r"is damaged \(it has 4 rows, the last of them 4\); make the gallery anew"):
        Gallery(tmp_path)


def test_adding_does_not_read_all_that_is_there(tmp_path):
    """By the steps of SQLite's machine, which a count of the rows takes one of for each."""
    opened = Gallery.create(tmp_path / "g", "f" * 16, DIM)
    steps = []
    for first in (0, 30, 60, 90):
        count = 0

        def step():
            nonlocal count
            count += 1

        with opened.writing():
            opened._database.set_progress_handler(step, 1)
            opened.add(entries(first, 30), features(first, 30))
            opened._database.set_progress_handler(None, 1)
        steps.append(count)
    assert steps[-1] - steps[0] < 30


def test_what_another_process_adds_meanwhile_is_not_there_yet(tmp_path):
    opened = filled(tmp_path)
    other = Gallery(tmp_path)
    with other.writing():
        other.add(entries(5, 4, camera="2"), features(5, 4))
    assert opened.cameras.tolist() == ["1", "1", "1", "", ""] and len(opened) == 5
    assert len(other.cameras) == len(Gallery(tmp_path)) == 9


def test_features_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    filled(tmp_path).close()

    def memmap(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "memmap", memmap)
    with pytest.raises(UserError, match=r"cannot read .*features.f32 \(Permission denied\)"):
        Gallery(tmp_path)
