"""The comparison with Market-1501's own lists, on a miniature whose lists the tests draw."""

import itertools

import numpy as np
import pytest
import scipy.io

from experiments import check_market1501
from jlml_jax import datasets, metrics


@pytest.fixture(scope="module")
def lists(market1501_dir):
    """For each list's file name, the 1-based numbers that it has, from the names alone: 0001_c1s1_000100_00.jpg."""
    splits = datasets.load("market1501", ("query", "gallery"), market1501_dir)
    gallery = sorted(splits["gallery"].names.tolist())
    drawn = {}
    for name in splits["query"].names.tolist():
        person, camera = name[:4], name[5:7]
        own = [number for number, other in enumerate(gallery, 1) if other[:4] == person]
        stem = name.partition(".")[0]  # of 0007_c1s1_000700_00.jpg.jpg too
        drawn[f"{stem}_good.mat"] = [number for number in own if gallery[number - 1][5:7] != camera]
        drawn[f"{stem}_junk.mat"] = [number for number in own if gallery[number - 1][5:7] == camera]
    return drawn


@pytest.fixture
def run(tmp_path, market1501_dir, lists, run_command):
    """Runs the script on the lists with `changes`; returns its exit status, stdout and stderr."""
    def run(**changes):
        (tmp_path / "gt_query").mkdir(exist_ok=True)
        for name, numbers in (lists | {f"{name}.mat": numbers for name, numbers in changes.items()}).items():
            scipy.io.savemat(tmp_path / "gt_query" / name, {
                f"{name[-8:-4]}_index": np.array([numbers or [0]], np.uint16)})  # a lone 0 where there is none
        return run_command(check_market1501, f"--source={tmp_path}", f"--data_dir={market1501_dir}")
    return run


FIRST = "0001_c1s1_000100_00"  # good: 8 to 11, junk: 6 and 7, after 3 of identity -1 and 2 distractors


def test_equal_lists(run, lists):
    assert lists[f"{FIRST}_good.mat"] == [8, 9, 10, 11] and lists[f"{FIRST}_junk.mat"] == [6, 7]
    status, out, err = run()
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "12 queries, 29 gallery images; listed are 48 good ones and 24 junk ones, none for 0 queries; 3 of identity -1",
        "the ranking counts and ignores exactly these"]


@pytest.mark.parametrize("changes, told", [
    ({"good": [9, 10, 11]}, "(1 images: 0001_c2s1_000100_01.jpg is wrong there, good here)"),
    ({"good": [5, 8, 9, 10, 11]}, "(1 images: 0000_c2s1_090001_01.jpg is good there, wrong here)"),
    ({"junk": [5, 6, 7]}, "(1 images: 0000_c2s1_090001_01.jpg is junk there, wrong here)"),
    ({"junk": [6]}, "(1 images: 0001_c1s1_000101_01.jpg is wrong there, junk here)"),
    ({"junk": []}, "(2 images: 0001_c1s1_000100_01.jpg is wrong there, junk here, 0001_c1s1_000101_01.jpg is "),
    ({"good": [8, 9, 10], "junk": [6, 7, 11]}, "(1 images: 0001_c3s1_000101_01.jpg is junk there, good here)"),
    ({"good": [7, 8, 9, 10, 11], "junk": [6]}, "(1 images: 0001_c1s1_000101_01.jpg is good there, junk here)"),
    ({"good": [6, 7], "junk": [8, 9, 10, 11]}, "(6 images: "),
    ({"good": [8, 9, 10, 12]}, "(2 images: 0001_c3s1_000101_01.jpg is wrong there, good here, "),
    ({"junk": [6, 29]}, "(2 images: "),
    ({"good": []}, "(4 images: "),
])
def test_one_wrong_list_is_found(run, changes, told):
    status, _, err = run(**{f"{FIRST}_{word}": numbers for word, numbers in changes.items()})
    assert status == 2
    assert err.count("\n") == 1
    assert "1 of 12 queries differ from" in err and f": {FIRST}.jpg {told}" in err


def test_the_first_of_many_are_named(run, lists):
    status, _, err = run(**{name.removesuffix(".mat"): [] for name in lists if "junk" in name})
    assert status == 2
    assert "12 of 12 queries differ" in err and err.count("(2 images: ") == 3 and "; ...; prepare" in err


@pytest.mark.parametrize("numbers, told", [([8, 30], "beyond the 29 of"), ([0, 8], "beyond the 29 of"),
                                           ([8, 8], "twice"), ([6, 8], "one that is good"), ([3, 6], "identity -1")])
def test_a_list_that_cannot_be_is_refused(run, numbers, told):
    status, _, err = run(**{f"{FIRST}_junk": numbers})
    assert status == 2
    assert f"{FIRST}_junk.mat" in err and told in err


def test_missing_lists_are_named(run, tmp_path, market1501_dir, refused_by):
    assert run()[0] == 0
    (tmp_path / "gt_query" / f"{FIRST}_junk.mat").unlink()
    arguments = [f"--source={tmp_path}", f"--data_dir={market1501_dir}"]
    assert f"there is no {tmp_path / 'gt_query' / FIRST}_junk.mat" in refused_by(check_market1501, *arguments)
    (tmp_path / "gt_query").rename(tmp_path / "query")
    assert "lacks gt_query/" in refused_by(check_market1501, *arguments)


def test_it_is_metrics_that_is_asked(run, monkeypatch):
    """A ranking that ignores no image of the query's own camera differs everywhere."""
    ranked = metrics.rank_metrics
    monkeypatch.setattr(metrics, "rank_metrics", lambda distances, *labels, **options: ranked(
        distances, *labels[:2], np.zeros_like(labels[2]), np.ones_like(labels[3]), **options))
    check_market1501.counted_kind.cache_clear()
    status, _, err = run()
    check_market1501.counted_kind.cache_clear()
    assert status == 2
    assert "12 of 12 queries differ" in err and "is junk there, good here" in err


def test_one_listing_alone_agrees():
    """Of all ways to list a gallery, that which is the case."""
    labels = np.array([1]), np.array([1, 1, 2, -1, 1]), np.array([1]), np.array([2, 1, 1, 1, 3])
    wrong, ignored, good = check_market1501.WRONG, check_market1501.IGNORED, check_market1501.GOOD
    agreeing = [kinds for kinds in itertools.product((wrong, ignored, good), repeat=5)
                if wrong in kinds and check_market1501.agree(labels, np.array(kinds))]
    assert agreeing == [(good, ignored, wrong, ignored, good)]
