"Warning signs that need no label: counted one image at a time, told in sentences, kept in records."
import re

import numpy as np
import pytest
from coft.collaborate import CoFT, CoFTPlus, CoFTSemi, cross_validate
from coft.experiment import find_or_run
from coft.filtering import SIGNS, Similarities, believed_labels, filled_labels, filling_sentences, select_topk, warning_signs
from coft.ours import CoFTX
from coft.results import Records
from coft.rivals import TopK
from helpers import QUICK, QUICK_PLUS


@pytest.fixture(scope="module")
def example():
    "30 images of 3 classes, of which the third is hardly ever predicted, and two models that disagree."
    rng = np.random.default_rng(0)
    P = rng.dirichlet([3, 3, 0.3], 30)
    views = [Similarities(rng.normal(size=(30, 3)), rng.normal(size=(30, 3)) + 0.8, tau=0.01) for _ in range(2)]
    return P, *select_topk(P, 6), views


def percent(hits):
    hits = list(hits)
    return round(100 * sum(hits) / len(hits), 2) if hits else None


def test_signs_are_counted_image_by_image(example):
    P, index, labels, views = example
    signs = warning_signs(P, index, labels, views, cross_validate(views))
    clean = lambda q, i, k: views[q].positive[i, k] > views[q].negative[i, k]
    pairs = list(zip(index, labels))
    filled = [(i, k) for i, k in pairs if max(range(3), key=lambda j: P[i, j]) != k]
    own = [[max(range(3), key=lambda j: v.positive[i, j]) for i in range(30)] for v in views]
    passes = [[clean(1 - g, i, own[g][i]) for i in range(30)] for g in (0, 1)]
    sizes = [sum(own[g][i] == k and passes[g][i] for g in (0, 1) for i in range(30)) for k in range(3)]
    expected = dict(filled=percent(p in filled for p in pairs), filled_believed=percent(clean(0, i, k) and clean(1, i, k) for i, k in filled),
                    selected_believed=percent(clean(0, i, k) and clean(1, i, k) for i, k in pairs), changed=percent(own[g][i] != P[i].argmax() for g in (0, 1) for i in range(30)),
                    agreement=percent(own[0][i] == own[1][i] for i in range(30)), rejected=percent(not p for g in (0, 1) for p in passes[g]),
                    rejected_twice=percent(not passes[0][i] and not passes[1][i] for i in range(30)), fits_none=percent(not any(clean(q, i, k) for q in (0, 1) for k in range(3)) for i in range(30)),
                    smallest_class=round(300 * min(sizes) / sum(sizes), 2), largest_class=round(300 * max(sizes) / sum(sizes), 2))
    assert signs == expected and set(signs) == set(SIGNS) and len(filled) > 2 and 0 < expected["fits_none"] < 50


def test_signs_of_nothing_are_none(example):
    P, _, _, views = example
    never = [Similarities(v.positive, v.positive, v.tau) for v in views]
    signs = warning_signs(P, np.zeros(0, int), np.zeros(0, int), never, cross_validate(never))
    assert signs["filled"] is None and signs["filled_believed"] is None and signs["smallest_class"] is None and signs["fits_none"] == 100


def test_images_with_a_given_label_are_not_counted(example):
    P, index, labels, views = example
    given = np.arange(0, 30, 2)
    others = np.setdiff1d(np.arange(30), given)
    rest = [Similarities(v.positive[others], v.negative[others], v.tau) for v in views]
    none = np.zeros(0, int)
    found = warning_signs(P, none, none, views, cross_validate(views), given)
    assert found == warning_signs(P[others], none, none, rest, cross_validate(rest)) != warning_signs(P, none, none, views, cross_validate(views))


def by_the_verdicts(trace, among):
    "The signs of the verdict, from the labels and verdicts in the trace of a run."
    labels, accepted = ([trace[f"{k}_{g}"][among] for g in (1, 2)] for k in ("labels", "accepted"))
    sizes = np.bincount(np.concatenate([y[a] for y, a in zip(labels, accepted)]), minlength=4)
    percent = {"rejected": 100 - 50 * (accepted[0].mean() + accepted[1].mean()), "rejected_twice": 100 * (~accepted[0] & ~accepted[1]).mean(),
               "smallest_class": 400 * sizes.min() / sizes.sum(), "largest_class": 400 * sizes.max() / sizes.sum()}
    return {k: pytest.approx(v, abs=0.01) for k, v in percent.items()}


