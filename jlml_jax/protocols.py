"""Who is train, query and gallery in each trial of a benchmark's protocol."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from jlml_jax import datasets
from jlml_jax.datasets.split import DISTRACTOR, Split, join_images
from jlml_jax.errors import UserError, first_few, printable

VIPER_TRIALS = 10
_OTHER_CAMERA = -1  # of extra distractors: none of the tested data set's
JOINED_SPLITS = ("all", "train")
_TRAIN_ALONE = " (train)"  # after the name of joined sets
CUHK03_PROTOCOLS = ("single-shot", "767/700")
CUHK03_TRAIN_IDENTITIES = (1_367, 1_260)  # Table 2; the text, which leaves out the last two camera pairs


@dataclasses.dataclass(frozen=True)
class Trial:
    """The images of one trial. Training and test identities are disjoint.

    What a data set has no images for is None: a union of data sets has no test, one of test images alone no training
    set, and ImageNet has `validation` in place of query and gallery.
    """

    dataset: str  # as in datasets.NAMES, or as `joined_name` has it
    protocol: str  # as results.json has it
    number: int = 0
    train: Split | None = None
    query: Split | None = None
    gallery: Split | None = None
    multi_query: Split | None = None  # Market-1501: further images of the queries' identities, by their cameras
    validation: Split | None = None  # images of the training classes, whose share classified rightly is the result
    single_gallery_shot: bool = False  # rank against one random image a gallery identity, as metrics has it
    incomplete: str = ""  # what is known to be missing or degraded in this copy of the data, in words
    # Data sets joined into `train`: an identity there is that of the data set plus this.
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)
    # By data set, where numbers mean nothing outside of it: identity i is called names[i - 1].
    names: dict[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    cameras_known: bool = True  # else every image of a data set of the user's own counts as a camera of its own

    def identities(self) -> np.ndarray:
        """The training identities, sorted, int64 [C]: class c of a classifier is the person identities()[c]."""
        return np.unique(self.train.identities)

    def labels(self) -> np.ndarray:
        """The classes of the training images, int64 [N]."""
        return self.labels_of(self.train)

    def labels_of(self, split: Split) -> np.ndarray:
        """The classes of images of training identities, int64 [N]."""
        return np.searchsorted(self.identities(), split.identities)

    def camera_one_hot(self) -> np.ndarray:
        """The cameras of the training images, float32 [N, number of cameras], one-hot; each data set has its own."""
        cameras = self.camera_numbers()
        return np.eye(cameras.max() + 1, dtype=np.float32)[cameras]

    def camera_numbers(self) -> np.ndarray:
        """The cameras of the training images, numbered from 0, int64 [N]; each data set has its own."""
        dataset = np.searchsorted(sorted(self.offsets.values()), self.train.identities)
        _, camera = np.unique(np.stack([dataset, self.train.cameras]), axis=1, return_inverse=True)
        return camera.ravel()  # NumPy 2.0 has a second axis

    def people(self) -> dict[str, list[int] | list[str]]:
        """The training identities by data set, in the order of the classes; by name where they have one."""
        return self._by_dataset(self.identities())

    def tested_people(self) -> dict[str, list[int] | list[str]]:
        """The identities that are searched for, by data set; by name where they have one."""
        return self._by_dataset(np.unique(self.query.identities))

    def datasets(self) -> list[str]:
        """Those that are trained on together, or the one."""
        return list(self.offsets) or [self.dataset]

    def _by_dataset(self, identities: np.ndarray) -> dict[str, list[int] | list[str]]:
        bounds = [*(self.offsets or {self.dataset: 0}).items(), ("", np.iinfo(np.int64).max)]
        numbers = {dataset: (identities[(identities > low) & (identities <= high)] - low).tolist()
                   for (dataset, low), (_, high) in zip(bounds, bounds[1:], strict=False)}
        return {dataset: [self.names[dataset][number - 1] for number in found] if dataset in self.names else found
                for dataset, found in numbers.items()}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The trials of a data set; each is made when it is asked for."""

    num_trials: int
    trial: Callable[[int], Trial]  # 0 to num_trials - 1

    def numbers(self, chosen: str) -> list[int]:
        """The trials that `config.data.trials` names, as `chosen_trials` has it.

        Raises:
            UserError: it names none, or one that is not among them.
        """
        last, numbers = self.num_trials - 1, chosen_trials(chosen)
        if numbers is None:
            return list(range(self.num_trials))
        if not numbers or numbers[-1] > last:
            raise UserError(f"data.trials={chosen!r} is not among the trials, 0 to {last}; give one (3), some (0-4 or "
                            "0-4,7) or all")
        return numbers


