"""The prepare command, on miniatures of the benchmarks and on a data set that is drawn."""

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from market1501_miniature import write_market1501
from miniatures import write_cuhk03, write_grid, write_msmt17, write_viper
from PIL import Image
from processes import WITHOUT_TENSORFLOW, run_program

from jlml_jax import datasets, prepare
from jlml_jax.datasets.base import PersonDatasetBuilder
from jlml_jax.datasets.market1501 import ROOT, Market1501
from jlml_jax.errors import UserError


@pytest.fixture
def original(tmp_path, monkeypatch):
    folder = tmp_path / "original" / ROOT
    monkeypatch.setattr(Market1501, "EXPECTED", write_market1501(folder, images_per_camera=1))
    return folder


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def run(run_command):
    """Runs the command on Market-1501 in this process; gives its exit status, stdout and stderr."""
    def run(source, data_dir, *flags):
        return run_command(prepare, "market1501", f"--source={source}", f"--data_dir={data_dir}", *flags)
    return run


def assert_refused(result, *parts):
    status, _, err = result
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_counts_are_printed_and_the_data_built(run, original, data_dir):
    status, out, err = run(original, data_dir)
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["split", "count", "expected", "found"]
    assert ["train", "images", "12", "12"] in rows
    assert ["gallery", "junk", "3", "3"] in rows
    assert ["gallery", "distractors", "2", "2"] in rows
    assert ["multi_query", "identities", "8", "8"] in rows
    assert out.splitlines()[-1] == "market1501 is prepared: train 12, query 12, gallery 17, multi_query 24"
    assert len(datasets.load("market1501", ("gallery",), data_dir)["gallery"]) == 17
    assert {path.name for path in data_dir.iterdir()} == {"market1501", ".market1501.lock"}  # no empty downloads/ left


def test_done_already(run, original, data_dir):
    assert run(original, data_dir)[0] == 0
    version = data_dir / "market1501" / "1.0.0"
    before = (version / "dataset_info.json").stat().st_mtime_ns
    status, out, err = run(original / "gone", data_dir, "--incomplete=by now")
    assert (status, err) == (0, "")
    assert "is prepared already in" in out
    assert "incomplete" not in out
    assert (version / "dataset_info.json").stat().st_mtime_ns == before

    source = original.parent / "other"
    Market1501.EXPECTED = write_market1501(source, images_per_camera=2, seed=1)  # the fixture restores it
    assert run(source, data_dir, "--overwrite")[0] == 0
    assert len(datasets.load("market1501", ("train",), data_dir)["train"]) == 24


def test_a_failed_check_leaves_what_was_built(run, original, data_dir):
    assert run(original, data_dir)[0] == 0
    shutil.rmtree(original / "query")
    assert_refused(run(original, data_dir, "--overwrite"), "query/")
    assert Market1501(data_dir=data_dir).is_prepared()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_what_was_built(run, original, data_dir, monkeypatch, error):
    def write(*_):
        raise error

    assert run(original, data_dir)[0] == 0
    before = datasets.load("market1501", ("train",), data_dir)["train"].fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(tfds.core.writer.ExampleWriter, "write", write)
        assert run(original, data_dir, "--overwrite")[0] in (2, 130)
    assert [path.name for path in (data_dir / "market1501").iterdir()] == ["1.0.0"]
    assert datasets.load("market1501", ("train",), data_dir)["train"].fingerprint() == before


def test_a_copy_without_its_metadata_is_not_whole(run, original, data_dir):
    """Of a degraded copy they say so."""
    assert run(original, data_dir, "--incomplete=resized")[0] == 0
    (data_dir / "market1501" / "1.0.0" / "metadata.json").unlink()
    with pytest.raises(UserError, match="market1501 is not prepared"):
        datasets.load("market1501", ("train",), data_dir)
    assert run(original, data_dir, "--incomplete=resized")[0] == 0
    assert datasets.metadata("market1501", data_dir)["incomplete"] == "resized"


