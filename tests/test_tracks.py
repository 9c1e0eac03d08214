"""Tracks: mean features, and the commands that search, group and calibrate by them."""

import csv
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jlml_jax import calibrate, compare, contact_sheet, extract, extractor, features_file, group, grouping, search
from jlml_jax.errors import UserError
from jlml_jax.tracks import TrackGallery
from jlml_jax.user_images import UserImage, list_images, track_numbers

PEOPLE = {"ann": (200, 30, 30), "bob": (30, 200, 30), "cem": (30, 30, 200)}
# identity, camera, track, images: of one camera both 1 and 2, another camera's 1, and two images of no track
TRACKS = [("ann", "door", "1", 3), ("bob", "door", "2", 2), ("ann", "till", "1", 2), ("cem", "till", "2", 4),
          ("bob", "till", "", 1), ("bob", "till", "", 1)]


@pytest.fixture
def crops(tmp_path):
    """A folder of crops and tracks.csv in it, by turns of the tracks, as several are followed at once."""
    folder = tmp_path / "crops"
    folder.mkdir()
    lines = []
    for number, (who, camera, track, images) in enumerate(TRACKS):
        for i in range(images):
            pixels = np.array(PEOPLE[who]) + np.random.default_rng(10 * number + i).normal(0, 25, (40, 20, 3))
            name = f"{number}_{i}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name)
            lines.append((i, f"{name},{who},{camera},{track}"))
    (folder / "tracks.csv").write_text("\n".join(["image,identity,camera,track", *(line for _, line in sorted(lines))]))
    return folder


@pytest.fixture
def run(run_command, tiny_run, loaded_once):
    def run(command, *arguments, workdir=tiny_run):
        status, out, error = run_command(command, f"--workdir={workdir}", *arguments)
        assert status == 0, error
        return out.splitlines()
    return run


def features_of(folder, tiny_extractor, names):
    return tiny_extractor.embed_crops([folder / name for name in names])


def plainly(tiny_extractor, features):
    """The mean feature of one person's images, each branch made as long as it is in one image."""
    mean = features.astype(np.float64).mean(axis=0).reshape(2, -1)
    return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).ravel()


def expected_means(crops, tiny_extractor):
    names = ([f"{number}_{i}.png" for i in range(images)] for number, (*_, images) in enumerate(TRACKS))
    return np.stack([plainly(tiny_extractor, features_of(crops, tiny_extractor, of_track)) for of_track in names])


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_means_are_those_image_by_image(crops, tiny_extractor, monkeypatch):
    names = sorted(path.name for path in crops.glob("*.png"))
    features = features_of(crops, tiny_extractor, names)
    np.testing.assert_allclose(np.linalg.norm(features.reshape(len(names), 2, -1), axis=2), 1, atol=1e-5)  # per branch
    of = np.array([int(name[0]) for name in names])
    for block in (1, 2, 5, 100):
        monkeypatch.setattr(extractor, "_MEANS_BLOCK", block)
        shuffled = np.random.default_rng(block).permutation(len(names))
        means = tiny_extractor.mean_features(features[shuffled], of[shuffled])
        np.testing.assert_allclose(means, expected_means(crops, tiny_extractor), atol=1e-5)
        # Rows of a larger array, one of them twice.
        rows = np.append(shuffled, 0)
        twice = tiny_extractor.mean_features(features, of[rows], rows)
        np.testing.assert_allclose(twice[1:], means[1:], atol=1e-5)
        np.testing.assert_allclose(twice[0], plainly(tiny_extractor, features[[0, 0, 1, 2]]), atol=1e-5)


def test_features_that_are_not_normalised_have_plain_means(tiny_extractor, monkeypatch):
    monkeypatch.setattr(tiny_extractor, "_normalize", "none")
    features = np.random.default_rng(0).standard_normal((5, tiny_extractor.dim)).astype(np.float32)
    means = tiny_extractor.mean_features(features, np.array([1, 0, 1, 1, 0]))
    np.testing.assert_allclose(means, [features[[1, 4]].mean(0), features[[0, 2, 3]].mean(0)], atol=1e-6)
    assert tiny_extractor.mean_features(features[:0], np.empty(0, int)).shape == (0, tiny_extractor.dim)


