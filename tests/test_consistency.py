"FixMatch and LaFTer: their losses, views and selections said a second time, every switch, and runs that break off."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from coft.clip import weights_digest, zero_shot_head
from coft.consistency import (OPERATIONS, STRONG_VIEWS, Blurred, FixMatch, FixMatchDA, FixMatchDASettings, FixMatchSettings, LaFTer,
                              LaFTerSettings, Learner, NoiseView, SelfTraining, StrongView, TextClassifier, align, class_sentences,
                              cover, learner_view, masked_loss, self_training_messages, strong_view)
from coft.contrast import ContrastView, Views
from coft.core import uniforms
from coft.data import Augmentation
from coft.trainer import EncoderWithHead
from helpers import broken_off, same_tensors
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter1d
from scipy.stats import norm

NO_MIRROR = Augmentation(crop=0.88, flip=False)
QUICK = {FixMatch: dict(preset="paper", epochs=2, batch_size=24, lr=1e-4, threshold=0.6), FixMatchDA: dict(preset="paper", epochs=2, batch_size=24, lr=1e-4, threshold=0.6),
         LaFTer: dict(preset="paper", text_epochs=3, n_visual=4, epochs=2, batch_size=24)}
methods = pytest.mark.parametrize("method", QUICK, ids=lambda m: m.name)


@pytest.fixture(scope="module")
def fits(clip, task):
    "One quick run of every method."
    return {method: method(**quick).fit(clip, task, progress=False) for method, quick in QUICK.items()}


@pytest.fixture(scope="module")
def pixels():
    "Four images of random colours in smooth fields, uint8 [4, 3, 32, 32]."
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.kron(rng.integers(20, 236, size=(4, 3, 8, 8)), np.ones((4, 4))).astype(np.uint8) + rng.integers(0, 20, size=(4, 3, 32, 32), dtype=np.uint8))


def softmax_slow(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy(x): return x.detach().numpy().astype(np.float64)


# Strong views

def pillow(name, image, level):
    "An operation as Pillow does it, with the strengths of the paper"
    factor = 0.05 + 0.9 * level
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "posterize":
        return ImageOps.posterize(image, int(4 + 4 * level))
    if name == "solarize":
        return ImageOps.solarize(image, 256 * level)
    kind = {"brightness": ImageEnhance.Brightness, "colour": ImageEnhance.Color, "contrast": ImageEnhance.Contrast, "sharpness": ImageEnhance.Sharpness}[name]
    return kind(image).enhance(factor)


@pytest.mark.parametrize("level", [0.1, 0.45])
@pytest.mark.parametrize("name", list(OPERATIONS)[1:9])
def test_colour_operations_are_those_of_pillow(pixels, name, level):
    found = OPERATIONS[name](pixels / 255, torch.full((4, 1, 1, 1), level)).clamp(0, 1) * 255
    wanted = np.stack([np.asarray(pillow(name, Image.fromarray(p.permute(1, 2, 0).numpy()), level)) for p in pixels]).transpose(0, 3, 1, 2)
    assert np.abs(found.numpy() - wanted).max() <= 1.6, "one level of rounding, twice where grey is rounded first"
    assert np.abs(wanted.astype(int) - pixels.numpy()).max() > 6, "an operation that changes nothing proves nothing"


@pytest.mark.parametrize("name, there", [("rotate", lambda y, x, v: (y * math.cos(v * math.pi / 6) + x * math.sin(v * math.pi / 6), x * math.cos(v * math.pi / 6) - y * math.sin(v * math.pi / 6))),
                                         ("shear_x", lambda y, x, v: (y, x + 0.3 * v * y)), ("shear_y", lambda y, x, v: (y + 0.3 * v * x, x)),
                                         ("translate_x", lambda y, x, v: (y, x + 0.6 * v)), ("translate_y", lambda y, x, v: (y + 0.6 * v, x))])
@pytest.mark.parametrize("level", [0.2, 0.9])
def test_movements_look_up_the_place_that_they_should(name, there, level):
    y, x = (np.mgrid[:32, :32] + 0.5) / 16 - 1
    ramp = torch.from_numpy(np.stack([y, x, y]).astype(np.float32))[None]
    found = OPERATIONS[name](ramp, torch.full((1, 1, 1, 1), level))[0]
    wanted = np.stack(there(y, x, 2 * level - 1))
    inside = (np.abs(wanted) < 0.95).all(0)
    assert inside.mean() > 0.5 and np.abs(found[:2].numpy() - wanted)[:, inside].max() < 1e-4


@pytest.mark.parametrize("flip", [False, True])
def test_only_the_task_decides_whether_views_are_mirrored(pixels, monkeypatch, flip):
    fields, grid = [], torch.nn.functional.affine_grid
    monkeypatch.setattr("torch.nn.functional.affine_grid", lambda theta, *args, **kwargs: fields.append(theta) or grid(theta, *args, **kwargs))
    like = replace(NO_MIRROR, flip=flip)
    for views in STRONG_VIEWS:
        view = strong_view(type("T", (), {"augmentation": like}), views)
        view(pixels.repeat(25, 1, 1, 1), uniforms(0, views, index=range(100), size=view.n_numbers), 28)
    mirrored = torch.cat([torch.linalg.det(f[:, :, :2]) < 0 for f in fields])
    assert len(mirrored) > 300 and mirrored.any() == flip


def test_a_strong_view_does_not_depend_on_its_batch(pixels):
    view = StrongView(NO_MIRROR)
    u = uniforms(0, "views", index=range(4), size=view.n_numbers)
    together = view(pixels, u, 28)
    assert torch.allclose(together, torch.cat([view(pixels[i:i + 1], u[i:i + 1], 28) for i in range(4)]), atol=1e-6)
    assert 0 <= together.min() and together.max() <= 1 and together.shape == (4, 3, 28, 28)
    assert torch.isfinite(view(pixels, np.full_like(u, np.nextafter(1, 0)), 28)).all(), "the largest number that can be drawn"


def test_the_square_has_its_side_and_its_place():
    found = cover(torch.ones(2, 3, 40, 40), torch.tensor([[1.0, 0.5, 0.25], [0.5, 0.5, 0.5]]), 0.5) == 0.5
    rows, columns = (found[0, 0].any(i).nonzero()[:, 0] for i in (1, 0))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 19, 10, 29)
    assert found[1].sum() == 3 * 10 * 10 and not (cover(torch.ones(2, 3, 40, 40), torch.rand(2, 3), 0.0) == 0.5).any()