def chosen_trials(chosen: str) -> list[int] | None:
    """The numbers in `3`, `0-4` or `0-4,7`, sorted; None for `all`, an empty list for anything else."""
    if chosen == "all":
        return None
    numbers = set()
    for part in chosen.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found:
            return []
        numbers.update(found)
    return sorted(numbers)


def load(name: str, data: ml_collections.ConfigDict) -> Protocol:
    """The protocol of data set `name`, with the choices that `data`, a `config.data`, makes.

    Several names joined by `+` are trained on together, with no test: by `data.joined_splits` as a whole, all their
    identities (the paper's pre-training on CUHK03 and Market-1501), or each set's training identities, so that each can
    be tested on. With `data.held_out_identities`, so many training identities take the place of the test.

    Raises:
        UserError: the data set is unknown or not prepared, or does not hold what the protocol needs.
    """
    protocol, held_out = _published(name, data), data.held_out_identities
    if not held_out:
        return protocol
    return dataclasses.replace(protocol, trial=lambda number: _hold_out(protocol.trial(number), held_out))


def _published(name: str, data: ml_collections.ConfigDict) -> Protocol:
    if data.joined_splits not in JOINED_SPLITS:
        raise UserError(f"data.joined_splits={data.joined_splits!r} is unknown; known are {', '.join(JOINED_SPLITS)}")
    if "+" in name:
        return _union(name, data)
    return _PROTOCOLS.get(name.partition("/")[0], _fixed_splits)(name, data)


def _hold_out(trial: Trial, number: int) -> Trial:
    """The trial with `number` random training identities, the same in every run, as its test; the real one is left out.

    For what is chosen by trying. Queries are an image of each of them from each camera; the gallery has all images of
    them, of which a query's own camera's are ignored, as always.
    """
    train = trial.train
    if train is None or trial.validation is not None:
        raise UserError(f"{trial.dataset} has no people to hold out; set data.held_out_identities=0")
    if trial.offsets:  # each data set has its own cameras, also where they go by one number
        train = dataclasses.replace(train, cameras=trial.camera_numbers())
    pairs = np.unique(np.stack([train.identities, train.cameras], 1), axis=0)
    people, cameras = np.unique(pairs[:, 0], return_counts=True)
    several = people[cameras > 1]
    if not 0 < number <= min(len(several), len(people) - 1):
        seen = "are seen by several cameras" if trial.cameras_known else "have several images"
        raise UserError(f"data.held_out_identities={number}: of the {len(people)} training identities of "
                        f"{trial.dataset}, {len(several)} {seen}, and one must be left")
    # RandomState's stream is frozen for good, where NumPy's newer generators may change theirs.
    chosen = np.random.RandomState(trial.number).permutation(several)[:number]
    gallery = _of(train, chosen)
    _, first = np.unique(np.stack([gallery.identities, gallery.cameras], 1), axis=0, return_index=True)
    protocol = f"{number} training identities held out{_cameras_told(trial.cameras_known)}"
    return _checked(Trial(trial.dataset, protocol, trial.number,
                          train=_of(train, np.setdiff1d(people, chosen)), query=gallery.select(np.sort(first)),
                          gallery=gallery, incomplete=trial.incomplete, offsets=trial.offsets,
                          names=trial.names, cameras_known=trial.cameras_known))


def _cameras_told(known: bool) -> str:
    """What the name of a protocol says of them."""
    return "" if known else ", cameras unknown"


def tests(name: str, data: ml_collections.ConfigDict) -> list[Trial]:
    """All trials of a data set, to be evaluated on.

    Raises:
        UserError: as `load`, or it has no queries and gallery.
    """
    protocol = _published(name, data)
    trials = [protocol.trial(number) for number in range(protocol.num_trials)]
    if trials[0].query is None:
        raise UserError(f"evaluate.datasets={name!r} has no queries and gallery to be evaluated on; leave it out")
    return trials


