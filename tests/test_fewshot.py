"CoOp, Tip-Adapter, Tip-Adapter-F and the linear probe: their formulas said again in NumPy, runs that break off, what is refused."
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coft import get_method, load_task
from coft.clip import load_clip, weights_digest, zero_shot_head
from coft.core import uniforms
from coft.data import ArrayImages, Audit
from coft.fewshot import (POWERS_OF_C, TIP_ROWS, EpsSchedule, FeatureCache, LearnedContext, LinearProbe, TipAdapter, TipAdapterF, as_head,
                          cache_keys, fit_logistic, held_out, label_folds, search_C, tip_adapter_settings)
from helpers import broken_off, text_features_slow
from sklearn.linear_model import LogisticRegression

QUICK_TIP = dict(preset="paper", shots=3, views="task", cache_views=2)
QUICK_F = QUICK_TIP | dict(epochs=3, batch_size=5)
METHODS = {"tip-adapter": QUICK_TIP, "tip-adapter-f": QUICK_F, "linear-probe": dict(preset="paper", shots=3, search_steps=2)}
TAU, BETA, ALPHA = 0.05, 1.7, 0.8


def unit(x): return x / np.sqrt((x**2).sum(-1, keepdims=True))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def accuracy(fitted, task): return 100 * (fitted.predict(task.test) == task.audit.test).mean()


def test_a_step_of_coop_is_that_of_the_formulas(clip, task):
    "Cross-entropy of cosines over tau, and its gradient by the context through the plain text tower."
    model = LearnedContext(clip, task.class_names, n_context=3, seed=1)
    pixels, label = task.unlabelled.batch(np.arange(6), clip.image_size).float() / 255, torch.tensor([0, 1, 2, 3, 0, 1])
    loss = model(pixels, label)["loss"]
    loss.backward()
    context = model.context.detach()[0].clone().requires_grad_()
    with torch.no_grad():
        v = clip.model.visual(clip.normalize(pixels))
    t = text_features_slow(clip, task.class_names, context)
    slow = -((v / v.norm(dim=1, keepdim=True)) @ (t / t.norm(dim=1, keepdim=True)).T / clip.tau).log_softmax(1)[range(6), label].mean()
    slow.backward()
    P = softmax(unit(v.numpy().astype(float)) @ unit(t.detach().numpy().astype(float)).T / clip.tau)
    assert loss.item() == pytest.approx(-np.log(P[range(6), label]).mean(), rel=1e-5)
    assert torch.allclose(model.context.grad[0], context.grad, rtol=1e-3, atol=1e-6) and context.grad.abs().max() > 1e-4
    assert not any(p.grad is not None for p in clip.model.parameters())


def fit(name, clip, task, seed=0, folder=None, **more):
    return get_method(name, **METHODS[name] | more).fit(clip, task, seed, progress=False, folder=folder)


# Tip-Adapter

def scores_slow(v, head, keys, labels, beta=BETA, alpha=ALPHA, tau=TAU):
    "Zero-shot scores and what the cache adds, number by number"
    out = np.zeros((len(v), len(head)))
    for i in range(len(v)):
        for k in range(len(head)):
            out[i, k] = v[i] @ head[k] / tau
            for j in range(len(keys)):
                if labels[j] == k:
                    out[i, k] += alpha * math.exp(-beta * (1 - v[i] @ keys[j]))
    return out


def gradient_slow(v, label, head, keys, labels, beta=BETA, alpha=ALPHA, tau=TAU):
    "Derivative of the mean cross-entropy for the keys, worked out by hand"
    P, out = softmax(scores_slow(v, head, keys, labels, beta, alpha, tau)), np.zeros_like(keys)
    for i in range(len(v)):
        for j in range(len(keys)):
            slope = (P[i, labels[j]] - (labels[j] == label[i])) / len(v)
            out[j] += slope * alpha * beta * math.exp(-beta * (1 - v[i] @ keys[j])) * v[i]
    return out


