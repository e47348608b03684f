"""The checks of the method's specification that concern CoFT, by their numbers there.

Check 8 to 10 and 12 to 13 belong to methods that are not CoFT.
"""
import numpy as np
import pytest
import torch
from coft.clip import load_clip, weights_digest
from coft.collaborate import PEER_SEED, CoFT, CoFTSettings, PromptedModel, cross_validate
from coft.filtering import Similarities, select_topk
from coft.prompts import L2_GRAD, clean_loss, p_clean, random_complement
from helpers import QUICK, remember_models, same_tensors

TAUS = (0.01, 0.07, 1.0)
SEEDS = range(5)


def random_similarities(seed, tau, n=50, n_classes=4):
    "What a model might say, with a tie in every fifth image"
    rng = np.random.default_rng(seed)
    positive, negative = rng.uniform(-1, 1, (2, n, n_classes)).astype(np.float32)
    negative[::5] = positive[::5]
    return Similarities(positive, negative, tau)


def random_probabilities(seed, n=60, n_classes=5):
    return np.random.default_rng(seed).dirichlet(np.full(n_classes, 0.5), n)


# Check 1

@pytest.mark.parametrize("tau", TAUS)
def test_check_01_p_clean_is_the_two_way_softmax(tau):
    s_pos, s_neg = np.random.default_rng(0).uniform(-1, 1, (2, 200))
    expected = 1 / (1 + np.exp(-(s_pos - s_neg) / tau))
    found = p_clean(torch.tensor(s_pos, dtype=torch.float32), torch.tensor(s_neg, dtype=torch.float32), tau)
    assert np.allclose(found, expected, atol=1e-5 if tau < 0.05 else 1e-6)
    assert np.allclose(p_clean(torch.tensor(s_pos), torch.tensor(s_neg), tau), expected, atol=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_check_01_filter_is_p_clean_above_one_half(tau):
    for seed in SEEDS:
        judge, labels = random_similarities(seed, tau), np.random.default_rng(seed).integers(4, size=50)
        accepted = judge.accepts(labels)
        assert (accepted == (judge.p_clean(labels) > 0.5)).all()
        assert 0 < accepted.sum() < 50


@pytest.mark.parametrize("tau", TAUS)
def test_check_01_filter_does_not_depend_on_tau(tau):
    labels = np.random.default_rng(0).integers(4, size=50)
    assert (random_similarities(0, tau).accepts(labels) == random_similarities(0, 0.01).accepts(labels)).all()


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("strict", [False, True])
def test_check_01_a_tie_is_rejected(tau, strict):
    judge, labels = random_similarities(0, tau), np.random.default_rng(1).integers(4, size=50)
    assert not judge.accepts(labels, strict)[::5].any()
    assert (judge.p_clean(labels)[::5] == 0.5).all()


@pytest.mark.parametrize("tau", TAUS)
def test_check_01_the_smallest_step_from_a_tie_decides(tau):
    half = np.full((2, 2), 0.25, np.float32)
    above, below = half.copy(), half.copy()
    above[0, 0], below[1, 1] = np.nextafter(np.float32(0.25), [1, 0], dtype=np.float32)
    for positive, labels, accepted in ((above, [0, 0], [True, False]), (below, [0, 1], [False, False])):
        judge = Similarities(positive, half, tau)
        assert judge.accepts(np.array(labels)).tolist() == accepted
        assert (judge.p_clean(np.array(labels)) > 0.5).tolist() == accepted


def test_check_01_strict_filter_accepts_no_more():
    for seed in SEEDS:
        judge, labels = random_similarities(seed, 0.01), np.random.default_rng(seed).integers(4, size=50)
        plain, strict = judge.accepts(labels), judge.accepts(labels, strict=True)
        assert (plain | ~strict).all() and strict.sum() < plain.sum()


def test_check_01_tau_of_the_model_is_that_of_its_similarities(clip, task):
    model = PromptedModel(clip, task.class_names, CoFTSettings(n_context=2, n_visual=2), seed=0)
    view = model.similarities(task.test)
    assert view.tau == clip.tau == pytest.approx(1 / clip.model.logit_scale.exp().item())
    probabilities = model.logits(task.test.batch(range(40), clip.image_size)).softmax(-1)
    assert np.allclose(view.probabilities, probabilities, atol=1e-4)


# Check 2

@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("seed", SEEDS)
def test_check_02_signs_of_the_gradient(seed, tau):
    rng = torch.Generator().manual_seed(seed)
    s_pos, s_neg = (torch.rand(6, 4, generator=rng, dtype=torch.float64).mul(0.1).requires_grad_() for _ in range(2))
    y = torch.randint(4, (6,), generator=rng)
    complement = random_complement(y, 4, torch.rand(6, generator=rng))
    clean_loss(s_pos, s_neg, y, complement, tau).backward()
    rows = torch.arange(6)
    assert (s_pos.grad[rows, y] < 0).all() and (s_neg.grad[rows, y] > 0).all()
    assert (s_pos.grad[rows, complement] > 0).all() and (s_neg.grad[rows, complement] < 0).all()
    untouched = torch.ones(6, 4, dtype=torch.bool)
    untouched[rows, y] = untouched[rows, complement] = False
    assert (s_pos.grad[untouched] == 0).all() and (s_neg.grad[untouched] == 0).all()


@pytest.mark.parametrize("l2_grad", L2_GRAD)
def test_check_02_a_small_step_lowers_l2(clip, task, l2_grad):
    model = PromptedModel(clip, task.class_names, CoFTSettings(l2_grad=l2_grad, n_context=4, n_visual=4), seed=0)
    batch = dict(pixels=task.unlabelled.batch(range(8), clip.image_size), label=torch.arange(8) % 4, u=torch.linspace(0, 0.9, 8))
    before = model(**batch)["L2"]
    before.backward()
    size = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad / size
    assert model(**batch)["L2"] < before


# Check 3

@pytest.mark.parametrize("l2_grad, learns", [("full", (True, True, True)), ("neg_visual", (False, True, True)), ("neg_only", (False, True, False))])
def test_check_03_who_learns_from_l2(clip, task, l2_grad, learns):
    model = PromptedModel(clip, task.class_names, CoFTSettings(l2_grad=l2_grad, n_context=4, n_visual=4), seed=0)
    scalars = model(pixels=task.unlabelled.batch(range(4), clip.image_size), label=torch.arange(4), u=torch.rand(4, generator=torch.Generator().manual_seed(0)))
    context, tokens = torch.autograd.grad(scalars["L2"], [model.prompt.context, model.visual.tokens], allow_unused=True, materialize_grads=True)
    assert (context[0].any().item(), context[1].any().item(), tokens.any().item()) == learns


@pytest.mark.parametrize("l2_grad", L2_GRAD)
def test_check_03_l1_teaches_positive_prompt_and_image_in_every_mode(clip, task, l2_grad):
    model = PromptedModel(clip, task.class_names, CoFTSettings(l2_grad=l2_grad, n_context=4, n_visual=4), seed=0)
    scalars = model(pixels=task.unlabelled.batch(range(4), clip.image_size), label=torch.arange(4), u=torch.zeros(4))
    context, tokens = torch.autograd.grad(scalars["L1"], [model.prompt.context, model.visual.tokens])
    assert context[0].any() and tokens.any() and not context[1].any()


# Check 4

def test_check_04_frozen_weights_are_bit_identical(clip, quick_run):
    assert quick_run.digest_before == quick_run.digest_after == weights_digest(load_clip("embedded").model)
    assert not any(p.requires_grad or p.grad is not None for p in clip.model.parameters())


def test_check_04_phase_1_trains_two_prompts_and_tokens_only(clip, quick_run):
    sizes = {k: tuple(p.shape) for k, p in quick_run.models["Phase I, model 1"].named_parameters()}
    width, layers = clip.model.transformer.width, len(clip.model.visual.transformer.resblocks)
    assert sizes == {"prompt.context": (2, 4, width), "visual.tokens": (layers, 4, clip.model.visual.class_embedding.shape[0])}


@pytest.mark.parametrize("g", [1, 2])
def test_check_04_phase_2_changes_all_visual_weights_and_holds_no_text(clip, quick_run, g):
    tuned, pretrained = quick_run.models[f"Phase II, model {g}"], clip.model.visual.state_dict()
    assert tuned.visual.state_dict().keys() == pretrained.keys()
    unchanged = [k for k, v in tuned.visual.state_dict().items() if torch.equal(v, pretrained[k])]
    assert not unchanged, f"Phase II left {unchanged} as they were"
    others = [k for k in tuned.state_dict() if not k.startswith(("visual.", "head."))]
    assert not others, f"Phase II also holds {others}"


# Check 5

@pytest.mark.parametrize("n_classes", [2, 3, 10, 101])
def test_check_05_complement_never_the_label(n_classes):
    u = torch.cat([torch.rand(200 * n_classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([0.0, 1 - 2**-53])])
    for label in {0, 1, n_classes - 1}:
        drawn = random_complement(torch.full((len(u),), label), n_classes, u)
        assert set(drawn.tolist()) == set(range(n_classes)) - {label}


def test_check_05_complement_is_uniform():
    u = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    share = random_complement(torch.full((30_000,), 2), 4, u).bincount(minlength=4) / 30_000
    assert torch.allclose(share, torch.tensor([1, 1, 0, 1]) / 3, atol=0.015)


def test_check_05_complement_is_drawn_anew_at_each_visit(clip, task, quick, monkeypatch):
    seen = []

    def remember(y, n_classes, u):
        seen.append(u.clone())
        return random_complement(y, n_classes, u)

    monkeypatch.setattr("coft.collaborate.random_complement", remember)
    CoFT(**quick | dict(phase1_batch_size=16)).fit(clip, task, progress=False)
    visits = torch.stack([u.sort().values for u in seen])
    assert visits.shape == (4, 16), "two models, two epochs, one batch of 4 x 4 images"
    assert visits.unique(dim=0).shape == visits.shape, "a visit repeated the draws of another"


# Check 6

@pytest.mark.parametrize("top_k", [1, 4, 12])
@pytest.mark.parametrize("fill_short", [True, False])
def test_check_06_select_topk_over_random_probabilities(top_k, fill_short):
    for seed in range(20):
        P = random_probabilities(seed)
        index, labels = select_topk(P, top_k, fill_short)
        sizes = np.bincount(labels, minlength=5)
        assert len(set(index.tolist())) == len(index) == len(labels)
        assert sizes.max() <= top_k
        assert not fill_short or (sizes == top_k).all()
        assert fill_short or (labels == P.argmax(1)[index]).all()


def test_check_06_every_image_is_used_when_they_just_suffice():
    index, labels = select_topk(random_probabilities(0), top_k=12)
    assert sorted(index.tolist()) == list(range(60)) and np.bincount(labels).tolist() == [12] * 5


def test_check_06_selection_keeps_the_most_confident():
    for seed in range(20):
        P = random_probabilities(seed)
        index, labels = select_topk(P, 3, fill_short=False)
        for k in range(5):
            kept, own = P[index[labels == k], k], P[P.argmax(1) == k, k]
            assert sorted(kept) == sorted(own)[-3:]


@pytest.mark.parametrize("fill_short, size", [(True, 15), (False, 3)])
def test_check_06_all_images_of_one_class_terminate(fill_short, size):
    P = np.tile([0.1, 0.6, 0.1, 0.1, 0.1], (60, 1))
    index, labels = select_topk(P, 3, fill_short)
    assert len(set(index.tolist())) == len(index) == size
    assert (labels == 1).sum() == 3


def test_check_06_ties_are_broken_by_position():
    index, _ = select_topk(np.full((6, 2), 0.5), 2)
    assert index.tolist() == [0, 1, 2, 3]


def test_check_06_too_large_k_says_what_is_possible():
    with pytest.raises(ValueError, match=r"top_k: 13 .* 5 classes are 65.* only 60 .* at most 12"):
        select_topk(random_probabilities(0), 13)
    index, _ = select_topk(random_probabilities(0), 13, fill_short=False)
    assert len(index) <= 60


def test_check_06_selected_set_of_a_run_has_c_times_k_images(quick_run):
    trace = quick_run.fitted.trace
    assert np.bincount(trace["selected_labels"], minlength=4).tolist() == [4] * 4
    assert len(set(trace["selected_index"].tolist())) == 16


# Check 7

def test_check_07_different_seeds_give_different_models(quick_run):
    first, second = (quick_run.models[f"Phase I, model {g}"] for g in (1, 2))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_check_07_equal_seeds_give_equal_models(clip, task, quick, trained, monkeypatch):
    monkeypatch.setattr("coft.collaborate.PEER_SEED", 0)
    CoFT(**quick).fit(clip, task, progress=False)
    assert same_tensors(trained["Phase I, model 1"], trained["Phase I, model 2"])


def test_check_07_swapping_the_seeds_of_a_run_swaps_its_accepted_sets(clip, task, quick, quick_run, monkeypatch):
    monkeypatch.setattr("coft.collaborate.PEER_SEED", -PEER_SEED)
    swapped, straight = CoFT(**quick).fit(clip, task, seed=PEER_SEED, progress=False).trace, quick_run.fitted.trace
    for name in ("labels", "accepted", "p_clean"):
        assert (straight[f"{name}_1"] == swapped[f"{name}_2"]).all() and (straight[f"{name}_2"] == swapped[f"{name}_1"]).all()


def test_check_07_swapping_the_views_swaps_the_accepted_sets():
    for seed in SEEDS:
        one, two = random_similarities(seed, 0.01), random_similarities(seed + 100, 0.01)
        straight, swapped = cross_validate([one, two]), cross_validate([two, one])
        for a, b in zip(straight, swapped[::-1]):
            assert all((x == y).all() for x, y in zip(a, b))
        assert (straight[0][1] != straight[1][1]).any()


def test_check_07_the_peer_judges_and_not_the_model_itself():
    sure = Similarities(np.array([[0.9, 0.1]]), np.array([[0.0, 0.0]]), 0.01)
    doubtful = Similarities(np.array([[0.2, 0.9]]), np.array([[0.5, 0.5]]), 0.01)
    (labels_1, accepted_1, p_1), (labels_2, accepted_2, p_2) = cross_validate([sure, doubtful])
    assert (labels_1.tolist(), accepted_1.tolist()) == ([0], [False]) and p_1[0] < 0.5
    assert (labels_2.tolist(), accepted_2.tolist()) == ([1], [True]) and p_2[0] > 0.5


# Check 11

@pytest.fixture(scope="module")
def permuted_run(clip, relabelled):
    "The quick run on the task with its hidden labels permuted."
    with pytest.MonkeyPatch.context() as monkeypatch:
        models = remember_models(monkeypatch)
        return CoFT(**QUICK).fit(clip, relabelled, seed=0, progress=False), models


def test_check_11_hidden_labels_change_no_trained_tensor(quick_run, permuted_run):
    _, models = permuted_run
    assert sorted(models) == ["Phase I, model 1", "Phase I, model 2", "Phase II, model 1", "Phase II, model 2"]
    assert all(same_tensors(model, quick_run.models[name]) for name, model in models.items())


def test_check_11_hidden_labels_change_no_prediction(task, quick_run, permuted_run):
    permuted, _ = permuted_run
    assert (permuted.predict_all(task.test) == quick_run.fitted.predict_all(task.test)).all()


def test_check_11_hidden_labels_change_no_trace(quick_run, permuted_run):
    plain, (permuted, _) = quick_run.fitted, permuted_run
    arrays = [k for k, v in plain.trace.items() if isinstance(v, np.ndarray)]
    assert {"zero_shot", "selected_index", "labels_1", "accepted_2", "p_clean_1"} <= set(arrays)
    assert all((plain.trace[k] == permuted.trace[k]).all() for k in arrays)
    losses = [[epoch["loss"] for history in fitted.trace["histories"].values() for epoch in history] for fitted in (plain, permuted)]
    assert losses[0] == losses[1] and len(losses[0]) == 2 * 2 + 2 * 1
    assert plain.messages == permuted.messages


def test_check_11_the_permutation_is_one(task, relabelled):
    assert (task.audit.train != relabelled.audit.train).any() and task.data_sha256 != relabelled.data_sha256
