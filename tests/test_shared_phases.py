"Runs that differ only in what follows Phase I share it, and nothing else is shared."
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from coft.clip import load_clip
from coft.collaborate import AFTER_PHASE1, CoFT, CoFTPlus, CoFTPlusSemi, phase1, phase1_folder
from coft.experiment import find_or_run
from coft.filtering import select_topk
from coft.ours import CoFTX
from coft.protocol import Run
from coft.results import Records
from helpers import QUICK, QUICK_PLUS

OTHER = dict(template_set="ensemble", top_k=7, fill_short=False, judge="self", strict_filter=True, head_init="text", head_input="pre_proj", label_model="embedded", label_pretrained="fonts",
             phase2_optimizer="adamw", phase2_lr=0.5, phase2_epochs=3, phase2_batch_size=7, phase2_weight_decay=0.3, rounds=5, rank_by="p_clean", contrastive=False, gamma=0.7, momentum=0.5, contrast_tau=0.5,
             queue=64, contrast_views="task", label_view="weak", shots=1, given_labels="phase2", balanced=False, balance_bound=3.0)


@pytest.fixture(scope="module")
def chosen(task):
    "S* of a fixed, made-up labelling."
    P = np.random.default_rng(0).dirichlet(np.ones(len(task.class_names)), len(task.unlabelled))
    return select_topk(P, 2, True)


@pytest.mark.parametrize("kind, name", [(m, f.name) for m in (CoFT, CoFTPlus, CoFTPlusSemi, CoFTX) for f in fields(m.Settings) if f.name in AFTER_PHASE1], ids=lambda v: v if isinstance(v, str) else v.name)
def test_phase1_does_not_read_what_comes_after_it(clip, task, chosen, kind, name):
    quick = dict(n_context=2, n_visual=2, phase1_epochs=1, phase1_batch_size=8, phase1_optimizer="adamw") | ({"label_model": "embedded"} if name == "label_pretrained" else {})
    plain = kind.Settings(**quick)
    changed = replace(plain, **({name: OTHER[name]} | ({"balanced": False} if kind is CoFTX and name == "fill_short" else {})))
    assert getattr(changed, name) != getattr(plain, name)
    one, two = (phase1(Run(clip, task, 0, s, progress=False), *chosen, 0, "Phase I", kind.Model)[0].state_dict() for s in (plain, changed))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("kind", [CoFT, CoFTPlus, CoFTX], ids=lambda k: k.name)
def test_every_other_setting_has_a_folder_of_its_own(clip, task, chosen, tmp_path, kind):
    settings = kind.Settings()
    folder = lambda s, seed=0, labels=chosen[1], clip=clip, task=task: phase1_folder(Run(clip, task, 0, s, phases=tmp_path), chosen[0], labels, seed, kind.Model)
    change = dict(light_module="lora", visual_depth="shallow", l2_grad="neg_only", phase1_optimizer="adamw", complement="random")
    others = [f.name for f in fields(settings) if f.name not in AFTER_PHASE1]
    different = [replace(settings, **{k: change.get(k) or getattr(settings, k) + 1}) for k in others]
    folders = [folder(settings), folder(settings, seed=1), folder(settings, labels=chosen[1][::-1].copy()), *map(folder, different)]
    folders += [folder(settings, clip=load_clip("embedded-l")), folder(settings, task=replace(task, template="a drawing of a {}."))]
    assert len(set(folders)) == len(folders) == len(others) + 5


def test_shared_phases_change_no_number_and_are_found(clip, task, tmp_path):
    alone, together = Records(tmp_path / "alone"), Records(tmp_path / "together")
    runs = [("coft", QUICK), ("coft", QUICK | {"judge": "nobody"}), ("coft+", QUICK_PLUS | {"rounds": 1}), ("coft+", QUICK_PLUS | {"rounds": 2})]
    for i, (name, settings) in enumerate(runs):
        (one,), (two,) = (find_or_run(name, settings, clip, task, 0, r, progress=False, share=s)[0][-1:] for r, s in ((alone, False), (together, True)))
        assert one["key"] == two["key"]
        assert np.array_equal(alone.arrays(one["key"])["test_probabilities"], together.arrays(two["key"])["test_probabilities"])
        assert (one["resumed"], two["resumed"]) == (False, i in (1, 3))
    assert not (tmp_path / "alone/phases").exists() and len(list((tmp_path / "together/phases").rglob("*.pt"))) == 2 + 2 + 2
