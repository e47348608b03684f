"Rivals on given labels: losses and selections restated without the package, what learns and what does not, runs that break off."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from coft.data import Audit
from coft.estimator import VLMClassifier
from coft.harder import noisy_task
from coft.noisy import (CE, DeFT, DeFTSettings, GivenLabelSettings, GMM, LabelDetector, LowLossLabels, SteadyLabels, clean_by_loss, deft_clean_loss,
                        symmetric_cross_entropy, tower_with_head)
from coft.protocol import METHODS, Run, get_method
from coft.trainer import PhaseState
from helpers import broken_off, message_of

FULL = dict(preset="paper", optimizer="adamw", lr=1e-3, epochs=2, batch_size=16)
DEFT = dict(preset="paper", n_context=4, n_visual=2, phase1_optimizer="adamw", phase1_lr=1e-3, phase1_epochs=2, warmup_epochs=1, phase1_batch_size=16,
            phase2_optimizer="adamw", phase2_lr=1e-4, phase2_epochs=1, phase2_batch_size=16)
SETTINGS = {"ce": FULL, "sce": FULL, "elr": FULL, "gmm": FULL | dict(warmup_epochs=1), "deft": DEFT}
SCORES, LABEL = np.array([[2.0, -1.0, 0.5], [0.0, 0.1, 0.2], [-30.0, 30.0, 0.0]]), np.array([0, 2, 0])


@pytest.fixture(scope="module")
def noisy(task):
    return noisy_task(task, 0.4)


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Losses

def sce_slow(scores, label):
    "Cross-entropy and 9.21 times what the model gives to other classes"
    P = softmax(scores)
    return np.array([-math.log(p[y]) - math.log(1e-4) * (sum(p) - p[y]) for p, y in zip(P, label)])


def test_symmetric_cross_entropy_is_that_of_the_formula():
    found = symmetric_cross_entropy(torch.tensor(SCORES), torch.tensor(LABEL))
    assert found.numpy() == pytest.approx(sce_slow(SCORES, LABEL), rel=1e-5)
    assert symmetric_cross_entropy(torch.tensor(SCORES), torch.tensor(LABEL), 6.0, 0.0)[0].item() == pytest.approx(-6 * math.log(softmax(SCORES)[0, 0]))


def test_early_learning_is_that_of_the_formula():
    "Two visits of the same images in another order: the mean of what was said goes on from the first."
    tower = torch.nn.Module()
    tower.head = torch.nn.Linear(2, 3)
    module = SteadyLabels(tower, 5, beta=0.3, weight=5.0).double()
    target = np.zeros((5, 3))
    for index, scores in (([3, 0, 4], SCORES), ([4, 3, 0], SCORES[::-1] * 0.5)):
        found = module.losses(torch.tensor(scores.copy()), torch.tensor(LABEL), torch.tensor(index)).numpy()
        P = softmax(scores).clip(1e-4, 1 - 1e-4)
        for i, p in zip(index, P):
            target[i] = 0.3 * target[i] + 0.7 * p / p.sum()
        expected = [-math.log(softmax(scores)[n, y]) + 5 * math.log(1 - (target[i] * P[n]).sum()) for n, (i, y) in enumerate(zip(index, LABEL))]
        assert found == pytest.approx(expected, rel=1e-5)
    assert np.allclose(module.target, target, atol=1e-6)


def test_the_clean_loss_of_deft_is_that_of_the_formula():
    negative, believed, complement = SCORES[::-1].copy() + 0.3, np.array([2, 0, 1]), np.array([1, 1, 0])
    positive = torch.tensor(SCORES, requires_grad=True)
    against = torch.tensor(negative, requires_grad=True)
    loss = deft_clean_loss(positive, against, torch.tensor(believed), torch.tensor(complement))
    yes = sigmoid(SCORES - negative)
    expected = -np.mean([math.log(max(yes[i, b], 1e-5)) + math.log(max(1 - yes[i, c], 1e-5)) for i, (b, c) in enumerate(zip(believed, complement))])
    assert loss.item() == pytest.approx(expected, rel=1e-6) and yes[2, 0] < 1e-5, "the example holds a probability that is cut"
    loss.backward()
    assert positive.grad is None and against.grad.abs().sum() > 0