@pytest.mark.parametrize("seed", range(3))
def test_scores_loss_and_gradient_are_those_of_the_formulas(seed):
    rng = np.random.default_rng(seed)
    v, head, keys = (unit(rng.normal(size=(n, 6))) for n in (7, 4, 9))
    labels, label = rng.integers(4, size=9), rng.integers(4, size=7)
    box = SimpleNamespace(tau=TAU, image_features=lambda pixels: pixels)
    cache = FeatureCache(box, *map(torch.tensor, (head, keys, labels)), BETA, ALPHA)
    expected = scores_slow(v, head, keys, labels)
    assert np.allclose(cache.scores(torch.tensor(v)).detach(), expected, atol=1e-9)
    loss = cache(torch.tensor(v), torch.tensor(label))["loss"]
    assert loss.item() == pytest.approx(-np.mean([math.log(softmax(expected)[i, label[i]]) for i in range(7)]), abs=1e-9)
    loss.backward()
    assert np.allclose(cache.keys.grad, gradient_slow(v, label, head, keys, labels), atol=1e-9)


def feature(clip, task, i, *stream):
    "Feature of one view of one image, not of unit length, in double precision"
    how = task.augmentation
    u = uniforms(*stream, "augment", index=[i], size=how.n_numbers)
    with torch.no_grad():
        return clip.model.visual(clip.normalize(how(task.unlabelled.batch([i], how.stored_size(24), whole=True), u, 24)))[0].double().numpy()


def keys_slow(clip, task, index, n_views, seed=0):
    return unit(np.stack([sum(feature(clip, task, i, seed, "Tip-Adapter cache", e) for e in range(n_views)) / n_views for i in index]))


@pytest.mark.parametrize("n_views", [1, 3])
def test_a_key_is_the_mean_of_raw_features_at_unit_length(clip, task, n_views):
    index = [5, 0, 17, 5]
    found = cache_keys(clip, task.unlabelled, index, task.augmentation, n_views, seed=0).numpy()
    assert np.allclose(found, keys_slow(clip, task, index, n_views), atol=1e-6)
    assert (found[0] == found[3]).all(), "an image that was drawn twice has one key"


def test_the_cache_alone_is_left_out_with_alpha_0(clip, task):
    plain, without = get_method("zero-shot").fit(clip, task), fit("tip-adapter", clip, task, alpha=0.0)
    assert (plain.predict_proba(task.test) == without.predict_proba(task.test)).all()
    assert (plain.predict_proba(task.test) != fit("tip-adapter", clip, task).predict_proba(task.test)).any()


def test_the_whole_of_tip_adapter_is_that_of_the_formulas(clip, task):
    index, labels = task.labelled(3, 0)
    head = zero_shot_head(clip, task.class_names, task.template).double().numpy()
    v = clip.image_features(task.test.batch(range(40), 24)).double().numpy()
    expected = softmax(scores_slow(v, head, keys_slow(clip, task, index, 2), labels, 1.0, 1.17, clip.tau))
    fitted = fit("tip-adapter", clip, task)
    assert np.allclose(fitted.predict_proba(task.test), expected, atol=1e-5)
    assert fitted.facts["labelled images"] == 12


def test_two_epochs_of_tip_adapter_f_are_two_steps_of_adamw(clip, task, tmp_path):
    "All images in one batch; the official rate, eps and decay"
    fit("tip-adapter-f", clip, task, epochs=2, batch_size=256, folder=tmp_path)
    state = torch.load(tmp_path / "tip-adapter-f.pt", weights_only=True)
    index, labels = task.labelled(3, 0)
    head, keys = zero_shot_head(clip, task.class_names, task.template).double().numpy(), keys_slow(clip, task, index, 2)
    m = s = 0
    for epoch in range(2):
        v = unit(np.stack([feature(clip, task, i, 0, "Tip-Adapter-F", epoch) for i in index]))
        g = gradient_slow(v, labels, head, keys, labels, 1.0, 1.17, clip.tau)
        m, s, lr, t = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2, 0.001 * 0.5 * (1 + math.cos(math.pi * epoch / 2)), epoch + 1
        keys = keys * (1 - lr * 0.01) - lr * (m / (1 - 0.9**t)) / (np.sqrt(s / (1 - 0.999**t)) + 1e-4)
    assert state["module"].keys() == {"keys"}, "nothing else learns or is kept"
    assert np.allclose(state["module"]["keys"], keys, atol=1e-6)
    assert not np.allclose(keys, keys_slow(clip, task, index, 2), atol=1e-4), "a step can be seen at this precision"


