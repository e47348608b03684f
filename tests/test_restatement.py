"""The formulas of CoFT said a second time, slowly and in plain NumPy, and compared with the package.

Nothing here imports torch's softmax, its sigmoid or its derivative; what agrees was written twice.
"""
import math

import numpy as np
import pytest
import torch
from coft.clip import load_clip
from coft.collaborate import CoFTSettings, PromptedModel, cross_validate
from coft.filtering import Similarities, select_topk, softmax_probabilities
from coft.prompts import L2_GRAD, dual_prompt_losses, p_clean
from coft.trainer import Schedule

N, C, D = 7, 4, 6
TAU, L2_WEIGHT = 0.07, 0.6


def sigmoid(z): return 1 / (1 + math.exp(-z))


def unit(x): return x / np.sqrt((x**2).sum(-1, keepdims=True))


def softmax_slow(scores):
    "Softmax of one row, term by term"
    top = max(scores)
    terms = [math.exp(s - top) for s in scores]
    return [t / sum(terms) for t in terms]


def example(seed):
    "Unit features of images and of both prompts, labels and complements, in double precision"
    rng = np.random.default_rng(seed)
    v, t_pos, t_neg = (unit(rng.normal(size=(n, D))) for n in (N, C, C))
    y = rng.integers(C, size=N)
    return v, t_pos, t_neg, y, (y + rng.integers(1, C, size=N)) % C


def losses_slow(v, t_pos, t_neg, y, complement):
    "L1 of Eq. 4 and L2 of Eq. 6, image by image"
    l1 = l2 = 0
    for i in range(len(v)):
        l1 -= math.log(softmax_slow([v[i] @ t / TAU for t in t_pos])[y[i]]) / len(v)
        clean = {k: sigmoid((v[i] @ t_pos[k] - v[i] @ t_neg[k]) / TAU) for k in (y[i], complement[i])}
        l2 -= (math.log(clean[y[i]]) + math.log(1 - clean[complement[i]])) / len(v)
    return l1, l2


def gradient_slow(v, t_pos, t_neg, y, complement, l2_grad):
    "Derivative of L1 + L2_WEIGHT * L2 for v, t+ and t-, worked out by hand"
    d_v, d_pos, d_neg = (np.zeros_like(x) for x in (v, t_pos, t_neg))
    for i in range(len(v)):
        p = softmax_slow([v[i] @ t / TAU for t in t_pos])
        for k in range(len(t_pos)):
            slope = (p[k] - (k == y[i])) / TAU / len(v)
            d_v[i] += slope * t_pos[k]
            d_pos[k] += slope * v[i]
        for k, target in ((y[i], 1), (complement[i], 0)):
            slope = L2_WEIGHT * (sigmoid((v[i] @ t_pos[k] - v[i] @ t_neg[k]) / TAU) - target) / TAU / len(v)
            d_neg[k] -= slope * v[i]
            if l2_grad == "full":
                d_pos[k] += slope * v[i]
            if l2_grad != "neg_only":
                d_v[i] += slope * (t_pos[k] - t_neg[k])
    return d_v, d_pos, d_neg


def package_loss(v, t_pos, t_neg, y, complement, l2_grad):
    l1, l2 = dual_prompt_losses(v, t_pos, t_neg, torch.tensor(y), torch.tensor(complement), TAU, l2_grad)
    return l1 + L2_WEIGHT * l2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("l2_grad", L2_GRAD)