def deft_step_slow(s_pos, s_neg, label, complement, epoch, warmup, natural):
    "One step of Phase I, image by image; the loss and who was selected"
    gap, P = s_pos - s_neg, softmax(s_pos)
    selected = [gap[i, y] > 0 and (not natural or gap[i].argmax() == y) for i, y in enumerate(label)]
    ce = [-math.log(P[i, y]) for i, y in enumerate(label)]
    if epoch < warmup:
        classification = np.mean(sce_slow(s_pos, label) if natural else ce)
    else:
        classification = sum(c for c, s in zip(ce, selected) if s) / max(1, sum(selected))
    as_given = epoch < (1 if natural else warmup)
    believed = [y if as_given or s else s_pos[i].argmax() for i, (y, s) in enumerate(zip(label, selected))]
    clean = -np.mean([math.log(max(sigmoid(gap[i, b]), 1e-5)) + math.log(max(sigmoid(-gap[i, c]), 1e-5)) for i, (b, c) in enumerate(zip(believed, complement))])
    return classification + clean, np.array(selected)


@pytest.mark.parametrize("script", ["natural", "synthetic"])
def test_a_step_of_deft_is_that_of_the_formulas(clip, noisy, script):
    "In the first epoch, in the second, after the first ones, and in the last, whose selection stands."
    settings = DeFTSettings(script=script, n_context=4, n_visual=2, warmup_epochs=2, phase1_epochs=4, phase1_batch_size=8)
    model = LabelDetector(clip, noisy.class_names, settings, 3, 72, 72)
    index, label = np.arange(40, 60), noisy.labelled(noisy=True)[1][40:60]
    pixels, u = noisy.unlabelled.batch(index, clip.image_size).float() / 255, torch.linspace(0, 0.99, 20)
    complement = (label + 1 + (u.numpy() * 3).astype(int)) % 4
    with torch.no_grad():
        v = model.image_features(pixels).numpy().astype(float)
        s_pos, s_neg = (v @ t.numpy().astype(float).T / clip.tau for t in model.prompt())
    for epoch in range(4):
        model.step.fill_(epoch * 9 + 8)
        model.selected.fill_(True)
        found = model(pixels, torch.tensor(label), torch.tensor(index), u)
        expected, selected = deft_step_slow(s_pos, s_neg, label, complement, epoch, 2, script == "natural")
        assert found["loss"].item() == pytest.approx(expected, rel=1e-4)
        assert 0 < selected.sum() < 20, "the example needs both"
        stands = selected if epoch == 3 else np.ones(20, bool)
        assert (model.selected.numpy()[index] == stands).all() and model.selected.sum() == 52 + stands.sum()


def test_only_the_negative_prompt_learns_what_is_clean(clip, noisy):
    settings = DeFTSettings(n_context=4, n_visual=2)
    model = LabelDetector(clip, noisy.class_names, settings, 3, 72, 72)
    found = model(noisy.unlabelled.batch(range(8), clip.image_size), torch.arange(8) % 4, torch.arange(8), torch.zeros(8))
    of_context, of_tokens = torch.autograd.grad(found["clean"], [model.prompt.context, model.visual.tokens], retain_graph=True, allow_unused=True)
    assert of_context[0].abs().max() == 0 and of_context[1].abs().max() > 0 and of_tokens is None
    of_context, of_tokens = torch.autograd.grad(found["classification"], [model.prompt.context, model.visual.tokens])
    assert of_context[0].abs().max() > 0 and of_context[1].abs().max() == 0 and of_tokens.abs().max() > 0


# Selection by loss

def test_the_lower_gaussian_is_kept():
    rng = np.random.default_rng(0)
    losses = rng.permutation(np.concatenate([rng.normal(0.3, 0.05, 70), rng.normal(3.0, 0.5, 30)]))
    assert (clean_by_loss(losses) == (losses < 1)).all() and (clean_by_loss(-losses + 5) == (losses > 1)).all()
    assert clean_by_loss(np.ones(4)).all(), "equal losses tell nothing"