def test_eps_reaches_adamw_and_sgd_has_none():
    leaf = [torch.nn.Parameter(torch.zeros(1))]
    assert EpsSchedule("adamw", eps=1e-4).build(leaf, 5)[0].param_groups[0]["eps"] == 1e-4
    assert "eps" not in EpsSchedule("sgd", eps=1e-4).build(leaf, 5)[0].param_groups[0]


def test_tip_adapter_f_learns(clip, task):
    fitted = fit("tip-adapter-f", clip, task, shots=8, epochs=20, alpha=5.0, lr=0.01)
    history = fitted.trace["histories"]["Tip-Adapter-F"]
    assert np.mean([h["loss"] for h in history[-3:]]) < np.mean([h["loss"] for h in history[:3]])


def test_the_official_rows():
    assert tip_adapter_settings("tip-adapter-f", "eurosat", 2) == dict(alpha=2.0, epochs=100, shots=2)
    assert tip_adapter_settings("tip-adapter", "eurosat") == dict(alpha=2.0, shots=16)
    assert tip_adapter_settings("tip-adapter", "digits") == dict(shots=16)
    assert len(TIP_ROWS) == 11
    with pytest.raises(ValueError, match="method: 'tip'"):
        tip_adapter_settings("tip", "dtd")


# Linear probe

@pytest.fixture(scope="module")
def cloud():
    "Features and labels of 24 images of three classes, by twos of an image"
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 8)
    return rng.normal(size=(24, 5)) + 1.2 * rng.normal(size=(3, 5))[labels], labels


@pytest.mark.parametrize("C", [1e-2, 0.316, 10])
def test_logistic_regression_ends_where_its_loss_is_least(cloud, C):
    "The gradient of C * sum of cross-entropies + |W|^2 / 2 vanishes"
    features, labels = cloud
    weight, bias = (t.double().numpy() for t in as_head(fit_logistic(features, labels, C), 3))
    slope = C * (softmax(features @ weight.T + bias) - np.eye(3)[labels])
    start = C * (np.full((24, 3), 1 / 3) - np.eye(3)[labels])
    assert abs(slope.T @ features + weight).max() < 1e-2 * abs(start.T @ features).max()
    assert abs(slope.sum(0)).max() < 1e-3 * abs(start).sum()


@pytest.mark.parametrize("classes, n_classes", [([0, 1, 2], 3), ([0, 1, 3], 5), ([2, 4], 5)])
def test_the_head_answers_as_scikit_learn_does(cloud, classes, n_classes):
    features, labels = cloud[0], np.array(classes)[cloud[1] % len(classes)]
    probe = fit_logistic(features, labels, 1.0)
    weight, bias = as_head(probe, n_classes)
    P = (torch.from_numpy(features).float() @ weight.T + bias).softmax(-1).numpy()
    assert np.allclose(P[:, classes], probe.predict_proba(features), atol=1e-6)
    assert (np.delete(P, classes, 1) == 0).all() and np.isfinite(P).all()


def search_slow(score, steps):
    "CoOp's search, by exponents"
    best = max([6, 4, 2, 0, -2, -4, -6], key=lambda e: (score(10.0**e), e))
    low, high = best - 1, best + 1
    for _ in range(steps):
        if score(10.0**low) < score(10.0**high):
            kept, low = high, low + (high - low) / 2
        else:
            kept, high = low, low + (high - low) / 2
    return kept


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_search_is_that_of_coop(steps):
    for peak in np.linspace(-7, 7, 29):
        for score in (lambda C: -abs(math.log10(C) - peak), lambda C: round(3 - abs(math.log10(C) - peak) / 4), lambda C: 0.0):
            C, tried = search_C(score, steps)
            assert math.log10(C) == pytest.approx(search_slow(score, steps), abs=1e-9)
            assert [t["C"] for t in tried[:7]] == list(POWERS_OF_C) and len(tried) == 7 + 2 * steps
            assert all(t["score"] == score(t["C"]) for t in tried)


@pytest.mark.parametrize("folds", [1, 2, 4, 9])
def test_folds_are_even_and_keep_copies_together(folds):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        index = np.concatenate([rng.choice(np.arange(100 * k, 100 * k + own), 6, replace=own < 6) for k, own in enumerate((20, 4, 6))])
        labels = np.repeat([0, 1, 2], 6)
        parts = label_folds(index, labels, folds, seed)
        distinct = {k: len(set(index[labels == k])) for k in range(3)}
        assert set(parts) == set(range(min(folds, *distinct.values())))
        assert all(len(set(parts[index == i])) == 1 for i in index)
        for k in range(3):
            sizes = [len(set(index[(labels == k) & (parts == p)])) for p in range(parts.max() + 1)]
            assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
        assert (parts == label_folds(index, labels, folds, seed)).all()