@pytest.mark.parametrize("method, settings", [(CoFT, dict(strict_filter=True)), (CoFT, dict(judge="nobody")), (CoFT, dict(judge="confidence")), (CoFTX, {}), (CoFTSemi, dict(shots=3))], ids=["strict", "nobody", "confidence", "coft-x", "semi"])
def test_the_signs_are_of_the_verdicts_that_the_run_used(clip, task, quick_run, method, settings):
    trace = method(**QUICK, **settings).fit(clip, task, progress=False).trace
    given = task.labelled(3, seed=0)[0] if method is CoFTSemi else []
    signs = {k: trace["signs"][k] for k in ("rejected", "rejected_twice", "smallest_class", "largest_class")}
    assert signs == by_the_verdicts(trace, np.setdiff1d(np.arange(72), given))
    assert trace["signs"] != quick_run.fitted.trace["signs"]
    if settings.get("judge") == "nobody":
        assert signs["rejected"] == signs["rejected_twice"] == 0
    if method is CoFTSemi:
        assert signs != by_the_verdicts(trace, np.arange(72)), "the given labels are all accepted"


def test_filling_is_told_with_what_looks_right(example):
    P, index, labels, views = example
    filled, believed = filled_labels(P, index, labels), believed_labels(views, index, labels)
    told = filling_sentences(P, index, labels, believed, 6, ["cat", "dog", "cow"])
    found, n = int((P.argmax(1) == 2).sum()), int((filled & (labels == 2)).sum())
    assert told == [f"Class 'cow' was found in only {found} images; its 6 starting labels were completed with the nearest others; {int((filled & believed & (labels == 2)).sum())} of these {n} look right to both models."]
    own = select_topk(P, 6, fill_short=False)
    assert filling_sentences(P, *own, believed_labels(views, *own), 6, ["cat", "dog", "cow"]) == [f"Class 'cow' was found in only {found} images; its 6 starting labels were left incomplete."]


def test_the_filling_of_the_last_round_is_told_for_each_model(clip, task):
    "With 18 images of each of four classes all 72 are taken, and every class that is found less often is completed."
    fitted = CoFTPlus(**QUICK_PLUS | dict(top_k=18, phase1_epochs=1)).fit(clip, task, progress=False)
    expected = []
    for g in (1, 2):
        found = np.bincount(fitted.trace[f"round1_labels_{g}"], minlength=4)
        expected += [f"Class {name!r} was found in only {n} images by model {g} in round 2; its 18 starting labels were completed with the nearest others; # of these {18 - n} look right to both models." for name, n in zip(task.class_names, found) if n < 18]
    told = [re.sub(r"\d+ of these", "# of these", m) for m in fitted.messages if "in round 2;" in m]
    assert told == expected and len(expected) > 1
    assert not any("in round" in m for m in CoFTPlus(**QUICK_PLUS | dict(top_k=18, rounds=1, contrastive=False)).fit(clip, task, progress=False).messages)


@pytest.mark.parametrize("fill_short, end", [(True, "were completed with the nearest others."), (False, "were left incomplete.")])
def test_top_k_tells_its_filling_without_a_word_about_beliefs(clip, task, monkeypatch, fill_short, end):
    P = np.tile(np.array([0.1, 0.2, 0.3, 0.4], np.float32), (72, 1))
    monkeypatch.setattr("coft.collaborate.softmax_probabilities", lambda *args: P)
    told = TopK(preset="paper", top_k=4, epochs=1, fill_short=fill_short).fit(clip, task, progress=False).messages
    assert told == [f"Class {name!r} was found in only 0 images; its 4 starting labels {end}" for name in task.class_names[:3]]


def test_a_run_and_its_record_carry_the_signs(clip, task, quick_run, tmp_path):
    fitted = quick_run.fitted
    signs = fitted.trace["signs"]
    assert signs["agreement"] == pytest.approx(100 * (fitted.trace["labels_1"] == fitted.trace["labels_2"]).mean(), abs=0.01)
    assert signs["rejected"] == pytest.approx(100 * (1 - np.mean([fitted.trace["accepted_1"], fitted.trace["accepted_2"]])), abs=0.01)
    assert signs["filled"] == pytest.approx(100 * (fitted.trace["zero_shot"][fitted.trace["selected_index"]].argmax(1) != fitted.trace["selected_labels"]).mean(), abs=0.01)
    stage, whole = find_or_run("coft", QUICK, clip, task, 0, Records(tmp_path), progress=False)[0]
    assert whole["signs"] == stage["signs"] == signs
    assert find_or_run("zero-shot", {}, clip, task, 0, Records(tmp_path), progress=False)[0][0]["signs"] == {}