def add_distractors(trials: Sequence[Trial], name: str, data: ml_collections.ConfigDict) -> list[Trial]:
    """The trials, to whose galleries all images of data set `name` are added as distractors; "" adds nothing.

    Market-1501 has 500,000 such images, an archive of its own.

    Raises:
        UserError: the data set has no crops, is not prepared, or has the very people that are searched for.
    """
    if not name:
        return list(trials)
    distractors = datasets.load_distractors(name, data.data_dir)
    return [_with_distractors(trial, distractors) if trial.gallery is not None else trial for trial in trials]


def _with_distractors(trial: Trial, distractors: Sequence[Split]) -> Trial:
    name = distractors[0].dataset
    if namespace(name) in map(namespace, trial.datasets()):
        raise UserError(f"evaluate.extra_gallery={name!r} has the very people that are searched for; give a data set "
                        "of others")
    # Theirs are other cameras than the tested ones, also where they go by one number.
    parts = [trial.gallery, *(dataclasses.replace(part, cameras=np.full(len(part), _OTHER_CAMERA))
                              for part in distractors)]
    gallery = Split(trial.dataset, join_images([part.images for part in parts]),
                    *(np.concatenate([getattr(part, field) for part in parts])
                      for field in ("identities", "cameras", "names")))
    return dataclasses.replace(trial, gallery=gallery, protocol=f"{trial.protocol}, {sum(map(len, distractors)):,} "
                                                                "extra distractors")


def _fixed_splits(name: str, data: ml_collections.ConfigDict) -> Protocol:
    """Market-1501, and sets like it: the splits are train, query, gallery and perhaps multi_query themselves."""
    splits = datasets.load(name, ("train", "query", "gallery", "multi_query"), data.data_dir)
    incomplete, names, known = _incomplete(name, data), _names(name, data), _cameras_known(name, data)

    def trial(number: int) -> Trial:
        parts = dict(splits)
        if "multi_query" in parts:
            everyone, query = parts["multi_query"], parts["query"]
            rows = np.flatnonzero(_in(_person_cameras(everyone), _person_cameras(query)))
            parts["multi_query"] = everyone.select(rows) if len(rows) else None  # none in an incomplete copy
        return _checked(Trial(name, f"single-query{_cameras_told(known)}", number, **parts, incomplete=incomplete,
                              names=names, cameras_known=known))
    return Protocol(1, trial)


