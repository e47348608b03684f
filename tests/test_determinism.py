"One seed gives one result: over two runs, over batch sizes, over thread counts, and for the embedded weights."
import json
from contextlib import contextmanager

import numpy as np
import papermill
import pytest
import torch
from coft.clip import load_clip
from coft.collaborate import CoFT, CoFTSettings, PromptedModel
from coft.core import generator, uniforms
from coft.data import batches
from coft.trainer import EncoderWithHead, Schedule, train
from helpers import QUICK, ROOT, same_tensors


@contextmanager
def threads(n):
    "Let torch use n threads inside this block"
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Two runs

def test_two_runs_with_one_seed_agree_bit_for_bit(clip, task, quick_run, trained):
    np.random.seed(7)
    torch.manual_seed(7)
    again = CoFT(**QUICK).fit(clip, task, seed=0, progress=False)
    assert sorted(trained) == sorted(quick_run.models)
    assert all(same_tensors(model, quick_run.models[name]) for name, model in trained.items())
    assert (again.predict_all(task.test) == quick_run.fitted.predict_all(task.test)).all()


def test_another_seed_gives_another_result(clip, task, quick_run):
    other = CoFT(**QUICK).fit(clip, task, seed=1, progress=False)
    assert (other.predict_all(task.test) != quick_run.fitted.predict_all(task.test)).any()


# Batches

def passed(task, batch_size, stream=(0, "phase", 0), index=range(20)):
    "Positions in order of visit, and the view of each"
    places, views = zip(*batches(task.unlabelled, index, batch_size, 24, stream, task.augmentation))
    return np.concatenate(places), torch.cat(views)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_order_and_views_do_not_depend_on_the_batch_size(task, batch_size):
    places, views = passed(task, batch_size)
    expected_places, expected_views = passed(task, 20)
    assert (places == expected_places).all() and sorted(places) == list(range(20))
    assert torch.equal(views, expected_views)


def test_a_view_does_not_depend_on_the_other_images(task):
    places, views = passed(task, 4)
    few_places, few_views = passed(task, 4, index=[11, 3])
    for place, view in zip(few_places, few_views):
        assert torch.equal(view, views[places.tolist().index([11, 3][place])])


@pytest.mark.parametrize("other", [(1, "phase", 0), (0, "other", 0), (0, "phase", 1)], ids=["seed", "phase", "epoch"])
def test_order_and_views_differ_by_seed_phase_and_epoch(task, other):
    (places, views), (other_places, other_views) = passed(task, 20), passed(task, 20, other)
    assert (places != other_places).any()
    assert not torch.equal(views[places.argsort()], other_views[other_places.argsort()])


def test_random_numbers_are_those_of_the_first_release():
    assert generator(0, "phase", 3, index=5).random() == uniforms(0, "phase", 3, index=[5], size=1)[0, 0] == 0.422929893841991


# Threads

def one_step(model, batch):
    "Gradients of all trainable parameters after one forward and backward pass"
    model.zero_grad()
    model(**batch)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("phase", [1, 2])
def test_gradient_of_one_step_agrees_across_thread_counts(clip, task, phase):
    model = PromptedModel(clip, task.class_names, CoFTSettings(), seed=0) if phase == 1 else EncoderWithHead(clip, 4)
    batch = dict(pixels=task.unlabelled.batch(range(16), 24), label=torch.arange(16) % 4, u=torch.linspace(0, 0.9, 16))
    gradients = []
    for n in (1, 2):
        with threads(n):
            gradients.append(one_step(model, batch))
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


class Double(torch.nn.Module):
    "A module of double precision that takes the loop's single precision pixels"
    def __init__(self, inner):
        super().__init__()
        self.inner = inner.double()

    def forward(self, pixels, **columns): return self.inner(pixels.double(), **columns)


def twenty_steps(task, phase, n_threads):
    "The loop's result after 20 steps in double precision, as one vector"
    clip = load_clip("embedded")
    clip.model.double()
    settings = CoFTSettings(n_context=4, n_visual=4)
    model = Double(PromptedModel(clip, task.class_names, settings, seed=0) if phase == 1 else EncoderWithHead(clip, 4))
    with threads(n_threads):
        train(model, task.unlabelled, range(20), {"label": np.arange(20) % 4}, Schedule(lr=0.01, epochs=4, batch_size=4), 24, task.augmentation, 0, "double", progress=False)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("phase", [1, 2])
def test_twenty_steps_in_double_precision_agree_across_thread_counts(task, phase):
    one, two = (twenty_steps(task, phase, n) for n in (1, 2))
    assert one.dtype == torch.float64
    assert (one - two).abs().max() < 1e-8


# The embedded weights

def test_pretraining_repeats_the_first_steps_of_the_card(tmp_path):
    card = json.loads((ROOT / "coft/embedded/coft-embedded.card.json").read_text())
    missing = [k for k in ("first_losses", "versions", "machine", "threads", "seed") if k not in card]
    assert not missing, f"the card of the embedded model lacks {missing}; copy the card that nbs/pretraining.ipynb wrote beside its weights"
    papermill.execute_notebook(ROOT / "nbs/pretraining.ipynb", tmp_path / "pretraining.ipynb", progress_bar=False, kernel_name="python3",
                               parameters=dict(max_steps=21, out_dir=str(tmp_path / "made"), threads=card["threads"], seed=card["seed"]))
    made = json.loads((tmp_path / "made/coft-embedded.card.json").read_text())
    same_place = all(made[k] == card[k] for k in ("versions", "machine", "threads"))
    assert len(card["first_losses"]) == len(made["first_losses"]) == 3
    assert made["first_losses"] == (card["first_losses"] if same_place else pytest.approx(card["first_losses"], rel=0.02))