def test_labels_are_chosen_anew_after_the_first_epochs_and_the_others_do_not_count(clip, noisy, monkeypatch):
    chosen = []
    monkeypatch.setattr("coft.noisy.clean_by_loss", lambda losses, threshold, seed: chosen.append((losses, seed)) or np.arange(len(losses)) < 10)
    fitted = GMM(**FULL | dict(epochs=4, warmup_epochs=2)).fit(clip, noisy, progress=False)
    assert len(chosen) == 2 and chosen[0][1] != chosen[1][1] and fitted.trace["selected_index"].tolist() == list(range(10))
    run = Run(clip, noisy, 0, GMM(**FULL).settings_for("paper"))
    index, label = noisy.labelled(noisy=True)
    module = LowLossLabels(tower_with_head(run, run.settings), run, index, label)
    module.choose()
    with torch.no_grad():
        scores = module.model.logits(noisy.unlabelled.batch(range(72), clip.image_size)).numpy().astype(float)
        losses = [-math.log(p[y]) for p, y in zip(softmax(scores), label)]
        assert chosen[-1][0] == pytest.approx(losses, rel=1e-3)
        pixels, batch = noisy.unlabelled.batch([3, 30, 5, 40], clip.image_size), torch.tensor([3, 30, 5, 40])
        module.step += 1
        found = module(pixels, torch.tensor(label)[batch], batch)["loss"].item()
        none = module(pixels[1::2], torch.tensor(label)[batch[1::2]], batch[1::2])["loss"].item()
    assert found == pytest.approx((losses[3] + losses[5]) / 2, rel=1e-3) and none == 0


# What learns

def test_blocks_and_head_learn_and_the_rest_stays(clip, noisy):
    run = Run(clip, noisy, 0, GivenLabelSettings())
    model = tower_with_head(run, run.settings)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {n for n, _ in model.named_parameters() if "resblocks" in n or n.startswith("head.")} and model.head.in_features == 96
    assert all(p.requires_grad for p in tower_with_head(run, replace(run.settings, trained="all")).parameters())


def test_the_second_phase_of_deft_starts_from_the_original_tower(clip, noisy, monkeypatch):
    seen = {}
    import coft.noisy
    plain = coft.noisy.train
    def train(module, *rest, **more):
        if "Phase II" in rest[9]:
            seen.update(tower=[p.clone() for p in module.model.visual.parameters()], selected=module.selected.clone())
        return plain(module, *rest, **more)
    monkeypatch.setattr(coft.noisy, "train", train)
    fitted = DeFT(**DEFT).fit(clip, noisy, progress=False)
    original = clip.copy_visual()
    original.proj = None
    assert all(torch.equal(a, b) for a, b in zip(seen["tower"], original.parameters()))
    assert np.flatnonzero(seen["selected"].numpy()).tolist() == fitted.trace["selected_index"].tolist()


def test_without_a_label_that_passes_the_prompts_answer(clip, noisy, monkeypatch):
    monkeypatch.setattr("coft.noisy.deft_selection", lambda positive, negative, label, strict: torch.zeros(len(label), dtype=torch.bool))
    fitted = DeFT(**DEFT).fit(clip, noisy, progress=False)
    assert "No given label passed" in fitted.messages[0] and np.isfinite(fitted.predict_proba(noisy.test)).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_true_labels_reach_no_method_and_a_killed_run_goes_on(name, clip, noisy, tmp_path, monkeypatch):
    method = get_method(name, **SETTINGS[name])
    whole = method.fit(clip, noisy, seed=1, progress=False)
    unknown = replace(noisy, _labels=Audit(noisy.audit.train[::-1].copy(), noisy.audit.test))
    with broken_off(monkeypatch, PhaseState, at=2 if name == "deft" else 1):
        method.fit(clip, unknown, seed=1, progress=False, folder=tmp_path)
    again = method.fit(clip, unknown, seed=1, progress=False, folder=tmp_path)
    assert (whole.predict_all(noisy.test) == again.predict_all(noisy.test)).all()
    assert (whole.trace["selected_index"] == again.trace["selected_index"]).all()
    with pytest.raises(PermissionError):
        method.fit(clip, replace(noisy, _noisy=None), progress=False)
    assert METHODS[name].supervised


@pytest.mark.parametrize("method, settings, message", [
    (CE, dict(trained="head"), "trained: 'head'"), (CE, dict(decay="step"), "decay: 'step'"), (CE, dict(head_init="text"), "head_input: 'pre_proj'"),
    (GMM, dict(warmup_epochs=-1), "warmup_epochs: -1"), (GMM, dict(threshold=2), "threshold: 2"), (DeFT, dict(script="real"), "script: 'real'"), (DeFT, dict(n_context=0), "n_context: 0")])
def test_bad_settings_are_named(method, settings, message):
    assert message in message_of(method, **settings)


def test_labels_that_a_user_gives_are_the_given_ones(clip, noisy):
    labels = noisy.labelled(noisy=True)[1]
    fitted = VLMClassifier(noisy.class_names, method="ce", clip=clip, preset="paper", settings=dict(epochs=1), template=noisy.template, augmentation=noisy.augmentation).fit(noisy.unlabelled.pixels, labels)
    assert (fitted.fitted_.trace["selected_labels"] == labels).all()
