"""The group command: labels that prepare takes, boxes of frames, files of features, thresholds, what is refused."""

import csv
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from jlml_jax import calibrate, contact_sheet, extract, features_file, group, grouping, prepare, protocols
from jlml_jax.user_images import list_images

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 220)]  # of persons


def person(color, seed):
    pixels = np.array(color) + np.random.default_rng(seed).normal(0, 2, (40, 20, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture
def crops(tmp_path):
    """Four persons; five images of the first, one fewer of each next: file i is of person PERSONS[i]."""
    (tmp_path / "crops").mkdir()
    for i, who in enumerate(PERSONS):
        person(COLORS[who], i).save(tmp_path / "crops" / f"{i:02d}.png")
    return tmp_path / "crops"


PERSONS = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 0, 1, 0]


@pytest.fixture
def run(run_command, tiny_run, loaded_once):
    def run(*arguments, workdir=tiny_run):
        status, out, error = run_command(group, f"--workdir={workdir}", *arguments)
        assert status == 0, error
        return out.splitlines()
    return run


@pytest.fixture
def refusal(refused_by, tiny_run, loaded_once):
    return lambda *arguments: refused_by(group, f"--workdir={tiny_run}", *arguments)


@pytest.fixture
def threshold(crops, tiny_extractor):
    """Between the distances within persons and those between them."""
    features = tiny_extractor.embed_crops(sorted(crops.iterdir()))
    distances = np.linalg.norm(features[:, None] - features, axis=-1)
    same = np.array(PERSONS)[:, None] == PERSONS
    assert distances[same].max() < distances[~same].min()
    return (distances[same].max() + distances[~same].min()) / 2


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def number_of(row):
    """Of the group: identities are such as 3fa9-00001."""
    return int(row["identity"].partition("-")[2])


def test_a_folder_becomes_labels_that_prepare_takes(run, crops, threshold, tmp_path, run_command, tiny_config):
    output = tmp_path / "people.csv"
    lines = run(f"--images={crops}", f"--output={output}", f"--threshold={threshold}", "--min_images=3")
    assert "14 images in 4 groups" in lines[0] and "the largest of 5" in lines[0]
    assert lines[1] == f"{output}: 12 images of 3 groups; 2 images in groups of fewer than 3 are left out"
    labels = rows(output)
    assert set(labels[0]) == {"image", "identity", "split"}  # no camera is known
    assert [number_of(row) for row in labels] == [1] * 5 + [2] * 4 + [3] * 3
    for row in labels:
        assert PERSONS[int(row["image"].removeprefix("crops/")[:2])] == number_of(row) - 1

    status, _, error = run_command(prepare, "folder/grouped", f"--source={output}", f"--data_dir={tmp_path / 'data'}")
    assert status == 0, error
    tiny_config.data.data_dir = str(tmp_path / "data")
    trial = protocols.load("folder/grouped", tiny_config.data).trial(0)
    assert trial.query is None and np.bincount(trial.train.identities).tolist() == [0, 5, 4, 3]


def test_known_identities_are_only_compared_with(run, crops, threshold, tmp_path):
    lines = ["image,identity,camera"]
    for i, who in enumerate(PERSONS):
        # One image of the first person is wrongly labelled; some are not labelled, or nobody.
        name = {0: "person 1", 5: "", 6: "distractor", 9: "junk"}.get(i, f"person {who}")
        lines.append(f"crops/{i:02d}.png,{name},door {i % 2}")
    (tmp_path / "listed.csv").write_text("\n".join(lines))
    told = run(f"--images={tmp_path / 'listed.csv'}", f"--output={tmp_path / 'people.csv'}", f"--threshold={threshold}")
    # Of 11 images: the group of the first person has 5, of which one is said to be person 1, of whom there are 3.
    precision = (4 * 4 / 5 + 1 / 5 + 6) / 11
    recall = (8 + 2 * 2 / 3 + 1 / 3) / 11
    assert told[1].startswith("11 images have an identity")
    assert f"a precision of {precision:.1%} and a recall of {recall:.1%}" in told[1]
    labels = rows(tmp_path / "people.csv")
    assert {number_of(row) for row in labels} == {1, 2, 3, 4}
    assert all(row["camera"] == f"door {int(row['image'][6:8]) % 2}" for row in labels)


def test_boxes_of_a_frame_are_different_people(run, tmp_path):
    """Twice the same person in each of two frames, by the pixels: as detections they are two."""
    for frame in range(2):
        sheet = Image.new("RGB", (60, 40))
        for left in (0, 30):
            sheet.paste(person(COLORS[0], 0), (left, 0))
        sheet.save(tmp_path / f"frame{frame}.png")
    boxes = ["image,x,y,width,height", *(f"frame{i}.png,{x},0,20,40" for i in range(2) for x in (0, 30))]
    (tmp_path / "boxes.csv").write_text("\n".join(boxes))
    lines = run(f"--images={tmp_path / 'boxes.csv'}", f"--output={tmp_path / 'people.csv'}", "--threshold=1")
    assert "4 images in 2 groups" in lines[0]
    labels = rows(tmp_path / "people.csv")
    for number in (1, 2):
        assert {row["image"] for row in labels if number_of(row) == number} == {"frame0.png", "frame1.png"}
    assert {(row["x"], row["y"], row["width"], row["height"]) for row in labels} == {
        ("0", "0", "20", "40"), ("30", "0", "20", "40")}


def test_a_file_of_features_gives_the_same(run, run_command, tiny_run, crops, threshold, tmp_path):
    features, of_images, of_features = (tmp_path / name for name in ("features.npz", "a.csv", "b.csv"))
    assert run_command(extract, f"--workdir={tiny_run}", f"--images={crops}", f"--output={features}")[0] == 0
    run(f"--images={crops}", f"--output={of_images}", f"--threshold={threshold}")
    shutil.move(crops, tmp_path / "elsewhere")  # the images are not read again
    run(f"--images={features}", f"--output={of_features}", f"--threshold={threshold}")
    assert of_features.read_text() == of_images.read_text()


def test_the_threshold_is_that_of_the_calibration(run, run_command, refusal, tiny_run, crops, tmp_path):
    output = f"--output={tmp_path / 'people.csv'}"
    told = refusal(f"--images={crops}", output)
    assert "calibrate --workdir=" in told and "with --features of labelled images of yours if" in told
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    assert run_command(calibrate, f"--workdir={workdir}")[0] == 0
    told = run(f"--images={crops}", output, "--false_accept_rate=0.01", workdir=workdir)[0]
    assert "a false accept rate of 1e-2" in told
    (tmp_path / "people.csv").unlink()
    _, _, error = run_command(group, f"--workdir={workdir}", f"--images={crops}", output, "--false_accept_rate=0.5")
    assert "no threshold is known for a false accept rate of 5e-1: the run's calibration has 1e-2" in error


def test_the_picture_shows_the_groups_from_the_most_typical_image_on(run, crops, threshold, tmp_path, monkeypatch):
    """The first person's image 8 is unlike the others, and comes last; of five images three are shown."""
    monkeypatch.setattr(group, "_SHOWN", 3)
    odd = np.asarray(person(COLORS[0], 8)).copy()
    odd[30:] = 90
    Image.fromarray(odd).save(crops / "08.png")
    picture = tmp_path / "people.png"
    run(f"--images={crops}", f"--output={tmp_path / 'people.csv'}", f"--threshold={threshold}", f"--picture={picture}")
    labels = rows(tmp_path / "people.csv")
    assert labels[4]["image"] == "crops/08.png" and number_of(labels[4]) == 1
    with Image.open(picture) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert pixels.shape == (4 * (192 + 2 * 8 + 16), 8 + 3 * 104 + 16, 3)
    for row in range(4):
        assert np.abs(pixels[row * 224 + 8 + 96, 8 + 48] - COLORS[row]).max() < 12
    legs = [pixels[8 + 180, 8 + column * 104 + (16 if column else 0) + 48] for column in range(3)]
    assert [bool(np.abs(leg - 90).max() < 20) for leg in legs] == [False, False, True]


def test_images_out_of_the_reach_of_the_csv(refusal, crops, tmp_path):
    (tmp_path / "labels").mkdir()
    error = refusal(f"--images={crops}", f"--output={tmp_path / 'labels' / 'people.csv'}", "--threshold=1")
    assert f"00.png, 01.png, 02.png, ... are not in {tmp_path / 'labels'}" in error
    assert f"give --output={crops / 'people.csv'}" in error
    # prepare follows no link out of the folder; the advice is where the images really are.
    (tmp_path / "labels" / "crops").symlink_to(crops)
    error = refusal(f"--images={tmp_path / 'labels' / 'crops'}", f"--output={tmp_path / 'labels' / 'people.csv'}",
                    "--threshold=1")
    assert f"give --output={crops / 'people.csv'}" in error
    assert not list(tmp_path.glob("labels/*.csv"))


def test_a_folder_goes_by_any_of_its_names(run, crops, threshold, tmp_path):
    (tmp_path / "link").symlink_to(crops)
    run(f"--images={crops}", f"--output={tmp_path / 'link' / 'people.csv'}", f"--threshold={threshold}")
    first = (crops / "people.csv").read_text()
    (crops / "people.csv").unlink()
    run(f"--images={tmp_path / 'link'}", f"--output={crops / 'people.csv'}", f"--threshold={threshold}")
    assert (crops / "people.csv").read_text() == first


def test_what_is_listed_twice_is_kept_once(run, crops, threshold, tmp_path, run_command):
    """A repeated line, a link to a file, and boxes that are one when they are cut to their frame."""
    (crops / "again.png").symlink_to(crops / "00.png")
    lines = ["image,x,y,width,height", "00.png,0,0,20,40", "00.png,0,0,20,40", "again.png,0,0,20,40",
             "01.png,0,0,20,40", "01.png,-2,0,22,40", *(f"{i:02d}.png,0,0,20,40" for i in range(2, 14))]
    (crops / "boxes.csv").write_text("\n".join(lines))
    told = run(f"--images={crops / 'boxes.csv'}", f"--output={crops / 'people.csv'}", f"--threshold={threshold}",
               "--clip_boxes")
    assert "3 images are there twice, and are kept once" in told
    labels = rows(crops / "people.csv")
    assert sorted(row["image"] for row in labels) == [f"{i:02d}.png" for i in range(14)]
    status, _, error = run_command(prepare, "folder/once", f"--source={crops / 'people.csv'}",
                                   f"--data_dir={tmp_path / 'data'}")
    assert status == 0, error


def test_each_image_is_looked_up_once_at_most(run, crops, threshold, tmp_path, monkeypatch):
    looked_up, original = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **options: looked_up.append(str(path))
                        or original(path, **options))
    (crops / "again.png").symlink_to("00.png")
    run(f"--images={crops}", f"--output={crops / 'people.csv'}", f"--threshold={threshold}")
    assert max(looked_up.count(str(path)) for path in crops.iterdir()) == 1


