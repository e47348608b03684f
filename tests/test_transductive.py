"TransCLIP: its updates said a second time in NumPy, the objective that they lower, and what transduction means for answers."
import numpy as np
import pytest
import torch
from coft.clip import weights_digest, zero_shot_head
from coft.data import ArrayImages, SomeImages, load_task
from coft.protocol import METHODS, Method
from coft.transductive import (TransCLIP, TransCLIPSettings, affinity, assign, estimate, image_set_features, mixture_scores,
                               objective, transduce)

TAU = 0.05


def unit(x): return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax_slow(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def example(seed, N=30, C=3, d=6):
    "Features in C crowded groups, and text features that point roughly at them"
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(C, d)))
    return unit(centres[rng.integers(C, size=N)] + 0.25 * rng.normal(size=(N, d))), unit(centres + 0.3 * rng.normal(size=(C, d)))


def affinity_slow(x, n):
    "W + W^T, W holding the n nearest others of each row"
    W = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        others = sorted((j for j in range(len(x)) if j != i), key=lambda j: -x[i] @ x[j])
        for j in others[:n]:
            W[i, j] = x[i] @ x[j]
    return W + W.T


def transclip_slow(x, t, s):
    "The method image by image, as the official code has it"
    (N, d), C = x.shape, len(t)
    y = softmax_slow(x @ t.T / TAU)
    W = affinity_slow(x, s.n_neighbours)
    mu = np.zeros((C, d))
    for k in range(C):
        best = sorted(range(N), key=lambda i: -y[i, k])[:s.n_confident]
        mu[k] = unit(sum(y[i, k] * x[i] for i in best))
    sigma, z = np.full(d, 1 / d), y.copy()
    for r in range(s.rounds + 1):
        if r:
            mu = np.stack([sum(z[i, k] * x[i] for i in range(N)) / z[:, k].sum() for k in range(C)])
            mu = unit(mu) if s.unit_means else mu
            sigma = sum(z[i, k] * (x[i] - mu[k])**2 for i in range(N) for k in range(C)) / N
        score = np.array([[-0.5 * ((x[i] - mu[k])**2 / sigma).sum() for k in range(C)] for i in range(N)])
        for _ in range(s.assign_steps):
            pull = np.stack([sum(W[i, j] * z[j] for j in range(N)) for i in range(N)])
            raw = y**s.text_weight * np.exp(s.mixture_weight * (score - score.max(1, keepdims=True)) + s.affinity_weight / (2 * s.n_neighbours) * pull)
            z = raw / raw.sum(1, keepdims=True)
    return z


@pytest.mark.parametrize("settings", [TransCLIPSettings(), TransCLIPSettings(text_weight=0.5, mixture_weight=0.3, affinity_weight=2.0, n_neighbours=5, rounds=3, assign_steps=2, n_confident=4, unit_means=False)], ids=["official", "other"])
@pytest.mark.parametrize("seed", range(3))
def test_the_whole_method(seed, settings):
    x, t = example(seed)
    z, values = transduce(torch.from_numpy(x), torch.from_numpy(t), TAU, settings)
    assert np.allclose(z.numpy(), transclip_slow(x, t, settings), atol=1e-6) and len(values) == settings.rounds + 1
    assert np.abs(z.numpy() - softmax_slow(x @ t.T / TAU)).max() > 0.05, "a method that answers like zero-shot proves nothing"


@pytest.mark.parametrize("n", [1, 3, 8])
def test_neighbours(n):
    x = example(0)[0]
    S = affinity(torch.from_numpy(x), n)
    assert np.allclose(S.to_dense().numpy(), affinity_slow(x, n)) and len(S.values()) <= 2 * n * len(x)


def test_cosines_are_held_in_pieces(monkeypatch):
    x, held = torch.from_numpy(example(0, N=50)[0]), []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, *args, **kwargs: held.append(self.numel()) or topk(self, *args, **kwargs))
    whole, pieces = affinity(x, 3), affinity(x, 3, piece=200)
    assert held == [2500] + [200] * 12 + [100] and torch.allclose(whole.to_dense(), pieces.to_dense())


def test_a_copy_is_a_neighbour_and_oneself_is_not():
    x = torch.from_numpy(unit(np.array([[1, 0.0], [1, 0], [0, 1]])))
    assert affinity(x, 1).to_dense().diagonal().tolist() == [0, 0, 0] and affinity(x, 1).to_dense()[0, 1] == 2


def objective_slow(z, y, x, mu, sigma, S, s):
    J = 0.0
    for i in range(len(z)):
        J += sum(z[i, k] * np.log(z[i, k]) - s.text_weight * z[i, k] * np.log(y[i, k]) for k in range(z.shape[1]))
        J += s.mixture_weight * sum(z[i, k] * 0.5 * ((x[i] - mu[k])**2 / sigma + np.log(sigma)).sum() for k in range(z.shape[1]))
        J -= s.affinity_weight / (4 * s.n_neighbours) * sum(S[i, j] * z[i] @ z[j] for j in range(len(z)))
    return J


def state(seed):
    "Features, text, answers, means and variances as tensors, with an affinity that has no negative eigenvalue"
    x, t = example(seed)
    rng = np.random.default_rng(seed + 100)
    z, x, t = (torch.from_numpy(v) for v in (rng.dirichlet(np.ones(3), len(x)), x, t))
    log_text, S = (x @ t.T / TAU).log_softmax(-1), x @ x.T
    return z, log_text, x, *estimate(x, z, unit_means=False), S


