"""The group command: labels that prepare takes, boxes of frames, files of features, thresholds, what is refused."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from jlml_jax import calibrate, extract, group, grouping, prepare, protocols
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


def test_a_folder_becomes_labels_that_prepare_takes(run, crops, threshold, tmp_path, run_command, tiny_config):
    output = tmp_path / "people.csv"
    lines = run(f"--images={crops}", f"--output={output}", f"--threshold={threshold}", "--min_images=3")
    assert "14 images in 4 groups" in lines[0] and "the largest of 5" in lines[0]
    assert lines[1] == f"{output}: 12 images of 3 groups; 2 images in groups of fewer than 3 are left out"
    labels = rows(output)
    assert set(labels[0]) == {"image", "identity", "split"}  # no camera is known
    assert [row["identity"] for row in labels] == ["0001"] * 5 + ["0002"] * 4 + ["0003"] * 3
    for row in labels:
        assert PERSONS[int(row["image"].removeprefix("crops/")[:2])] == int(row["identity"]) - 1

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
    assert {row["identity"] for row in labels} == {"0001", "0002", "0003", "0004"}
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
    for identity in ("0001", "0002"):
        assert {row["image"] for row in labels if row["identity"] == identity} == {"frame0.png", "frame1.png"}
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
    assert "calibrate --workdir=" in refusal(f"--images={crops}", output)
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    assert run_command(calibrate, f"--workdir={workdir}")[0] == 0
    told = run(f"--images={crops}", output, "--false_accept_rate=0.01", workdir=workdir)[0]
    assert "a false accept rate of 1e-2" in told
    _, _, error = run_command(group, f"--workdir={workdir}", f"--images={crops}", output, "--false_accept_rate=0.5")
    assert "no threshold is known for a false accept rate of 5e-1: the run's calibration has 1e-2" in error


def test_the_picture_shows_the_groups_from_the_most_typical_image_on(run, crops, threshold, tmp_path):
    picture = tmp_path / "people.png"
    run(f"--images={crops}", f"--output={tmp_path / 'people.csv'}", f"--threshold={threshold}", f"--picture={picture}")
    with Image.open(picture) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert pixels.shape[0] == 4 * (192 + 2 * 8 + 16)
    for row in range(4):
        center = pixels[row * 224 + 8 + 96, 8 + 48]
        assert np.abs(center - COLORS[row]).max() < 12
    last = pixels[8 + 96, 8 + 16 + 4 * 104 + 48]  # the fifth of the largest group
    assert np.abs(last - COLORS[0]).max() < 12


def test_images_out_of_the_reach_of_the_csv(refusal, crops, tmp_path):
    (tmp_path / "labels").mkdir()
    error = refusal(f"--images={crops}", f"--output={tmp_path / 'labels' / 'people.csv'}", "--threshold=1")
    assert f"00.png is not in {tmp_path / 'labels'}" in error and f"give --output={crops / 'people.csv'}" in error
    (tmp_path / "labels" / "crops").symlink_to(crops)
    error = refusal(f"--images={tmp_path / 'labels' / 'crops'}", f"--output={tmp_path / 'labels' / 'people.csv'}",
                    "--threshold=1")
    assert "is not in" in error  # prepare follows no link out of the folder
    assert not list(tmp_path.glob("labels/*.csv"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--threshold=1", "--false_accept_rate=1e-3"], "two ways to say one thing"),
    (["--threshold=0"], "must be above 0"),
    (["--threshold=nan"], "must be above 0"),
    (["--threshold=1", "--min_images=0"], "must be at least 1"),
    (["--threshold=1e-6", "--min_images=2"], "no group has 2 images; give a lower --min_images, or a higher threshold"),
    (["--threshold=1", "--picture=people.none"], "no suffix of a format of pictures"),
])
def test_arguments_that_are_refused(refusal, crops, tmp_path, arguments, message):
    assert message in refusal(f"--images={crops}", f"--output={tmp_path / 'people.csv'}", *arguments)
    assert not (tmp_path / "people.csv").exists()


def test_what_would_be_replaced_and_too_many_images(refusal, crops, tmp_path, monkeypatch):
    (tmp_path / "list.csv").write_text("image\ncrops/00.png\ncrops/01.png\n")
    error = refusal(f"--images={tmp_path / 'list.csv'}", f"--output={tmp_path / 'list.csv'}", "--threshold=1")
    assert "--images and --output are one file" in error
    monkeypatch.setattr(grouping, "MOST_IMAGES", 13)
    monkeypatch.setattr(group, "load_extractor", lambda _: pytest.fail("embeds what cannot be grouped"))
    assert "14 images are more than can" in refusal(f"--images={crops}", f"--output={tmp_path / 'people.csv'}")


def test_the_output_must_be_a_csv(refusal, crops, tmp_path):
    assert "must end in .csv" in refusal(f"--images={crops}", f"--output={tmp_path / 'people.txt'}", "--threshold=1")


def test_the_labels_list_images_as_all_commands_do(run, crops, threshold, tmp_path):
    run(f"--images={crops}", f"--output={crops / 'people.csv'}", f"--threshold={threshold}")
    listed = list_images(str(crops / "people.csv")).images
    assert len(listed) == 14 and {image.identity for image in listed} == {"0001", "0002", "0003", "0004"}
