"CraFT: checks 12 and 13 of the specification, a restatement in NumPy, every switch, and a run that breaks off."
import numpy as np
import pytest
import torch
from coft.blackbox import BlackBoxVLM, BudgetExhausted, Pictures
from coft.craft import (BBT, CraFT, PromptGenerator, Refiner, craft_settings, fitness, kl, refinement_loss,
                        weight_at)
from coft.data import batches
from helpers import broken_off

TINY = dict(preset="paper", shots=4, budget=120, views="task", intrinsic_dim=32, weight_share=2)


@pytest.fixture
def scores():
    "Scores of 3 candidates for 6 images of 4 classes, and labels."
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(3, 6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.fixture
def box(clip):
    return BlackBoxVLM(clip)


@pytest.fixture(scope="module")
def whole(clip, task):
    "An unbroken run of three generations, and what its box was asked."
    inner = BlackBoxVLM(clip)
    return CraFT(**TINY).fit(inner, task, progress=False), inner


def zeroed(refiner):
    with torch.no_grad():
        for p in refiner.parameters():
            p.zero_()
    return refiner


# Check 12

def test_check_12_a_refiner_of_zeros_changes_nothing(scores):
    Y, y = scores
    refiner = zeroed(Refiner(4))
    assert torch.equal(refiner(Y), Y)
    assert torch.equal(fitness(Y, y, refiner, 5.0), fitness(Y, y, None, 0.0)), "KL is 0"
    assert refinement_loss(Y[0], y, refiner, 5.0) == torch.nn.functional.cross_entropy(Y[0], y)


def test_check_12_without_weight_the_fitness_does_not_see_the_refiner(scores):
    Y, y = scores
    assert torch.equal(fitness(Y, y, Refiner(4, seed=0), 0.0), fitness(Y, y, Refiner(4, seed=1), 0.0))
    assert (fitness(Y, y, Refiner(4, seed=0), 0.1) != fitness(Y, y, Refiner(4, seed=1), 0.1)).all()


def test_check_12_the_gradient_reaches_the_refiner_only(clip, box, task, scores):
    pixels = task.unlabelled.batch(range(6), 24)
    answer = box.logits(box.embed_text("a photo of a"), task.class_names, pixels)
    assert isinstance(answer, np.ndarray), "an array carries no gradient"
    refiner = Refiner(4)
    refinement_loss(torch.from_numpy(answer[0]), scores[1], refiner, 0.1).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in refiner.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in clip.model.parameters())


def test_check_12_eight_thousand_queries_are_two_hundred_generations(clip, task, monkeypatch):
    asked = []

    def answer(self, context, class_names, images, candidates, raw_features):
        asked.append((len(context) * bool(candidates), len(context) * len(images)))
        return np.random.default_rng(len(asked)).standard_normal((len(context), len(images), len(class_names))).astype(np.float32)

    monkeypatch.setattr(BlackBoxVLM, "_answer", answer)
    fitted = CraFT(preset="paper", shots=2, budget=8000, views="task", intrinsic_dim=4, bound=0.0, readout="mean").fit(BlackBoxVLM(clip), task, progress=False)
    assert len(fitted.trace["history"]) == 200 and fitted.facts["prompt queries"] == sum(a for a, _ in asked) == 8000
    assert fitted.facts["image forwards"] == sum(b for _, b in asked) == 200 * (40 + 1) * 8


def test_check_12_the_weight_ends_after_its_share():
    on = [bool(weight_at(40 * g, 0.1, 8000, 4)) for g in range(1, 201)]
    assert on == [True] * 50 + [False] * 150
    assert all(weight_at(40 * g, 0.1, 8000, 1) == 0.1 for g in range(1, 201))


# Check 13

def test_check_13_kl():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.2, 0.2, 0.6]]).log()
    assert kl(p, p) == 0 and kl(p, q) > 0 and abs(kl(p, q) - kl(q, p)) > 0.01
    assert abs(kl(p, q) - (0.7 * np.log(0.7 / 0.2) + 0.1 * np.log(0.1 / 0.6))) < 1e-6


