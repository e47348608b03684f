"Labels confused as people confuse them, and folders that are not clean."
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch
from coft.collaborate import CoFT
from coft.core import read_json
from coft.data import SHIFTS, STORED, TASKS, ArrayImages, Audit, Task, load_task, sample_task
from coft.experiment import Parameters
from coft.filtering import label_quality
from coft.harder import HARDER, NOISE_RATES, annotator_confusion, at_rate, copies_task, mislabel, noisy_task, strangers_task, tail_task, wrong_classes
from helpers import QUICK, REAL, message_of, real

CONFUSION = np.array([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.1, 0.6]])


# Labels

def test_look_alikes_are_confused_and_others_are_not():
    "Two classes of the same bright images, one of dark ones."
    rng = np.random.default_rng(0)
    pixels = np.concatenate([rng.integers(200, 256, (40, 8, 8)), rng.integers(0, 50, (20, 8, 8))]).astype(np.uint8)
    task = Task("three", ["a", "b", "c"], ArrayImages(pixels), ArrayImages(pixels), _labels=Audit(np.repeat([0, 1, 2], 20), np.repeat([0, 1, 2], 20)))
    found = annotator_confusion(task)
    assert np.allclose(found.sum(1), 1) and found[2, 2] > 0.95 and found[:2, 2].max() < 0.05
    assert found[:2, :2].min() > 0.3
    assert "'b'" in message_of(annotator_confusion, replace(task, _labels=Audit(np.repeat([0, 1, 2], [38, 2, 20]), task.audit.test)))


def test_the_stored_confusions_are_those_of_the_tasks():
    toy = load_task("glyphs-toy")
    stored = at_rate(annotator_confusion(toy), 0.4, np.full(4, 0.25))
    given = noisy_task(toy, 0.4).labelled(noisy=True)[1]
    counted = np.stack([np.bincount(given[toy.audit.train == k], minlength=4) / (toy.audit.train == k).sum() for k in range(4)])
    assert np.abs(stored - counted).max() < 0.03


@pytest.mark.parametrize("name", ["digits", "glyphs"])
def test_the_stored_confusion_is_made_by_this_code(name):
    "The stored one has six decimals; a version of scikit-learn may stop a little elsewhere."
    stored = np.array(read_json(STORED / "confusions.json")[name])
    found = annotator_confusion(load_task(name))
    assert found.shape == stored.shape and np.abs(found - stored).max() < 1e-3


def test_the_rates_of_cifar10_are_hit():
    real("cifar10", "train.parquet")
    clean = load_task("cifar10", REAL)
    for rate in NOISE_RATES:
        noisy = load_task(f"cifar10-mislabelled-{round(100 * rate)}", REAL)
        given = noisy.labelled(noisy=True)[1]
        assert len(given) == 50000 and (given != clean.audit.train).mean() == pytest.approx(rate, abs=0.001)
        assert noisy.unlabelled is clean.unlabelled and noisy.audit is clean.audit, "decoded once"


def test_mistakes_that_are_spread_over_fewer_classes_count_as_fewer():
    two = np.array([[0.5, 0.25, 0.25, 0], [0, 0.2, 0.4, 0.4], [0.1, 0, 0.8, 0.1], [0.3, 0.3, 0, 0.4]])
    assert wrong_classes(two) == pytest.approx(2) and wrong_classes(1000 * two) == pytest.approx(2)
    assert wrong_classes(np.array([[0.5, 0.5, 0], [0, 1, 0], [0.25, 0.25, 0.5]])) == pytest.approx(1.5), "a class without a mistake has no part in it"


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.6])
def test_the_confusion_keeps_its_form_at_every_rate(rate):
    "Ratios of entries are those of the confusion to one power, and the right class stays the likeliest."
    shares = np.array([0.5, 0.3, 0.2])
    transition = at_rate(CONFUSION, rate, shares)
    assert np.allclose(transition.sum(1), 1) and 1 - shares @ np.diag(transition) == pytest.approx(rate)
    powers = [np.log(transition[k, i] / transition[k, j]) / np.log(CONFUSION[k, i] / CONFUSION[k, j]) for k, i, j in [(0, 0, 1), (0, 1, 2), (1, 1, 0), (2, 0, 1), (2, 2, 0)]]
    assert np.allclose(powers, powers[0]) and (transition.argmax(1) == [0, 1, 2]).all()


