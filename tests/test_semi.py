"Rivals with a few labelled images, and where given labels enter CoFT."
from dataclasses import replace

import numpy as np
import pytest
import torch
from coft.collaborate import CoFTPlusSemi, CoFTSemi
from coft.data import Audit, Augmentation
from coft.protocol import METHODS, Run, get_method
from coft.pseudolabels import growing_sizes
from coft.semi import FixMatchSemi, FixMatchSemiSettings, GRIPSemi, MixedPrompt, SemiSelfTraining
from coft.trainer import EncoderWithHead, PhaseState
from helpers import QUICK, QUICK_PLUS, broken_off, message_of

FIXMATCH = dict(preset="paper", epochs=2, batch_size=24, lr=1e-4, threshold=0.3, strong_views="task", shots=3, labelled_batch=8)
GRIP = dict(preset="paper", optimizer="adamw", lr=0.01, weight_decay=0.0, epochs=1, batch_size=16, n_context=4, steps=2, shots=3)


def cross_entropy(scores, label):
    scores = scores - scores.max(-1, keepdims=True)
    return np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(label)), label]


# FixMatch

def test_a_step_of_fixmatch_has_a_batch_of_labelled_images(clip, task):
    "Sure answers to weak views teach strong ones; eight labelled images have a loss of their own, others in every step."
    plain = replace(task, augmentation=Augmentation(crop=1.0, flip=False))
    model = EncoderWithHead(clip, 4, clip.text_features([task.template.format(n) for n in task.class_names]))
    views = (task.unlabelled.batch(range(12), clip.image_size).float() / 255).unflatten(0, (6, 2))
    with torch.no_grad():
        weak, strong = (model.logits(x).numpy().astype(float) for x in views.unbind(1))
    P = np.exp(-np.stack([cross_entropy(weak, np.full(6, k)) for k in range(4)], 1))
    threshold = float(np.median(P.max(1)))
    settings = FixMatchSemiSettings(threshold=threshold, shots=3, labelled_batch=8, labelled_weight=0.5)
    module = SemiSelfTraining(model, settings, None, Run(clip, plain, 5, settings))
    index, labels = task.labelled(3, 5)
    shown, label = module.labelled()
    found = module(views)
    with torch.no_grad():
        own = model.logits(shown).numpy().astype(float)
    sure = P.max(1) >= threshold
    assert sure.sum() == 3
    masked = (cross_entropy(strong, P.argmax(1)) * sure).sum() / 6
    assert found["loss"].item() == pytest.approx(masked + 0.5 * cross_entropy(own, label.numpy()).mean(), rel=1e-3)
    apart = [(task.unlabelled.batch(index, 24) / 255 - x).abs().amax((1, 2, 3)) for x in shown]
    assert len(label) == 8 and all(d.min() < 1e-4 and labels[d.argmin()] == y for d, y in zip(apart, label))
    module.after_step()
    assert not torch.equal(module.labelled()[0], shown)


# GRIP

def test_the_loss_of_grip_weighs_labelled_images_by_their_number(clip, task):
    model = MixedPrompt(clip, task.class_names, 4, seed=0)
    model.balance = 3.0
    v, label = clip.image_features(task.unlabelled.batch(range(6), clip.image_size)), np.array([0, 1, 2, 3, 0, 1])
    losses = cross_entropy(model.logits(v).detach().numpy().astype(float), label)
    found = lambda rows, given: model(v[rows], torch.tensor(label[rows]), torch.tensor(given))["loss"].item()
    assert found([0, 1, 2, 3], [False, False, False, True]) == pytest.approx(losses[:3].mean() + 3 * losses[3], rel=1e-4)
    assert found([4, 5], [False, False]) == pytest.approx(losses[4:].mean(), rel=1e-4) and found([4], [True]) == pytest.approx(3 * losses[4], rel=1e-4)