# FixMatch

def fixmatch_slow(weak, strong, threshold, mean_over, share=None, prior=None, momentum=0.0):
    "Loss of a batch from the scores of its weak and strong views, image by image, and the new running share"
    P, Q = softmax_slow(weak), softmax_slow(strong)
    if prior is not None:
        share = momentum * share + (1 - momentum) * P.mean(0)
        P = np.stack([p * (prior + 1e-6) / (share + 1e-6) for p in P])
        P /= P.sum(1, keepdims=True)
    losses = [-math.log(q[p.argmax()]) for p, q in zip(P, Q) if p.max() >= threshold]
    return sum(losses) / (len(P) if mean_over == "batch" else max(1, len(losses))), len(losses) / len(P), share


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mean_over", ["batch", "accepted"])
def test_two_steps_of_fixmatch(clip, task, mean_over, aligned):
    settings = FixMatchSettings(threshold=0.6, mean_over=mean_over)
    head = torch.nn.functional.normalize(torch.randn(4, clip.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    prior, share = (np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])) if aligned else (None, None)
    training = SelfTraining(EncoderWithHead(clip, 4, head), settings, prior=prior, share=share, momentum=0.9)
    views, partly = Views((NO_MIRROR, StrongView(NO_MIRROR))), []
    for step in range(2):
        stored = task.unlabelled.batch(range(16 * step, 16 * step + 16), views.stored_size(24), whole=True)
        batch = views(stored, uniforms(0, step, index=range(16), size=views.n_numbers), 24)
        weak, strong = (numpy(training.model.logits(batch[:, i])) for i in (0, 1))
        loss, accepted, share = fixmatch_slow(weak, strong, 0.6, mean_over, share, prior, 0.9)
        found = training(batch)
        assert found["loss"].item() == pytest.approx(loss, abs=2e-6) and found["accepted"].item() == pytest.approx(accepted, abs=1e-6)
        if aligned:
            assert np.allclose(training.share.numpy(), share, atol=1e-6)
        partly.append(0 < accepted < 1)
    assert any(partly)


