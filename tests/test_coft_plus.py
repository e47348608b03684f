"CoFT+ and what else CoFT can be told: checks 8 to 11 of the specification, every switch, a few labels, another labeller."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coft.clip import load_clip
from coft.collaborate import (PEER_SEED, ROUND_SEED, CoFT, CoFTPlus, CoFTPlusSemi, CoFTPlusSettings, CoFTSemi, cross_validate,
                              PromptedModel, contrast_views, first_labels, phase2, templates_of)
from coft.contrast import ContrastView, MomentumContrast, Views, follow, info_nce, queue_length
from coft.core import uniforms
from coft.data import Augmentation
from coft.filtering import select_topk, selection_report
from coft.pages import label_rounds
from coft.protocol import Run, get_method
from coft.trainer import EncoderWithHead
from helpers import QUICK, QUICK_PLUS, remember_models, same_tensors

OFF = dict(rounds=1, contrastive=False, template_set="coop")


@pytest.fixture(scope="module")
def plus_run(clip, task):
    "A quick run of CoFT+, its models, what each phase started from, and what it was trained on."
    import coft.collaborate
    starts, shown = {}, {}

    def watch(module, images, index, columns, *args, **kwargs):
        title = args[6]
        starts[title] = {k: v.clone() for k, v in module.state_dict().items()}
        shown[title] = (np.asarray(index), {k: np.asarray(v) for k, v in columns.items()})
        return train(module, images, index, columns, *args, **kwargs)

    train = coft.collaborate.train
    with pytest.MonkeyPatch.context() as monkeypatch:
        models = remember_models(monkeypatch)
        monkeypatch.setattr(coft.collaborate, "train", watch)
        fitted = CoFTPlus(**QUICK_PLUS).fit(clip, task, seed=0, progress=False)
    return fitted, models, starts, shown


@pytest.fixture
def contrast(clip):
    "Momentum contrast around a fresh encoder with a head of 4 classes, and a queue of 6."
    return MomentumContrast(EncoderWithHead(clip, 4, seed=0), length=6, gamma=0.5, momentum=0.9, seed=0)


def two_views(task, index, seed=0):
    views = Views((task.augmentation, task.augmentation))
    return views(task.unlabelled.batch(index, views.stored_size(24)), uniforms(seed, "views", index=index, size=views.n_numbers), 24)


# Check 8

def test_check_08_all_switches_off_is_coft(clip, task, quick_run, trained):
    fitted = CoFTPlus(**QUICK | OFF).fit(clip, task, seed=0, progress=False)
    assert (fitted.predict_all(task.test) == quick_run.fitted.predict_all(task.test)).all()
    assert trained.keys() == quick_run.models.keys()
    assert all(same_tensors(model, quick_run.models[name]) for name, model in trained.items())
    assert fitted.messages == quick_run.fitted.messages


@pytest.mark.parametrize("on", [dict(rounds=2), dict(contrastive=True, contrast_views="task"), dict(template_set="llm")], ids=["rounds", "contrastive", "templates"])
def test_check_08_each_switch_changes_the_run(clip, task, quick_run, on):
    fitted = CoFTPlus(**QUICK | OFF | on).fit(clip, task, seed=0, progress=False)
    assert (fitted.predict_all(task.test) != quick_run.fitted.predict_all(task.test)).any()


# Check 9

def test_check_09_every_round_starts_from_fresh_prompts(clip, task, plus_run):
    fitted, _, starts, _ = plus_run
    settings = CoFTPlus(**QUICK_PLUS).settings_for("paper")
    for g in (0, 1):
        for r, title in ((1, f"Phase I, model {g + 1}"), (2, f"Phase I, model {g + 1}, round 2")):
            fresh = PromptedModel(clip, task.class_names, settings, g * PEER_SEED + (r - 1) * ROUND_SEED).state_dict()
            assert all(torch.equal(starts[title][k], v) for k, v in fresh.items())
    first = [starts[f"Phase I, model 1{r}"] for r in ("", ", round 2")]
    assert not any(torch.equal(first[0][k], first[1][k]) for k in first[0])