def test_each_mean_has_images(tiny_extractor):
    features = np.ones((3, tiny_extractor.dim), np.float32)
    for of in ([0, 2, 2], [0, 0], [7, 7, 7]):
        with pytest.raises(ValueError, match="a number for each image, from 0 on without a gap"):
            tiny_extractor.mean_features(features, of)
    assert tiny_extractor.mean_features(features, [1, 0, 1]).shape == (2, tiny_extractor.dim)


def test_means_of_a_large_gallery_lie_in_memory_once(tiny_extractor, monkeypatch):
    monkeypatch.setattr(extractor, "_MEANS_BLOCK", 100)
    features, of = np.ones((20_000, tiny_extractor.dim), np.float32), np.arange(20_000)
    tracemalloc.start()
    means = tiny_extractor.mean_features(features, of)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert means.dtype == np.float32 and peak < 1.5 * means.nbytes


def test_tracks_are_a_camera_s(crops):
    images = list_images(str(crops / "tracks.csv")).images
    numbers = track_numbers(images)
    assert numbers[:6].tolist() == [0, 1, 2, 3, 4, 5]  # the first image of each
    assert np.bincount(numbers).tolist() == [images for *_, images in TRACKS]
    assert all(int(image.file[0]) == number for image, number in zip(images, numbers, strict=True))
    assert track_numbers([]).tolist() == []


@pytest.mark.parametrize(("lines", "message"), [
    ("a.png,ann,door,7\nb.png,ben,door,7", "t.csv: track 7 of camera door is not of one person: a.png .line 2. and "
     "b.png .line 3. have two identities, ann and ben"),
    ("a.png,ann,,7\nb.png,,,7", "track 7 is not of one person: .* have two identities, ann and none"),
])
def test_a_track_of_two_people_is_refused(tmp_path, lines, message):
    (tmp_path / "t.csv").write_text("image,identity,camera,track\n" + lines)
    with pytest.raises(UserError, match=message):
        list_images(str(tmp_path / "t.csv"))


def test_a_track_is_once_in_a_frame(tmp_path):
    boxes = [UserImage(tmp_path / "f.png", "f.png", box=(x, 0, 8, 16), track="7", camera=camera)
             for x, camera in ((0, "door"), (20, "till"), (20, "till"))]
    assert track_numbers(boxes).tolist() == [0, 1, 1]
    with pytest.raises(UserError, match="are two boxes of one frame"):
        track_numbers([boxes[0], UserImage(tmp_path / "f.png", "f.png", box=(4, 0, 8, 16), track="7", camera="door")])


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_file_of_features_keeps_the_tracks(run, crops, tmp_path, suffix):
    output = tmp_path / f"f{suffix}"
    run(extract, f"--images={crops / 'tracks.csv'}", f"--output={output}")
    table = features_file.read(output)
    listed = list_images(str(crops / "tracks.csv")).images
    assert table.tracks.tolist() == [image.track for image in listed] and "" in table.tracks
    assert [table.image(row).track for row in range(3)] == ["1", "2", "1"]
    assert np.array_equal(track_numbers([table.image(row) for row in range(len(table))]), track_numbers(listed))
    run(extract, f"--images={crops}", f"--output={output}")  # without a CSV there are none
    assert features_file.read(output).tracks is None


def test_tracks_that_are_not_a_row_each_are_refused(tmp_path):
    table = features_file.FeaturesFile(np.ones((2, 3), np.float32), *[np.array(["a", "b"])] * 3, None, "/", "f",
                                       np.array(["1"]))
    features_file.write(tmp_path / "f.npz", table)
    with pytest.raises(UserError, match="not of one length"):
        features_file.read(tmp_path / "f.npz")