def _viper(name: str, data: ml_collections.ConfigDict) -> Protocol:
    """10 random halves of the people, the same in every run; cam_a is queried against cam_b (Gray and Tao, 2008)."""
    splits = datasets.load(name, ("cam_a", "cam_b"), data.data_dir)
    people = np.unique(splits["cam_a"].identities)
    incomplete = _incomplete(name, data)

    def trial(number: int) -> Trial:
        # RandomState's stream is frozen for good, where NumPy's newer generators may change theirs.
        train, test = np.split(np.random.RandomState(number).permutation(people), [len(people) // 2])
        cam_a, cam_b = splits.values()
        return _checked(Trial(name, f"{len(train)}/{len(test)} single-shot", number,
                              train=_join([_of(cam_a, train), _of(cam_b, train)]),
                              query=_of(cam_a, test), gallery=_of(cam_b, test), incomplete=incomplete))
    return Protocol(VIPER_TRIALS, trial)


def _grid(name: str, data: ml_collections.ConfigDict) -> Protocol:
    """The 10 official partitions; the gallery has the test identities and all distractors (Loy et al., 2009)."""
    splits = datasets.load(name, ("probe", "gallery"), data.data_dir)
    partitions = datasets.metadata(name, data.data_dir)["partitions"]
    incomplete = _incomplete(name, data)

    def trial(number: int) -> Trial:
        train, test = partitions[number]["train"], partitions[number]["test"]
        probe, gallery = splits.values()
        return _checked(Trial(name, f"{len(train)}/{len(test)} single-shot", number,
                              train=_join([_of(probe, train), _of(gallery, train)]),
                              query=_of(probe, test), gallery=_of(gallery, [*test, DISTRACTOR]),
                              incomplete=incomplete))
    return Protocol(len(partitions), trial)


def _cuhk03(name: str, data: ml_collections.ConfigDict) -> Protocol:
    """20 single-shot trials (Li et al., 2014), or the 767/700 split (Zhong et al., 2017), by `data.cuhk03_protocol`."""
    if data.cuhk03_protocol not in CUHK03_PROTOCOLS:
        raise UserError(f"data.cuhk03_protocol={data.cuhk03_protocol!r} is unknown; known are "
                        f"{', '.join(CUHK03_PROTOCOLS)}")
    if data.cuhk03_train_identities not in CUHK03_TRAIN_IDENTITIES:
        raise UserError(f"data.cuhk03_train_identities={data.cuhk03_train_identities} is unknown; known are "
                        "1367, all but the test identities, and 1260, those of camera pairs 1 to 3 alone")
    if name == "cuhk03":
        raise UserError("data.name='cuhk03' does not say whose boxes: give cuhk03/labeled or cuhk03/detected")
    crops = datasets.load(name, ("crops",), data.data_dir)["crops"]
    metadata, incomplete = datasets.metadata(name, data.data_dir), _incomplete(name, data)

    if data.cuhk03_protocol == "767/700":
        lists = metadata["new_protocol"]
        if lists is None:
            raise UserError(f"{name} was prepared without the lists of the 767/700 protocol; put them beside "
                            "cuhk-03.mat and prepare it again with --overwrite")
        rows = {image: row for row, image in enumerate(crops.names)}
        parts = {part: crops.select(np.array([rows[image] for image in images])) for part, images in lists.items()}
        return Protocol(1, lambda number: _checked(Trial(name, "767/700", number, **parts, incomplete=incomplete)))

    testsets = metadata["testsets"]
    in_first_pairs = crops.cameras <= 6 if data.cuhk03_train_identities == 1_260 else np.ones(len(crops), bool)

    def trial(number: int) -> Trial:
        tested = np.isin(crops.identities, testsets[number])
        view_1 = crops.cameras % 2 == 1
        train = crops.select(np.flatnonzero(~tested & in_first_pairs))
        return _checked(Trial(
            name, f"{len(np.unique(train.identities))}/{len(testsets[number])} single-shot", number, train=train,
            query=crops.select(np.flatnonzero(tested & view_1)), gallery=crops.select(np.flatnonzero(tested & ~view_1)),
            single_gallery_shot=True, incomplete=incomplete))
    return Protocol(len(testsets), trial)


def _imagenet(name: str, data: ml_collections.ConfigDict) -> Protocol:
    """Classification: the data set's own training and validation images."""
    splits = datasets.load(name, ("train", "validation"), data.data_dir)
    unknown = np.setdiff1d(splits["validation"].identities, splits["train"].identities)
    if unknown.size:
        classes = datasets.metadata(name, data.data_dir)["classes"]
        lacking = first_few([classes[number - 1] for number in unknown])
        raise UserError(f"{name} has validation images, but no training images, of {unknown.size} classes: {lacking}; "
                        "add these and prepare it again with --overwrite")
    incomplete = _incomplete(name, data)
    return Protocol(1, lambda number: Trial(name, "classification", number, **splits, incomplete=incomplete))


def joined_name(name: str, joined_splits: str) -> str:
    """What results call the training set of `data.name` and `data.joined_splits`: all people of joined sets, or not."""
    return name + _TRAIN_ALONE if "+" in name and joined_splits == "train" else name


def _union(name: str, data: ml_collections.ConfigDict) -> Protocol:
    """People of several data sets, without distractors and junk, in one training set."""
    names = name.split("+")
    repeated = [one for one, number in Counter(map(namespace, filter(None, names))).items() if number > 1]
    if repeated:
        raise UserError(f"data.name={name!r} has the people of {first_few(repeated)} more than once")
    parts, offsets, end, incomplete, people = [], {}, 0, [], {}
    for one in names:
        part = _everybody(one, data) if data.joined_splits == "all" else _training_people(one, data)
        if not part:
            raise UserError(f"data.name={name!r}: {one} has no people to train on; leave it out")
        offsets[one] = end
        people |= _names(one, data)
        parts.append(dataclasses.replace(part, identities=part.identities + end))
        end = int(parts[-1].identities.max())
        if missing := _incomplete(one, data):
            incomplete.append(f"{one}: {missing}")
    name = joined_name(name, data.joined_splits)
    trial = Trial(name, "all identities" if data.joined_splits == "all" else "training identities",
                  train=dataclasses.replace(_join(parts), dataset=name), offsets=offsets,
                  incomplete="; ".join(incomplete), names=people,
                  cameras_known=all(_cameras_known(one, data) for one in names))
    return Protocol(1, lambda number: trial)


def _everybody(name: str, data: ml_collections.ConfigDict) -> Split:
    splits = datasets.load(name, _PEOPLE_SPLITS.get(namespace(name), ("train", "query", "gallery")), data.data_dir)
    whole = _join(splits.values())
    return whole.select(np.flatnonzero(whole.identities > DISTRACTOR))


def _training_people(name: str, data: ml_collections.ConfigDict) -> Split | None:
    protocol = _published(name, data)
    if protocol.num_trials > 1:  # whoever is trained on in one is tested in another
        instead = "give data.cuhk03_protocol=767/700, or " if namespace(name) == "cuhk03" else ""
        raise UserError(f"data.joined_splits=train: {name} has {protocol.num_trials} trials, each with other training "
                        f"people; {instead}leave it out of data.name")
    return protocol.trial(0).train


_PROTOCOLS = {"cuhk03": _cuhk03, "grid": _grid, "imagenet2012": _imagenet, "tiny_imagenet": _imagenet,
              "viper": _viper}

# The splits that have all images of a data set's people, where these are not train, query and gallery.
_PEOPLE_SPLITS = {"cuhk03": ("crops",), "grid": ("probe", "gallery"), "viper": ("cam_a", "cam_b")}


def namespace(dataset: str) -> str:
    """Data sets of the same people have the same one: CUHK03's labeled and detected boxes are of one population."""
    return "cuhk03" if dataset.startswith("cuhk03/") else dataset


def label_map(trial: Trial, parent: dict[str, Any] | None) -> dict[str, Any]:
    """What label_map.json has: the people a run is trained on, and those of the run that its weights come from.

    People of a data set of the user's own are there by name, as its numbers are of one preparation alone.
    """
    return {"dataset": trial.dataset, "fingerprint": trial.train.fingerprint(), "identities": trial.people(),
            "init_from": parent}


def with_names(label_map: dict[str, Any] | None, names: dict[str, Sequence[str]]) -> dict[str, Any] | None:
    """The label map, and those before it, with the people of data sets in `names` (`Trial.names`) by name.

    A run that was trained before label maps had names has their numbers, which are taken for those of today.
    """
    if label_map is None:
        return None
    people = {dataset: [names[dataset][person - 1] if isinstance(person, int) and person <= len(names[dataset]) else
                        person for person in found] if dataset in names else found
              for dataset, found in label_map["identities"].items()}
    return label_map | {"identities": people, "init_from": with_names(label_map["init_from"], names)}


def refuse_other_people(parent: dict[str, Any], label_map: dict[str, Any]) -> None:
    """A UserError if the identity layers of a run with label map `parent` tell others apart than those of a new run."""
    # Of data sets that are trained on together the order counts, too: it is that of the classes.
    if list(parent["identities"].items()) != list(label_map["identities"].items()):
        ours, theirs = (sum(len(identities) for identities in one["identities"].values())
                        for one in (label_map, parent))
        raise UserError("keep_identity_layers=True, but init_from was trained on other people, or in another order: "
                        f"{theirs} of {parent['dataset']} there, {ours} of {label_map['dataset']} here; leave it "
                        "False, and the identity layers are new")


def refuse_trained_on(trial: Trial, trained: dict[str, Any] | None) -> None:
    """A UserError if a run with label map `trained`, or one that it started from, saw test identities of `trial`."""
    if trial.query is None:
        return
    tested, trained = trial.tested_people(), with_names(trained, trial.names)
    number = sum(map(len, tested.values()))
    while trained is not None:
        both = [(dataset, identity) for dataset, identities in tested.items()
                for identity in sorted({*identities} & _people_of(trained, dataset))]
        if both:
            dataset, identity = both[0]
            whom = printable(str(identity)) + (f" of {dataset}" if trial.offsets else "")
            everybody = "+" in trained["dataset"] and not trained["dataset"].endswith(_TRAIN_ALONE)
            alone = ", such as one by data.joined_splits=train" if everybody else ""
            raise UserError(
                f"{len(both)} of the {number} test identities of {trial.dataset}, trial {trial.number} (such as "
                f"{whom}), were trained on with {trained['dataset']}: the result would mean nothing; evaluate on other "
                f"people, or take a run that has not seen these{alone}")
        trained = trained["init_from"]


def _people_of(label_map: dict[str, Any], dataset: str) -> set[int] | set[str]:
    """The people that a run was trained on who are of the same population as those of `dataset`."""
    return {identity for name, identities in label_map["identities"].items()
            if namespace(name) == namespace(dataset) for identity in identities}


def _names(name: str, data: ml_collections.ConfigDict) -> dict[str, Sequence[str]]:
    """`Trial.names` of a data set: one of the user's own has numbers that are of one preparation alone."""
    names = datasets.names(name, data.data_dir).identities
    return {name: names} if names else {}


def _cameras_known(name: str, data: ml_collections.ConfigDict) -> bool:
    return datasets.names(name, data.data_dir).cameras is not None


def _incomplete(name: str, data: ml_collections.ConfigDict) -> str:
    metadata = datasets.metadata(name, data.data_dir)
    notes = ["MSMT17_V2, whose faces are masked"] if metadata.get("faces_masked") else []
    return "; ".join([*notes, metadata["incomplete"]] if "incomplete" in metadata else notes)


def _of(split: Split, identities: Sequence[int]) -> Split:
    return split.select(np.flatnonzero(np.isin(split.identities, identities)))


def _join(splits: Iterable[Split]) -> Split:
    splits = list(splits)
    return Split(splits[0].dataset, [image for split in splits for image in split.images],
                 *(np.concatenate([getattr(split, field) for split in splits])
                   for field in ("identities", "cameras", "names")))


def _person_cameras(split: Split) -> list[tuple[int, int]]:
    return list(zip(split.identities.tolist(), split.cameras.tolist(), strict=True))


def _in(values: Iterable[Any], others: Iterable[Any]) -> list[bool]:
    others = set(others)
    return [value in others for value in values]


def _checked(trial: Trial) -> Trial:
    """The trial, unless its splits cannot be those of a protocol."""
    advice = f"mend the original files and prepare {trial.dataset} again"
    parts = {part: split for part in ("train", "query", "gallery") if (split := getattr(trial, part)) is not None}
    for part, split in parts.items():
        if not len(split):
            raise UserError(f"the {part} split of {trial.dataset} is empty; {advice}")
        if part != "gallery" and split.identities.min() <= DISTRACTOR:
            raise UserError(f"the {part} split of {trial.dataset} has junk or distractors in it; {advice}")
    if "query" not in parts and "train" in parts:  # good for training alone, as prepare has said
        return dataclasses.replace(trial, gallery=None)
    if "query" in parts and "gallery" not in parts or "gallery" in parts and "query" not in parts:
        raise UserError(f"{trial.dataset} has {'no gallery' if 'query' in parts else 'a gallery but no queries'}; "
                        f"{advice}")
    if "query" not in parts:
        return trial
    if "train" in parts:
        shared = np.intersect1d(trial.train.identities, trial.query.identities)
        if len(shared):
            raise UserError(f"{len(shared)} test identities of {trial.dataset}, such as {shared[0]}, are training "
                            f"identities too: the result would mean nothing; {advice}")
    unmatched = list(_without_match(trial.query, trial.gallery))
    users_own = trial.dataset.startswith("folder/")  # prepare has said which queries those are: they are not counted
    if users_own and len(unmatched) == len(trial.query) and "train" in parts:
        return dataclasses.replace(trial, query=None, gallery=None)
    if len(unmatched) == len(trial.query) or unmatched and not (trial.incomplete or users_own):
        cameras = np.unique(np.concatenate([trial.query.cameras, trial.gallery.cameras]))
        cause = " (all images are from one camera)" if len(cameras) == 1 else ""
        raise UserError(f"{len(unmatched)} of {len(trial.query)} queries of {trial.dataset}, trial {trial.number}, "
                        f"have no image of the same person from another camera in the gallery{cause}: "
                        f"{first_few(unmatched)}; {advice}")
    return trial


def _without_match(query: Split, gallery: Split) -> Iterator[str]:
    images, same_camera = Counter(gallery.identities.tolist()), Counter(_person_cameras(gallery))
    for name, (person, camera) in zip(query.names, _person_cameras(query), strict=True):
        if images[person] == same_camera[person, camera]:
            yield name
