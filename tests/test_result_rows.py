"""Rows of results.json, their means over trials, and the tables of them."""

import dataclasses

import numpy as np
import pytest
from runs import ROW_FIELDS, ROW_FRACTIONS

from configs import default
from jlml_jax import evaluate, metrics, reranking, result_rows


def test_rows_have_the_fields_of_results_json(trial):
    config = default.get_config().evaluate
    config.normalize, config.max_rank = "per_branch", 5  # fewer than the ranks reported
    rng = np.random.default_rng(0)

    def extract(split):
        return {"global": rng.normal(size=(len(split), 4)), "local": rng.normal(size=(len(split), 6))}

    rows = evaluate.evaluate_trials([trial], extract, config)
    assert [row["feature"] for row in rows] == ["global", "local", "joint"]
    for row in rows:
        assert row.keys() == ROW_FIELDS
        assert all(0 < row[field] < 1 for field in ROW_FRACTIONS if field != "rank20")
        assert row["rank1"] <= row["rank5"] <= row["rank10"] <= row["rank20"] <= 1
        assert (row["dataset"], row["protocol"], row["trial"], row["normalize"]) == (
            "test", "single-query", 0, "per_branch")
        assert (row["num_queries"], row["num_gallery"]) == (20, 39)


def test_of_several_trials_the_table_shows_the_mean(trial):
    rng = np.random.default_rng(0)

    def extract(split):
        return {"global": np.eye(12)[split.identities + 1] + rng.normal(size=(len(split), 12))}

    trials = [trial, dataclasses.replace(trial, number=1, incomplete="")]
    rows = evaluate.evaluate_trials(trials, extract, default.get_config().evaluate)
    assert [row["trial"] for row in rows] == [0, 1, "mean"]
    title, _, line = result_rows.format_rows(rows).splitlines()
    assert "mean of 2 trials" in title
    mean, deviation = np.mean([row["rank1"] for row in rows[:2]]), np.std([row["rank1"] for row in rows[:2]], ddof=1)
    assert line.split()[1:4] == [f"{100 * mean:.1f}", "±", f"{100 * deviation:.1f}"]


def test_re_ranking_has_columns_of_its_own(trial):
    def extract(split):
        rng = np.random.default_rng(len(split))
        return {"global": np.eye(12)[split.identities + 1] + 0.3 * rng.normal(size=(len(split), 12))}

    trials = [trial, dataclasses.replace(trial, number=1)]
    config = default.get_config().evaluate
    plain = evaluate.evaluate_trials(trials, extract, config)
    config.reranking = True
    rows = evaluate.evaluate_trials(trials, extract, config)
    for row, without in zip(rows, plain, strict=True):
        assert {field: row[field] for field in without} == without
        added = row.keys() - without.keys()
        assert {field.removesuffix("_std") for field in added} == {f"reranked_{score}" for score in result_rows.SCORES}
    reranked = reranking.Reranking(*(extract(split)["global"] for split in (trial.query, trial.gallery)))
    expected = metrics.rank_blocks(reranked.distances, *evaluate.labels_of(trial))
    assert rows[0]["reranked_mean_ap"] == expected.mean_ap != rows[0]["mean_ap"]
    _, header, line = result_rows.format_rows(rows).splitlines()
    assert header.split("mINP")[1].split() == ["R1", "re-r.", "mAP", "re-r."] and line.count("±") == 9
    drawn = dataclasses.replace(trial, single_gallery_shot=True)
    assert evaluate.evaluate_trials([drawn], extract, config)[0].keys() == ROW_FIELDS


def test_means_are_of_what_all_trials_have(trial):
    def extract(split):
        return {"global": np.random.default_rng(len(split)).normal(size=(len(split), 12))}

    def rows_of(number, **fields):
        config = default.get_config().evaluate
        config.update(fields)
        return evaluate.evaluate_trials([dataclasses.replace(trial, number=number)], extract, config)

    mean, = result_rows.mean_rows(rows_of(0, reranking=True) + rows_of(1))
    assert mean["trials"] == [0, 1] and "rank1_std" in mean
    assert not [field for field in mean if field.startswith("reranked")]