# Restatement

def plain_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def plain_refined(Y, refiner):
    w1, b1, w2, b2 = (p.detach().numpy().astype(np.float64) for p in refiner.parameters())
    return Y + np.maximum(Y @ w1.T + b1, 0) @ w2.T + b2


@pytest.mark.parametrize("direction", ["code", "text"])
def test_fitness_is_that_of_the_formulas(scores, direction):
    Y, y = scores[0].numpy().astype(np.float64), scores[1].numpy()
    refiner = Refiner(4, seed=3)
    expected = []
    for candidate in Y:
        P_I, P_O = plain_softmax(candidate), plain_softmax(plain_refined(candidate, refiner))
        cross_entropy = np.mean([-np.log(P_I[i, y[i]]) for i in range(6)])
        a, b = (P_O, P_I) if direction == "code" else (P_I, P_O)
        expected.append(cross_entropy + 0.3 * np.mean([sum(a[i] * np.log(a[i] / b[i])) for i in range(6)]))
    assert np.allclose(fitness(*scores, refiner, 0.3, direction), expected, atol=1e-5)


def test_refinement_loss_is_that_of_the_formulas(scores):
    Y, y = scores[0][0].numpy().astype(np.float64), scores[1].numpy()
    refiner = Refiner(4, seed=3)
    P_I, P_O = plain_softmax(Y), plain_softmax(plain_refined(Y, refiner))
    expected = np.mean([-np.log(P_O[i, y[i]]) + 0.3 * sum(P_I[i] * np.log(P_I[i] / P_O[i])) for i in range(6)])
    assert abs(refinement_loss(scores[0][0], scores[1], refiner, 0.3).item() - expected) < 1e-5


def test_one_generation_is_that_of_the_formulas(clip, task):
    "Candidates, fitness, read-out and one step of Adam, written out."
    one = TINY | dict(budget=40, refine_batch_size=64, weight_share=1)
    s, box = CraFT(**one).settings_for("paper"), BlackBoxVLM(clip)
    fitted = CraFT(**one).fit(BlackBoxVLM(clip), task, progress=False)
    index, labels = task.labelled(4, 0)
    labels = torch.from_numpy(labels)
    start = box.embed_text("a photo of a")
    search, refiner = PromptGenerator(start, 32, seed=0), Refiner(4, seed=0)
    Z = search.ask()
    (place, fixed), = batches(task.unlabelled, index, 256, 24, (0, "fitness", 0), task.augmentation)
    f = [float(fitness(torch.from_numpy(box.logits(start + (search.A @ z.astype(np.float32)).reshape(start.shape), task.class_names, fixed)), labels[place], refiner, s.weight)[0]) for z in Z]
    assert abs(fitted.trace["history"][0]["best"] - min(f)) < 1e-4
    search.tell(Z, f)
    context = search.readout()
    assert np.allclose(fitted.trace["context"], context, atol=1e-3)
    adam = torch.optim.Adam(refiner.parameters(), lr=1e-3)
    (place, views), = batches(task.unlabelled, index, 64, 24, (0, "refine", 0), task.augmentation)
    Y_I = torch.from_numpy(box.logits(context, task.class_names, views)[0])
    loss = refinement_loss(Y_I, labels[place], refiner, weight_at(40, s.weight, 40, 1))
    assert abs(loss.item() - fitted.trace["history"][0]["loss"]) < 1e-3
    adam.zero_grad(), loss.backward(), adam.step()
    with torch.no_grad():
        Y = torch.from_numpy(box.logits(context, task.class_names, task.test.batch(range(40), 24))[0])
        assert np.allclose(fitted.predict_proba(task.test), refiner(Y).softmax(-1), atol=1e-3)


# The search

@pytest.mark.parametrize("bound", [0.5, 5.0])
def test_candidates_and_readouts_stay_within_the_bound(bound):
    search = PromptGenerator(np.zeros((2, 4)), 16, sigma=1.0, bound=bound, seed=0)
    for _ in range(5):
        Z = search.ask()
        assert abs(Z).max() <= bound
        search.tell(Z, -Z.sum(1))
        for how in ("sample_mean", "xbest", "mean"):
            assert np.isfinite(search.readout(how)).all()
    assert search.A.shape == (8, 16)