def test_cameras_of_some_images_are_those_of_none(run, crops, threshold, tmp_path):
    lines = ["image,camera", "00.png,door", *(f"{i:02d}.png," for i in range(1, 14))]
    (crops / "listed.csv").write_text("\n".join(lines))
    told = run(f"--images={crops / 'listed.csv'}", f"--output={crops / 'people.csv'}", f"--threshold={threshold}")
    assert "some images tell no camera, so that the CSV has none: it would need those of all" in told
    assert "camera" not in rows(crops / "people.csv")[0]


def test_each_grouping_has_names_of_its_own(run, crops, threshold, tmp_path):
    """So that people of one are not taken for those of another, where their numbers are the same."""
    first, again, other = (crops / name for name in ("a.csv", "b.csv", "c.csv"))
    for output in (first, again):
        run(f"--images={crops / '*.png'}", f"--output={output}", f"--threshold={threshold}")
    (crops / "13.png").unlink()
    run(f"--images={crops / '*.png'}", f"--output={other}", f"--threshold={threshold}")
    assert first.read_text() == again.read_text()
    identities = [{row["identity"] for row in rows(path)} for path in (first, other)]
    assert len(identities[0]) == len(identities[1]) == 4 and not identities[0] & identities[1]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--threshold=1", "--false_accept_rate=1e-3"], "two ways to say one thing"),
    (["--threshold=0"], "must be above 0"),
    (["--threshold=nan"], "must be above 0"),
    (["--threshold=inf"], "must be above 0, and finite"),
    (["--threshold=1", "--min_images=0"], "--min_images=0 must be from 1 to the number of images, 14"),
    (["--threshold=1", "--min_images=15"], "--min_images=15 must be from 1 to"),
    (["--threshold=1e-6", "--min_images=2"], "no group has 2 images; give a lower --min_images, or a higher threshold"),
    (["--threshold=1", "--picture=people.none"], "no suffix of a format of pictures"),
])
def test_arguments_that_are_refused(refusal, crops, tmp_path, arguments, message):
    assert message in refusal(f"--images={crops}", f"--output={tmp_path / 'people.csv'}", *arguments)
    assert not (tmp_path / "people.csv").exists()


