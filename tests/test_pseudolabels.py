"UPL, FPL, IFPL, GRIP and CPL: losses, selections and whole rounds restated without the package, and runs that break off."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from coft.clip import load_clip, weights_digest
from coft.core import generator
from coft.data import Audit, load_task, sample_task
from coft.protocol import get_method
from coft.pseudolabels import (CandidatePrompt, FeatureImages, PseudoPrompt, UPLSettings, candidate_loss, candidate_sets,
                               cpl_settings, fill_pools, growing_sizes)
from coft.rivals import ZeroShot
from helpers import broken_off, text_features_slow

TINY = dict(preset="paper", optimizer="adamw", lr=0.01, weight_decay=0.0, epochs=2, batch_size=8, n_context=4)
METHODS = {"upl": dict(top_k=4, n_prompts=2, views="task"), "fpl": dict(top_k=4), "ifpl": dict(top_k=4, rounds=2), "grip": dict(steps=3), "cpl": dict(steps=3)}


def fit(name, clip, task, seed=0, folder=None, **changes):
    return get_method(name, **TINY | METHODS[name] | changes).fit(clip, task, seed=seed, progress=False, folder=folder)


@pytest.fixture(scope="module")
def whole(clip, task):
    "One unbroken run of every method, by its name."
    return {name: fit(name, clip, task) for name in METHODS}


# The models, said again in plain torch and NumPy

def log_softmax_slow(scores):
    top = max(scores)
    return [s - top - math.log(sum(math.exp(t - top) for t in scores)) for s in scores]


@pytest.fixture(scope="module")
def double():
    "The embedded model in double precision, unit features of six images, labels, weights of candidates."
    clip = load_clip("embedded")
    clip.model.double()
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(6, clip.embed_dim)))
    weight = rng.random((6, 4)) * (rng.random((6, 4)) < 0.6)
    weight[np.arange(6), [0, 1, 2, 3, 0, 1]] = 0.3
    return clip, torch.nn.functional.normalize(features, dim=-1), np.array([0, 1, 2, 3, 0, 1]), weight


def scores_slow(clip, names, model, features):
    t = text_features_slow(clip, names, model.context.detach()[0])
    return [[float(v @ u) / clip.tau for u in t] for v in features]


def test_the_loss_of_a_label_is_that_of_the_formula(double, task):
    clip, features, label, _ = double
    model = PseudoPrompt(clip, task.class_names, 4, seed=3).double()
    expected = np.mean([-log_softmax_slow(s)[y] for s, y in zip(scores_slow(clip, task.class_names, model, features), label)])
    assert model(features, torch.tensor(label))["loss"].item() == pytest.approx(expected, abs=1e-6)


def test_the_loss_of_a_set_is_that_of_the_formula(double, task):
    clip, features, _, weight = double
    model = CandidatePrompt(clip, task.class_names, 4, seed=3).double()
    scores = scores_slow(clip, task.class_names, model, features)
    expected = np.mean([-math.log(sum(w * math.exp(l) for w, l in zip(row, log_softmax_slow(s)))) for s, row in zip(scores, weight)])
    assert model(features, torch.tensor(weight))["loss"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("clip_norm", [0.3, 0.0])
def test_the_gradient_is_cut(double, task, clip_norm):
    clip, features, _, weight = double
    model = CandidatePrompt(clip, task.class_names, 4, seed=3, clip_norm=clip_norm).double()
    context = model.context.detach().clone().requires_grad_()
    scores = features @ text_features_slow(clip, task.class_names, context[0]).T / clip.tau
    gradient, = torch.autograd.grad(-(scores.softmax(-1) * torch.tensor(weight)).sum(-1).log().mean(), context)
    assert gradient.norm() > 0.3, "the example needs a gradient to cut"
    model(features, torch.tensor(weight))["loss"].backward()
    assert torch.allclose(model.context.grad, gradient * (0.3 / gradient.norm() if clip_norm else 1), atol=1e-6)


def test_a_weight_of_zero_leaves_the_gradient_finite():
    logits = torch.zeros(1, 3, requires_grad=True)
    candidate_loss(logits, torch.tensor([[1.0, 0.0, 0.0]])).backward()
    assert torch.allclose(logits.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]))