def test_the_label_carries_no_gradient(clip, task):
    training = SelfTraining(EncoderWithHead(clip, 4, seed=0), FixMatchSettings(threshold=0.0))
    batch = torch.rand(4, 2, 3, 24, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    training(batch)["loss"].backward()
    assert (batch.grad[:, 0] == 0).all() and (batch.grad[:, 1] != 0).any()


def test_a_batch_without_an_accepted_label_teaches_nothing():
    scores = torch.randn(3, 4, requires_grad=True)
    for mean_over in ("batch", "accepted"):
        loss = masked_loss(scores, torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool), mean_over)
        loss.backward()
        assert loss == 0 and (scores.grad == 0).all()


def test_alignment_moves_the_mean_to_the_prior():
    P, prior = torch.from_numpy(np.random.default_rng(0).dirichlet([5, 2, 2], 400)), torch.tensor([0.2, 0.3, 0.5])
    before, after = ((p.mean(0) - prior).abs().sum() for p in (P, align(P, prior, P.mean(0))))
    assert after < 0.25 * before


def test_selections_are_those_above_the_threshold(fits):
    trace = fits[FixMatch].trace
    sure = trace["zero_shot"].max(1) >= 0.6
    assert (trace["selected_index"] == np.flatnonzero(sure)).all() and (trace["selected_labels"] == trace["zero_shot"].argmax(1)[sure]).all()
    P = trace["zero_shot"].astype(np.float64)
    aligned = P * (0.25 + 1e-6) / (P.mean(0) + 1e-6)
    aligned /= aligned.sum(1, keepdims=True)
    trace = fits[FixMatchDA].trace
    assert (trace["selected_index"] == np.flatnonzero(aligned.max(1) >= 0.6)).all()


def test_the_average_answers_and_labels(clip, task, fits):
    still = FixMatch(**QUICK[FixMatch], average=1.0).fit(clip, task, progress=False)
    assert np.allclose(still.predict_proba(task.unlabelled), still.trace["zero_shot"], atol=1e-5), "an average that never moves is zero-shot CLIP"
    slow = FixMatch(**QUICK[FixMatch], average=0.9, labeller="average").fit(clip, task, progress=False)
    assert not np.array_equal(slow.predict_proba(task.test), fits[FixMatch].predict_proba(task.test))


@pytest.mark.parametrize("train_head", [True, False])
def test_the_head_learns_only_if_it_should(clip, task, monkeypatch, train_head):
    towers = []
    monkeypatch.setattr("coft.consistency.EncoderWithHead", lambda *args: towers.append(EncoderWithHead(*args)) or towers[-1])
    FixMatch(**QUICK[FixMatch] | dict(epochs=1), train_head=train_head).fit(clip, task, progress=False)
    assert same_tensors(towers[0].head, EncoderWithHead(clip, 4, zero_shot_head(clip, task.class_names, task.template)).head) != train_head
    assert not same_tensors(towers[0].visual, clip.model.visual)


def test_nothing_to_learn_from_is_said(clip, task):
    fitted = FixMatch(**QUICK[FixMatch] | dict(threshold=1.0, epochs=1)).fit(clip, task, progress=False)
    assert any("nothing to learn from" in m for m in fitted.messages) and np.isfinite(fitted.predict_proba(task.test)).all()


def test_a_collapse_is_said(clip, task):
    fitted = FixMatch(**QUICK[FixMatch] | dict(lr=0.03, epochs=3)).fit(clip, task, progress=False)
    labels = fitted.predict(task.unlabelled)
    assert len(np.unique(labels)) < 4 and fitted.messages and "FixMatch" in fitted.messages[0]


def test_messages_say_what_happened_and_no_more():
    names, before = list("abcdefgh"), np.repeat(np.arange(8), 5)
    assert self_training_messages(before, before, names, "it") == []
    assert [m.split(" ")[:2] for m in self_training_messages(before, np.where(before == 7, 6, before), names, "it")] == [["it", "drifted"], ["it", "lost"]]
    assert len(self_training_messages(before, np.zeros(40, int), names, "it")) == 1
    assert len(self_training_messages(before, before % 2, names, "it")) == 1 + 5, "six lost classes are four sentences and one for the rest"