def test_check_09_the_first_round_is_shared_and_the_next_is_each_models_own(task, plus_run):
    fitted, _, _, shown = plus_run
    first, second = (shown[f"Phase I, model {g}"] for g in (1, 2))
    assert (first[0] == second[0]).all() and (first[1]["label"] == second[1]["label"]).all()
    own = [shown[f"Phase I, model {g}, round 2"] for g in (1, 2)]
    assert sorted(own[0][0]) != sorted(own[1][0])
    for g in (1, 2):
        assert (own[g - 1][0] == fitted.trace[f"round2_selected_index_{g}"]).all()
        assert np.bincount(own[g - 1][1]["label"]).tolist() == [4] * 4


def test_check_09_a_round_takes_its_own_models_most_confident(clip, task, plus_run):
    _, models, _, shown = plus_run
    for g in (1, 2):
        view = models[f"Phase I, model {g}"].similarities(task.unlabelled)
        index, labels = select_topk(view.probabilities, 4)
        assert (shown[f"Phase I, model {g}, round 2"][0] == index).all()
        assert (shown[f"Phase I, model {g}, round 2"][1]["label"] == labels).all()


def test_what_the_models_make_of_each_others_labels_is_kept_for_every_round(task, plus_run):
    fitted, models, _, _ = plus_run
    views = [models[f"Phase I, model {g}"].similarities(task.unlabelled) for g in (1, 2)]
    report = selection_report(fitted.trace, task.audit.train)
    for g, (labels, accepted, _) in enumerate(cross_validate(views), 1):
        assert (fitted.trace[f"round1_labels_{g}"] == labels).all() and (fitted.trace[f"round1_accepted_{g}"] == accepted).all()
        right = labels == task.audit.train
        assert report[f"round1_accepted_precision_{g}"] == round(100 * right[accepted].mean(), 2) and report[f"round1_accepted_recall_{g}"] == round(100 * accepted[right].mean(), 2)
    assert report["round1_agreement"] == round(100 * (views[0].labels == views[1].labels).mean(), 2) and "round2_agreement" not in report
    rounds = label_rounds([dict(task="digits", method="coft+", seed=0, n_train=len(task.unlabelled), pseudo_labels=report)])
    assert rounds.agreement.tolist() == [report["round1_agreement"], report["agreement"]]


def test_check_09_ranking_by_p_clean_is_another_ranking(clip, task, plus_run):
    view = plus_run[1]["Phase I, model 1"].similarities(task.unlabelled)
    ranking = view.ranking("p_clean")
    assert (ranking.argmax(1) == view.labels).all()
    assert np.allclose(ranking.max(1) - 1, view.p_clean(view.labels))
    settings = QUICK_PLUS | dict(contrastive=False)
    a, b = (CoFTPlus(**settings, rank_by=by).fit(clip, task, progress=False).trace["round2_selected_index_1"] for by in ("confidence", "p_clean"))
    assert sorted(a) != sorted(b)


# Check 10

def test_check_10_momentum_0_copies_and_1_keeps():
    slow, fast = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        fast.weight.fill_(2.0), fast.running_mean.fill_(5.0)
    follow(slow, fast, 1.0)
    assert slow.weight.tolist() == [1, 1, 1] and slow.running_mean.tolist() == [5, 5, 5]
    follow(slow, fast, 0.0)
    assert slow.weight.tolist() == [2, 2, 2]


def test_check_10_queue_is_first_in_first_out(contrast):
    keys = F.normalize(torch.randn(8, contrast.queue.shape[1], generator=torch.Generator().manual_seed(0)), dim=-1)
    start = contrast.queue.clone()
    for pair in keys.split(2):
        contrast.push(pair)
    assert torch.equal(contrast.queue, torch.cat([keys[6:8], keys[2:6]]))
    assert int(contrast.oldest) == 2 and not torch.equal(start, contrast.queue)