def rate_slow(step, steps, ramp):
    return (step + 1) / (ramp + 1) if step < ramp else 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


def test_a_round_of_sgd_is_that_of_the_formulas(clip, task):
    "Selection, order, momentum, decay, warm-up and prediction of FPL, written out."
    fitted = fit("fpl", clip, task, optimizer="sgd", lr=0.02, weight_decay=0.1, epochs=3, warmup_epochs=1)
    with torch.no_grad():
        v = clip.image_features(task.unlabelled.batch(range(72), clip.image_size))
        zero_shot = (v @ clip.text_features([task.template.format(n) for n in task.class_names]).T / clip.tau).softmax(-1).numpy()
    assert np.allclose(fitted.trace["zero_shot"], zero_shot, atol=1e-5)
    index, labels = fitted.trace["selected_index"], fitted.trace["selected_labels"]
    context = PseudoPrompt(clip, task.class_names, 4, seed=0).context.detach()[0].requires_grad_()
    speed, losses = torch.zeros_like(context), []
    for epoch in range(3):
        order = generator(0, "round 1", epoch, "order").permutation(16)
        for i in range(2):
            place = order[8 * i:8 * i + 8]
            scores = v[index[place]] @ text_features_slow(clip, task.class_names, context).T / clip.tau
            loss = -scores.log_softmax(-1)[torch.arange(8), torch.tensor(labels[place])].mean()
            gradient, = torch.autograd.grad(loss, context)
            speed = 0.9 * speed + gradient + 0.1 * context.detach()
            context = (context.detach() - 0.02 * rate_slow(2 * epoch + i, 6, 2) * speed).requires_grad_()
            losses.append(loss.item())
    assert [h["loss"] for h in fitted.trace["histories"]["FPL, round 1"]] == pytest.approx(np.mean(np.reshape(losses, (3, 2)), 1), abs=1e-5)
    with torch.no_grad():
        test = clip.image_features(task.test.batch(range(40), clip.image_size))
        expected = (test @ text_features_slow(clip, task.class_names, context).T / clip.tau).softmax(-1)
    assert np.allclose(fitted.predict_proba(task.test), expected, atol=1e-4)


# Selections

def candidate_sets_slow(P, alpha, gamma):
    "Image by image and class by class, as the paper words it"
    N, C = P.shape

    def quantile(values, q):
        values, place = sorted(values), q * (len(values) - 1)
        low = int(place)
        return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])

    tau = quantile([max(row) for row in P], alpha) if alpha else sum(max(row) for row in P) / N
    level = [quantile(P[:, k], max(0, 1 - gamma / C)) for k in range(C)]
    sets = np.zeros((N, C), bool)
    for i in range(N):
        gathered = 0.0
        for k in sorted(range(C), key=lambda k: -P[i, k]):
            sets[i, k] = P[i, k] >= level[k] and P[i, k] > 1e-7
            gathered += P[i, k]
            if gathered > tau:
                break
    return sets


@pytest.mark.parametrize("alpha, gamma", [(0.75, 2.0), (0.6, 1.0), (0.0, 2.0), (1.0, 5.0), (0.9, 0.5), (0.3, 9.0)])
def test_candidate_sets(alpha, gamma):
    for seed in range(10):
        P = np.random.default_rng(seed).dirichlet([2, 1, 0.5, 0.3, 0.1], 40)
        sets = candidate_sets(P, alpha, gamma)
        assert (sets == candidate_sets_slow(P, alpha, gamma)).all()
        assert sets[np.unravel_index(P.argmax(), P.shape)], "the largest number is always a candidate"


def fill_pools_slow(P, sets, room):
    "Images ask one at a time, from the last to the first, until nobody has a wish left"
    wishes = {i: sorted(np.flatnonzero(sets[i]), key=lambda k: -P[i, k]) for i in range(len(P))}
    pools, asking = {k: [] for k in range(P.shape[1])}, list(range(len(P)))
    while asking:
        i = asking.pop()
        if not wishes[i]:
            continue
        k = wishes[i].pop(0)
        pools[k] = sorted([*pools[k], i], key=lambda j: -P[j, k])
        asking += pools[k][room[k]:]
        pools[k] = pools[k][:room[k]]
    return {i: k for k, held in pools.items() for i in held}