@pytest.mark.parametrize("from_file", [False, True])
def test_each_track_is_found_once_by_its_mean(run, crops, tmp_path, tiny_extractor, from_file):
    gallery = crops / "tracks.csv"
    if from_file:
        gallery = tmp_path / "f.npz"
        run(extract, f"--images={crops / 'tracks.csv'}", f"--output={gallery}")
    means = expected_means(crops, tiny_extractor)
    query = features_of(crops, tiny_extractor, ["1_0.png"])[0]
    output = tmp_path / "found.csv"
    run(search, f"--gallery={gallery}", f"--query={crops / '1_0.png'}", f"--output={output}")
    found = rows_of(output)
    distances = np.linalg.norm(means - query, axis=1)
    assert [int(row["image"].rpartition("/")[2][0]) for row in found] == np.argsort(distances).tolist()
    np.testing.assert_allclose([float(row["distance"]) for row in found], np.sort(distances), atol=1e-5)
    by_track = {(row["camera"], row["track"]): row for row in found}
    # The image in the middle stands for it.
    assert by_track["door", "1"]["image"].endswith("0_1.png") and by_track["door", "1"]["identity"] == "ann"
    assert by_track["till", "2"]["image"].endswith("3_2.png")

    lines = run(search, f"--gallery={gallery}", f"--query={crops / '1_0.png'}", "--exclude_query_images",
                "--camera=door")
    assert sum(" track " in line for line in lines) == 1 and lines[-2].endswith("0_1.png track 1")


def test_each_track_is_searched_for_by_its_mean(run, crops, tmp_path, tiny_extractor):
    tracks, output = f"{crops / 'tracks.csv'}", tmp_path / "found.csv"
    run(search, f"--gallery={tracks}", f"--query={tracks}", f"--output={output}", "--exclude_own_camera")
    found = rows_of(output)
    means = expected_means(crops, tiny_extractor)
    cameras = np.array([camera for _, camera, *_ in TRACKS])
    for number, (_, camera, track, images) in enumerate(TRACKS):
        rows = [row for row in found if row["query"][0] == str(number)]
        assert {(row["query_track"], row["query_images"]) for row in rows} == {(track, str(images))}
        others = np.flatnonzero(cameras != camera)
        distances = np.linalg.norm(means[others] - means[number], axis=1)
        assert [int(row["image"].rpartition("/")[2][0]) for row in rows] == others[np.argsort(distances)].tolist()
        np.testing.assert_allclose([float(row["distance"]) for row in rows], np.sort(distances), atol=1e-5)
    one_person = run(search, f"--gallery={tracks}", f"--query={tracks}", "--same_person")
    assert sum(line[:4].strip().isdigit() for line in one_person) == len(TRACKS)  # one query, of all images


def test_rows_lead_to_all_tracks_that_have_them(tiny_extractor, monkeypatch):
    """Those, too, that two tracks share: copies of one image are one row of a gallery."""
    rng = np.random.default_rng(0)
    names, rows = rng.integers(0, 20, 100), rng.integers(0, 80, 100)
    images = [UserImage(Path(f"{number}.png"), "", track=str(name)) for number, name in enumerate(names)]
    numbers = track_numbers(images)
    features = rng.standard_normal((80, tiny_extractor.dim), np.float32)
    table = features_file.FeaturesFile(features, *[np.full(80, "")] * 3, None, "", tiny_extractor.fingerprint)
    gallery = TrackGallery(table, images, rows, tiny_extractor)
    np.testing.assert_allclose(gallery.features, tiny_extractor.mean_features(features[rows], numbers), atol=1e-6)
    monkeypatch.setattr(np, "isin", None)  # a search of all rows for each query
    for wanted in (rows[:1], rows[3:9], np.arange(200), np.array([999]), np.empty(0, int)):
        expected = sorted({number for number, row in zip(numbers.tolist(), rows, strict=True) if row in wanted})
        assert gallery.tracks_of(wanted).tolist() == expected