def test_held_out_images_are_judged_by_a_model_that_has_not_seen_them(cloud):
    features, labels = cloud
    parts, told, right = label_folds(np.arange(24), labels, 4), [], []
    for i in range(24):
        others = parts != parts[i]
        P = LogisticRegression(C=0.5, max_iter=1000).fit(features[others], labels[others]).predict_proba(features[i:i + 1])[0]
        told.append(math.log(P[labels[i]]))
        right.append(P.argmax() == labels[i])
    assert held_out(features, labels, parts, 0.5) == pytest.approx(np.mean(told), abs=1e-6)
    assert held_out(features, labels, parts, 0.5, "accuracy") == np.mean(right) < 1


def test_the_whole_of_the_linear_probe_is_that_of_the_formulas(clip, task):
    with torch.no_grad():
        train, test = (clip.model.visual(clip.normalize(images.batch(range(len(images)), 24))).double().numpy() for images in (task.unlabelled, task.test))
    index, labels = task.labelled(3, 0)
    parts, x = label_folds(index, labels, 4, 0), train[index]
    exponent = search_slow(lambda C: held_out(x, labels, parts, C), 2)
    expected = LogisticRegression(C=10.0**exponent, max_iter=1000).fit(x, labels).predict_proba(test)
    fitted = fit("linear-probe", clip, task)
    assert fitted.facts == {"labelled images": 12, "C": pytest.approx(10.0**exponent, rel=1e-3), "folds": 3}
    assert np.allclose(fitted.predict_proba(task.test), expected, atol=1e-5)


def test_one_shot_takes_C_as_it_is_and_says_so(clip, task):
    single, asked, other = fit("linear-probe", clip, task, shots=1), fit("linear-probe", clip, task, folds=1), fit("linear-probe", clip, task, folds=1, C=2.0)
    assert single.facts == {"labelled images": 4, "C": 0.316} and "single labelled image" in single.messages[0]
    assert (asked.facts["C"], other.facts["C"]) == (0.316, 2.0) and not asked.messages
    assert (asked.predict_proba(task.test) != other.predict_proba(task.test)).any()


def test_a_search_that_stops_early_is_told(clip, task):
    assert "before it had converged" in fit("linear-probe", clip, task, folds=1, max_iter=1).messages[0]


def some_classes(task, keep):
    "The task with the training images of these classes alone"
    rows = np.flatnonzero(np.isin(task.audit.train, keep))
    return replace(task, unlabelled=ArrayImages(task.unlabelled.pixels[rows]), _labels=Audit(task.audit.train[rows], task.audit.test))


def test_a_class_without_images_is_never_the_answer_of_the_probe(clip, task):
    P = fit("linear-probe", clip, some_classes(task, [0, 2])).predict_proba(task.test)
    assert (P[:, [1, 3]] == 0).all() and np.allclose(P.sum(1), 1, atol=1e-6)
    assert (fit("tip-adapter", clip, some_classes(task, [0, 2])).predict_proba(task.test) > 0).all()
    with pytest.raises(ValueError, match="show 1 class; at least two"):
        fit("linear-probe", clip, some_classes(task, [3]))


# All three

@pytest.mark.parametrize("name", METHODS)
def test_two_runs_agree_and_see_no_test_label(clip, task, name):
    np.random.seed(7)
    torch.manual_seed(7)
    first = fit(name, clip, task)
    shuffled = replace(task, _labels=Audit(task.audit.train, np.roll(task.audit.test, 1)))
    assert (first.predict_all(task.test) == fit(name, clip, shuffled).predict_all(task.test)).all()
    assert (first.predict_all(task.test) != fit(name, clip, task, seed=1).predict_all(task.test)).any()


@pytest.mark.parametrize("name", METHODS)
def test_they_take_labels_and_leave_the_model_alone(clip, task, name):
    assert get_method(name).supervised
    fit(name, clip, task)
    assert weights_digest(clip.model) == weights_digest(load_clip("embedded").model)
    with pytest.raises(PermissionError):
        fit(name, clip, task.blind())