@pytest.mark.parametrize("room", [[1] * 5, [3, 1, 4, 2, 5], [0, 2, 2, 0, 9], [40] * 5])
def test_pools_do_not_depend_on_who_asks_first(room):
    for seed in range(10):
        P = np.random.default_rng(seed).dirichlet([2, 1, 0.5, 0.3, 0.1], 40)
        sets = candidate_sets(P, 0.75, 3.0)
        pool = fill_pools(P, sets, np.array(room))
        assert {i: k for i, k in enumerate(pool) if k >= 0} == fill_pools_slow(P, sets, room)


def test_growing_sizes_are_those_of_the_code():
    for N, C, T in ((1257, 10, 10), (72, 4, 3), (100, 7, 10), (13500, 10, 10), (30, 10, 10)):
        sizes, per_step = growing_sizes(N, C, T), N // T
        for t, size in enumerate(sizes, 1):
            expected = int(t * per_step / C)
            assert size == max(1, expected if expected * C <= N else N // C)


def probabilities_of(clip, task, context):
    "Of the unlabelled images under a learned context [M, d_t]"
    with torch.no_grad():
        t = text_features_slow(clip, task.class_names, torch.from_numpy(context))
        v = clip.image_features(task.unlabelled.batch(range(len(task.unlabelled)), clip.image_size))
        return (v @ t.T / clip.tau).softmax(-1).numpy()


def top_k_slow(P, K, fill_short):
    "The K surest of each predicted class; then the nearest of those that are left, class by class"
    chosen = {k: sorted((i for i in range(len(P)) if P[i].argmax() == k), key=lambda i: -P[i, k])[:K] for k in range(P.shape[1])}
    for k in chosen if fill_short else ():
        free = [i for i in range(len(P)) if not any(i in c for c in chosen.values())]
        chosen[k] += sorted(free, key=lambda i: -P[i, k])[:K - len(chosen[k])]
    return {(i, k) for k, rows in chosen.items() for i in rows}


@pytest.mark.parametrize("name, sizes, fill_short", [("upl", [4], False), ("fpl", [4], True), ("ifpl", [4, 4], True), ("grip", [6, 12, 18], True)])
def test_every_round_takes_the_surest_labels_of_the_one_before(clip, task, whole, name, sizes, fill_short):
    trace = whole[name].trace
    P = trace["zero_shot"]
    for r, K in enumerate(sizes, 1):
        front = "" if r == 1 else f"round{r}_"
        assert set(zip(trace[f"{front}selected_index"].tolist(), trace[f"{front}selected_labels"].tolist())) == top_k_slow(P, K, fill_short)
        P = probabilities_of(clip, task, trace["contexts"][r - 1])


def no_class_3(clip, task, template_set):
    "First labels that never say class 3"
    P = np.random.default_rng(0).dirichlet([3, 2, 1, 1e-3], len(task.unlabelled)).astype(np.float32)
    P[:, 3] = np.minimum(P[:, 3], P[:, :3].max(1) / 2)
    return P, None


@pytest.mark.parametrize("short", [False, True])
def test_every_round_of_cpl_takes_the_sets_of_the_one_before(clip, task, monkeypatch, short):
    if short:
        monkeypatch.setattr("coft.pseudolabels.first_labels", no_class_3)
    trace, held, sizes = fit("cpl", clip, task, alpha=0.3).trace, [0] * 4, []
    P = trace["zero_shot"]
    for r, K in enumerate([6, 12, 18], 1):
        front = "" if r == 1 else f"round{r}_"
        sets = candidate_sets_slow(P.astype(np.float64), 0.3, 2.0)
        expected = fill_pools_slow(P, sets, [h + K - max(held) for h in held])
        index, pool = trace[f"{front}selected_index"], trace[f"{front}selected_labels"]
        assert dict(zip(index.tolist(), pool.tolist())) == expected and (trace[f"{front}candidates"] == sets[index]).all()
        held = [list(expected.values()).count(k) for k in range(4)]
        sizes.append(held)
        P = probabilities_of(clip, task, trace["contexts"][r - 1])
    assert sizes == [[6] * 4, [12] * 4, [18] * 4] or short
    assert not short or sizes[0][3] < 6 and sizes[1][3] < 12, "without a short pool its smaller room would not be seen"


@pytest.mark.parametrize("strategy", ["grip", "fpl"])
def test_weights_of_candidates(clip, task, monkeypatch, strategy):
    import coft.pseudolabels
    train, seen = coft.pseudolabels.train, []
    monkeypatch.setattr("coft.pseudolabels.train", lambda model, images, index, columns, *rest, **more: (seen.append(columns["weight"]), train(model, images, index, columns, *rest, **more))[1])
    trace = fit("cpl", clip, task, strategy=strategy, steps=2, top_k=5).trace
    P = np.where(trace["candidates"], trace["zero_shot"][trace["selected_index"]], 0)
    soft = P / P.sum(1, keepdims=True)
    assert np.allclose(seen[0], soft if strategy == "grip" else trace["candidates"], atol=1e-6)
    assert len(seen) == (2 if strategy == "grip" else 1)
    if strategy == "grip":
        assert (seen[1] == trace["round2_candidates"]).all() and (trace["candidates"].sum(1) > 1).any()


# The methods

def test_two_runs_agree_and_another_seed_differs(clip, task, whole):
    for name, first in whole.items():
        assert (fit(name, clip, task).predict_all(task.test) == first.predict_all(task.test)).all(), name
        assert (fit(name, clip, task, seed=1).predict_all(task.test) != first.predict_all(task.test)).any(), name


def test_hidden_labels_change_nothing(clip, task, relabelled, whole):
    for name, first in whole.items():
        permuted = fit(name, clip, relabelled)
        assert (permuted.predict_all(task.test) == first.predict_all(task.test)).all(), name
        assert all((permuted.trace[k] == v).all() for k, v in first.trace.items() if isinstance(v, np.ndarray)), name
        assert permuted.messages == first.messages and permuted.facts == first.facts


def test_without_any_label_the_methods_run(clip, task):
    unlabelled = replace(task, _labels=Audit(None, None))
    assert fit("grip", clip, unlabelled).predict(task.test).shape == (40,)


def test_frozen_weights_are_unchanged(clip, whole):
    assert weights_digest(clip.model) == weights_digest(load_clip("embedded").model)
    assert not any(p.requires_grad or p.grad is not None for p in clip.model.parameters())


@pytest.mark.parametrize("name, at", [("upl", 3), ("fpl", 1), ("ifpl", 3), ("ifpl", 2), ("grip", 5), ("cpl", 1), ("cpl", 5)])
def test_a_run_that_breaks_off_goes_on_to_the_same_numbers(clip, task, tmp_path, monkeypatch, whole, name, at):
    import coft.trainer
    with broken_off(monkeypatch, coft.trainer.PhaseState, at):
        fit(name, clip, task, folder=tmp_path)
    fitted, first = fit(name, clip, task, folder=tmp_path), whole[name]
    assert (fitted.predict_all(task.test) == first.predict_all(task.test)).all()
    assert (fitted.trace["contexts"] == first.trace["contexts"]).all()
    losses = [[[h["loss"] for h in history] for history in f.trace["histories"].values()] for f in (fitted, first)]
    assert losses[0] == losses[1]


def test_a_round_that_goes_on_with_its_prompt_breaks_off_as_well(clip, task, tmp_path, monkeypatch):
    import coft.trainer
    unbroken = fit("grip", clip, task, restart=False)
    with broken_off(monkeypatch, coft.trainer.PhaseState, 3):
        fit("grip", clip, task, restart=False, folder=tmp_path)
    assert (fit("grip", clip, task, restart=False, folder=tmp_path).predict_all(task.test) == unbroken.predict_all(task.test)).all()


def test_a_state_of_other_settings_is_refused(clip, task, tmp_path):
    fit("cpl", clip, task, folder=tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another run: clip_norm was 0.8 and is 0.5"):
        fit("cpl", clip, task, folder=tmp_path, clip_norm=0.5)


@pytest.mark.parametrize("name, change", [
    ("upl", dict(top_k=3)), ("upl", dict(n_prompts=1)), ("upl", dict(views="crop")), ("upl", dict(views="plain")), ("upl", dict(warmup_epochs=0)), ("upl", dict(context_std=0.1)), ("upl", dict(template_set="llm")),
    ("ifpl", dict(rounds=3)), ("ifpl", dict(restart=False)), ("ifpl", dict(weight_decay=1.0)), ("ifpl", dict(optimizer="sgd")), ("ifpl", dict(n_context=3)), ("ifpl", dict(batch_size=5)), ("ifpl", dict(epochs=3)), ("ifpl", dict(lr=0.02)),
    ("grip", dict(steps=4)), ("grip", dict(restart=False)),
    ("cpl", dict(steps=2)), ("cpl", dict(strategy="fpl")), ("cpl", dict(strategy="fpl", top_k=2)), ("cpl", dict(alpha=0.2)), ("cpl", dict(gamma=1.0)), ("cpl", dict(clip_norm=0.001))], ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}={x}" for k, x in v.items()))
def test_every_setting_changes_the_run(clip, task, whole, name, change):
    assert (fit(name, clip, task, **change).predict_all(task.test) != whole[name].predict_all(task.test)).any()


@pytest.mark.parametrize("name, fill_short, started", [("upl", False, 0), ("upl", True, 4), ("fpl", True, 4), ("fpl", False, 0), ("grip", True, 6), ("grip", False, 0)])
def test_a_class_that_zero_shot_never_finds(clip, task, monkeypatch, name, fill_short, started):
    monkeypatch.setattr("coft.pseudolabels.first_labels", no_class_3)
    fitted = fit(name, clip, task, fill_short=fill_short)
    assert (fitted.trace["selected_labels"] == 3).sum() == started
    assert f"Class 'digit three' was found in only 0 images; it starts with {started} pseudo-labels." in fitted.messages


def test_upl_averages_scores(clip, task, whole):
    single = [fit("upl", clip, task, n_prompts=1, seed=seed) for seed in (0, 1000)]
    assert (single[0].trace["contexts"][0] == whole["upl"].trace["contexts"][0]).all() and (single[1].trace["contexts"][0] == whole["upl"].trace["contexts"][1]).all()
    mean = np.mean([np.log(f.predict_proba(task.test).astype(np.float64)) for f in single], 0)
    assert np.allclose(whole["upl"].predict_proba(task.test), np.exp(mean) / np.exp(mean).sum(1, keepdims=True), atol=1e-5)


def test_features_stand_for_the_test_view(clip, task):
    "The same training on pixels that are always shown alike."
    import coft.trainer
    features = clip.image_features(task.unlabelled.batch(range(72), clip.image_size))
    models = [PseudoPrompt(clip, task.class_names, 4, seed=0) for _ in range(2)]
    index, columns = np.arange(24), {"label": np.arange(24) % 4}
    for model, images in zip(models, (task.unlabelled, FeatureImages(features))):
        coft.trainer.train(model, images, index, columns, UPLSettings(epochs=2, batch_size=8).schedule(), clip.image_size, None, 0, "same", progress=False)
    assert torch.allclose(*(m.context for m in models), atol=1e-5)


def test_every_method_fits_its_labels_and_beats_zero_shot(clip):
    toy = load_task("glyphs-toy")
    truth, quick = toy.audit.test, dict(optimizer="adamw", lr=0.003, weight_decay=0.0, epochs=10, batch_size=16, views="plain", preset="paper")
    zero_shot = (ZeroShot().fit(clip, toy).predict(toy.test) == truth).mean()
    for name, more in dict(upl=dict(n_prompts=2), fpl={}, ifpl=dict(rounds=3), grip=dict(steps=3), cpl=dict(steps=3)).items():
        fitted = get_method(name, **quick | more).fit(clip, toy, progress=False)
        history = list(fitted.trace["histories"].values())[-1]
        assert history[-1]["loss"] < history[0]["loss"], name
        assert (fitted.predict(toy.test) == truth).mean() > zero_shot + 0.03, name


@pytest.mark.parametrize("name", ["upl", "cpl"])
def test_a_large_vision_transformer(vit, photos, name):
    fitted = fit(name, vit, photos, top_k=2, epochs=1, **dict(n_prompts=1) if name == "upl" else dict(steps=2))
    P = fitted.predict_proba(photos.test)
    assert P.shape == (3, 3) and np.allclose(P.sum(1), 1, atol=1e-5)
    assert all(np.isfinite(h["loss"]) for history in fitted.trace["histories"].values() for h in history)


def test_a_residual_network(photos):
    fitted = fit("grip", load_clip("RN50-quickgelu", "random"), photos, epochs=1, steps=2)
    assert np.isfinite(fitted.predict_proba(photos.test)).all() and len(fitted.trace["contexts"]) == 2


@pytest.mark.parametrize("name, settings, message", [
    ("upl", dict(n_prompts=0), "n_prompts: 0"), ("upl", dict(top_k=0), "top_k: 0"), ("upl", dict(views="moco"), "views: 'moco'"), ("upl", dict(fill_short=1), "fill_short: 1"), ("upl", dict(epochs=0), "epochs: 0"),
    ("fpl", dict(template_set="all"), "template_set: 'all'"), ("fpl", dict(context_std=0), "context_std: 0"), ("fpl", dict(warmup_epochs=-1), "warmup_epochs: -1"), ("fpl", dict(n_context=1.5), "n_context: 1.5"), ("fpl", dict(rounds=2), "setting of fpl: 'rounds'"),
    ("ifpl", dict(rounds=0), "rounds: 0"), ("ifpl", dict(restart="no"), "restart: 'no'"), ("ifpl", dict(optimizer="adam"), "optimizer: 'adam'"),
    ("grip", dict(steps=0), "steps: 0"), ("grip", dict(top_k=4), "setting of grip: 'top_k'"), ("grip", dict(lr=0), "lr: 0"),
    ("cpl", dict(strategy="ifpl"), "strategy: 'ifpl'"), ("cpl", dict(alpha=-0.1), "alpha: -0.1"), ("cpl", dict(alpha=2), "alpha: 2"), ("cpl", dict(gamma=0), "gamma: 0"), ("cpl", dict(clip_norm=-1), "clip_norm: -1"), ("cpl", dict(steps=2.5), "steps: 2.5")])
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_method(name, **settings)


def test_fewer_images_than_classes_are_named(clip, task):
    with pytest.raises(ValueError, match=r"there are 3 unlabelled images for 4 classes"):
        fit("grip", clip, sample_task(task, n_train=3))
    with pytest.raises(ValueError, match=r"top_k: 4 images for each of 4 classes are 16, but there are only 3"):
        fit("fpl", clip, sample_task(task, n_train=3))
    assert len(fit("upl", clip, sample_task(task, n_train=3)).trace["selected_index"]) == 3


def test_a_long_name_is_said_before_any_image_is_looked_at(clip, task, monkeypatch):
    monkeypatch.setattr("coft.pseudolabels.first_labels", lambda *args: pytest.fail("an image was looked at"))
    with pytest.raises(ValueError, match="lower n_context"):
        fit("fpl", clip, task, n_context=60)


def test_the_official_rows():
    for name, beta, C in (("oxford_flowers", 0.99, 102), ("dtd", 0.95, 47), ("eurosat", 0.80, 10), ("fgvc_aircraft", 0.97, 100)):
        settings = get_method("cpl", preset="paper", **cpl_settings(name)).settings_for("paper")
        assert 1 - settings.gamma / C == pytest.approx(beta)
    assert cpl_settings("digits") == {}
    paper = {name: get_method(name, preset="paper").settings_for("paper") for name in METHODS}
    assert [(s.optimizer, s.lr, s.epochs, s.batch_size, s.weight_decay, s.n_context) for s in paper.values()] == [("sgd", 0.002, 50, 32, 5e-4, 16)] + [("sgd", 0.1, 150, 16, 0.1, 16)] * 3 + [("sgd", 0.02, 50, 64, 0.05, 16)]