def test_a_track_is_shown_by_its_middle_whichever_images_were_known(run, crops, tmp_path):
    header, *lines = (crops / "tracks.csv").read_text().splitlines()
    (crops / "known.csv").write_text("\n".join([header, *(line for line in lines if line[:3] in ("0_0", "0_1"))]))
    run(search, f"--gallery={crops / 'known.csv'}", f"--index={tmp_path / 'index'}")
    run(search, f"--gallery={crops / 'tracks.csv'}", f"--query={crops / '0_0.png'}", f"--index={tmp_path / 'index'}",
        f"--output={tmp_path / 'found.csv'}")
    by_track = {(row["camera"], row["track"]): row["image"] for row in rows_of(tmp_path / "found.csv")}
    assert by_track["door", "1"] == str(crops / "0_1.png")


def test_a_track_is_shown_by_its_middle_whichever_frames_it_shares(run, tmp_path):
    """The frames are read as they are listed first, by other tracks: the later before the earlier."""
    for number in range(3):
        Image.new("RGB", (40, 40), (40 * number, 90, 200)).save(tmp_path / f"{number}.png")
    (tmp_path / "boxes.csv").write_text("image,track,x,y,width,height\n2.png,b,20,0,20,40\n" + "".join(
        f"{number}.png,a,0,0,20,40\n" for number in range(3)))
    run(search, f"--gallery={tmp_path / 'boxes.csv'}", f"--query={tmp_path / '0.png'}",
        f"--index={tmp_path / 'index'}", f"--output={tmp_path / 'found.csv'}")
    assert {row["track"]: row["image"] for row in rows_of(tmp_path / "found.csv")} == {
        "a": str(tmp_path / "1.png"), "b": str(tmp_path / "2.png")}


def test_tracks_of_several_cameras_do_not_become_one_camera_s(run, refused_by, tiny_run, crops, tmp_path):
    """door's track 1 and till's would be one."""
    arguments = [f"--gallery={crops / 'tracks.csv'}", f"--index={tmp_path / 'index'}", "--query_camera=yard"]
    error = refused_by(search, f"--workdir={tiny_run}", f"--query={crops / 'tracks.csv'}", *arguments)
    assert "has tracks of 2: door, till; leave out --query_camera" in error
    header, *lines = (crops / "tracks.csv").read_text().splitlines()
    (crops / "door.csv").write_text("\n".join([header, *(line for line in lines if ",door," in line)]))
    lines = run(search, f"--query={crops / 'door.csv'}", *arguments)
    assert sum(line.startswith("query ") for line in lines) == 2


