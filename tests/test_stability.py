"What happens when a run goes wrong: plain words, finite numbers, and an error that says where."
import re

import numpy as np
import pytest
from coft import CoFT, TopK
from coft.filtering import Similarities, collapse_warning, selection_warnings
from coft.trainer import EncoderWithHead, Schedule, train

NAMES = ["cat", "dog", "cow"]


def reject(monkeypatch, refused):
    "Make every peer reject the labels of the classes `refused`, and accept the others"
    monkeypatch.setattr(Similarities, "accepts", lambda self, labels, strict=False: ~np.isin(labels, refused))


def assert_finite(fitted, images):
    P = fitted.predict_all(images)
    assert np.isfinite(P).all() and np.allclose(P.sum(-1), 1, atol=1e-5)


def test_a_collapsed_model_is_told_in_plain_words():
    assert collapse_warning(np.full(9, 1), NAMES, "model 1") == ["model 1 collapsed: it calls every image 'dog'."]
    missing = selection_warnings(np.full(9, 1), np.ones(9, bool), NAMES, "model 1")
    assert [name for name in NAMES if any(repr(name) in m for m in missing)] == ["cat", "cow"]


def test_a_healthy_model_causes_no_warning():
    labels = np.array([0, 1, 2, 1])
    assert collapse_warning(labels, NAMES, "model 1") == [] == selection_warnings(labels, np.array([True, True, True, False]), NAMES, "model 1")


def test_no_image_is_no_collapse():
    assert collapse_warning(np.array([], int), NAMES, "model 1") == []


def test_rejected_class_is_told_apart_from_a_class_that_was_never_given():
    rejected, missing = selection_warnings(np.array([0, 0, 1]), np.array([True, True, False]), NAMES, "model 2")
    assert "'dog'" in rejected and "1 times" in rejected and "rejected all" in rejected
    assert "'cow'" in missing and "0 times" in missing and "rejected" not in missing


def test_collapsed_run_says_so_and_goes_on(clip, task, quick, monkeypatch):
    def all_one_class(models, images):
        s = np.tile(np.array([0.1, 0.2, 0.3, 0.2], np.float32), (len(images), 1))
        return [Similarities(s, s - 0.1, clip.tau)] * len(models)

    monkeypatch.setattr("coft.collaborate.similarities", all_one_class)
    fitted = CoFT(**quick).fit(clip, task, progress=False)
    assert "model 1 of Phase I collapsed: it calls every image 'digit two'." in fitted.messages
    assert any(m.startswith("No image is left for class 'digit zero' of model 2") for m in fitted.messages)
    assert_finite(fitted, task.test)


def test_nothing_accepted_in_one_class(clip, task, quick, quick_run, monkeypatch):
    assert (quick_run.fitted.trace["labels_1"] == 1).any(), "model 1 gives that label nowhere; choose another class"
    reject(monkeypatch, [1])
    fitted = CoFT(**quick).fit(clip, task, progress=False)
    assert any("'digit one' of model 1" in m and "rejected all" in m for m in fitted.messages)
    assert "Phase II, model 1" in fitted.trace["histories"]
    assert_finite(fitted, task.test)


def test_nothing_accepted_at_all_leaves_the_answer_to_phase_1(clip, task, quick, trained, monkeypatch):
    reject(monkeypatch, range(4))
    fitted = CoFT(**quick).fit(clip, task, progress=False)
    for g in (1, 2):
        assert f"Its peer accepted none of model {g}'s 72 labels." in fitted.messages
        assert f"Phase II of model {g} has nothing to learn from; its Phase I model answers instead." in fitted.messages
    assert sorted(trained) == ["Phase I, model 1", "Phase I, model 2"]
    assert (fitted.predict_all(task.test) == fitted.stages["coft-phase1"].predict_all(task.test)).all()
    assert_finite(fitted, task.test)


def test_nothing_accepted_in_one_direction_only(clip, task, quick, monkeypatch):
    answers = iter([np.zeros(72, bool), np.ones(72, bool)])
    monkeypatch.setattr(Similarities, "accepts", lambda self, labels, strict=False: next(answers))
    fitted = CoFT(**quick).fit(clip, task, progress=False)
    assert [name for name in fitted.trace["histories"] if "Phase II," in name] == ["Phase II, model 2"]
    alone = fitted.stages["coft-phase1"].predict_all(task.test)
    assert (fitted.predict_all(task.test)[0] == alone[0]).all() and (fitted.predict_all(task.test)[1] != alone[1]).any()


def test_a_single_accepted_image_is_enough(clip, task, quick, monkeypatch):
    monkeypatch.setattr(Similarities, "accepts", lambda self, labels, strict=False: np.arange(72) == 5)
    fitted = CoFT(**quick).fit(clip, task, progress=False)
    assert "Phase II, model 1" in fitted.trace["histories"]
    assert_finite(fitted, task.test)


def test_short_classes_are_named(clip, task, quick, monkeypatch):
    P = np.tile(np.array([0.1, 0.2, 0.3, 0.4], np.float32), (72, 1))
    monkeypatch.setattr("coft.collaborate.softmax_probabilities", lambda *args: P)
    for fill_short, end in ((True, "completed with the nearest others"), (False, "left incomplete")):
        said = CoFT(**quick | dict(fill_short=fill_short)).fit(clip, task, progress=False).messages
        short = [m for m in said if end in m]
        assert len(short) == 3 and "'digit zero' was found in only 0 images; its 4 starting labels" in short[0]


@pytest.mark.parametrize("phase, setting", [("Phase I, model 1", {"phase1_optimizer": "sgd", "phase1_lr": 1e30}), ("Phase II, model 1", {"phase2_optimizer": "sgd", "phase2_lr": 1e30})])
def test_a_loss_that_is_not_finite_ends_the_phase_with_its_place(clip, task, quick, phase, setting):
    with pytest.raises(FloatingPointError, match=rf"^{phase}: the loss is (nan|-?inf) in epoch \d of \d\. Lower the learning rate \(now 1e\+30\)"):
        CoFT(**quick | setting).fit(clip, task, progress=False)


def test_the_epoch_in_the_message_is_counted_from_one(clip, task):
    model = EncoderWithHead(clip, 4)
    with pytest.raises(FloatingPointError) as error:
        train(model, task.unlabelled, range(8), {"label": np.arange(8) % 4}, Schedule(lr=1e30, epochs=3, batch_size=8), clip.image_size, task.augmentation, 0, "one step per epoch", progress=False)
    assert re.search(r"one step per epoch: .* in epoch 2 of 3", str(error.value)), "the first step is finite, the second is not"


def test_top_k_with_an_empty_class_is_finite(clip, task, monkeypatch):
    P = np.tile(np.array([0.1, 0.2, 0.3, 0.4], np.float32), (72, 1))
    monkeypatch.setattr("coft.collaborate.softmax_probabilities", lambda *args: P)
    fitted = TopK(preset="paper", top_k=4, fill_short=False, epochs=1).fit(clip, task, progress=False)
    assert set(fitted.trace["selected_labels"]) == {3}
    assert_finite(fitted, task.test)