def test_a_prior_is_used_in_proportion(clip, task):
    P = np.full((3, 4), 0.25, np.float32)
    given = FixMatchDA().alignment(P, FixMatchDASettings(prior=(2, 1, 1, 0)))
    assert given["prior"].tolist() == [0.5, 0.25, 0.25, 0] and (given["share"] == 0.25).all()
    assert (FixMatchDA().alignment(P, FixMatchDASettings(prior="zero-shot"))["prior"] == P.mean(0)).all()
    with pytest.raises(ValueError, match="3 numbers were given for 4 classes"):
        FixMatchDA().alignment(P, FixMatchDASettings(prior=(1, 1, 1)))


# LaFTer

def smoothed_slow(scores, labels, smoothing):
    "Cross-entropy with smoothed labels, term by term"
    logP = np.log(softmax_slow(scores))
    return np.mean([-(1 - smoothing) * row[k] - smoothing * row.mean() for row, k in zip(logP, labels)])


def test_the_text_classifiers_loss():
    rng = np.random.default_rng(0)
    features, labels, u = rng.normal(size=(9, 6)).astype(np.float32), rng.integers(3, size=9), rng.random((9, 6))
    noisy = NoiseView(6, 0.3)(torch.from_numpy(features), u, 1)
    assert np.allclose(noisy.numpy(), features + 0.3 * norm.ppf(u), atol=1e-6)
    classifier = TextClassifier(6, 3, 0.2, seed=1)
    found = classifier(noisy, torch.from_numpy(labels))["loss"].item()
    assert found == pytest.approx(smoothed_slow(numpy(noisy) @ numpy(classifier.head.weight).T, labels, 0.2), abs=1e-6)
    assert torch.isfinite(NoiseView(6)(torch.zeros(1, 6), np.zeros((1, 6)), 1)).all()


def tower_slow(visual, x, tokens=None):
    "A vision transformer's features of normalised pixels, with tokens behind the patches before the first block"
    x = visual.conv1(x).flatten(2).transpose(1, 2)
    x = visual.ln_pre(torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding)
    if tokens is not None:
        x = torch.cat([x, tokens.expand(len(x), -1, -1)], 1)
    for block in visual.transformer.resblocks:
        x = block(x)
    return visual.ln_post(x[:, 0]) @ visual.proj


@pytest.mark.parametrize("unit", [False, True])
def test_the_learners_loss(clip, task, unit):
    weight = torch.randn(4, clip.embed_dim, generator=torch.Generator().manual_seed(0)) * 0.1
    learner = Learner(clip, weight, task.unlabelled, LaFTerSettings(n_visual=3, smoothing=0.2, unit_features=unit), seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in learner.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=rng)
    index, changed = torch.tensor([5, 2, 40, 7]), torch.rand(4, 3, 24, 24, generator=rng)
    plain = tower_slow(learner.tower, clip.normalize(task.unlabelled.batch(index, 24)))
    labels = (numpy(torch.nn.functional.normalize(plain, dim=-1)) @ weight.numpy().T).argmax(1)
    v = numpy(tower_slow(learner.tower, clip.normalize(changed), learner.tokens.tokens[0]))
    scores = (v / np.linalg.norm(v, axis=1, keepdims=True) if unit else v) @ numpy(learner.head.weight).T
    found = learner(changed, index)["loss"]
    assert found.item() == pytest.approx(smoothed_slow(scores, labels, 0.2), rel=1e-5)
    assert learner.labels(task.unlabelled.batch(index, 24)).tolist() == labels.tolist()
    found.backward()
    assert {n.split(".")[0] for n, p in learner.named_parameters() if p.grad is not None} == {"tower", "tokens", "head"}


def test_only_norms_tokens_and_classifier_learn(clip, task):
    learner = Learner(clip, torch.zeros(4, clip.embed_dim), task.unlabelled, LaFTerSettings(), seed=0)
    learns = {n for n, p in learner.named_parameters() if p.requires_grad}
    norms = {f"tower.{n}.{kind}" for n, m in clip.model.visual.named_modules() if "ln_" in n and hasattr(m, "bias") for kind in ("weight", "bias")}
    assert learns == norms | {"tokens.tokens", "head.weight"} and len(norms) >= 12
    assert learner.tokens.tokens.shape[:2] == (1, 50)


