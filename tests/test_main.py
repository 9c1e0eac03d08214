"""The command as a user types it: exit status, and one line on stderr for what the user can mend."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from fast_compilation import XLA_FLAGS
from processes import ROOT, child_environment

from configs import default
from jlml_jax.datasets import synthetic_pedestrians


def run_main(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-m", "jlml_jax.main", *arguments], cwd=folder, capture_output=True, text=True, timeout=300,
        env=child_environment(XLA_FLAGS=XLA_FLAGS))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config.train.stps=3"], "there is no config field train.stps; near it: train.steps, train."),
    ([f"--config={ROOT / 'configs' / 'modern.py'}", "--config.loss.margin=0.1", "--config.optim.weight", "3"],
     "there is no config field optim.weight; near it: optim.weight_decay"),
    (["--config.data.width[0]=3"], "does not support integer indexing"),
    (["--config.data.mean=(1j,)"], "complex"),
    (["--config.train.steps=many"], "invalid literal for int() with base 10: 'many'"),
    (["--confg=configs/default.py"], "Unknown command line flag 'confg'. Did you mean: config"),
    (["--config=configs/nothing.py"], "there is no config 'configs/nothing.py' here; "),
    (["--config", "nothing.py:3"], f"there is no config 'nothing.py' here; {ROOT / 'configs'} has cuhk03.py, "),
    (["--config"], "Missing value for flag --config"),
    (["--mode=test"], "train_and_evaluate|train|evaluate"),
    (["--" + "x" * 3000], "maximum recursion depth exceeded"),
    (["configs/default.py"], "unexpected argument 'configs/default.py'"),
    (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run is an address, not a folder: give one on a file system"),
    (["--config.data.data_dir=gs://bucket/data"], "data_dir=gs://bucket/data is an address, not a folder"),
    ([f"--config={ROOT / 'configs' / 'cuhk03.py'}", "--config.data.data_dir=nowhere"],
     "nowhere. Get cuhk03_release.zip from the authors (https://www.ee.cuhk.edu.hk/~xgwang/CUHK_identification.html),"),
])
def test_what_the_user_can_mend_is_told_in_one_line(tmp_path, arguments, message):
    done = run_main(*arguments, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["--config=configs/cuhk03.py"], ["--config", "configs/cuhk03.py"]])
def test_the_packages_configs_are_found_from_any_folder(tmp_path, given):
    done = run_main(*given, "--config.data.data_dir=nowhere", folder=tmp_path)
    assert "cuhk03/labeled is not prepared in nowhere" in done.stderr
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cuhk03.py").write_text("def get_config():\n return 1 / 0\n")
    assert "configs/cuhk03.py, line 2: ZeroDivisionError" in run_main(*given, folder=tmp_path).stderr


@pytest.mark.parametrize(("line", "message"), [
    ("config = default.get_config(", "'(' was never closed (mine.py, line 3)"),
    ("config = defalt.get_config()", "name 'defalt' is not defined"),
    ("config = default.get_config(); config.train.stps = 3", "no config field train.stps; near it: train.steps"),
    ("config = default.get_config(); config.data.name = None", "data.name=None must be a text"),
    ("config = 1 // 0", "mine.py, line 3: ZeroDivisionError: "),
    ("config = default.get_config(); config.seed = int('x')", "mine.py, line 3: ValueError: invalid literal for int()"),
])
def test_a_slip_in_a_config_of_ones_own_is_told_in_one_line(tmp_path, line, message):
    (tmp_path / "mine.py").write_text(f"from configs import default\ndef get_config():\n {line}\n return config\n")
    done = run_main("--config=mine.py", "--workdir=run", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_every_config_is_a_delta_over_the_default():
    fields = set(default.get_config().to_dict())
    recipes = {}
    for path in sorted((ROOT / "configs").glob("[a-z]*.py")):
        config = importlib.import_module(f"configs.{path.stem}").get_config()
        assert set(config.to_dict()) == fields and config.name == path.stem
        recipes[path.stem] = (config.optim.to_dict(), config.loss.to_dict(), config.train.to_dict())
    paper = recipes["default"]
    assert all(recipes[name] == paper for name in ("cuhk03", "cuhk03_market1501", "grid", "market1501", "viper"))
    pre_training = recipes["imagenet"]  # Table 4: ten times less often, six times as long
    assert pre_training == (paper[0] | {"decay_every": 100_000}, paper[1], paper[2] | {"steps": 300_000})


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_shows_how_to_call_it(tmp_path, option):
    done = run_main(option, folder=tmp_path)
    assert done.returncode == 0
    assert "python -m jlml_jax.main" in done.stdout and "--workdir" in done.stdout


def test_the_config_of_the_synthetic_job_in_miniature(tmp_path):
    """Drawing, training, evaluation with baselines, results and picture, from the default config by its flags."""
    done = run_main(
        "--workdir=run", "--config.data.data_dir=data", "--config.train.steps=2", "--config.train.batch_size=8",
        "--config.optim.warmup_steps=0",
        "--config.data.height=32", "--config.data.width=16", "--config.model.num_strips=2", "--config.model.depth=1",
        "--config.model.stem_features=4", "--config.model.global_widths=(4,4,4,4)",
        "--config.model.local_widths=(4,4,4,4)", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Generating" not in done.stderr  # TFDS's bars, which are for a terminal
    assert "ranked lists of a few queries in run/ranked.png" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {row["feature"]: row for row in results["rows"]}
    assert set(rows) == {"chance", "colour histogram", "untrained network", "global", "local", "joint"}
    assert rows["joint"]["num_queries"] == 240 and rows["joint"]["num_gallery"] == 720
    # Of 719 or so gallery images that count, 5 are right.
    assert rows["chance"]["rank1"] == pytest.approx(5 / 719, abs=0.01)
    assert 2 * rows["chance"]["rank1"] < rows["colour histogram"]["rank1"] < 0.15
    assert {"command", "commit", "versions", "hardware", "seed", "wall_time_seconds"} <= set(results["provenance"])
    assert (tmp_path / "run" / "ranked.png").stat().st_size > 10_000
    assert "images/s" in done.stdout and "floating-point operations an image" in done.stdout


def test_the_synthetic_set_is_as_described(tmp_path, monkeypatch):
    """In miniature: a few of its people, drawn twice, with the sizes that the full set has by the same rule."""
    monkeypatch.setattr(synthetic_pedestrians, "TRAIN_IDENTITIES", range(1, 4))
    monkeypatch.setattr(synthetic_pedestrians, "TEST_IDENTITIES", range(201, 207))
    splits = []
    for folder in ("one", "two"):
        builder = synthetic_pedestrians.SyntheticPedestrians(data_dir=tmp_path / folder)
        builder.build()
        splits.append({name: builder.load_split(name) for name in ("train", "query", "gallery")})
    one, two = splits
    assert {name: len(split) for name, split in one.items()} == {"train": 36, "query": 12, "gallery": 36}
    assert all(one[name].fingerprint() == two[name].fingerprint() for name in one)
    assert set(one["train"].identities) == {1, 2, 3} and set(one["gallery"].cameras) == set(range(1, 7))
    assert sorted(one["query"].cameras) == sorted([1, 2, 3, 4, 5, 6] * 2)
    seen = [image for split in one.values() for image in split.images]
    assert len(set(seen)) == len(seen)
    assert one["query"].decode(128, 64).shape == (12, 128, 64, 3)
    assert np.all(one["query"].identities[:, None] != one["train"].identities)