def test_check_10_the_queue_never_holds_the_keys_of_its_own_batch(contrast, task, monkeypatch):
    held = []
    monkeypatch.setattr("coft.contrast.info_nce", lambda q, k, queue, tau: held.append((k, queue)) or info_nce(q, k, queue, tau))
    for step in range(4):
        contrast(two_views(task, [3 * step, 3 * step + 1]), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool))
    for k, queue in held:
        assert (k @ queue.T).max() < 1 - 1e-6
    assert ((held[0][0] @ held[1][1].T).max(1).values > 1 - 1e-6).all(), "the keys of a step must be there at the next"


def test_check_10_gamma_0_is_no_contrast(clip, task):
    pixels, label, accepted = two_views(task, range(6)), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    contrast = MomentumContrast(EncoderWithHead(clip, 4, seed=0), length=6, gamma=0.0, seed=0)
    contrast(pixels, label, accepted)["loss"].backward()
    plain = EncoderWithHead(clip, 4, seed=0)
    F.cross_entropy(plain.logits(pixels[accepted, 0]), label[accepted]).backward()
    for a, b in zip(contrast.model.parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_check_10_rejected_images_teach_through_the_contrast_alone(contrast, task):
    losses = contrast(two_views(task, range(6)), torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.bool))
    losses["loss"].backward()
    assert losses["L_FFT"] == 0 and losses["loss"] == 0.5 * losses["L_cont"]
    assert contrast.model.visual.conv1.weight.grad.abs().max() > 0
    assert contrast.model.head.weight.grad is None
    assert not any(p.requires_grad for p in contrast.slow.parameters())


def test_check_10_info_nce_and_follow_against_numpy(contrast):
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    q, k, queue = unit(rng.normal(size=(5, 8))), unit(rng.normal(size=(5, 8))), unit(rng.normal(size=(7, 8)))
    loss = 0.0
    for i in range(5):
        right = np.exp(q[i] @ k[i] / 0.07)
        loss -= np.log(right / (right + sum(np.exp(q[i] @ other / 0.07) for other in queue))) / 5
    assert float(info_nce(*(torch.from_numpy(x) for x in (q, k, queue)), 0.07)) == pytest.approx(loss, abs=1e-6)
    before = {n: p.clone().double().numpy() for n, p in contrast.slow.named_parameters()}
    with torch.no_grad():
        for p in contrast.model.visual.parameters():
            p.add_(1.0)
    contrast.after_step()
    fast = dict(contrast.model.visual.named_parameters())
    for n, p in contrast.slow.named_parameters():
        assert np.allclose(p.numpy(), 0.9 * before[n] + 0.1 * fast[n].detach().numpy(), atol=1e-6)


def test_check_10_the_slow_copy_follows_in_training(plus_run, clip, task, monkeypatch):
    steps = []
    after = MomentumContrast.after_step
    monkeypatch.setattr(MomentumContrast, "after_step", lambda self: steps.append(1) or after(self))
    CoFTPlus(**QUICK_PLUS | dict(rounds=1)).fit(clip, task, progress=False)
    assert len(steps) == 2 * 3, "two directions, 72 images in batches of 24"


@pytest.mark.parametrize("n, batch, asked, expected", [(10_000, 64, 0, 4096), (1257, 64, 0, 576), (72, 24, 0, 24), (72, 64, 0, 64), (72, 64, 300, 256)])
def test_check_10_length_of_the_queue(n, batch, asked, expected):
    assert queue_length(n, batch, asked) == expected


# Check 11

def test_check_11_hidden_labels_change_nothing_in_coft_plus(plus_run, clip, task, relabelled, trained):
    fitted, models, _, _ = plus_run
    permuted = CoFTPlus(**QUICK_PLUS).fit(clip, relabelled, seed=0, progress=False)
    assert trained.keys() == models.keys() and len(models) == 6
    assert all(same_tensors(model, models[name]) for name, model in trained.items())
    assert (permuted.predict_all(task.test) == fitted.predict_all(task.test)).all()


