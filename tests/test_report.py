"""The report of a run: what is in the page, what is refused, and the page in a real browser."""

import csv
import dataclasses
import html.parser
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jlml_jax import datasets, evaluate, metrics, parallel, pictures, protocols, report
from jlml_jax.checkpoints import load_run
from jlml_jax.datasets import Names
from jlml_jax.datasets.folder import Folder
from jlml_jax.distances import l2_distances
from jlml_jax.models import build_model
from jlml_jax.result_rows import SCORES

MARKUP = "<img src=x onerror=alert(1)>\"'&"
PEOPLE, TRAINED = 14, 4


@pytest.fixture(scope="module")
def shop_dir(market1501_dir, tmp_path_factory):
    """A TFDS data folder with the miniature Market-1501 and folder/shop, whose names and identities have markup."""
    source, data_dir = tmp_path_factory.mktemp("shop"), tmp_path_factory.mktemp("data")
    shutil.copytree(market1501_dir / "market1501", data_dir / "market1501")
    rng, rows = np.random.default_rng(0), ["image,identity,camera,split"]
    for person in range(PEOPLE):
        colour = rng.integers(0, 256, 3)
        for camera in ("door", "<i>till"):
            for split in ["train"] if person < TRAINED else ["query", "gallery"]:
                name = f"{person}-{'till' if camera != 'door' else camera}-{split}-<b>&.png"
                pixels = np.clip(colour + rng.integers(-60, 60, (32, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(source / name)
                identity = MARKUP if person == TRAINED else f"p{person}"
                quoted = identity.replace('"', '""')
                rows.append(f'{name},"{quoted}",{camera},{split}')
    (source / "people.csv").write_text("\n".join(rows))
    Folder(data_dir=data_dir, config="shop").build(source / "people.csv")
    return data_dir


def make_run(tiny_run, workdir, name, data_dir):
    """`tiny_run` as if it had been trained on data set `name`: the weights do for any."""
    shutil.copytree(tiny_run, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["data"] |= {"name": name, "data_dir": str(data_dir)}
    (workdir / "config.json").write_text(json.dumps(config))
    trial = protocols.load(name, load_run(workdir).config.data).trial(0)
    (workdir / "label_map.json").write_text(json.dumps(protocols.label_map(trial, None)))
    return trial


def score_row(**values):
    return dict.fromkeys(SCORES, 0.125) | {
        "dataset": "viper", "protocol": "316/316 single-shot", "trial": 0, "feature": "joint", "normalize": "none",
        "num_queries": 316, "num_gallery": 316} | values


@pytest.fixture(scope="module")
def shop(tiny_run, tiny_extractor, shop_dir, tmp_path_factory):
    """The run on folder/shop, its report, its trial and the features that it is matched by."""
    workdir = tmp_path_factory.mktemp("runs") / "shop"
    trial = make_run(tiny_run, workdir, "folder/shop", shop_dir)
    rows = [score_row(trial=0, incomplete="half of it <b>", mean_ap=0.25), score_row(trial=1),
            score_row(trial="mean", trials=[0, 1], rank1=0.375) | {f"{score}_std": 0.0217 for score in SCORES}]
    (workdir / "results.json").write_text(json.dumps(
        {"rows": rows, "provenance": {"commit": "c0ffee", "command": "python -m jlml_jax.main", "steps": 12,
                                      "versions": {"jax": "9.9"}, "uncommitted_changes": True,
                                      "training": [{"command": "python -m jlml_jax.main --config.seed=3",
                                                    "commit": "decaf", "first_step": 1000}]}}))
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "lo')  # cut short by a kill
    (workdir / "calibration.json").write_text(json.dumps({
        "fingerprint": tiny_extractor.fingerprint,
        "thresholds": [{"rate": 1e-2, "threshold": 0.75}, {"rate": 1e-3, "threshold": 0.5},
                       {"rate": 1e-4, "threshold": None}]}))
    path = report.write_report(workdir, queries=5)
    run, mesh = load_run(workdir), parallel.make_mesh()
    forward = evaluate.make_forward(build_model(run.config, 0), run.config, mesh)
    features = [evaluate.matching_features(
        evaluate.extract_features(forward, run.variables, split, run.config.data, 16, mesh), "per_branch")
        for split in (trial.query, trial.gallery)]
    return workdir, path, trial, features


class Page(html.parser.HTMLParser):
    """Elements in order as (tag, attributes, text directly in it)."""

    def __init__(self, path):
        super().__init__()
        self.elements, self._open = [], []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in ("img", "meta", "link", "input", "br"):
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1][2] += data

    def all(self, tag, **wanted):
        return [(attributes, text) for found, attributes, text in self.elements if found == tag and all(
            wanted_value in (attributes.get(name) or "").split() for name, wanted_value in wanted.items())]


@pytest.fixture(scope="module")
def page(shop):
    return Page(shop[1])


def test_it_is_one_file_that_asks_for_nothing(page):
    for tag, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
        if tag in ("script", "link"):
            assert attributes in ({}, {"rel": "icon", "href": "data:,"})
    assert "default-src 'none'" in dict(page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0])["content"]
    style = page.all("style")[0][1]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_markup_in_names_stays_text(page):
    texts = [text for _, _, text in page.elements]
    assert any(MARKUP in text for text in texts)
    assert any("<i>till" in text for text in texts)
    assert any("-<b>&.png" in text for text in texts)
    assert not any("onerror" in attributes for _, attributes, _ in page.elements)
    assert all(attributes == {"aria-hidden": "true"} for attributes, _ in page.all("b"))
    assert len(page.all("script")) == 1


def test_the_page_can_be_used_without_seeing_it(page):
    assert page.all("html")[0][0]["lang"] == "en"
    assert all("alt" in attributes for attributes, _ in page.all("img"))
    assert all(attributes["alt"] for attributes, _ in page.all("img") if "layer" not in attributes.get("class", ""))
    assert all(attributes.get("scope") in ("row", "col") for attributes, _ in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(attributes["aria-label"] and attributes["role"] == "img" for attributes, _ in page.all("svg"))
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["for"] for attributes, _ in page.all("label") if "for" in attributes} == {
        attributes["id"] for attributes, _ in page.all("select")}
    assert {attributes["href"][1:] for attributes, _ in page.all("a")} <= set(ids)


def test_results_are_those_of_the_file_in_per_cent(page):
    cells = [" ".join(text.split()) for _, _, text in page.elements if text.strip()]
    assert cells.count("12.5") == 7 + 6 + 6 and "25.0" in cells and "37.5" in cells
    assert "mean of 2 trials" in cells and cells.count("± 2.2") == 7
    assert any("half of it <b>" in cell for cell in cells)
    assert "c0ffee, with uncommitted changes" in cells and "jax 9.9" in cells
    assert cells[cells.index("trained from step 1,000") + 1] == "python -m jlml_jax.main --config.seed=3 (commit decaf)"


def test_figures_are_of_the_features(page, shop):
    _, _, trial, (query, gallery) = shop
    tiles = [text for _, text in page.all("dd")][:5]
    scores = {name: metrics.evaluate_ranking(query[name], gallery[name], *evaluate.labels_of(trial)) for name in query}
    assert [float(tile) for tile in tiles[:3]] == pytest.approx(
        [100 * scores["joint"].cmc[0], 100 * scores["joint"].mean_ap, 100 * scores["joint"].mean_inp], abs=0.0501)
    assert tiles[3:] == ["20", "20"]
    label = next(attributes["aria-label"] for attributes, _ in page.all("svg") if "CMC" in attributes["aria-label"])
    for name, score in scores.items():
        assert f"{name}: {100 * score.cmc[0]:.4g} at 1, {100 * score.cmc[-1]:.4g} at 50" in label
    same = trial.query.identities[:, None] == trial.gallery.identities
    other = trial.query.cameras[:, None] != trial.gallery.cameras
    assert f"{(same & other).sum()} pairs of the same person and {(~same).sum()} of different people" in page.text


def test_lists_are_the_worst_the_best_and_others(page, shop):
    _, _, trial, (query, gallery) = shop
    _, precisions = metrics.query_scores(query["joint"], gallery["joint"], *evaluate.labels_of(trial))
    articles = [attributes for attributes, _ in page.all("article")]
    assert [one["data-group"] for one in articles] == ["worst"] * 5 + ["random"] * 5 + ["best"] * 5
    files = [text for attributes, text in page.all("span", **{"class": "file"})]
    assert len(set(files)) == 15
    shown = np.array([precisions[list(trial.query.names).index(name)] for name in files])
    assert np.all(np.diff(shown[:5]) >= 0) and np.all(np.diff(shown[10:]) <= 0)
    np.testing.assert_allclose(shown[:5], np.sort(precisions)[:5])
    np.testing.assert_allclose(shown[10:], np.sort(precisions)[::-1][:5])
    cameras = {attributes["value"] for attributes, _ in page.all("option")} & {"door", "<i>till"}
    assert cameras == {one["data-camera"] for one in articles} == {"door", "<i>till"}


def test_the_table_beside_the_page_has_every_query(shop):
    workdir, _, trial, (query, gallery) = shop
    with open(workdir / "report.queries.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ranks, precisions = metrics.query_scores(query["joint"], gallery["joint"], *evaluate.labels_of(trial))
    assert [row["query"] for row in rows] == trial.query.names.tolist()
    assert [int(row["first_match_rank"]) for row in rows] == ranks.tolist()
    np.testing.assert_allclose([float(row["average_precision"]) for row in rows], precisions, atol=1e-6)
    distances = l2_distances(query["joint"], gallery["joint"])
    for q, row in enumerate(rows):
        nearest = pictures.ranked_gallery(trial, q, distances[q], 1)[0]
        assert row["nearest"] == trial.gallery.names[nearest]
        assert float(row["nearest_distance"]) == pytest.approx(distances[q, nearest], abs=1e-5)
    assert {row["camera"] for row in rows} == {row["nearest_camera"] for row in rows} == {"door", "<i>till"}
    assert {MARKUP, "p5"} < {row["identity"] for row in rows}


def test_queries_that_do_not_count_have_no_scores_in_the_table(shop):
    _, _, trial, (query, gallery) = shop
    gallery = gallery["joint"][:]
    alone = dataclasses.replace(trial, gallery=trial.gallery.select(np.arange(1)))
    scores = metrics.query_scores(query["joint"], gallery[:1], *evaluate.labels_of(alone))
    names = datasets.names("folder/shop", load_run(shop[0]).config.data.data_dir)
    lines = report._queries_table(alone, names, query["joint"], gallery[:1], *scores).splitlines()[1:]
    rows = list(csv.reader(lines))
    assert len(rows) == len(trial.query) and sum(row[3:5] != ["", ""] for row in rows) == 1
    own = [row for row in rows if row[1:3] == [names.identity(alone.gallery.identities[0]),
                                               names.camera(alone.gallery.cameras[0])]]
    assert own and all(row[5:] == [""] * 4 for row in own)  # all of the gallery is of its own camera


def test_a_list_is_ranked_as_the_metrics_rank(shop):
    _, _, trial, (query, gallery) = shop
    distances = l2_distances(query["joint"], gallery["joint"])
    distances[:] = np.round(distances, 1)  # ties: the wrong image is first
    for q in range(len(trial.query)):
        ranked = pictures.ranked_gallery(trial, q, distances[q], 100)
        right = trial.gallery.identities[ranked] == trial.query.identities[q]
        assert np.all(trial.gallery.cameras[ranked[right]] != trial.query.cameras[q])
        one = metrics.rank_metrics(distances[q:q + 1], *(labels[q:q + 1] if i % 2 == 0 else labels
                                                         for i, labels in enumerate(evaluate.labels_of(trial))))
        assert 1 / (1 + np.flatnonzero(right)[0]) == pytest.approx(one.mean_ap)  # there is one right image


def test_the_same_run_gives_the_same_page(shop, tmp_path):
    workdir, path, _, _ = shop
    again = report.write_report(workdir, tmp_path / "again.html", queries=5)
    assert again.read_bytes() == path.read_bytes()


def test_thresholds_are_marked_and_stale_ones_refused(shop, page, tmp_path, refused_by):
    workdir, _, trial, (query, gallery) = shop
    distances = l2_distances(query["joint"], gallery["joint"])
    same = trial.query.identities[:, None] == trial.gallery.identities
    same_pairs = distances[same & (trial.query.cameras[:, None] != trial.gallery.cameras)]
    cells = [text for _, text in page.all("td")]
    for threshold in (0.75, 0.5):
        assert f"{threshold:.4f}" in cells
        assert cells[cells.index(f"{threshold:.4f}") + 1:][:2] == [
            f"{100 * np.mean(same_pairs < threshold):.1f}", f"{100 * np.mean(distances[~same] < threshold):.3f}"]
    assert len(page.all("path", **{"class": "mark"})) == 2
    shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["evaluate"]["norm_statistics"] = "data"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    written = report.write_report(tmp_path / "run", queries=5).read_text()
    assert "thresholds are of features by other statistics" in written and "0.7500" not in written
    assert "statistics by camera" not in written
    shutil.copy(workdir / "config.json", tmp_path / "run")
    content = json.loads((workdir / "calibration.json").read_text())
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(content | {"source": {"tracks": 9}}))
    written = report.write_report(tmp_path / "run", queries=5).read_text()
    assert "thresholds are of tracks" in written and "0.7500" not in written and "No thresholds yet" not in written
    content["fingerprint"] = "0" * 16
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(content))
    assert "run python -m jlml_jax.calibrate" in refused_by(report, f"--workdir={tmp_path / 'run'}")
    assert (tmp_path / "run" / "report.html").exists()  # what was there stays


def test_what_the_user_can_mend(shop, shop_dir, tmp_path, refused_by):
    workdir = tmp_path / "run"
    shutil.copytree(shop[0], workdir)
    (workdir / "report.html").unlink()
    run = f"--workdir={workdir}"
    assert "--queries=0 must be at least 1" in refused_by(report, run, "--queries=0")
    assert "is a folder" in refused_by(report, run, f"--output={tmp_path}")
    assert "is not a folder" in refused_by(report, run, f"--output={tmp_path / 'no' / 'r.html'}")
    assert "is not a run's folder" in refused_by(report, f"--workdir={tmp_path}")
    assert "is not prepared in" in refused_by(report, run, f"--data_dir={tmp_path}")
    (tmp_path / "trial-00").symlink_to(workdir)
    assert "give one of them" in refused_by(report, f"--workdir={tmp_path}")
    labels = json.loads((workdir / "label_map.json").read_text())
    (workdir / "label_map.json").write_text(json.dumps(labels | {"fingerprint": "other"}))
    assert "another version of folder/shop" in refused_by(report, run)
    (workdir / "label_map.json").write_text(json.dumps(labels))
    for name in ("metrics.jsonl", "results.json"):
        for content in ("{\n", "5\n", '{"x": 1}\n'):
            (workdir / name).write_text(content)
            assert f"{workdir / name} does not read" in refused_by(report, run)
    assert not (workdir / "report.html").exists()


def test_a_union_has_no_ranking(tiny_run, shop_dir, tmp_path):
    make_run(tiny_run, tmp_path / "run", "market1501+folder/shop", shop_dir)
    page = Page(report.write_report(tmp_path / "run"))
    assert not page.all("article") and not page.all("div", **{"class": "notice"})
    assert [text for _, text in page.all("h2")] == ["Results", "Training", "Provenance"]
    assert "Not evaluated yet" in page.text and len(page.all("svg")) == 5
    assert "Do not pass this file on" not in page.text


def test_evaluations_while_training_are_curves():
    history = [{"step": step, "loss": 1.0} for step in (2, 4)]
    history.insert(1, {"step": 3, "rank1/global": 0.25, "rank1/joint": 0.5, "mean_ap/global": 0.125,
                       "mean_ap/joint": 0.375})
    loss, rank1, mean_ap = report._training(history)
    assert (rank1["title"], rank1["names"], rank1["rows"]) == (
        "Rank-1 while training", ["global", "joint"], [("3", ["25", "50"])])
    assert (mean_ap["title"], mean_ap["rows"]) == ("mAP while training", [("3", ["12.5", "37.5"])])
    assert [x for x, _ in loss["rows"]] == ["2", "4"]


def test_results_of_other_weights_are_told(shop):
    workdir, _, trial, (query, gallery) = shop
    scores = {name: metrics.evaluate_ranking(query[name], gallery[name], *evaluate.labels_of(trial)) for name in query}
    row = score_row(dataset=trial.dataset, protocol=trial.protocol, rank1=float(scores["joint"].cmc[0]),
                    mean_ap=scores["joint"].mean_ap)
    other = row | {"mean_ap": row["mean_ap"] / 2}
    for rows, differs in (([row], False), ([other], True), ([other | {"trained_on": "viper"}], False)):
        results = {"rows": rows, "provenance": {"steps": 6}}
        told = report._difference(load_run(workdir), trial, results, "joint", scores)
        assert ("of step 6; checkpoint 12" in told) == differs and bool(told) == differs


def test_real_people_are_not_to_be_passed_on(tiny_run, tmp_path, capsys, page):
    page_of_benchmark = Page(report.write_report(tiny_run, tmp_path / "report.html"))
    assert "Do not pass this file on." in page_of_benchmark.text
    assert "may not be passed on" in capsys.readouterr().out
    assert "No thresholds yet" in page_of_benchmark.text
    assert "Do not pass this file on." not in page.text


def test_real_people_among_ones_own_are_not_to_be_passed_on_either(shop, tmp_path, capsys):
    shutil.copytree(shop[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["evaluate"]["extra_gallery"] = "market1501"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    page = Page(report.write_report(tmp_path / "run", queries=1))
    assert "images of real people in it, from\n    market1501, whose terms" in page.text
    assert "it has images of market1501 in it" in capsys.readouterr().out


def test_cameras_that_are_not_known_are_not_made_up(shop):
    _, _, trial, (query, gallery) = shop
    trial = dataclasses.replace(trial, cameras_known=False)
    names = datasets.names("folder/shop", load_run(shop[0]).config.data.data_dir)
    scores = metrics.query_scores(query["joint"], gallery["joint"], *evaluate.labels_of(trial))
    table = list(csv.DictReader(report._queries_table(trial, names, query["joint"], gallery["joint"], *scores)
                                .splitlines()))
    assert {row["camera"] for row in table} == {row["nearest_camera"] for row in table} == {""}
    distances = l2_distances(query["joint"][:][:1], gallery["joint"])[0]
    shown = report._ranked_list(trial, names, "best", 0, distances, *scores)
    assert {shown["camera"], *(crop["camera"] for crop in shown["gallery"])} == {"unknown"}


def test_a_report_is_made_on_any_number_of_devices(tiny_run, tmp_path, monkeypatch):
    make_mesh = parallel.make_mesh
    monkeypatch.setattr(parallel, "make_mesh", lambda devices=None: make_mesh((devices or jax.devices())[:3]))
    report.write_report(tiny_run, tmp_path / "report.html", queries=1)  # whose batches of 16 they do not divide
    assert (tmp_path / "report.html").exists()


def test_means_over_trials_are_in_the_report_of_a_trial(tmp_path):
    (tmp_path / "trial-03").mkdir()
    (tmp_path / "trial-03" / "results.json").write_text(json.dumps({"rows": [score_row(trial=3)], "provenance": {}}))
    mean = score_row(trial="mean", trials=[3, 4])
    (tmp_path / "results.json").write_text(json.dumps({"rows": [score_row(trial=4), mean], "provenance": {}}))
    assert [row["trial"] for row in report._read_results(tmp_path / "trial-03")["rows"]] == [3, "mean"]


def test_means_over_networks_are_in_the_report_of_a_trial(tmp_path):
    own = score_row(trial=0, trained_on="viper", trained_trial=3)
    mean = score_row(trial=0, trained_on="viper", trained_trial="mean", trained_trials=[3, 4])
    (tmp_path / "trial-03").mkdir()
    (tmp_path / "trial-03" / "results.json").write_text(json.dumps({"rows": [own], "provenance": {}}))
    (tmp_path / "results.json").write_text(json.dumps(
        {"rows": [own, score_row(trial="mean", trials=[0, 1], trained_on="viper", trained_trial=4), mean],
         "provenance": {}}))
    rows = report._read_results(tmp_path / "trial-03")["rows"]
    assert rows == [own, mean]
    table, = report._tables(rows)
    assert table["trials"] and [row["trial"] for row in table["rows"]] == [0, "mean of 2 networks"]


# In a browser.


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]' and a Chromium")
    path = next(filter(None, [os.environ.get("CHROMIUM"), *map(shutil.which, (
        "chromium", "chromium-browser", "google-chrome"))]), None)
    if path is None:
        pytest.skip("needs a Chromium: apt-get install chromium, or its path in the environment variable CHROMIUM")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # CI runs as root
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, shop):
    """Opens the report; nothing may be asked for but the file, and nothing told on the console."""
    problems, contexts = [], []

    def run(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or problems.append(request.url))
        tab.on("dialog", lambda dialog: problems.append(dialog.message))
        tab.goto(Path(shop[1]).as_uri())
        return tab

    yield run
    for context in contexts:
        context.close()
    assert not problems


def shown(tab):
    return tab.locator("#queries > article:visible").count()


def test_the_filters_filter(visit):
    tab = visit()
    assert shown(tab) == 15
    tab.select_option("#by-group", "worst")
    assert shown(tab) == 5 and tab.inner_text("output") == "5 of 15 queries"
    tab.select_option("#by-camera", "<i>till")
    expected = tab.evaluate("""() => [...document.querySelectorAll("article")].filter(
        (one) => one.dataset.group === "worst" && one.dataset.camera === "<i>till").length""")
    assert shown(tab) == expected < 5
    tab.click("text=Show all")
    tab.locator("output", has_text="15 of 15 queries").wait_for()
    identity = tab.get_attribute("article >> nth=0", "data-identity")
    tab.select_option("#by-identity", identity)
    headings = tab.locator("#queries > article:visible h3").all_inner_texts()
    assert headings and all(f"Identity {identity}," in heading for heading in headings)
    other = tab.evaluate("""(identity) => ["worst", "random", "best"].find((group) => ![
        ...document.querySelectorAll("article")].some((one) => one.dataset.group === group
                                                      && one.dataset.identity === identity))""", identity)
    tab.select_option("#by-group", other)
    assert shown(tab) == 0 and tab.is_visible("text=No query is left")


def test_it_works_by_keyboard(visit):
    tab = visit()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#main"
    tab.focus("#by-group")
    tab.keyboard.press("ArrowDown")
    assert shown(tab) == 5
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for _ in range(3):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # Show all
    tab.locator("output", has_text="15 of 15 queries").wait_for()
    tab.keyboard.press("Tab")  # to the radio buttons
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.value") == "global"
    tab.wait_for_timeout(400)  # until the maps have faded in
    opacities = [tab.evaluate(f"getComputedStyle(document.querySelector('article .layer.{branch}')).opacity")
                 for branch in ("global", "local")]
    assert opacities == ["1", "0"]
    summary = tab.locator("summary").first
    summary.focus()
    tab.keyboard.press("Enter")
    assert tab.locator(".values table").first.is_visible()


def test_it_fits_a_phone(visit):
    tab = visit(viewport={"width": 375, "height": 700})
    assert tab.evaluate("document.documentElement.scrollWidth") == 375
    tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") == 375
    assert tab.evaluate("document.querySelector('.row ol').scrollWidth > document.querySelector('.row ol').clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(visit, scheme):
    """WCAG's contrast of 4.5 between text and what is behind it; of 3 between curves and the panel."""
    tab = visit(color_scheme=scheme)
    colours = tab.evaluate("""() => {
        const colour = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
        return {panel: colour(".panel", "backgroundColor"), paper: colour("body", "backgroundColor"),
                text: ["body", ".about", ".key.right", ".key.wrong", "summary", ".group", "thead th"].map(
                    (one) => colour(one, "color")),
                curves: [".c0", ".c1", ".c2", ".c3"].map((one) => colour(one, "stroke"))};
    }""")

    def luminance(colour):
        channels = np.array([int(value) for value in re.findall(r"\d+", colour)[:3]]) / 255
        return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ (
            0.2126, 0.7152, 0.0722)

    def contrast(one, other):
        low, high = sorted([luminance(one), luminance(other)])
        return (high + 0.05) / (low + 0.05)

    assert (luminance(colours["paper"]) > 0.5) == (scheme == "light")
    for behind in (colours["panel"], colours["paper"]):
        assert all(contrast(colour, behind) >= 4.5 for colour in colours["text"])
        assert all(contrast(colour, behind) >= 3 for colour in colours["curves"])


def test_without_scripts_everything_is_shown(visit):
    tab = visit(java_script_enabled=False)
    assert shown(tab) == 15 and not tab.is_visible("form.tools")
    tab.check("input[value=local]")
    assert tab.locator("article .layer.local").first.is_visible()


def test_cameras_that_are_not_known_are_said_to_be(trial):
    rows = len(trial.query)
    one = report._ranked_list(trial, Names(cameras=None), "best", 0, np.zeros(len(trial.gallery)), np.ones(rows, int),
                              np.ones(rows))
    assert {one["camera"], *(hit["camera"] for hit in one["gallery"])} == {"unknown"}
