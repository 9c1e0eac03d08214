"""The search command: galleries that last, filters, pictures."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from jlml_jax import contact_sheet, extract, features_file, search, user_images
from jlml_jax.gallery import Gallery
from jlml_jax.reranking import Reranking


def write_crops(folder, indices, size=(20, 40)):
    folder.mkdir(exist_ok=True)
    for i in indices:
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}_c{1 + i % 3}s1_{i:06d}_00.png")


@pytest.fixture
def crops(tmp_path):
    write_crops(tmp_path / "crops", range(12))
    return tmp_path / "crops"


@pytest.fixture
def run(run_command, refused_by, tiny_run, loaded_once):
    """Runs the command; returns its lines, or with status=2 the one line of its error."""
    def run(*arguments, status=0, workdir=tiny_run):
        if status == 2:
            return refused_by(search, f"--workdir={workdir}", *arguments)
        returned, out, error = run_command(search, f"--workdir={workdir}", *arguments)
        assert returned == 0, error
        return out.splitlines()
    return run


def found(lines):
    """The names of the files in the table, nearest first, and their distances."""
    rows = [line.split() for line in lines if line[:4].strip().isdigit()]
    return [row[-1].rpartition("/")[2] for row in rows], [float(row[1]) for row in rows]


def names(indices):
    return [f"{i:04d}_c{1 + i % 3}s1_{i:06d}_00.png" for i in indices]


def test_a_folder_is_searched_and_only_what_is_new_is_embedded(run, crops, tmp_path, tiny_extractor, monkeypatch):
    query, index = crops / names([4])[0], tmp_path / "index"
    lines = run(f"--gallery={crops}", f"--query={query}", f"--index={index}", "--top_k=20")
    files, distances = found(lines)
    assert files[0] == query.name and distances[0] == 0 and distances == sorted(distances)
    assert sorted(files) == names(range(12)) and "12 images added, 12 in it" in lines[1]
    # The same order as by features computed here.
    extractor = tiny_extractor
    features = extractor(np.stack([user_images.load_query(str(path), 32, 16)[1] for path in sorted(crops.iterdir())]))
    expected = np.argsort(np.linalg.norm(features - features[4], axis=1), kind="stable")
    assert files == names(expected)

    embedded = []
    original = type(extractor).__call__
    monkeypatch.setattr(type(extractor), "__call__", lambda self, images, cameras: embedded.append(len(images))
                        or original(self, images, cameras))
    write_crops(crops, [12, 13])
    (crops / names([0])[0]).rename(crops / "0099_c1s1_000099_00.png")  # another name, and identity, for the same image
    (crops / names([1])[0]).unlink()
    lines = run(f"--gallery={crops}", f"--query={query}", f"--index={index}", "--top_k=20")
    assert "2 images added, 14 in it" in lines[1] and sum(embedded) == 2 + 1
    files, _ = found(lines)
    assert sorted(files) == [*names(range(2, 14)), "0099_c1s1_000099_00.png"]  # not what is gone
    assert " 99 " in next(line for line in lines if "0099_c1s1" in line)
    assert len(found(run(f"--gallery={index}", f"--query={query}", "--top_k=20"))[0]) == 14  # the whole gallery


def test_without_an_index_the_gallery_is_kept_in_the_run(run, tiny_run, crops, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    assert "12 images added" in run(f"--gallery={crops}", workdir=workdir)[1]
    assert "0 images added, 12 in it" in run(f"--gallery={crops}", workdir=workdir)[1]
    folder, = (workdir / "galleries").glob("*/crops-*")
    assert len(Gallery(folder)) == 12


def test_filters(run, crops, tmp_path):
    query = crops / names([4])[0]  # camera 2
    for arguments, expected in {
        ("--camera=1,3",): [i for i in range(12) if i % 3 != 1],
        ("--exclude_camera=1",): [i for i in range(12) if i % 3 != 0],
        ("--exclude_own_camera",): [i for i in range(12) if i % 3 != 1],
        ("--camera=1,2", "--exclude_own_camera"): range(0, 12, 3),
        ("--query_camera=1", "--exclude_own_camera"): [i for i in range(12) if i % 3 != 0],
        ("--query_camera=9", "--exclude_own_camera"): range(12),  # a camera that the gallery has nothing of
    }.items():
        lines = run(f"--gallery={crops}", f"--query={query}", f"--index={tmp_path / 'i'}", "--top_k=20", *arguments)
        assert sorted(found(lines)[0]) == names(expected)
    error = run(f"--gallery={tmp_path / 'i'}", f"--query={query}", "--camera=9", status=2)
    assert "no image of the gallery has camera 9; its cameras are 1, 2, 3" in error
    error = run(f"--gallery={tmp_path / 'i'}", f"--query={query}", "--camera=2", "--exclude_own_camera", status=2)
    assert "no images to search of these cameras" in error
    unnamed = shutil.copy(query, tmp_path / "somebody.png")
    error = run(f"--gallery={tmp_path / 'i'}", f"--query={unnamed}", "--exclude_own_camera", status=2)
    assert "somebody.png" in error and "--query_camera" in error


def test_many_queries_are_each_searched_for(run, crops, tmp_path):
    wanted = tmp_path / "wanted"
    write_crops(wanted, [4, 7, 20])
    arguments = [f"--index={tmp_path / 'i'}", "--top_k=3"]
    alone = [found(run(f"--gallery={crops}", f"--query={wanted / name}", *arguments)) for name in names([4, 7, 20])]
    lines = run(f"--gallery={crops}", f"--query={wanted}", *arguments)
    assert [line for line in lines if line.startswith("query ")] == [f"query {name}" for name in names([4, 7, 20])]
    assert found(lines)[0] == [file for one in alone for file in one[0]]

    output, picture = tmp_path / "found.csv", tmp_path / "found.png"
    lines = run(f"--gallery={crops}", f"--query={wanted}", f"--output={output}", f"--picture={picture}", *arguments)
    assert f"{output}: 9 images found, for 3 queries" in lines and found(lines) == ([], [])
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["query"], row["rank"]) for row in rows] == [(name, str(rank)) for name in names([4, 7, 20])
                                                            for rank in (1, 2, 3)]
    assert [row["image"] for row in rows] == [str(crops / file) for one in alone for file in one[0]]
    distances = [float(row["distance"]) for row in rows]
    np.testing.assert_allclose(distances, [distance for one in alone for distance in one[1]], atol=1e-4)
    assert {(row["identity"], row["camera"], row["x"], row["query_x"]) for row in rows[:1]} == {("4", "2", "", "")}
    sheet = np.asarray(Image.open(picture))
    for row, name in enumerate(names([4, 7, 20])):
        expected = np.asarray(Image.open(wanted / name).resize((96, 192), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(sheet[8 + 224 * row:][:192, 8:104], expected)


def test_boxes_of_queries_and_found_are_written(run, crops, tmp_path):
    Image.open(crops / names([3])[0]).resize((100, 80)).save(tmp_path / "frame.png")
    table, output = tmp_path / "boxes.csv", tmp_path / "found.csv"
    table.write_text("image,camera,x,y,width,height\nframe.png,door,10,20,30,40\nframe.png,till,50,0,20,50\n")
    run(f"--gallery={table}", f"--query={table}", f"--output={output}", f"--index={tmp_path / 'i'}", "--top_k=1")
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    boxes = [["10", "20", "30", "40"], ["50", "0", "20", "50"]]
    assert [[row[name] for name in ("x", "y", "width", "height")] for row in rows] == boxes
    assert [[row[f"query_{name}"] for name in ("x", "y", "width", "height")] for row in rows] == boxes
    assert [row["camera"] for row in rows] == ["door", "till"]


def test_boxes_beyond_their_frame_are_cut_if_asked_for(run, crops, tmp_path):
    frame = Image.open(crops / names([3])[0]).resize((100, 80))
    frame.save(tmp_path / "frame.png")
    table, output, picture = (tmp_path / name for name in ("boxes.csv", "found.csv", "found.png"))
    table.write_text("image,x,y,width,height\nframe.png,-10,20,30,40\nframe.png,50,0,20,50\n")
    arguments = [f"--gallery={table}", f"--query={table}", f"--index={tmp_path / 'i'}", "--top_k=1"]
    assert "1 of the first 2 images (of 2) are bad: frame.png (line 2): the box -10, 20, 30, 40" in run(
        *arguments, status=2)
    for added in (2, 0):
        lines = run(*arguments, f"--output={output}", f"--picture={picture}", "--clip_boxes")
        assert f"{tmp_path / 'i'}: {added} images added, 2 in it" in lines
        assert lines.count("1 boxes cross the edge of their frame and are cut to it") == 2  # queries, and the gallery
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["distance"] for row in rows] == ["0.000000"] * 2
    assert [[row[name] for name in ("query_x", "x", "y", "width")] for row in rows] == [
        ["0", "0", "20", "20"], ["50", "50", "0", "20"]]
    # What was found is drawn, though the picture knows nothing of how it was listed.
    expected = np.asarray(frame.crop((0, 20, 20, 60)).resize((96, 192), Image.Resampling.BILINEAR))
    sheet = np.asarray(Image.open(picture))
    for left in (8, 8 + 104 + 16):
        np.testing.assert_array_equal(sheet[8:200, left:left + 96], expected)
    # Known as it is cut, it is refused as it was.
    assert "frame.png (line 2): the box -10, 20, 30, 40 is not within" in run(
        *[one for one in arguments if not one.startswith("--query")], status=2)


def test_the_own_camera_is_each_query_s_own(run, crops, tmp_path):
    wanted = tmp_path / "wanted"
    write_crops(wanted, [4, 6])  # cameras 2 and 1
    arguments = [f"--gallery={crops}", f"--query={wanted}", f"--index={tmp_path / 'i'}", "--top_k=20",
                 "--exclude_own_camera"]
    files, _ = found(run(*arguments))
    assert sorted(files[:8]) == names([i for i in range(12) if i % 3 != 1])
    assert sorted(files[8:]) == names([i for i in range(12) if i % 3 != 0])
    lines = run(*arguments, "--camera=2")
    assert sorted(found(lines)[0]) == names([1, 4, 7, 10])
    assert f"nothing is left to search for 1 queries: {names([4])[0]}" in lines
    # Of one person: no camera of theirs.
    assert sorted(found(run(*arguments, "--same_person"))[0]) == names([2, 5, 8, 11])


def test_the_query_itself_can_be_left_out(run, tiny_run, crops, tmp_path):
    arguments = [f"--query={crops}", "--top_k=2", "--exclude_query_images"]
    lines = run(f"--gallery={crops}", f"--index={tmp_path / 'i'}", *arguments)
    files, distances = found(lines)
    assert len(files) == 24 and min(distances) > 0
    assert not [number for number, file in enumerate(files) if file == names([number // 2])[0]]
    assert extract.main([f"--workdir={tiny_run}", f"--images={crops}", f"--output={tmp_path / 'f.npz'}"]) == 0
    assert found(run(f"--gallery={tmp_path / 'f.npz'}", *arguments))[0] == files
    linked = tmp_path / "linked"
    linked.mkdir()
    for crop in crops.iterdir():
        (linked / crop.name).symlink_to(crop)
    assert extract.main([f"--workdir={tiny_run}", f"--images={linked}", f"--output={tmp_path / 'g.npz'}"]) == 0
    assert found(run(f"--gallery={tmp_path / 'g.npz'}", *arguments))[0] == files
    shutil.copy(crops / names([4])[0], tmp_path / "copy.png")  # the same image by another name
    files, distances = found(run(f"--gallery={crops}", f"--index={tmp_path / 'i'}", f"--query={tmp_path / 'copy.png'}",
                                 "--top_k=20", "--exclude_query_images"))
    assert len(files) == 11 and min(distances) > 0
    error = run(f"--gallery={tmp_path / 'f.npz'}", *arguments, "--same_person", status=2)
    assert "has no images to search beside the query images" in error


def test_the_nearest_can_be_re_ranked(run, crops, tmp_path, tiny_extractor, monkeypatch):
    gallery = tiny_extractor.embed_crops(sorted(crops.iterdir()))
    write_crops(tmp_path, [20])
    query = tmp_path / names([20])[0]
    feature = tiny_extractor.embed_crops([query])
    expected = np.argsort(Reranking(feature, gallery).distances(np.arange(1), np.arange(12))[0])
    plain = np.argsort(np.linalg.norm(gallery - feature, axis=1))
    assert expected.tolist() != plain.tolist()
    arguments = [f"--gallery={crops}", f"--query={query}", f"--index={tmp_path / 'i'}", "--rerank"]
    files, distances = found(run(*arguments, "--top_k=12"))
    assert files == names(expected)
    np.testing.assert_allclose(distances, np.linalg.norm(gallery - feature, axis=1)[expected], atol=1e-4)
    assert found(run(*arguments, "--top_k=3"))[0] == files[:3]
    monkeypatch.setattr(search, "RERANKED", 4)  # no others come in
    assert sorted(found(run(*arguments, "--top_k=2"))[0] + found(run(*arguments, "--top_k=4"))[0][2:]) == sorted(
        names(plain[:4]))


def test_images_of_one_person_are_searched_for_by_their_mean(run, crops, tmp_path, tiny_extractor):
    wanted = tmp_path / "wanted"
    write_crops(wanted, [4, 7, 20])
    features = {folder: tiny_extractor(np.stack([user_images.load_query(str(path), 32, 16)[1]
                                                 for path in sorted(folder.iterdir())])) for folder in (crops, wanted)}
    mean = tiny_extractor.mean_features(features[wanted], np.zeros(3, int))
    expected = np.linalg.norm(features[crops] - mean, axis=1)
    lines = run(f"--gallery={crops}", f"--query={wanted}", "--same_person", f"--index={tmp_path / 'i'}", "--top_k=20")
    files, distances = found(lines)
    assert files == names(np.argsort(expected))
    np.testing.assert_allclose(distances, np.sort(expected), atol=1e-4)
    assert any(line.startswith("no verdicts: run python -m jlml_jax.calibrate") for line in lines)
    run(f"--gallery={crops}", f"--query={wanted}", "--same_person", f"--index={tmp_path / 'i'}", "--top_k=1",
        f"--output={tmp_path / 'found.csv'}")
    row, = csv.DictReader((tmp_path / "found.csv").read_text().splitlines())
    assert (row["query"], row["query_images"]) == (names([4])[0], "3")


def test_bad_queries(run, crops, tmp_path, monkeypatch):
    wanted = tmp_path / "wanted"
    write_crops(wanted, [4, 7])
    (wanted / "broken.png").write_bytes(b"no image")
    arguments = [f"--gallery={crops}", f"--query={wanted}", f"--index={tmp_path / 'i'}", "--top_k=1"]
    error = run(*arguments, status=2)
    assert "broken.png" in error and "--keep_going" in error and not (tmp_path / "i").exists()
    assert found(run(*arguments, "--keep_going"))[0] == names([4, 7])
    monkeypatch.setattr(contact_sheet, "MOST_ROWS", 2)
    error = run(*arguments, f"--picture={tmp_path / 'found.png'}", status=2)
    assert "--picture shows 2 queries at most, not 3" in error


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_file_of_features_is_searched(run, tiny_run, crops, tmp_path, suffix):
    file, query = tmp_path / f"features{suffix}", crops / names([7])[0]
    assert extract.main([f"--workdir={tiny_run}", f"--images={crops}", f"--output={file}"]) == 0
    files, distances = found(run(f"--gallery={file}", f"--query={query}", "--top_k=3", "--exclude_camera=1"))
    assert len(files) == 3 and files[0] == query.name and distances[0] == 0
    assert "leave out --index" in run(f"--gallery={file}", f"--index={tmp_path / 'i'}", status=2)


def test_a_gallery_of_another_model_is_refused_with_both_fingerprints(run, tiny_extractor, crops, tmp_path):
    own = tiny_extractor.fingerprint
    Gallery.create(tmp_path / "other", "0123456789abcdef", 32).close()
    table = features_file.FeaturesFile(np.ones((1, 32), np.float32), *np.array([["a"]] * 3), None, "/",
                                       "fedcba9876543210")
    features_file.write(tmp_path / "other.npz", table)
    query = f"--query={crops / names([0])[0]}"
    for arguments, other in (
        ([f"--gallery={tmp_path / 'other'}", query], "0123456789abcdef"),
        ([f"--gallery={crops}", f"--index={tmp_path / 'other'}"], "0123456789abcdef"),
        ([f"--gallery={tmp_path / 'other.npz'}", query], "fedcba9876543210"),
    ):
        error = run(*arguments, status=2)
        assert own in error and other in error
    assert len(Gallery(tmp_path / "other")) == 0


def test_the_picture_shows_the_query_and_what_was_found(run, crops, tmp_path, monkeypatch):
    query, index, picture = crops / names([4])[0], tmp_path / "i", tmp_path / "found.png"
    arguments = [f"--query={query}", "--top_k=3", f"--picture={picture}"]
    second = found(run(f"--gallery={crops}", f"--index={index}", *arguments))[0][1]
    sheet = np.asarray(Image.open(picture))
    cells = [sheet[8:200, left:left + 96] for left in (8, 8 + 104 + 16, 8 + 2 * 104 + 16)]
    expected = np.asarray(Image.open(query).resize((96, 192), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(cells[0], expected)
    np.testing.assert_array_equal(cells[1], expected)
    assert np.abs(cells[2].astype(int) - expected).max() > 50
    (crops / second).unlink()  # a file that is gone leaves its place empty
    run(f"--gallery={index}", *arguments)
    gone = np.asarray(Image.open(picture))[8:200, 8 + 2 * 104 + 16:][:, :96]
    assert (gone == 255).mean() > 0.9
    before = picture.read_bytes()
    monkeypatch.setattr(contact_sheet, "_CROP", (30_000, 192))  # of which a JPEG has no room for four
    picture.rename(picture.with_suffix(".jpg"))
    error = run(f"--gallery={index}", *arguments[:2], f"--picture={picture.with_suffix('.jpg')}", status=2)
    assert "cannot write --picture=" in error and picture.with_suffix(".jpg").read_bytes() == before


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gallery=nowhere", "--query=QUERY"], "nowhere does not exist"),
    (["--gallery=CROPS", "--query=nobody.png"], "nobody.png does not exist"),
    (["--gallery=CROPS", "--picture=found.png", "--output=found.csv"], "--output, --picture without --query: give it"),
    (["--gallery=CROPS", "--query=QUERY", "--output=CROPS"], "is a folder; give a file"),
    (["--gallery=CROPS", "--query=QUERY", "--output=QUERY"], "--query and --output are one file"),
    (["--gallery=CROPS", "--query=QUERY", "--picture=CROPS/0007_c2s1_000007_00.png"], "is one of the images"),
    (["--gallery=nowhere", "--query=CROPS", "--picture=CROPS/0007_c2s1_000007_00.png"], "is one of the images"),
    (["--gallery=CROPS", "--query=QUERY", "--output=f.png", "--picture=./f.png"], "--output and --picture are"),
    (["--gallery=CROPS", "--query=QUERY", "--output=found.JPG"], "would be a CSV; give it a name that ends in .csv"),
    (["--gallery=CROPS", "--query=QUERY", "--picture=found.xbm"], "has no suffix of a format"),
    (["--gallery=CROPS", "--query=QUERY", "--top_k=0"], "--top_k=0 must be at least 1"),
    (["--gallery=CROPS", "--index=CROPS"], "has files in it but is no gallery"),
    (["--gallery=CROPS", "--query=QUERY", "--picture=found.psd"], "--picture=found.psd has no suffix of a format"),
    (["--gallery=CROPS", "--query=QUERY", "--picture=nowhere/found.png"], "nowhere is not a folder"),
])
def test_what_the_user_can_mend(run, crops, arguments, message):
    query = str(crops / names([0])[0])
    arguments = [argument.replace("CROPS", str(crops)).replace("QUERY", query) for argument in arguments]
    assert message in run(*arguments, status=2)