@pytest.mark.parametrize("std, expected", [(0.2, 0.2), (1.0, 1.0), (0.0, 1 / np.sqrt(3 * 512))])
def test_the_projection_has_the_spread_that_was_asked_for(std, expected):
    A = PromptGenerator(np.zeros((4, 64)), 512, projection_std=std, seed=0).A
    assert abs(A.std() - expected) < 0.02 * expected and abs(A.mean()) < 0.02 * expected
    assert std or abs(A).max() <= 512 ** -0.5


def test_searches_leave_numpys_own_random_numbers_alone():
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    search = PromptGenerator(np.zeros((2, 4)), 400, seed=0)
    for _ in range(2):
        Z = search.ask()
        search.tell(Z, (Z ** 2).sum(1))
        search.readout()
    assert np.random.rand() == expected


def test_a_seed_repeats_and_another_differs():
    first, again, other = (PromptGenerator(np.zeros((2, 4)), 16, seed=s) for s in (0, 0, 1))
    assert (first.ask() == again.ask()).all() and (first.ask() != other.ask()).all()


# The method

def test_a_run_repeats_and_learns(clip, task, whole):
    again = CraFT(**TINY).fit(clip, task, progress=False)
    assert (again.predict_all(task.test) == whole[0].predict_all(task.test)).all()
    history = again.trace["history"]
    assert history[-1]["loss"] < history[0]["loss"] and [h["prompt_queries"] for h in history] == [40, 80, 120]


@pytest.mark.parametrize("change", [dict(weight=0.0), dict(kl_fitness=False), dict(kl_refine=False), dict(weight_share=1), dict(kl_direction="text"), dict(readout="mean"), dict(readout="xbest"), dict(intrinsic_dim=16), dict(sigma=0.1), dict(bound=0.5),
                                    dict(projection_std=0.5), dict(population=20), dict(hidden=32), dict(refine_lr=1e-2), dict(refine_batch_size=8), dict(prompt_start="a photo of the"), dict(training="sequential"), dict(views="crop"), dict(compat_raw_features=True),
                                    dict(refine=False), dict(generate=False), dict(shots=2)], ids=lambda c: next(iter(c)))
def test_every_setting_changes_the_run(clip, task, whole, change):
    fitted = CraFT(**TINY | change).fit(clip, task, progress=False)
    assert (fitted.predict_all(task.test) != whole[0].predict_all(task.test)).any()


def test_parts_of_the_method(clip, task):
    search, refine = (CraFT(**TINY, **off).fit(clip, task, progress=False) for off in (dict(refine=False), dict(generate=False)))
    assert (BBT(**TINY).fit(clip, task, progress=False).predict_all(task.test) == search.predict_all(task.test)).all()
    assert refine.facts["prompt queries"] == 0 and search.facts["image forwards"] == 120 * 16
    assert np.array_equal(refine.trace["context"], BlackBoxVLM(clip).embed_text("a photo of a"))
    assert search.facts["bytes to deploy"] == 4 * 4 * 96 < refine.facts["bytes to deploy"]


def test_one_after_the_other_searches_first(clip, task):
    history = CraFT(**TINY, training="sequential").fit(clip, task, progress=False).trace["history"]
    assert [("best" in h, "loss" in h) for h in history] == [(True, False)] * 3 + [(False, True)] * 3


def test_snapshots_are_taken_as_asked(clip, task):
    fitted = CraFT(**TINY, log_every=2).fit(clip, task, progress=False)
    snapshot, = fitted.trace["snapshots"]
    assert snapshot["prompt_queries"] == 80 and snapshot["context"].shape == (4, 96) and snapshot["refiner"]