def test_queries_without_a_match_are_not_counted(trial):
    scores = metrics.RankingMetrics(np.linspace(0, 1, 20), 0.5, 0.4, 0.3, 7)
    row = result_rows.make_row(trial, "single-query", "joint", "none", scores)
    assert (row["num_queries"], row["rank1"], row["rank20"], row["mean_ap_trapezoid"]) == (7, 0, 1, 0.4)


def test_only_what_was_evaluated_alike_is_averaged():
    row = dict.fromkeys(result_rows.SCORES, 0.5) | {
        "dataset": "viper", "protocol": "316/316 single-shot", "trial": 0, "feature": "joint", "normalize": "none",
        "num_queries": 316, "num_gallery": 316}
    mean, = result_rows.mean_rows([row, row | {"trial": 1, "rank1": 0.7, "num_queries": 312}])
    assert (mean["trials"], mean["num_queries"], mean["mean_ap"], mean["mean_ap_std"]) == ([0, 1], 314, 0.5, 0)
    assert (mean["rank1"], mean["rank1_std"]) == (pytest.approx(0.6), pytest.approx(0.02**0.5))
    assert result_rows.mean_rows([row]) == []
    for field in ("dataset", "protocol", "feature", "normalize", "norm_statistics", "incomplete", "trained_on"):
        assert result_rows.mean_rows([row, row | {"trial": 1, field: "another"}]) == []


def test_means_stand_for_the_rows_that_they_are_of_alone():
    row = {"dataset": "viper", "protocol": "316/316 single-shot", "trial": 0}
    mean, another = row | {"trial": "mean"}, row | {"dataset": "grid"}
    crossed = row | {"trained_on": "market1501", "trained_trial": 0}
    assert result_rows.without_averaged([row, row | {"trial": 1}, mean, another, crossed]) == [mean, another, crossed]
    of_networks = crossed | {"trained_trial": "mean"}
    assert result_rows.without_averaged([row, crossed, of_networks]) == [row, of_networks]


def test_a_table_has_the_columns_that_any_of_its_rows_has(trial):
    def extract(split):
        return {"global": np.random.default_rng(len(split)).normal(size=(len(split), 12))}

    config = default.get_config().evaluate
    config.reranking, config.norm_statistics = True, "camera"
    row, = evaluate.evaluate_trials([trial], extract, config)
    chance = {field: value for field, value in row.items() if "reranked" not in field and field != "norm_statistics"}
    _, statistics, header, first, second = result_rows.format_rows([chance | {"feature": "chance"}, row]).splitlines()
    assert "each camera's" in statistics and header.endswith("mAP re-r.")
    assert len(first.split()) == 8 and len(second.split()) == 10


def test_trials_evaluated_in_several_ways_have_a_table_for_each():
    def mean(normalize, trials, **fields):
        return dict.fromkeys(result_rows.SCORES, 0.5) | dict.fromkeys(map("{}_std".format, result_rows.SCORES), 0.1) | {
            "dataset": "viper", "protocol": "316/316 single-shot", "trial": "mean", "trials": trials,
            "feature": "joint", "normalize": normalize, "num_queries": 316, "num_gallery": 316} | fields

    rows = [mean("none", [0, 1, 2]), mean("joint", [3, 4]), mean("joint", [5, 6], norm_statistics="data")]
    tables = result_rows.format_rows(rows).split("\n\n")
    assert [("mean of 3 trials" in table, "mean of 2 trials" in table, "normalize=none" in table,
             "normalize=joint" in table, "BN by" in table) for table in tables] == [
        (True, False, True, False, False), (False, True, False, True, False), (False, True, False, True, True)]
    table = result_rows.format_rows([mean("none", [0, 1]), mean("none", [0, 1], feature="local")])
    assert "normalize" not in table and table.count("mean of 2 trials") == 1


def test_one_image_of_each_person_and_every_distractor_are_drawn_from(trial):
    drawn = dataclasses.replace(trial, single_gallery_shot=True)
    row, = evaluate.evaluate_trials([drawn], lambda split: {"global": np.eye(12)[split.identities + 1]},
                                    default.get_config().evaluate)
    assert row["num_gallery"] == 10 + 5