def test_both_losses(seed, l2_grad):
    *features, y, complement = example(seed)
    found = dual_prompt_losses(*map(torch.tensor, features), torch.tensor(y), torch.tensor(complement), TAU, l2_grad)
    assert [f.item() for f in found] == pytest.approx(losses_slow(*features, y, complement), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_p_clean(seed):
    v, t_pos, t_neg, y, _ = example(seed)
    two_way = [softmax_slow([v[i] @ t_pos[y[i]] / TAU, v[i] @ t_neg[y[i]] / TAU])[0] for i in range(N)]
    s_pos, s_neg = v @ t_pos.T, v @ t_neg.T
    rows = np.arange(N)
    assert np.allclose(p_clean(torch.tensor(s_pos[rows, y]), torch.tensor(s_neg[rows, y]), TAU), two_way, atol=1e-9)
    assert np.allclose(Similarities(s_pos, s_neg, TAU).p_clean(y), two_way, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_filter(seed):
    rng = np.random.default_rng(seed)
    s = rng.uniform(0, 0.3, (2, 2, 30, C))
    directions = cross_validate([Similarities(positive, negative, TAU) for positive, negative in s])
    for g, q in ((0, 1), (1, 0)):
        for i in range(30):
            label = max(range(C), key=lambda k: s[g][0][i][k])
            assert directions[g][0][i] == label
            assert directions[g][1][i] == (s[q][0][i][label] > s[q][1][i][label])
            assert directions[g][2][i] == pytest.approx(sigmoid((s[q][0][i][label] - s[q][1][i][label]) / TAU), abs=1e-9)


def test_zero_shot_probabilities():
    v, t, *_ = example(0)
    expected = [softmax_slow([v[i] @ t[k] / TAU for k in range(C)]) for i in range(N)]
    assert np.allclose(softmax_probabilities(torch.tensor(v), torch.tensor(t), TAU), expected, atol=1e-6)


def select_slow(P, top_k, fill_short):
    "The selection as the specification's pseudo-code has it"
    best = {k: sorted((i for i in range(len(P)) if max(range(C), key=lambda j: P[i][j]) == k), key=lambda i: -P[i][k])[:top_k] for k in range(C)}
    used = {i for kept in best.values() for i in kept}
    for k in range(C):
        while fill_short and len(best[k]) < top_k:
            chosen = max((i for i in range(len(P)) if i not in used), key=lambda i: P[i][k])
            best[k].append(chosen)
            used.add(chosen)
    return {(i, k) for k in best for i in best[k]}


@pytest.mark.parametrize("fill_short", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_selection(top_k, fill_short):
    for seed in range(10):
        P = np.random.default_rng(seed).dirichlet([2, 1, 0.5, 0.1], 40)
        index, labels = select_topk(P, top_k, fill_short)
        assert set(zip(index.tolist(), labels.tolist())) == select_slow(P, top_k, fill_short)


@pytest.mark.parametrize("l2_grad", L2_GRAD)
def test_gradient_of_the_loss(l2_grad):
    *features, y, complement = example(1)
    leaves = [torch.tensor(f, requires_grad=True) for f in features]
    package_loss(*leaves, y, complement, l2_grad).backward()
    for leaf, expected in zip(leaves, gradient_slow(*features, y, complement, l2_grad)):
        assert np.allclose(leaf.grad, expected, atol=1e-9)


def test_gradient_of_the_loss_by_small_differences():
    *features, y, complement = example(2)
    slow = lambda *f: np.dot(losses_slow(*f, y, complement), [1, L2_WEIGHT])
    for which, expected in enumerate(gradient_slow(*features, y, complement, "full")):
        found = np.zeros_like(expected)
        for place in np.ndindex(expected.shape):
            high, low = ([f.copy() for f in features] for _ in range(2))
            high[which][place] += 1e-5
            low[which][place] -= 1e-5
            found[place] = (slow(*high) - slow(*low)) / 2e-5
        assert np.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("l2_grad", L2_GRAD)
def test_two_steps_of_sgd(l2_grad):
    *features, y, complement = example(3)
    schedule, steps = Schedule("sgd", lr=0.05, epochs=1, weight_decay=0.01), 3
    leaves = [torch.tensor(f, requires_grad=True) for f in features]
    optimizer, rate = schedule.build(leaves, steps)
    speed = [np.zeros_like(f) for f in features]
    for step in range(2):
        optimizer.zero_grad()
        package_loss(*leaves, y, complement, l2_grad).backward()
        optimizer.step()
        rate.step()
        lr = 0.05 * 0.5 * (1 + math.cos(math.pi * step / steps))
        slopes = [g + 0.01 * f for g, f in zip(gradient_slow(*features, y, complement, l2_grad), features)]
        speed = [0.9 * m + s for m, s in zip(speed, slopes)]
        features = [f - lr * m for f, m in zip(features, speed)]
    for leaf, expected in zip(leaves, features):
        assert np.allclose(leaf.detach(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("parameter", ["prompt.context", "visual.tokens"])
def test_gradient_of_a_whole_model_by_small_differences(task, parameter):
    clip = load_clip("embedded")
    clip.model.double()
    model = PromptedModel(clip, task.class_names, CoFTSettings(n_context=4, n_visual=3, l2_weight=L2_WEIGHT), seed=0).double()
    batch = dict(pixels=task.unlabelled.batch(range(6), clip.image_size).double() / 255, label=torch.arange(6) % 4, u=torch.linspace(0, 0.9, 6))
    leaf = dict(model.named_parameters())[parameter]
    gradient, = torch.autograd.grad(model(**batch)["loss"], leaf)
    for seed in range(3):
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            leaf += 1e-5 * direction
            high = model(**batch)["loss"].item()
            leaf -= 2e-5 * direction
            low = model(**batch)["loss"].item()
            leaf += 1e-5 * direction
        assert (high - low) / 2e-5 == pytest.approx((gradient * direction).sum().item(), abs=1e-6)
