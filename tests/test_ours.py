"coft-x: our additions, each with a switch, and out of the papers' methods."
import numpy as np
import pytest
import torch
from coft.collaborate import CoFT, CoFTPlus, PromptedModel
from coft.ours import CoFTX, balance_accepted, class_quotas, runner_up_complement, select_quotas
from helpers import QUICK, same_tensors

OFF = dict(complement="random", balanced=False)


def test_all_switches_off_is_coft(clip, task, quick_run, trained):
    CoFTX(**QUICK | OFF).fit(clip, task, seed=0, progress=False)
    assert trained.keys() == quick_run.models.keys()
    assert all(same_tensors(model, quick_run.models[name]) for name, model in trained.items())


@pytest.mark.parametrize("on", [dict(complement="runner_up", n_runner_up=1), dict(balanced=True, balance_bound=1.05)], ids=["complement", "balanced"])
def test_each_switch_changes_the_run(clip, task, quick_run, on):
    fitted = CoFTX(**QUICK | OFF | on).fit(clip, task, seed=0, progress=False)
    assert (fitted.predict_all(task.test) != quick_run.fitted.predict_all(task.test)).any()


def test_the_papers_methods_do_not_use_them():
    assert CoFT.Model is CoFTPlus.Model is PromptedModel
    assert not {"complement", "balanced"} & {f for m in (CoFT, CoFTPlus) for f in m.Settings.__dataclass_fields__}


@pytest.mark.parametrize("m", [1, 2, 3, 9])
def test_runners_up_are_the_nearest_other_classes(m):
    generator = torch.Generator().manual_seed(0)
    s, y, u = torch.rand(500, 6, generator=generator), torch.randint(6, (500,), generator=generator), torch.rand(500, generator=generator)
    drawn = runner_up_complement(y, s, m, u)
    assert (drawn != y).all()
    nearer = (s.scatter(1, y[:, None], -1) > s.gather(1, drawn[:, None])).sum(1)
    assert set(nearer.tolist()) == set(range(min(m, 5)))


def test_quotas_stay_within_the_bound_of_equal_parts():
    share = np.array([0.7, 0.2, 0.05, 0.05])
    quotas = class_quotas(share, 80, bound=1.5)
    assert quotas.tolist() == [30, 16, 14, 14]
    P = np.random.default_rng(0).dirichlet(np.ones(4), size=200)
    index, labels = select_quotas(P, quotas)
    assert np.bincount(labels).tolist() == quotas.tolist() and len(set(index.tolist())) == len(index)


def test_a_bound_of_one_takes_equal_parts():
    assert class_quotas(np.array([0.9, 0.1]), 20, bound=1.0).tolist() == [10, 10]


def test_acceptance_stays_within_the_bound_where_labels_allow():
    rng = np.random.default_rng(0)
    labels, accepted, clean, share = rng.integers(3, size=300), rng.random(300) < 0.5, rng.random(300), np.array([0.5, 0.3, 0.2])
    kept, total = balance_accepted(labels, accepted, clean, share, 1.2), accepted.sum()
    for k, part in enumerate(share):
        given, n = (labels == k).sum(), (kept & (labels == k)).sum()
        assert n <= part * total * 1.2 and (n >= min(given, np.floor(part * total / 1.2)))
        for group in (accepted, ~accepted):
            inside = (labels == k) & group
            if (kept & inside).any() and (inside & ~kept).any():
                assert clean[kept & inside].min() >= clean[inside & ~kept].max()


def test_nothing_accepted_stays_nothing():
    nothing = balance_accepted(np.array([0, 1]), np.zeros(2, bool), np.zeros(2), np.array([0.5, 0.5]), 1.5)
    assert not nothing.any()