def test_labelled_images_are_in_every_round_and_never_pseudo_labelled(clip, task, monkeypatch):
    seen = []
    import coft.pseudolabels
    plain = coft.pseudolabels.train
    monkeypatch.setattr(coft.pseudolabels, "train", lambda model, images, index, columns, *rest, **more: seen.append((index, columns, model.balance)) or plain(model, images, index, columns, *rest, **more))
    fitted = GRIPSemi(**GRIP).fit(clip, task, seed=5, progress=False)
    own, given = task.labelled(3, 5)
    for r, ((index, columns, balance), size) in enumerate(zip(seen, growing_sizes(60, 4, 2)), 1):
        assert (index[columns["given"]] == own).all() and (columns["label"][columns["given"]] == given).all()
        assert not np.isin(index[~columns["given"]], own).any() and (~columns["given"]).sum() == 4 * size and balance == 12 / (4 * size)
    assert len(seen) == 2 and fitted.facts["labelled images"] == 12


@pytest.mark.parametrize("method, settings", [(FixMatchSemi, FIXMATCH), (GRIPSemi, GRIP)], ids=["fixmatch", "grip"])
def test_runs_go_on_and_other_labels_reach_nobody(method, settings, clip, task, tmp_path, monkeypatch):
    own, _ = task.labelled(3, 0)
    train = task.audit.train.copy()
    hidden = replace(task, _labels=Audit(train, task.audit.test))
    monkeypatch.setattr(type(task), "labelled", lambda self, shots, seed: (own, task.audit.train[own]))
    train[np.setdiff1d(np.arange(72), own)] = 0
    whole = method(**settings).fit(clip, task, progress=False)
    with broken_off(monkeypatch, PhaseState, at=1):
        method(**settings).fit(clip, hidden, progress=False, folder=tmp_path)
    again = method(**settings).fit(clip, hidden, progress=False, folder=tmp_path)
    assert (whole.predict_all(task.test) == again.predict_all(task.test)).all()
    assert METHODS[method.name].supervised and get_method(method.name, shots=2).settings_for("embedded").shots == 2


# CoFT

@pytest.mark.parametrize("where, selected, accepted", [("both", 28, True), ("phase1", 28, False), ("phase2", 16, True)])
def test_given_labels_enter_where_they_are_asked_to(clip, task, where, selected, accepted):
    fitted = CoFTSemi(**QUICK, shots=3, given_labels=where).fit(clip, task, seed=5, progress=False)
    index, labels = task.labelled(3, seed=5)
    trace = fitted.trace
    assert len(trace["selected_index"]) == selected and np.isin(index, trace["selected_index"]).all() == (selected == 28)
    assert not np.isin(trace["selected_index"][:16], index).any()
    for g in (1, 2):
        as_given = (trace[f"labels_{g}"][index] == labels).all() and trace[f"accepted_{g}"][index].all()
        judged = (trace[f"accepted_{g}"] == (trace[f"p_clean_{g}"] > 0.5))[index].all()
        assert as_given if accepted else judged


@pytest.mark.parametrize("method, settings", [(CoFTSemi, QUICK), (CoFTPlusSemi, QUICK_PLUS)], ids=["coft", "coft+"])
def test_labels_enter_coft_by_their_one_door(method, settings, clip, task, monkeypatch):
    "Other true labels of the images that are not given change nothing, other given labels do."
    own, given = task.labelled(3, 0)
    train, others = task.audit.train.copy(), np.setdiff1d(np.arange(72), own)
    train[others] = (train[others] + 1) % 4
    altered = replace(task, _labels=Audit(train, task.audit.test))

    def fitted(task, labels):
        monkeypatch.setattr(type(task), "labelled", lambda self, shots, seed: (own, labels))
        return method(**settings | dict(shots=3)).fit(clip, task, progress=False)

    first, second, other = fitted(task, given), fitted(altered, given), fitted(task, (given + 1) % 4)
    assert (first.predict_all(task.test) == second.predict_all(task.test)).all() and (first.predict_all(task.test) != other.predict_all(task.test)).any()
    assert (first.messages, first.facts, first.trace["signs"]) == (second.messages, second.facts, second.trace["signs"])


def test_a_place_that_is_not_known_is_named():
    assert "given_labels: 'phase3'" in message_of(CoFTSemi, given_labels="phase3")