@pytest.mark.parametrize(("pattern", "damage"), [
    ("*-train.array_record*", lambda content: content[:100]),
    ("*-train.array_record*", lambda content: content[:-10]),
    ("*-train.array_record*", lambda content: content[:1 << 16]),
    ("*-train.array_record*", lambda content: content[:2_000] + bytes(1_000) + content[3_000:]),
    ("dataset_info.json", lambda content: content[:len(content) // 2]),
    ("metadata.json", lambda content: content[:len(content) // 2]),
])
@pytest.mark.parametrize("load", [
    datasets.load, lambda name, splits, data_dir: datasets.load_distractors(name, data_dir)])
def test_damaged_data_are_told(run, original, data_dir, pattern, damage, load):
    assert run(original, data_dir)[0] == 0
    path, = (data_dir / "market1501" / "1.0.0").glob(pattern)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"market1501.* is damaged \(.*again"):
        load("market1501", ("train",), data_dir)
    if path.suffix == ".json":
        shutil.rmtree(data_dir / "market1501")
    assert run(original, data_dir, "--overwrite")[0] == 0
    assert len(load("market1501", ("train",), data_dir))


def test_metadata_without_what_a_protocol_needs_are_told(run, original, data_dir):
    assert run(original, data_dir)[0] == 0
    with pytest.raises(UserError, match=r"is damaged \(metadata.json has no partitions\); prepare market1501"):
        datasets.metadata("market1501", data_dir)["partitions"]


def test_files_that_cannot_be_read_are_not_called_damaged(run, original, data_dir, monkeypatch):
    assert run(original, data_dir)[0] == 0

    def open_source(*_, **__):
        raise RuntimeError("open() failed: Permission denied; opening x")

    monkeypatch.setattr(Market1501, "as_data_source", open_source)
    with pytest.raises(UserError, match=r"cannot read .*1.0.0 \(open\(\) failed: Permission denied"):
        datasets.load("market1501", ("train",), data_dir)


def test_a_set_is_drawn_by_one_process_at_a_time(tmp_path, monkeypatch, capfd):
    """The other one says that it waits, until which the first here is at it, and takes what the first has drawn."""
    drawn, said = [], []

    class Drawn:
        name, builder_config, data_dir_root, data_dir, data_path, DRAWN = "drawn", None, tmp_path, "", tmp_path, True
        info = SimpleNamespace(metadata={"cameras": 6})
        alone = PersonDatasetBuilder.alone

        def is_prepared(self):
            return (tmp_path / "drawn").exists()

        def build(self):
            drawn.append(self)
            end = time.monotonic() + 60
            while "is in use by" not in "".join(said) and time.monotonic() < end:
                said.append(capfd.readouterr().out)
                time.sleep(0.01)
            (tmp_path / "drawn").touch()

    monkeypatch.setattr(datasets, "builder", lambda *_: Drawn())
    with ThreadPoolExecutor(2) as pool:  # a lock is an open file's, not a process's
        assert list(pool.map(lambda _: datasets.metadata("drawn"), range(2))) == [{"cameras": 6}] * 2
    assert len(drawn) == 1
    assert re.search(r"drawn in .* is in use by (process \d+|another process).*; waiting for it", "".join(said))


def test_wrong_folders(run, original, data_dir):
    assert_refused(run(original / "no such", data_dir), "is not a folder", ROOT, "bounding_box_train/")
    assert_refused(run(original / "query", data_dir), "lacks bounding_box_train/, query/, bounding_box_test/")
    shutil.rmtree(original / "gt_bbox")
    assert_refused(run(original, data_dir), "lacks gt_bbox/;", str(original))
    assert not data_dir.exists()


def test_the_folder_above_is_taken_too(run, original, data_dir):
    assert run(original.parent, data_dir)[0] == 0


def test_half_copied(run, original, data_dir):
    (original / "query" / "0001_c2s1_000100_00.jpg").unlink()
    for path in (original / "bounding_box_train").glob("0004_*"):
        path.unlink()
    status, out, err = run(original, data_dir)
    assert_refused((status, out, err), str(original), "train has 9 images instead of 12",
                   "train has 3 identities instead of 4", "query has 11 images instead of 12", "again", "--incomplete=")
    assert "train        identities           4         3  differs" in out.splitlines()
    assert not data_dir.exists()


def test_a_copy_known_to_be_incomplete(run, original, data_dir):
    for path in (original / "bounding_box_train").glob("0004_*"):
        path.unlink()
    status, out, err = run(original, data_dir, "--incomplete=resized to 64x128, JPEG twice")
    assert (status, err) == (0, "")
    assert "train        identities           4         3  differs" in out.splitlines()
    recorded = ("resized to 64x128, JPEG twice; train has 9 images instead of 12; "
                "train has 3 identities instead of 4")
    assert out.splitlines()[-1] == f"it is recorded as incomplete: {recorded}"
    assert datasets.metadata("market1501", data_dir) == {"incomplete": recorded}
    assert len(datasets.load("market1501", ("train",), data_dir)["train"]) == 9

    status, out, _ = run(original, data_dir, "--incomplete=anything else")
    assert status == 0
    assert "is prepared already in" in out
    assert out.splitlines()[-1] == f"it is recorded as incomplete: {recorded}"

    write_market1501(original.parent / "whole", images_per_camera=1)
    status, out, _ = run(original.parent / "whole", data_dir, "--overwrite")
    assert status == 0
    assert "incomplete" not in out
    assert datasets.metadata("market1501", data_dir) == {}


def test_a_degraded_copy_with_the_right_counts(run, original, data_dir):
    assert run(original, data_dir, "--incomplete= resized to 64x128 ")[0] == 0
    assert datasets.metadata("market1501", data_dir) == {"incomplete": "resized to 64x128"}


@pytest.mark.parametrize("why", ["", "  ", "lost\nand more lost"])
def test_incomplete_without_a_reason(run, original, data_dir, why):
    assert_refused(run(original, data_dir, f"--incomplete={why}"), "--incomplete needs one line")
    assert not data_dir.exists()


def test_what_an_incomplete_copy_cannot_do_without(run, original, data_dir):
    flag = "--incomplete=some were lost"
    (original / "query" / "0001_c2s1_000100_00.jpg").write_bytes(b"")
    assert_refused(run(original, data_dir, flag), "1 of 65 images", "must be mended or removed, also to build")
    (original / "query" / "0001_c1.jpg").touch()
    assert_refused(run(original, data_dir, flag), "1 image names", "query/0001_c1.jpg")
    for path in (original / "query").iterdir():
        path.unlink()
    assert_refused(run(original, data_dir, flag), "has no images of query")
    assert not Market1501(data_dir=data_dir).is_prepared()


def test_junk_where_none_is_published(run, original, data_dir):
    (original / "query" / "0001_c1s1_000100_00.jpg").rename(original / "query" / "-1_c1s1_000100_00.jpg")
    assert_refused(run(original, data_dir), "query has 1 junk instead of 0")


def test_unparsable_name_and_strays(run, original, data_dir):
    (original / "gt_bbox" / ".DS_Store").touch()
    (original / "gt_bbox" / "0001_c1.jpg").touch()
    assert_refused(run(original, data_dir), "1 image names", "gt_bbox/0001_c1.jpg")
    (original / "gt_bbox" / "0001_c1.jpg").unlink()
    status, out, _ = run(original, data_dir)
    assert status == 0
    assert "1 files not of the data set are left out: gt_bbox/.DS_Store" in out


def test_undecodable_images_are_named(run, original, data_dir):
    names = ["bounding_box_train/0002_c1s1_000200_01.jpg", "query/0003_c2s1_000300_00.jpg",
             "bounding_box_test/0001_c3s1_000100_01.jpg", "gt_bbox/0001_c1s1_000100_00.jpg"]
    (original / names[0]).write_bytes((original / names[0]).read_bytes()[:-500])  # a copy that broke off
    for name in names[1:]:
        (original / name).write_bytes(b"")
    assert_refused(run(original, data_dir), "4 of 65 images", *names[:3], "; ...")
    assert not Market1501(data_dir=data_dir).is_prepared()


def test_data_dir_that_cannot_be_written(run, original, data_dir):
    data_dir.touch()
    assert_refused(run(original, data_dir / "below a file"), "cannot write to", "--data_dir")


def test_too_little_room(run, original, data_dir, monkeypatch):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    assert_refused(run(original, data_dir), "MB free", "make room")
    assert not Market1501(data_dir=data_dir).is_prepared()


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    RuntimeError("Failed to finalize writing: write() failed: No space left on device"),  # as array_record tells it
])
def test_disk_that_fills_up_meanwhile(run, original, data_dir, monkeypatch, error):
    def write(*_):
        raise error

    monkeypatch.setattr(tfds.core.writer.ExampleWriter, "write", write)
    assert_refused(run(original, data_dir), "cannot write", "No space left on device", "make room")
    assert not Market1501(data_dir=data_dir).is_prepared()
    assert list((data_dir / "market1501").iterdir()) == []


def test_other_errors_while_building_are_bugs(original, data_dir, monkeypatch):
    def write(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(tfds.core.writer.ExampleWriter, "write", write)
    with pytest.raises(RuntimeError, match="something else"):
        prepare.prepare("market1501", original, data_dir)


def test_a_build_that_was_killed_is_not_taken_for_whole(run, original, data_dir):
    killed = run_program(f"""
import os, signal
from jlml_jax import prepare
from jlml_jax.datasets.market1501 import Market1501
def generate(self, crops, generate=Market1501._generate_examples):
    if crops[0].origin.startswith("gt_bbox"):
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(self, crops)
Market1501._generate_examples = generate
Market1501.EXPECTED = {Market1501.EXPECTED}
prepare.main(["market1501", "--source={original}", "--data_dir={data_dir}"])
""")
    assert killed.returncode == -9, killed.stderr
    left, = (data_dir / "market1501").iterdir()
    assert left.name.startswith("incomplete.")
    assert not Market1501(data_dir=data_dir).is_prepared()
    with pytest.raises(prepare.UserError, match="is not prepared"):
        datasets.load("market1501", ("train",), data_dir)

    assert run(original, data_dir)[0] == 0
    assert len(datasets.load("market1501", ("train",), data_dir)["train"]) == 12


def test_all_build_and_read_without_tensorflow(tmp_path, data_dir):
    """TFRecord is the exception, which TensorFlow alone reads."""
    sources = {"market1501": tmp_path / "market", "viper": tmp_path / "viper", "grid": tmp_path / "grid",
               "msmt17": tmp_path / "msmt17", "cuhk03/labeled": tmp_path / "cuhk03",
               "cuhk03/detected": tmp_path / "cuhk03"}
    write_market1501(sources["market1501"], images_per_camera=1)
    write_viper(sources["viper"])
    grid_counts = write_grid(sources["grid"])
    write_msmt17(sources["msmt17"])
    write_cuhk03(tmp_path / "cuhk03")
    Market1501(data_dir=tmp_path / "tfrecord", file_format="tfrecord").build(sources["market1501"])
    program = WITHOUT_TENSORFLOW + f"""
from jlml_jax import datasets, prepare
from jlml_jax.datasets import grid, synthetic_pedestrians
grid.Grid.EXPECTED = {grid_counts}  # its partitions are of so many people
synthetic_pedestrians.TRAIN_IDENTITIES = synthetic_pedestrians.TEST_IDENTITIES = range(1, 3)

try:
    import tensorflow
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("tensorflow is there")
for name, source in { {name: str(source) for name, source in sources.items()} }.items():
    flag = ["--incomplete=a miniature"] if name != "grid" else []
    assert prepare.main([name, "--source=" + source, "--data_dir={data_dir}", *flag]) == 0, name
assert prepare.main(["synthetic_pedestrians", "--data_dir={data_dir}"]) == 0
for name in datasets.NAMES:
    if datasets.builder(name, "{data_dir}").is_prepared():
        splits = datasets.load(name, tuple(datasets.builder(name, "{data_dir}").info.splits), "{data_dir}")
        print("read", name, sum(map(len, splits.values())), *sorted(datasets.metadata(name, "{data_dir}")))
sys.exit(prepare.exit_status(lambda: datasets.load("market1501", ("train",), "{tmp_path / 'tfrecord'}")))
"""
    result = run_program(program)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "1.0.0 is in the format tfrecord, which needs TensorFlow" in result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("read ")] == [
        "read cuhk03/detected 280 incomplete new_protocol testsets",
        "read cuhk03/labeled 275 incomplete new_protocol testsets",
        "read grid 15 partitions", "read market1501 65 incomplete", "read msmt17 54 faces_masked incomplete",
        "read synthetic_pedestrians 40", "read viper 10 incomplete"]


def test_wrong_arguments(refused, data_dir):
    assert "unknown data set 'marked1501'; known are cuhk03/detected, " in refused("marked1501")
    error = refused("market1501", f"--data_dir={data_dir}")
    assert "needs --source=FOLDER" in error
    assert "bounding_box_train" in error


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as exit_:
        prepare.main(["--help"])
    assert exit_.value.code == 0
    assert "python -m jlml_jax.prepare market1501 --source=" in capsys.readouterr().out


class Drawn(PersonDatasetBuilder, skip_registration=True):
    """A data set of two noise images, drawn."""

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = "Two noise images."
    DRAWN = True

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for camera in (1, 2):
            noise = np.random.default_rng(camera).integers(0, 255, (128, 64, 3), np.uint8)
            yield camera, {"image": Image.fromarray(noise), "identity": 1, "camera": camera, "name": f"{camera}.png"}


def test_a_drawn_set_needs_no_source(capsys, data_dir, monkeypatch):
    monkeypatch.setattr(datasets, "builder", lambda name, data_dir: Drawn(data_dir=data_dir))
    assert prepare.main(["drawn", "--source=.", f"--data_dir={data_dir}"]) == 2
    assert capsys.readouterr().err == "error: drawn is drawn, not read: leave out --source\n"
    assert prepare.main(["drawn", "--incomplete=why", f"--data_dir={data_dir}"]) == 2
    assert "leave out --incomplete\n" in capsys.readouterr().err
    assert prepare.main(["drawn", f"--data_dir={data_dir}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "drawn is prepared: train 2"
    assert datasets.load("drawn", ("train",), data_dir)["train"].cameras.tolist() == [1, 2]
    assert datasets.metadata("drawn", data_dir) == {}
