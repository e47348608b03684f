"Labels confused as people confuse them, and folders that are not clean."
from dataclasses import replace

import numpy as np
import pytest
import torch
from coft.collaborate import CoFT
from coft.data import ArrayImages, Audit, Task, load_task
from coft.filtering import label_quality
from coft.harder import HARDER, NOISE_RATES, annotator_confusion, at_rate, copies_task, mislabel, noisy_task, strangers_task, tail_task
from helpers import QUICK, message_of

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