# Views

def test_views_are_functions_of_their_numbers_and_differ():
    pixels = torch.randint(256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = ContrastView()
    u = uniforms(0, "views", index=range(4), size=view.n_numbers)
    a, b = view(pixels, u, 32), view(pixels, u, 32)
    assert torch.equal(a, b) and torch.allclose(view(pixels[2:], u[2:], 32), a[2:], atol=1e-6)
    assert (view(pixels, uniforms(1, "views", index=range(4), size=view.n_numbers), 32) - a).abs().max() > 0.1


def test_views_keep_to_what_the_task_allows(task):
    assert contrast_views(task, CoFTPlusSettings()).parts[0].flip is False
    assert len(contrast_views(task, CoFTPlusSettings(label_view="weak")).parts) == 3
    assert contrast_views(task, CoFTPlusSettings(contrast_views="task")).parts == (task.augmentation,) * 2


def test_grey_views_have_no_colour_and_mirrored_ones_are_mirrored():
    pixels = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    u = uniforms(0, "grey", index=range(6), size=11)
    grey = ContrastView(p_grey=1.0)(pixels, u, 32)
    assert (grey.amax(1) - grey.amin(1)).max() < 1e-6
    still = dict(area=1, aspect=1, p_jitter=0, p_grey=0)
    plain, mirrored = (ContrastView(flip=flip, **still)(pixels, u, 32) for flip in (False, True))
    for i in range(6):
        assert torch.allclose(mirrored[i], plain[i].flip(-1) if u[i, 4] < 0.5 else plain[i], atol=1e-5)


def test_views_of_several_kinds_lie_side_by_side(task):
    views = Views((ContrastView(), Augmentation()))
    assert views.n_numbers == ContrastView.n_numbers + Augmentation().n_numbers
    assert two_views(task, range(3)).shape == (3, 2, 3, 24, 24)


# Templates

def test_template_sets(task):
    assert templates_of(task, "single") == "a photo of a {}." and templates_of(task, "coop") == task.template
    assert len(templates_of(task, "llm")) == 8 and all(t.count("{}") == 1 for t in templates_of(task, "llm"))


def test_a_task_without_llm_templates_says_what_to_do(vit, photos):
    with pytest.raises(ValueError, match=r"'llm' was given, but the task 'photos' has no templates.*llm_templates"):
        CoFTPlus().fit(vit, photos, progress=False)


def test_phase_2_does_not_see_the_templates(clip, task, quick_run):
    labels, accepted = (quick_run.fitted.trace[k] for k in ("labels_1", "accepted_1"))
    head = torch.eye(4, clip.embed_dim)
    one, two = (phase2(Run(clip, task, 0, CoFTPlusSettings(**{k: v for k, v in QUICK_PLUS.items() if k != "preset"} | dict(template_set=t)), progress=False), labels, accepted, head, 0, "Phase II")[0] for t in ("coop", "llm"))
    assert same_tensors(one, two)


# A few labels, another labeller

@pytest.mark.parametrize("semi, whole, more", [(CoFTSemi, CoFT, {}), (CoFTPlusSemi, CoFTPlus, dict(rounds=2, contrast_views="task"))], ids=["coft", "coft+"])
def test_no_labelled_image_is_the_label_free_method(clip, task, semi, whole, more):
    a, b = (method(**QUICK | more, **extra).fit(clip, task, progress=False).predict_all(task.test) for method, extra in ((semi, dict(shots=0)), (whole, {})))
    assert (a == b).all()


def test_given_labels_join_the_selection_and_are_accepted(clip, task):
    fitted = CoFTSemi(**QUICK, shots=3).fit(clip, task, seed=5, progress=False)
    index, labels = task.labelled(3, seed=5)
    trace = fitted.trace
    assert len(trace["selected_index"]) == 16 + 12 == len(set(trace["selected_index"].tolist()))
    assert dict(zip(trace["selected_index"], trace["selected_labels"])).items() >= dict(zip(index, labels)).items()
    for g in (1, 2):
        assert trace[f"accepted_{g}"][index].all() and (trace[f"labels_{g}"][index] == labels).all()


def test_given_labels_are_never_counted_as_pseudo_labels(clip, task):
    fitted = CoFTSemi(**QUICK, shots=3).fit(clip, task, seed=5, progress=False)
    index, _ = task.labelled(3, seed=5)
    assert fitted.facts["images in S*"] == 16 and fitted.facts["images with a given label"] == 12
    assert fitted.facts["labels of model 1 that its peer accepted"].endswith("of 60")
    report = selection_report(fitted.trace, task.audit.train)
    rest = np.setdiff1d(np.arange(72), index)
    assert report["selected_size"] == 16
    assert report["accepted_share_1"] == round(100 * fitted.trace["accepted_1"][rest].mean(), 2)
    assert report["label_precision_2"] == round(100 * (fitted.trace["labels_2"] == task.audit.train)[rest].mean(), 2)
    assert list(fitted.stages) == ["coft-semi-phase1"]


def test_given_labels_join_every_round(clip, task):
    fitted = CoFTPlusSemi(**QUICK_PLUS, shots=3).fit(clip, task, seed=5, progress=False)
    index, labels = task.labelled(3, seed=5)
    for g in (1, 2):
        chosen = dict(zip(fitted.trace[f"round2_selected_index_{g}"], fitted.trace[f"round2_selected_labels_{g}"]))
        assert len(chosen) == 16 + 12 and chosen.items() >= dict(zip(index, labels)).items()


def test_phase_1_alone_of_the_semi_supervised_method_sees_the_labels(clip, task):
    whole = CoFTSemi(**QUICK, shots=3).fit(clip, task, progress=False)
    stage = get_method("coft-semi-phase1", **QUICK, shots=3).fit(clip, task, progress=False)
    assert (stage.predict_all(task.test) == whole.stages["coft-semi-phase1"].predict_all(task.test)).all()


def test_label_free_methods_never_reach_the_labels(clip, task):
    with pytest.raises(PermissionError):
        CoFTSemi(**QUICK, shots=3).fit(clip, task.blind(), progress=False)
    CoFTPlus(**QUICK_PLUS | OFF).fit(clip, task.blind(), progress=False)


def test_teacher_equal_to_student_is_coft(clip, task, quick_run):
    fitted = CoFT(**QUICK, label_model="embedded").fit(clip, task, progress=False)
    assert (fitted.predict_all(task.test) == quick_run.fitted.predict_all(task.test)).all()


def test_another_model_labels_and_the_own_one_learns(clip, task, trained):
    fitted = CoFT(**QUICK | dict(head_init="text"), label_model="embedded-l").fit(clip, task, progress=False)
    teacher = load_clip("embedded-l")
    assert np.allclose(fitted.trace["zero_shot"], first_labels(teacher, task)[0])
    assert trained["Phase I, model 1"].clip.weights_sha256 == teacher.weights_sha256
    students = [m for name, m in trained.items() if name.startswith("Phase II")]
    assert students and all(m.clip is clip for m in students)


@pytest.mark.parametrize("settings, message", [
    (dict(rounds=0), "rounds: 0"), (dict(gamma=-1), "gamma: -1"), (dict(momentum=1.5), "momentum: 1.5"), (dict(contrast_tau=0), "contrast_tau: 0"),
    (dict(contrastive="yes"), "contrastive: 'yes'"), (dict(rank_by="loss"), "rank_by: 'loss'"), (dict(contrast_views="simclr"), "contrast_views"),
    (dict(label_view="strong"), "label_view"), (dict(queue=-1), "queue: -1"), (dict(label_pretrained="openai"), "label_pretrained: 'openai'.*without label_model"),
    (dict(template_set="cupl"), "template_set: 'cupl'")])
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CoFTPlus(**settings)
