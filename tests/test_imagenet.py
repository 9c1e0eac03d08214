"""ImageNet-2012 through TFDS's own builder, on miniatures of its two archives, and images that stay on disk."""

import contextlib
import io
import json
import resource
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from processes import WITHOUT_TENSORFLOW, run_program

from jlml_jax import datasets, input_pipeline, prepare
from jlml_jax.datasets import imagenet
from jlml_jax.datasets.imagenet import ARCHIVES, Imagenet2012
from jlml_jax.datasets.split import Split, StoredImages
from jlml_jax.datasets.stored import open_split
from jlml_jax.errors import UserError

LABELS = {"n01440764": 0, "n01443537": 1, "n01629819": 25, "n15075141": 999}  # as in the ILSVRC's sorted list
COUNTS = {"train": 12, "validation": 7}
SPLITS = tuple(COUNTS)


def draw(seed, mode="RGB"):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_imagenet(folder, seed=0):
    """Writes the two archives into `folder`; returns the images by split and name, in the order of the archives."""
    folder.mkdir(parents=True)
    images = {"train": {}, "validation": {}}
    classes = []
    for wnid, label in LABELS.items():
        members = {f"{wnid}_{number}.JPEG": draw((seed, label, number), "L" if number == 7 else "RGB")
                   for number in (10026, 7, 334)}
        images["train"] |= members
        write_tar(folder / "class.tar", members.items())
        classes.append((f"{wnid}.tar", (folder / "class.tar").read_bytes()))
    (folder / "class.tar").unlink()
    write_tar(folder / ARCHIVES["train"], classes)
    for number in (3, 1, 7, 2, 6, 5, 4):  # in the original, too, they are in no order
        images["validation"][f"ILSVRC2012_val_{number:08d}.JPEG"] = draw((seed, 5000, number))
    write_tar(folder / ARCHIVES["validation"], images["validation"].items())
    return images


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    monkeypatch.setattr(Imagenet2012, "EXPECTED", COUNTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The miniature's images by split and name, and the data folder that prepare built from its archives."""
    source, data_dir = tmp_path_factory.mktemp("imagenet") / "source", tmp_path_factory.mktemp("data")
    images = write_imagenet(source)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(Imagenet2012, "EXPECTED", COUNTS)
        assert prepare.main(["imagenet2012", f"--source={source}", f"--data_dir={data_dir}"]) == 0
    assert out.getvalue().splitlines()[-1] == "imagenet2012 is prepared: train 12, validation 7"
    return images, data_dir


@pytest.fixture
def splits(built):
    return datasets.load("imagenet2012", SPLITS, built[1])


def test_splits_hold_the_archives_images_and_their_classes(built, splits):
    images, data_dir = built
    for name, split in splits.items():
        assert split.dataset == "imagenet2012" and len(split) == COUNTS[name]
        assert dict(zip(split.names.tolist(), split.images, strict=True)) == images[name]
        assert split.cameras.tolist() == [1] * len(split) and split.cameras.dtype == np.int64
        assert split.identities.dtype == np.int64
    train, validation = splits.values()
    assert train.identities.tolist() == [LABELS[name.split("_")[0]] + 1 for name in train.names]
    wnids = Path(tfds.core.tfds_path("datasets/imagenet2012/labels.txt")).read_text().split()
    of_validation = Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")).read_text().split()
    assert validation.identities.tolist() == [
        wnids.index(of_validation[int(name[15:23]) - 1]) + 1 for name in validation.names]
    assert {path.name for path in data_dir.iterdir()} == {"imagenet2012", ".imagenet2012.lock"}
    assert not [path for path in data_dir.rglob("*") if "incomplete" in path.name or path.name.endswith("-")]


def test_data_that_tfds_itself_would_read(built):
    source = tfds.builder("imagenet2012", data_dir=built[1], file_format="array_record").as_data_source("train")
    assert {source[i]["file_name"].decode() for i in range(12)} == built[0]["train"].keys()


# --- images on disk

def test_images_stay_on_disk(built, splits):
    images, split = built[0]["train"], splits["train"]
    picked = split.select(np.array([7, 0, 3, 3]))
    assert isinstance(split.images, StoredImages) and isinstance(picked.images, StoredImages)
    assert picked.names.tolist() == split.names[[7, 0, 3, 3]].tolist()
    assert picked.identities.tolist() == split.identities[[7, 0, 3, 3]].tolist()
    assert list(picked.images) == picked.read(np.arange(4)) == [images[name] for name in picked.names]
    again = picked.select(np.array([1, 2]))
    assert again.read(np.array([1])) == [again.images[1]] == [images[again.names[1]]]
    assert again.images[np.int64(-1)] == again.images[1]
    with pytest.raises(IndexError):
        again.images[2]


def test_threads_may_share_them(built, splits):
    images, split = built[0]["train"], splits["train"]
    rng = np.random.default_rng(0)
    orders = [rng.permutation(12) for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        for order, read in zip(orders, pool.map(split.read, orders), strict=True):
            assert read == [images[name] for name in split.names[order]]


def test_the_fingerprint_reads_no_image(built, tmp_path, monkeypatch):
    split = datasets.load("imagenet2012", ("train",), built[1])["train"]
    for method in ("__getitem__", "read"):
        monkeypatch.delattr(StoredImages, method)
    assert split.select(np.arange(12)).fingerprint() == split.fingerprint()
    assert split.select(np.arange(12)[::-1]).fingerprint() != split.fingerprint()

    write_imagenet(tmp_path / "source", seed=1)  # other images under the same names
    builder = Imagenet2012(data_dir=tmp_path / "data")
    builder.build(tmp_path / "source")
    other = builder.load_split("train")
    np.testing.assert_array_equal(other.names, split.names)
    assert other.fingerprint() != split.fingerprint()


@pytest.mark.parametrize("split", SPLITS)
def test_every_loader_decodes_them_as_if_they_were_in_memory(splits, split):
    stored = splits[split]
    memory = Split(stored.dataset, list(stored.images), stored.identities, stored.cameras, stored.names)
    np.testing.assert_array_equal(stored.decode(32, 24), memory.decode(32, 24))
    batches = [np.array([6, 0, 2]), np.array([1, 1, 5])]
    for one, other in zip(input_pipeline.decode_batches(stored, iter(batches), 32, 24),
                          input_pipeline.decode_batches(memory, iter(batches), 32, 24), strict=True):
        assert one.shape == (3, 32, 24, 3)
        np.testing.assert_array_equal(one, other)


def test_enough_files_may_be_open(built):
    """Every file of a data set stays open; ImageNet has a thousand."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(before[1], 5000) - 100
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
        open_split(datasets.builder("imagenet2012", built[1]), "train")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (few + 1, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- the annotation that is kept beside the data

@pytest.fixture
def copied(built, tmp_path):
    """A copy of the data folder."""
    return shutil.copytree(built[1], tmp_path / "copied")


def annotation_of(data_dir):
    return datasets.builder("imagenet2012", data_dir).data_path / "annotation-train.npz"


def test_the_annotation_is_read_from_the_examples_once(built, monkeypatch):
    assert annotation_of(built[1]).exists()  # by prepare
    monkeypatch.delattr(imagenet, "read_examples")
    assert len(datasets.load("imagenet2012", SPLITS, built[1])["train"]) == 12


@pytest.mark.parametrize("kept", [None, b"", b"half written", "other version"])
def test_an_annotation_that_is_not_that_of_the_data_is_read_anew(copied, splits, kept):
    path = annotation_of(copied)
    if kept is None:
        path.unlink()
    elif kept == "other version":
        with np.load(path) as file:
            np.savez(path, **{**file, "labels": file["labels"] + 1, "version": "[]"})
    else:
        path.write_bytes(kept)
    again = datasets.load("imagenet2012", ("train",), copied)["train"]
    assert again.fingerprint() == splits["train"].fingerprint()
    with np.load(path) as file:
        np.testing.assert_array_equal(file["labels"] + 1, again.identities)
    assert not list(path.parent.glob("annotation-*/"))


def test_an_interrupted_reading_leaves_nothing(copied, monkeypatch):
    path = annotation_of(copied)
    path.unlink()

    def interrupted(source):
        yield source[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(imagenet, "read_examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.load("imagenet2012", ("train",), copied)
    assert [kept.name for kept in path.parent.glob("annotation-*")] == ["annotation-validation.npz"]


def test_a_folder_that_cannot_be_written(copied, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    annotation_of(copied).unlink()
    monkeypatch.setattr(imagenet.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(UserError, match=r"cannot write .*annotation-train\.npz.*Permission denied.*writable"):
        datasets.load("imagenet2012", ("train",), copied)


# --- without TensorFlow, and what is refused

def test_reads_without_tensorflow_and_says_that_it_builds_with_it(built, tmp_path):
    write_imagenet(tmp_path / "source")
    program = WITHOUT_TENSORFLOW + f"""
from jlml_jax import datasets, prepare
split = datasets.load("imagenet2012", ("train",), {str(built[1])!r})["train"]
print(split.decode(8, 8).shape, len(split.read([0, 5])))
sys.exit(prepare.main(["imagenet2012", "--source={tmp_path / 'source'}", "--data_dir={tmp_path / 'data'}"]))
"""
    done = run_program(program)
    assert done.stdout == "(12, 8, 8, 3) 2\n", done.stderr
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: TFDS builds imagenet2012 with TensorFlow, which is not installed")


@pytest.fixture
def original(tmp_path):
    return tmp_path / "source", write_imagenet(tmp_path / "source"), f"--data_dir={tmp_path / 'data'}"


def assert_refused(refused, original, *parts):
    source, _, data_dir = original
    error = refused("imagenet2012", f"--source={source}", data_dir)
    for part in (*parts, "download or copy it again"):
        assert part in error
    assert list((source.parent / "data" / "imagenet2012").iterdir()) == []


def test_missing_archives(refused, original):
    source, _, data_dir = original
    (source / ARCHIVES["validation"]).unlink()
    error = refused("imagenet2012", f"--source={source}", data_dir)
    assert "has no ILSVRC2012_img_val.tar; give the folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_" in error
    error = refused("imagenet2012", f"--source={source}", data_dir, "--incomplete=half")
    assert "imagenet2012 is built from whole archives alone: leave out --incomplete" in error
    assert "needs --source=FOLDER. manual_dir should contain two files" in refused("imagenet2012", data_dir)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("split", SPLITS)
def test_an_archive_that_broke_off(refused, original, split, number):
    """Within its first or its last image, of whose end nothing but padding comes after."""
    source, images, _ = original
    content = (source / ARCHIVES[split]).read_bytes()
    image = list(images[split].values())[number]
    (source / ARCHIVES[split]).write_bytes(content[:content.index(image) + len(image) // 2])
    assert_refused(refused, original, f"{ARCHIVES[split]} is damaged or not the original (")


def test_an_archive_that_lacks_images(refused, original):
    source, images, _ = original
    write_tar(source / ARCHIVES["validation"], list(images["validation"].items())[1:])
    assert_refused(refused, original, "img_val.tar has 6 images instead of 7")


def test_archives_packed_by_somebody_else(refused, original):
    source, images, _ = original
    write_tar(source / ARCHIVES["train"], images["train"].items())
    assert_refused(refused, original, "img_train.tar is damaged or not the original")
    write_imagenet(source / "again")
    (source / "again" / ARCHIVES["train"]).rename(source / ARCHIVES["train"])
    write_tar(source / ARCHIVES["validation"], [("README", b"..."), *images["validation"].items()])
    assert_refused(refused, original, "img_val.tar has README, which is no image of the original")
    write_tar(source / ARCHIVES["validation"], [(f"val/{name}", image) for name, image in images["validation"].items()])
    assert_refused(refused, original, "img_val.tar has val/ILSVRC2012_val_00000003.JPEG")


def test_too_little_room(refused, original, monkeypatch):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    assert "MB free" in refused("imagenet2012", f"--source={original[0]}", original[2])


def test_disk_that_fills_up_meanwhile(refused, original, monkeypatch):
    def write(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "bucket.tmp; No space left on device")

    monkeypatch.setattr(tfds.core.writer.ExampleWriter, "write", write)
    error = refused("imagenet2012", f"--source={original[0]}", original[2])
    assert "cannot write" in error and "No space left on device" in error and "make room" in error


def test_a_split_that_tfds_left_out_is_not_prepared(copied):
    assert datasets.builder("imagenet2012", copied).is_prepared()
    path = annotation_of(copied).with_name("dataset_info.json")
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"splits": info["splits"][1:]}))
    assert not datasets.builder("imagenet2012", copied).is_prepared()
    with pytest.raises(UserError, match="imagenet2012 is not prepared in"):
        datasets.load("imagenet2012", ("validation",), copied)


def test_data_of_tfds_in_another_format(copied):
    path = annotation_of(copied).with_name("dataset_info.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    for file in path.parent.glob("*.array_record-*"):
        file.rename(path.with_name(file.name.replace("array_record", "tfrecord")))
    with pytest.raises(UserError, match="is in the format tfrecord, which is not read by index; remove it"):
        datasets.load("imagenet2012", ("train",), copied)