@pytest.mark.parametrize("name, margin", [("tip-adapter", 3), ("tip-adapter-f", 3), ("linear-probe", 3)])
def test_they_are_better_than_zero_shot_on_the_toy_task(clip, name, margin):
    toy = load_task("glyphs-toy")
    more = {} if name == "linear-probe" else dict(alpha=5.0, cache_views=10)
    assert accuracy(fit(name, clip, toy, shots=16, **more), toy) > accuracy(get_method("zero-shot").fit(clip, toy), toy) + margin


@pytest.mark.parametrize("at", [1, 2])
def test_a_run_that_breaks_off_goes_on_to_the_same_numbers(clip, task, tmp_path, monkeypatch, at):
    import coft.trainer
    with broken_off(monkeypatch, coft.trainer.PhaseState, at):
        fit("tip-adapter-f", clip, task, folder=tmp_path)
    assert len(torch.load(tmp_path / "tip-adapter-f.pt", weights_only=True)["history"]) == at
    resumed, whole = fit("tip-adapter-f", clip, task, folder=tmp_path), fit("tip-adapter-f", clip, task)
    assert (resumed.predict_all(task.test) == whole.predict_all(task.test)).all()


@pytest.mark.parametrize("setting", [dict(alpha=2.0), dict(beta=2.0), dict(eps=1e-6), dict(cache_views=1), dict(template_set="ensemble")], ids=str)
def test_a_state_of_other_settings_is_refused(clip, task, tmp_path, setting):
    fit("tip-adapter-f", clip, task, epochs=1, folder=tmp_path)
    (name, value), = setting.items()
    with pytest.raises(ValueError, match=rf"belongs to another run: {name} was .* and is {value!r}"):
        fit("tip-adapter-f", clip, task, epochs=1, folder=tmp_path, **setting)


@pytest.mark.parametrize("method, settings, message", [
    (TipAdapter, dict(shots=0), "shots: 0"), (TipAdapter, dict(beta=0), "beta: 0"), (TipAdapter, dict(alpha=-1), "alpha: -1"), (TipAdapter, dict(cache_views=0), "cache_views: 0"),
    (TipAdapter, dict(views="moco"), "views: 'moco'"), (TipAdapter, dict(template_set="best"), "template_set: 'best'"), (TipAdapter, dict(epochs=3), "setting of tip-adapter: 'epochs'"),
    (TipAdapterF, dict(eps=0), "eps: 0"), (TipAdapterF, dict(optimizer="adam"), "optimizer: 'adam'"), (TipAdapterF, dict(lr=0), "lr: 0"), (TipAdapterF, dict(alpha=float("nan")), "alpha: nan"),
    (LinearProbe, dict(shots=1.5), "shots: 1.5"), (LinearProbe, dict(C=0), "C: 0"), (LinearProbe, dict(folds=0), "folds: 0"), (LinearProbe, dict(criterion="loss"), "criterion: 'loss'"), (LinearProbe, dict(max_iter=0), "max_iter: 0")],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_bad_settings_are_named(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(**settings)


def test_the_official_views_are_mirrored_where_the_task_allows_it(clip, task):
    crops = [fit("tip-adapter", clip, replace(task, augmentation=replace(task.augmentation, flip=flip)), views="crop").predict_proba(task.test) for flip in (True, False)]
    assert (crops[0] != crops[1]).any() and all(np.isfinite(P).all() for P in crops)


@pytest.mark.parametrize("name, tower, more", [("tip-adapter-f", "RN50-quickgelu", dict(cache_views=1, views="crop", epochs=1)), ("linear-probe", "RN50-quickgelu", dict(folds=1)), ("tip-adapter", "vit", dict(cache_views=1, views="crop"))], ids=str)
def test_any_tower_will_do(request, photos, name, tower, more):
    labelled = replace(photos, _labels=Audit(np.array([0, 1, 2, 0, 1, 2, 0, 1]), np.array([0, 1, 2])))
    clip = request.getfixturevalue("vit") if tower == "vit" else load_clip(tower, "random")
    P = fit(name, clip, labelled, shots=1, **more).predict_proba(labelled.test)
    assert P.shape == (3, 3) and np.isfinite(P).all() and np.allclose(P.sum(1), 1, atol=1e-5)