def test_what_is_frozen_stays(clip, task, fits, monkeypatch):
    learners, before = [], weights_digest(clip.model)
    monkeypatch.setattr("coft.consistency.Learner", lambda *args: learners.append(Learner(*args)) or learners[-1])
    LaFTer(**QUICK[LaFTer]).fit(clip, task, progress=False)
    fresh, trained = clip.model.visual.state_dict(), learners[0].tower.state_dict()
    same = {n for n in fresh if torch.equal(fresh[n], trained[n])}
    assert same == {n for n in fresh if ".ln_" not in f".{n}"} and weights_digest(clip.model) == before
    assert not torch.equal(learners[0].head.weight, learners[0].teacher)


def test_sentences_come_from_where_they_should(task):
    C, n_llm, n_own = len(task.class_names), len(task.llm_templates), len(task.templates)
    for texts, n in (("both", n_llm + n_own), ("llm", n_llm), ("templates", n_own)):
        sentences, labels, long_texts = class_sentences(task, texts)
        assert np.bincount(labels).tolist() == [n] * C and long_texts == "error"
        assert all(task.class_names[k] in s for s, k in zip(sentences, labels))
    told = replace(task, llm_templates={name: [f"about {name}"] * (k + 1) for k, name in enumerate(task.class_names)})
    sentences, labels, long_texts = class_sentences(told, "llm")
    assert np.bincount(labels).tolist() == [1, 2, 3, 4] and long_texts == "cut" and sentences[-1] == f"about {task.class_names[-1]}"
    with pytest.raises(ValueError, match="no templates by a language model"):
        class_sentences(replace(task, llm_templates=()), "llm")


def test_a_task_without_sentences_is_told(clip, task):
    fitted = LaFTer(**QUICK[LaFTer] | dict(epochs=1)).fit(clip, replace(task, llm_templates=()), progress=False)
    assert any("no sentences by a language model" in m for m in fitted.messages) and fitted.facts["sentences of the text classifier"] == 4 * len(task.templates)


def test_official_steps_and_constant_rate():
    s = LaFTerSettings()
    assert [s.text_schedule(name, 10).epochs for name in ("oxford_flowers", "dtd", "digits")] == [600, 400, 400]
    assert LaFTerSettings(text_epochs=7).text_schedule("dtd", 10).epochs == 7
    for schedule in (s.schedule(), s.text_schedule("dtd", 10)):
        assert [schedule.rate(step, 100) for step in (0, 50, 99)] == [1, 1, 1]
    assert LaFTerSettings(decay="cosine").schedule().rate(99, 100) < 0.01


def test_blur_is_gaussian(pixels):
    u = np.linspace(0.05, 0.95, 48).reshape(4, 12)
    sharp = ContrastView(like=Augmentation(crop=1.0))
    found, plain = Blurred(sharp)(pixels, u, 224), sharp(pixels, u[:, :-1], 224)
    for image, blurred, width in zip(plain.numpy(), found.numpy(), 0.1 + 1.9 * u[:, -1]):
        wanted = gaussian_filter1d(gaussian_filter1d(image, width, axis=1, mode="nearest", radius=6), width, axis=2, mode="nearest", radius=6)
        assert np.abs(blurred - wanted).max() < 1e-5
    assert (found - plain).abs().max() > 0.05


def test_the_learners_view_is_the_tasks_if_asked(task):
    assert learner_view(task, LaFTerSettings(views="task")) == task.augmentation
    view = learner_view(task, LaFTerSettings(crop_area=0.3)).view
    assert (view.area, view.flip, view.like) == (0.3, task.augmentation.flip, task.augmentation)


# All of them

@methods
def test_one_seed_gives_one_run_and_labels_do_not_matter(clip, task, relabelled, fits, method):
    again = method(**QUICK[method]).fit(clip, relabelled, progress=False)
    assert (again.predict_all(task.test) == fits[method].predict_all(task.test)).all()
    other = method(**QUICK[method]).fit(clip, task, seed=1, progress=False)
    assert not (other.predict_all(task.test) == fits[method].predict_all(task.test)).all()