@pytest.mark.parametrize("limit", [dict(max_prompt_queries=119), dict(max_image_forwards=2 * (40 + 1) * 16 + 40 * 16)])
def test_a_run_stops_within_the_boxs_budget_and_keeps_its_last_state(clip, task, limit):
    fitted = CraFT(**TINY).fit(BlackBoxVLM(clip, **limit), task, progress=False)
    assert fitted.facts["prompt queries"] == 80 and "Stopped after 2 of 3 generations" in fitted.messages[0]
    two = CraFT(**TINY | dict(budget=80, weight=0.0)).fit(clip, task, progress=False)
    unweighted = CraFT(**TINY | dict(weight=0.0)).fit(BlackBoxVLM(clip, **limit), task, progress=False)
    assert np.array_equal(unweighted.trace["context"], two.trace["context"]), "the state is that of the second generation"


def test_one_after_the_other_refines_even_where_the_search_ends_early(clip, task):
    fitted = CraFT(**TINY, training="sequential").fit(BlackBoxVLM(clip, max_prompt_queries=80), task, progress=False)
    history = fitted.trace["history"]
    assert [("best" in h, "loss" in h) for h in history] == [(True, False)] * 2 + [(False, False)] + [(False, True)] * 3
    assert history[-1]["loss"] < history[3]["loss"] and len(fitted.messages) == 1


def test_raw_features_are_asked_for_before_anything_is_paid(clip, task):
    box = BlackBoxVLM(clip)
    with pytest.raises(ValueError, match="compat_raw_features: this box"):
        CraFT(**TINY, compat_raw_features=True).fit(box, task, progress=False)
    assert box.n_prompt_queries == 0