def test_a_picture_has_a_row_for_each_track(run, refused_by, tiny_run, crops, tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MOST_ROWS", 6)  # queries; they have 13 images
    arguments = [f"--gallery={crops / 'tracks.csv'}", f"--query={crops / 'tracks.csv'}",
                 f"--picture={tmp_path / 'found.png'}", f"--index={tmp_path / 'index'}"]
    run(search, *arguments)
    monkeypatch.setattr(contact_sheet, "MOST_ROWS", 5)
    assert "shows 5 queries at most, not 6" in refused_by(search, f"--workdir={tiny_run}", *arguments)


def test_a_lasting_gallery_keeps_images_not_tracks(run, crops, tmp_path):
    index = tmp_path / "index"
    listed = run(search, f"--gallery={crops / 'tracks.csv'}", f"--query={crops / '0_0.png'}", f"--index={index}",
                 "--top_k=20")
    whole = run(search, f"--gallery={index}", f"--query={crops / '0_0.png'}", "--top_k=20")
    rows = [sum(line[:4].strip().isdigit() for line in lines) for lines in (listed, whole)]
    assert rows == [len(TRACKS), sum(images for *_, images in TRACKS)]


@pytest.fixture
def threshold(crops, tiny_extractor):
    """Between the distances within persons and those between them."""
    means = expected_means(crops, tiny_extractor)
    distances = np.linalg.norm(means[:, None] - means, axis=-1)
    who = np.array([who for who, *_ in TRACKS])
    same = who[:, None] == who
    assert distances[same].max() < distances[~same].min()
    return (distances[same].max() + distances[~same].min()) / 2


def test_tracks_are_grouped(run, crops, threshold, tmp_path):
    output = tmp_path / "people.csv"
    lines = run(group, f"--images={crops / 'tracks.csv'}", f"--output={output}", f"--threshold={threshold}")
    assert lines[0].startswith("13 images of 6 tracks in 3 groups")
    assert "precision of 100.0% and a recall of 100.0%" in lines[1]
    labels = rows_of(output)
    people = {}
    for row in labels:
        who, camera, track, _ = TRACKS[int(row["image"].rpartition("/")[2][0])]
        assert (row["camera"], row["track"]) == (camera, track)
        people.setdefault(row["identity"], set()).add(who)
    # By their images: ann has five, bob and cem four, and bob is the first of these in the list.
    assert [people[name] for name in sorted(people)] == [{"ann"}, {"bob"}, {"cem"}]
    assert np.array_equal(track_numbers(list_images(str(output)).images), track_numbers(
        [UserImage(crops / row["image"], "", track=row["track"], camera=row["camera"]) for row in labels]))


def test_a_track_keeps_together_what_images_alone_would_not(run, crops, threshold, tmp_path):
    """A track of a tracker's that goes on from ann to bob: its images are never parted, whatever they show."""
    text = (crops / "tracks.csv").read_text().replace(",ann,door,1", ",,door,1").replace(",bob,door,2", ",,door,1")
    (crops / "mixed.csv").write_text(text)
    run(group, f"--images={crops / 'mixed.csv'}", f"--output={tmp_path / 'people.csv'}", f"--threshold={threshold}")
    labels = rows_of(tmp_path / "people.csv")
    assert len({row["identity"] for row in labels if (row["camera"], row["track"]) == ("door", "1")}) == 1


def test_tracks_in_one_frame_are_different_people(run, tmp_path):
    """The same pixels twice in the second of three frames: two tracks that are followed side by side there."""
    color = Image.new("RGB", (20, 40), PEOPLE["ann"])
    lines = ["image,track,x,y,width,height"]
    for frame, tracks in enumerate(("a", "ab", "bc")):
        sheet = Image.new("RGB", (60, 40))
        for track in tracks:
            left = 20 * "abc".index(track)
            sheet.paste(color, (left, 0))
            lines.append(f"{frame}.png,{track},{left},0,20,40")
        sheet.save(tmp_path / f"{frame}.png")
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    told = run(group, f"--images={tmp_path / 'boxes.csv'}", f"--output={tmp_path / 'people.csv'}", "--threshold=1")
    assert told[0].startswith("5 images of 3 tracks in 2 groups")
    groups = {row["track"]: row["identity"] for row in rows_of(tmp_path / "people.csv")}
    assert groups["a"] == groups["c"] != groups["b"]


def test_so_many_tracks_as_can_be_grouped(run_command, refused_by, tiny_run, loaded_once, crops, tmp_path, monkeypatch):
    monkeypatch.setattr(grouping, "MOST_IMAGES", 6)  # tracks; there are 13 images
    arguments = group, f"--workdir={tiny_run}", f"--images={crops / 'tracks.csv'}", "--threshold=1"
    assert run_command(*arguments, f"--output={tmp_path / 'a.csv'}")[0] == 0
    monkeypatch.setattr(grouping, "MOST_IMAGES", 5)
    assert "6 tracks are more than can be grouped" in refused_by(*arguments, f"--output={tmp_path / 'b.csv'}")


def test_tracks_without_all_cameras_are_not_written(run, crops, threshold, tmp_path):
    text = (crops / "tracks.csv").read_text().replace(",till,", ",,")
    (crops / "some.csv").write_text(text)
    lines = run(group, f"--images={crops / 'some.csv'}", f"--output={tmp_path / 'people.csv'}",
                f"--threshold={threshold}")
    assert any("some images tell no camera, so that the CSV has none, and no tracks" in line for line in lines)
    assert set(rows_of(tmp_path / "people.csv")[0]) == {"image", "identity", "split"}


@pytest.fixture
def calibrated(run, tiny_run, crops, tmp_path):
    """A copy of the run, and functions that calibrate it on images and on tracks."""
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    for name, images in (("tracks", crops / "tracks.csv"), ("images", crops / "images.csv")):
        if name == "images":
            lines = [line.split(",")[:3] for line in (crops / "tracks.csv").read_text().splitlines()]
            images.write_text("\n".join(map(",".join, lines)))
        run(extract, f"--images={images}", f"--output={tmp_path / name}.npz", workdir=workdir)

    def calibrate_on(name):
        lines = run(calibrate, f"--features={tmp_path / name}.npz", workdir=workdir)
        content = json.loads((workdir / "calibration.json").read_text())
        for entry, threshold in zip(content["thresholds"], (9.0, 8.0, 7.0), strict=True):  # too few pairs measure these
            entry["threshold"] = threshold
        (workdir / "calibration.json").write_text(json.dumps(content))
        return lines, content
    return workdir, calibrate_on


def test_pairs_of_tracks_are_counted(calibrated, run, refused_by, crops, tmp_path):
    workdir, calibrate_on = calibrated
    lines, content = calibrate_on("tracks")
    # ann is seen by both cameras once each; bob by door once and by till twice.
    assert "6 tracks of 3 people: 3 pairs of the same person from different cameras, 11 of different people" in lines
    assert content["source"] == {"features": "tracks.npz", "tracks": 6, "identities": 3}
    lines, content = calibrate_on("images")
    assert content["source"] == {"features": "images.npz", "images": 13, "identities": 3}
    (crops / "one.csv").write_text("image,identity,camera,track\n0_0.png,ann,door,1\n0_1.png,ann,door,1")
    run(extract, f"--images={crops / 'one.csv'}", f"--output={tmp_path / 'one.npz'}")
    assert "no two of the 1 tracks show one person" in refused_by(calibrate, f"--workdir={workdir}",
                                                                  f"--features={tmp_path / 'one.npz'}")


def test_verdicts_are_for_what_they_were_measured_on(calibrated, run, crops):
    workdir, calibrate_on = calibrated
    one, tracks, images = (f"{crops / name}" for name in ("0_0.png", "tracks.csv", "images.csv"))
    pairs = {("images", images, one): True, ("images", tracks, tracks): False, ("images", tracks, one): False,
             ("tracks", tracks, tracks): True, ("tracks", images, one): False, ("tracks", tracks, one): False}
    why = {("images", tracks): "calibrated on single images; for tracks", ("tracks", one): "on an image and a track"}
    last = None
    for (measured, gallery, query), given in pairs.items():
        if measured != last:
            calibrate_on(last := measured)
        lines = run(search, f"--gallery={gallery}", f"--query={query}", "--top_k=2", workdir=workdir)
        assert any("same person at" in line for line in lines) == given
        assert any(line.startswith("no verdicts: ") for line in lines) != given
        if (measured, query) in why and gallery == tracks:
            assert why[measured, query] in lines[-1]
    lines = run(search, f"--gallery={images}", f"--query={images}", "--same_person", workdir=workdir)
    assert "not on all images of a person" in lines[-1]
    lines = run(compare, one, one, workdir=workdir)
    assert lines[-1].startswith("no verdict: the run was calibrated on tracks; for single images calibrate")


def test_groups_say_what_the_threshold_was_measured_on(calibrated, run, crops, tmp_path):
    workdir, calibrate_on = calibrated
    for number, (measured, images, words) in enumerate((
            ("images", "tracks.csv", "a false accept rate between images of 1e-3"),
            ("images", "images.csv", "a false accept rate of 1e-3"),
            ("tracks", "tracks.csv", "a false accept rate of 1e-3"),
            ("tracks", "images.csv", "a false accept rate between tracks of 1e-3"))):
        calibrate_on(measured)
        lines = run(group, f"--images={crops / images}", f"--output={tmp_path / f'{number}.csv'}", workdir=workdir)
        assert words in lines[0]