@methods
@pytest.mark.parametrize("at", [1, -1])
def test_a_run_that_breaks_off_ends_bit_identical(clip, task, tmp_path, monkeypatch, fits, method, at):
    import coft.trainer
    states = sum(len(h) for h in fits[method].trace["histories"].values())
    with broken_off(monkeypatch, coft.trainer.PhaseState, at % states):
        method(**QUICK[method]).fit(clip, task, progress=False, folder=tmp_path)
    fitted = method(**QUICK[method]).fit(clip, task, progress=False, folder=tmp_path)
    assert (fitted.predict_all(task.test) == fits[method].predict_all(task.test)).all()
    losses = [[[e["loss"] for e in h] for h in f.trace["histories"].values()] for f in (fitted, fits[method])]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method, name, value", [(FixMatch, "threshold", 0.7), (FixMatch, "mean_over", "accepted"), (FixMatchDA, "prior", (1, 2, 1, 1)), (FixMatchDA, "momentum", 0.5), (LaFTer, "smoothing", 0.3), (LaFTer, "noise", 0.2)], ids=str)
def test_a_state_of_another_setting_is_refused(clip, task, tmp_path, method, name, value):
    quick = QUICK[method] | dict(epochs=1)
    method(**quick).fit(clip, task, progress=False, folder=tmp_path)
    with pytest.raises(ValueError, match=rf"belongs to another run: {name} was .* and is"):
        method(**quick | {name: value}).fit(clip, task, progress=False, folder=tmp_path)


@methods
def test_probabilities_are_probabilities(task, fits, method):
    P = fits[method].predict_proba(task.test)
    assert P.shape == (40, 4) and np.isfinite(P).all() and np.allclose(P.sum(1), 1, atol=1e-5)
    assert not method.supervised and not method.transductive


def test_lafter_learns(clip, task):
    fitted = LaFTer(preset="paper", text_epochs=60, text_lr=0.01, n_visual=4, epochs=4, lr=2e-3, views="task", batch_size=24).fit(clip, task, progress=False)
    for history in fitted.trace["histories"].values():
        assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert (fitted.trace["selected_labels"] == task.audit.train).mean() > 0.6, "a classifier of sentences knows images; a guess has 0.25"
    assert (fitted.predict(task.test) == task.audit.test).mean() > 0.5


def test_fixmatch_grows_sure_without_losing_its_labels(clip, task):
    fitted = FixMatch(preset="paper", epochs=6, batch_size=24, lr=2e-4, threshold=0.7, strong_views="task").fit(clip, task, progress=False)
    assert len(fitted.trace["final_selected_index"]) > len(fitted.trace["selected_index"])
    zero_shot = (fitted.trace["zero_shot"].argmax(1) == task.audit.train).mean()
    assert (fitted.predict(task.unlabelled) == task.audit.train).mean() > zero_shot - 0.05


@pytest.mark.parametrize("method, quick", [(FixMatch, {}), (LaFTer, dict(text_epochs=2))], ids=lambda v: getattr(v, "name", ""))
def test_any_clip(vit, photos, method, quick):
    fitted = method(epochs=1, **quick).fit(vit, photos, progress=False)
    assert np.isfinite(fitted.predict_proba(photos.test)).all() and weights_digest(vit.model) == vit.weights_sha256


@pytest.mark.parametrize("kind, bad", [(FixMatchSettings, dict(threshold=1.5)), (FixMatchSettings, dict(strong_views="weak")), (FixMatchSettings, dict(operations=-1)), (FixMatchSettings, dict(cutout=2)),
                                       (FixMatchSettings, dict(mean_over="all")), (FixMatchSettings, dict(labeller="average")), (FixMatchSettings, dict(average=1.1)), (FixMatchSettings, dict(train_head=1)),
                                       (FixMatchSettings, dict(lr=0)), (FixMatchDASettings, dict(prior="even")), (FixMatchDASettings, dict(prior=(0, 0))), (FixMatchDASettings, dict(prior=(1, -1))), (FixMatchDASettings, dict(momentum=2)),
                                       (LaFTerSettings, dict(texts="all")), (LaFTerSettings, dict(noise=-1)), (LaFTerSettings, dict(smoothing=2)), (LaFTerSettings, dict(text_epochs=-1)), (LaFTerSettings, dict(text_lr=0)),
                                       (LaFTerSettings, dict(n_visual=1.5)), (LaFTerSettings, dict(views="moco")), (LaFTerSettings, dict(crop_area=0)), (LaFTerSettings, dict(unit_features="no")), (LaFTerSettings, dict(decay="step"))], ids=str)
def test_a_bad_setting_is_named(kind, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        kind(**bad)