def test_nothing_is_replaced(refusal, crops, tmp_path):
    output = tmp_path / "people.csv"
    output.write_text("corrected by hand")
    error = refusal(f"--images={crops}", f"--output={output}", "--threshold=1")
    assert "is there already, and may have been corrected by hand; remove it or give another name" in error
    assert output.read_text() == "corrected by hand"
    output.unlink()
    (tmp_path / "link.png").symlink_to(crops / "03.png")
    before = (crops / "03.png").read_bytes()
    for picture in (crops / "03.png", tmp_path / "link.png"):
        error = refusal(f"--images={crops}", f"--output={output}", "--threshold=1", f"--picture={picture}")
        assert "is one of the images, and would be replaced" in error
    assert (crops / "03.png").read_bytes() == before and not output.exists()


def test_a_picture_that_fails_leaves_no_labels(refusal, crops, tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "_CROP", (30_000, 192))
    error = refusal(f"--images={crops}", f"--output={tmp_path / 'people.csv'}", "--threshold=1",
                    f"--picture={tmp_path / 'people.jpg'}")
    assert "cannot write --picture" in error and not (tmp_path / "people.csv").exists()


def test_what_cannot_be_grouped_is_told_before_it_is_embedded(refusal, crops, tmp_path, monkeypatch, tiny_extractor):
    monkeypatch.setattr(group, "load_extractor", lambda _: pytest.fail("has been embedded"))
    monkeypatch.setattr(grouping, "MOST_IMAGES", 13)
    output = f"--output={tmp_path / 'people.csv'}"
    assert "14 images are more than can be grouped at once, 13" in refusal(f"--images={crops}", output)
    (crops / "13.png").rename(crops / " 13.png")
    monkeypatch.undo()
    assert "begin or end with a space, which a CSV does not keep: ' 13.png'" in refusal(
        f"--images={crops}", f"--output={crops / 'people.csv'}")
    none = features_file.FeaturesFile(np.empty((0, 32), np.float32), *[np.array([], str)] * 3, None, str(crops),
                                      tiny_extractor.fingerprint)
    features_file.write(tmp_path / "none.npz", none)
    assert "none.npz has no images" in refusal(f"--images={tmp_path / 'none.npz'}", output)


def test_the_output_must_be_a_csv(refusal, crops, tmp_path):
    assert "must end in .csv" in refusal(f"--images={crops}", f"--output={tmp_path / 'people.txt'}", "--threshold=1")


def test_the_labels_list_images_as_all_commands_do(run, crops, threshold, tmp_path):
    run(f"--images={crops}", f"--output={crops / 'people.csv'}", f"--threshold={threshold}")
    listed = list_images(str(crops / "people.csv")).images
    assert len(listed) == 14 and len({image.identity for image in listed}) == 4