def test_given_labels_hit_every_cell_of_the_confusion():
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [500, 301, 77]))
    transition = at_rate(CONFUSION, 0.4, np.bincount(labels) / len(labels))
    given = mislabel(labels, transition, seed=3)
    counts = np.array([[((labels == k) & (given == j)).sum() for j in range(3)] for k in range(3)])
    assert np.abs(counts - transition * np.bincount(labels)[:, None]).max() < 1.001
    assert (given == mislabel(labels, transition, seed=3)).all() and (given != mislabel(labels, transition, seed=4)).any()
    assert (mislabel(np.array([-1, 0]), np.eye(3)) == [-1, 0]).all(), "a stranger stays one"


@pytest.mark.parametrize("name", ["digits", "glyphs", "glyphs-dev"])
def test_registered_tasks_hit_their_rates(name):
    clean = load_task(name)
    for rate in NOISE_RATES:
        noisy = load_task(f"{name}-mislabelled-{round(100 * rate)}")
        index, given = noisy.labelled(noisy=True)
        assert len(index) == len(clean.unlabelled) and abs((given != clean.audit.train).mean() - rate) < 0.006
        assert noisy.audit is clean.audit and (noisy.labelled()[1] == clean.audit.train).all()


def test_given_labels_have_one_door(clip, task, quick_run):
    noisy = noisy_task(task, 0.4)
    assert noisy.data_sha256 != task.data_sha256
    with pytest.raises(PermissionError):
        noisy.blind().labelled(noisy=True)
    assert (CoFT(**QUICK).fit(clip, noisy, progress=False).predict_all(task.test) == quick_run.fitted.predict_all(task.test)).all()


@pytest.mark.parametrize("rate", [0, 0.8, "half"])
def test_rates_that_cannot_be_are_named(rate):
    assert "rate:" in message_of(at_rate, CONFUSION, rate, np.full(3, 1 / 3))


# Folders

def test_strangers_join_the_same_listed_images():
    base = load_task("glyphs")
    folders = {s: strangers_task(base, s) for s in (0, 0.1, 0.5)}
    listed = {s: set(t.unlabelled.rows[t.audit.train >= 0]) for s, t in folders.items()}
    assert listed[0] == listed[0.1] == listed[0.5] and len(folders[0].unlabelled) == len(listed[0])
    for s, t in folders.items():
        assert (t.audit.train < 0).mean() == pytest.approx(s, abs=1e-3)
        shown = base.audit.train[t.unlabelled.rows]
        assert [t.class_names[k] for k in t.audit.train[t.audit.train >= 0]] == [base.class_names[k] for k in shown[t.audit.train >= 0]]
        assert (shown[t.audit.train < 0] % 2 == 1).all()
        assert [t.class_names[k] for k in t.audit.test[:50]] == [base.class_names[k] for k in base.audit.test[t.test.rows[:50]]]
        assert (t.labelled()[1] >= 0).all()


def test_a_stranger_is_a_wrong_label_and_no_class():
    quality = label_quality(np.array([0, 1]), np.array([0, 1]), np.array([0, -1, 1]), 2)
    assert quality.precision == 0.5 and quality.class_recall.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_tails_fall_by_equal_factors(ratio):
    base = load_task("digits")
    sizes = np.sort(np.bincount(tail_task(base, ratio).audit.train, minlength=10))[::-1]
    assert sizes[0] / sizes[-1] == pytest.approx(ratio, rel=0.3), "the smallest class is rounded to a whole image"
    assert np.allclose(np.log(sizes / sizes[0]), -np.log(ratio) * np.arange(10) / 9, atol=0.35)
    assert sizes[0] >= 120