def test_the_objective():
    z, log_text, x, mu, sigma, S = state(0)
    s = TransCLIPSettings(text_weight=0.7, mixture_weight=0.3, affinity_weight=2.0)
    found = objective(z, log_text, x, mu, sigma, S, s)
    assert found == pytest.approx(objective_slow(*(v.numpy() for v in (z, log_text.exp(), x, mu, sigma, S)), s), rel=1e-9)


@pytest.mark.parametrize("mixture_weight", [0.02, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_no_update_raises_the_objective_where_the_affinity_allows_the_promise(seed, mixture_weight):
    s = TransCLIPSettings(mixture_weight=mixture_weight, unit_means=False)
    z, log_text, x, mu, sigma, S = state(seed)
    assert torch.linalg.eigvalsh(S).min() > -1e-9
    J = [objective(z, log_text, x, mu, sigma, S, s)]
    for _ in range(8):
        for _ in range(3):
            z = assign(z, log_text, mixture_scores(x, mu, sigma), S, s)
            J.append(objective(z, log_text, x, mu, sigma, S, s))
        mu, _ = estimate(x, z, unit_means=False)
        J.append(objective(z, log_text, x, mu, sigma, S, s))
        sigma = estimate(x, z, unit_means=False)[1]
        J.append(objective(z, log_text, x, mu, sigma, S, s))
    assert (np.diff(J) <= 1e-9).all() and J[-1] < J[0] - 1


@pytest.mark.parametrize("seed", range(3))
def test_means_and_variances_are_where_the_objective_is_lowest(seed):
    s, rng = TransCLIPSettings(unit_means=False), torch.Generator().manual_seed(seed)
    z, log_text, x, mu, sigma, S = state(seed)
    lowest = objective(z, log_text, x, mu, sigma, S, s)
    for _ in range(10):
        moved = mu + 0.01 * torch.randn(mu.shape, generator=rng, dtype=mu.dtype)
        scaled = sigma * torch.exp(0.05 * torch.randn(sigma.shape, generator=rng, dtype=sigma.dtype))
        assert objective(z, log_text, x, moved, sigma, S, s) > lowest < objective(z, log_text, x, mu, scaled, S, s)


def test_unit_means_have_unit_length():
    z, _, x, *_ = state(0)
    assert torch.allclose(estimate(x, z)[0].norm(dim=-1), torch.ones(3, dtype=x.dtype))


def test_a_class_that_nobody_answers_breaks_nothing():
    x, t = (torch.from_numpy(v) for v in example(0))
    z, values = transduce(x, torch.cat([t, -x.mean(0, keepdim=True)]), 1e-4)
    assert torch.isfinite(z).all() and np.isfinite(values).all() and z[:, 3].max() == 0


# Answers

@pytest.fixture(scope="module")
def fitted(clip, task):
    return TransCLIP(preset="paper").fit(clip, task)


def test_the_order_of_the_images_does_not_matter(task, fitted):
    order = np.random.default_rng(0).permutation(len(task.test))
    assert np.allclose(fitted.predict_proba(SomeImages(task.test, order)), fitted.predict_proba(task.test)[order], atol=1e-5)


def test_the_company_matters_and_alone_it_is_zero_shot(clip, task, fitted):
    head = zero_shot_head(clip, task.class_names, task.template).double()
    zero_shot = (image_set_features(clip, task.test) @ head.T / clip.tau).softmax(-1).numpy()
    alone = np.concatenate([fitted.predict_proba(SomeImages(task.test, [i])) for i in range(3)])
    assert np.allclose(alone, zero_shot[:3], atol=1e-5)
    assert np.abs(fitted.predict_proba(task.test) - zero_shot).max() > 0.05
    assert np.isfinite(fitted.predict_proba(SomeImages(task.test, [0, 1]))).all()


def test_images_that_are_all_alike_break_nothing(clip, fitted):
    same = ArrayImages(np.full((12, 24, 24), 90, np.uint8))
    P = fitted.predict_proba(same)
    assert np.isfinite(P).all() and len(np.unique(P.argmax(1))) == 1


def test_it_says_that_it_is_transductive(fitted):
    assert TransCLIP.transductive and not Method.transductive
    assert [name for name, m in METHODS.items() if m.transductive] == ["transclip"]
    assert fitted.facts["transductive"].startswith("yes") and "transductive" in fitted.messages[0]
    assert not TransCLIP.supervised


def test_labels_and_seed_change_nothing(clip, task, relabelled, fitted):
    before = weights_digest(clip.model)
    other = TransCLIP(preset="paper").fit(clip, relabelled, seed=5)
    assert (other.predict_all(task.test) == fitted.predict_all(task.test)).all() and weights_digest(clip.model) == before


def test_it_gains_on_the_toy_task(clip):
    toy = load_task("glyphs-toy")
    head = zero_shot_head(clip, toy.class_names, toy.template)
    zero_shot = (image_set_features(clip, toy.test).float() @ head.T).argmax(1).numpy()
    accuracy = lambda labels: 100 * (labels == toy.audit.test).mean()
    assert accuracy(TransCLIP(preset="paper").fit(clip, toy).predict(toy.test)) > accuracy(zero_shot) + 2


def test_any_clip(vit, photos):
    P = TransCLIP().fit(vit, photos).predict_proba(photos.unlabelled)
    assert P.shape == (8, 3) and np.allclose(P.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("bad", [dict(template_set="all"), dict(text_weight=-1), dict(mixture_weight=float("nan")), dict(affinity_weight="1"), dict(n_neighbours=1.5), dict(rounds=-1), dict(assign_steps=0), dict(n_confident=0), dict(unit_means=1)], ids=str)
def test_a_bad_setting_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TransCLIPSettings(**bad)