def test_a_damaged_state_is_named(clip, task, tmp_path):
    (tmp_path / "craft.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"craft.pt in .* cannot be read.*Delete it"):
        CraFT(**TINY).fit(clip, task, progress=False, folder=tmp_path)


def test_answers_of_a_fitted_method_are_paid_too(clip, task):
    fitted = CraFT(**TINY).fit(BlackBoxVLM(clip, max_image_forwards=3 * 41 * 16 + 39), task, progress=False)
    with pytest.raises(BudgetExhausted, match="1968 of 2007 image forwards were used, and 40 more"):
        fitted.predict_proba(task.test)


@pytest.mark.parametrize("settings, message", [(dict(budget=100), r"budget: 100 .*multiple of the population of 40.*such as 80"), (dict(budget=0), "budget: 0"), (dict(shots=0), "shots: 0"), (dict(readout="best"), "readout: 'best'"), (dict(sigma=0), "sigma: 0"),
                                               (dict(generate=False, refine=False), "both are off"), (dict(kl_direction="both"), "kl_direction"), (dict(views="moco"), "views"), (dict(training="joint"), "training"), (dict(population=2, budget=80), "population: 2")])
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CraFT(**settings)


def test_bbt_has_no_refiner():
    with pytest.raises(ValueError, match="with one it is 'craft'"):
        BBT(refine=True)


def test_the_official_rows():
    assert craft_settings("imagenet", 16) == dict(bound=0.0, projection_std=0.0, weight=0.0, weight_share=1, readout="xbest", hidden=512, budget=4000, shots=16)
    assert craft_settings("imagenet", 1)["budget"] == craft_settings("caltech101", 1)["budget"] == 2000
    assert craft_settings("fgvc_aircraft") == dict(sigma=0.02, bound=0.0, shots=16, budget=8000)
    for name in ("oxford_pets", "dtd", "eurosat", "food101"):
        CraFT(**craft_settings(name, 4))


# A run that breaks off

@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_that_breaks_off_goes_on_to_the_same_numbers(clip, task, tmp_path, monkeypatch, whole, at):
    import coft.craft
    with broken_off(monkeypatch, coft.craft._State, at):
        CraFT(**TINY).fit(clip, task, progress=False, folder=tmp_path)
    fitted = CraFT(**TINY).fit(clip, task, progress=False, folder=tmp_path)
    assert (fitted.predict_all(task.test) == whole[0].predict_all(task.test)).all()
    assert fitted.trace["history"] == whole[0].trace["history"] and fitted.facts == whole[0].facts


def test_a_state_of_other_settings_is_refused(clip, task, tmp_path):
    CraFT(**TINY).fit(clip, task, progress=False, folder=tmp_path)
    for change, message in ((dict(sigma=0.5), r"sigma was 1.0 and is 0.5"), (dict(shots=2), "shots was 4 and is 2")):
        with pytest.raises(ValueError, match=rf"belongs to another run: .*{message}.*Give another folder"):
            CraFT(**TINY | change).fit(clip, task, progress=False, folder=tmp_path)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        CraFT(**TINY).fit(clip, task, seed=1, progress=False, folder=tmp_path)


# The box

def test_the_box_shows_no_part_of_the_model(clip, box, task):
    box.logits(box.embed_text("a photo of a"), task.class_names, Pictures(task.unlabelled.batch(range(5), 24)))
    public = {name: getattr(box, name) for name in dir(box) if not name.startswith("_")}
    assert not [name for name, value in public.items() if isinstance(value, (torch.nn.Module, torch.Tensor, torch.nn.Parameter)) or hasattr(value, "parameters")]
    assert not [k for k, v in (box.info() | vars(box.meter)).items() if not isinstance(v, (str, int, bool, type(None)))]
    assert "convenience" in BlackBoxVLM.__doc__ and "wall" in BlackBoxVLM.__doc__


def test_the_rounding_of_resampled_views_is_no_fault(box, task):
    pixels = np.full((1, 3, 24, 24), 1 + 1e-6, np.float32)
    assert box.logits(box.embed_text("a photo of a"), task.class_names, pixels).shape == (1, 1, 4)


def test_what_is_kept_changes_no_answer(box, task):
    context, pixels = box.embed_text("a photo of a"), task.unlabelled.batch(range(7), 24).numpy()
    kept = Pictures(pixels)
    first, second, plain = (box.logits(context, task.class_names, images) for images in (kept, kept, pixels))
    assert np.array_equal(first, second) and np.allclose(first, plain, atol=1e-5)
    part = box.logits(context, task.class_names, Pictures(None, kept.ids[2:4]))
    assert np.allclose(part, plain[:, 2:4], atol=1e-5)


def test_raw_features_are_longer_and_must_be_allowed(clip, box, task):
    pixels = task.unlabelled.batch(range(7), 24)
    context = box.embed_text("a photo of a")
    raw = BlackBoxVLM(clip, raw_features=True).logits(context, task.class_names, pixels, raw_features=True)
    ratio = raw / box.logits(context, task.class_names, pixels)
    assert np.allclose(ratio, ratio[..., :1], rtol=1e-3) and not np.allclose(ratio, 1, atol=0.05)
    with pytest.raises(ValueError, match="raw_features=True"):
        box.logits(context, task.class_names, pixels, raw_features=True)


@pytest.mark.parametrize("context, images, message", [
    (np.zeros((4, 95)), np.zeros((1, 3, 24, 24), np.uint8), r"context: an array \[prompts, tokens, 96\] is needed, \[1, 4, 95\]"),
    (np.full((4, 96), np.inf), np.zeros((1, 3, 24, 24), np.uint8), "384 of 384 numbers are not finite"),
    (np.zeros((0, 4, 96)), np.zeros((1, 3, 24, 24), np.uint8), "context: an array"),
    (np.zeros((60, 96)), np.zeros((1, 3, 24, 24), np.uint8), "the model has room for 64"),
    (np.zeros((4, 96)), np.zeros((1, 3, 32, 32), np.uint8), r"images: an array \[images, 3, 24, 24\] is needed, \[1, 3, 32, 32\]"),
    (np.zeros((4, 96)), np.full((1, 3, 24, 24), 2.0), "finite floats from 0 to 1"),
    (np.zeros((4, 96)), np.zeros((1, 3, 24, 24), np.int64), "int64 was given")])
def test_bad_questions_are_refused_and_cost_nothing(box, task, context, images, message):
    with pytest.raises(ValueError, match=message):
        box.logits(context, task.class_names, images, candidates=True)
    assert box.n_prompt_queries == box.n_image_forwards == 0