def test_near_copies_are_near_and_many():
    base = load_task("digits")
    folder = copies_task(base, 0.5)
    source = np.bincount(folder.unlabelled.rows).argmax()
    mine = np.flatnonzero(folder.unlabelled.rows == source)
    pixels = folder.unlabelled.batch(mine, 24).float()
    own = base.unlabelled.batch([source], 24).float()
    differences = (pixels - own).abs().mean((1, 2, 3))
    assert len(mine) == 21 and (differences == 0).sum() < 8
    others = (base.unlabelled.batch(range(200), 24).float() - own).abs().mean((1, 2, 3))
    assert differences.max() < np.quantile(others, 0.1)
    assert torch.equal(folder.unlabelled.batch(mine[3:4], 24), folder.unlabelled.batch(mine, 24)[3:4]), "a copy does not depend on its batch"
    assert folder.unlabelled.digest() != copies_task(base, 0.5, seed=1).unlabelled.digest()


def test_every_kind_is_registered_and_keeps_classes_or_lists_half():
    for kind in HARDER:
        toy = load_task(f"glyphs-toy-{kind}")
        assert toy.name == f"glyphs-toy-{kind}" and len(toy.class_names) == (2 if "strangers" in kind else 4)
        assert toy.unlabelled.batch([0, len(toy.unlabelled) - 1], 24).shape == (2, 3, 24, 24)
    shifted, clean = load_task("glyphs-toy-turn"), load_task("glyphs-toy")
    assert shifted.unlabelled is clean.unlabelled and not torch.equal(shifted.test.batch([0], 24), clean.test.batch([0], 24))


# A part of a folder that is made harder

@pytest.fixture
def part():
    "Tasks as a job loads them that takes 400 of the 1,257 images of `digits`."
    return Parameters(tasks="digits", unlabelled=400).load


def test_a_part_of_a_folder_keeps_its_share_of_near_copies(part):
    folder = part("digits-copies").unlabelled
    times = np.bincount(folder.rows, minlength=400)
    assert len(folder) == 400 and folder.changed.sum() == 200 and (times == 21).sum() == 10 and set(times) == {0, 1, 21}


def test_a_part_of_a_folder_shows_the_same_listed_images_at_every_share_of_strangers(part):
    base, listed = load_task("digits"), []
    for share in (0, 10, 30, 50):
        folder = part(f"digits-strangers-{share}")
        own = folder.unlabelled.images.rows[folder.unlabelled.rows]
        strange = folder.audit.train < 0
        assert strange.mean() == pytest.approx(share / 100, abs=2e-3) and (base.audit.train[own[strange]] % 2 == 1).all()
        listed.append(set(own[~strange]))
    assert listed[0] == listed[1] == listed[2] == listed[3] and 180 <= len(listed[0]) <= 200


def test_a_part_of_a_folder_keeps_rates_tails_and_missing_classes(part):
    clean = part("digits")
    for rate in (20, 40, 60):
        noisy = part(f"digits-mislabelled-{rate}")
        assert noisy.unlabelled.digest() == clean.unlabelled.digest() and (noisy.labelled(noisy=True)[1] != clean.audit.train).mean() == pytest.approx(rate / 100, abs=0.012)
    sizes = np.bincount(part("digits-tail-10").audit.train, minlength=10)
    assert sizes.max() / sizes.min() == pytest.approx(10, rel=0.2)
    assert (np.bincount(part("digits-missing").audit.train, minlength=10) == 0).sum() == 3


def test_a_task_that_is_made_of_no_other_is_cut_as_before(part):
    assert part("digits").data_sha256 == sample_task(load_task("digits"), 400).data_sha256
    assert part("digits-turn").unlabelled.digest() == part("digits").unlabelled.digest()
    assert Parameters(tasks="digits-copies", unlabelled=5000).load("digits-copies").data_sha256 == load_task("digits-copies").data_sha256


def test_every_harder_task_takes_the_number():
    bases = ("digits", "glyphs-dev", "glyphs", "glyphs-toy", "cifar10")
    made = [f"{b}-{k}" for b in bases for k in (*HARDER, *SHIFTS) if not (b == "digits" and k in SHIFTS)]
    assert all("unlabelled" in signature(TASKS[name]).parameters for name in made)
