"The loop and the head that every method shares, and where training curves go."
from dataclasses import replace

import numpy as np
import pytest
import torch
from coft.clip import Compute, FrozenCLIP, load_clip
from coft.collaborate import CoFT
from coft.data import TASKS, ArrayImages, batches
from coft.experiment import Parameters, run_variant
from coft.protocol import get_method
from coft.trainer import EncoderWithHead, PhaseState, Schedule, tracking, train
from helpers import message_of


def test_a_random_head_is_that_of_torchs_linear_layer(clip):
    "Section 2.7: weights and bias uniform within 1 / sqrt(d)."
    head = EncoderWithHead(clip, 500, seed=0).head
    bound = clip.embed_dim ** -0.5
    for numbers in (head.weight.detach(), head.bias.detach()):
        assert numbers.abs().max() <= bound and numbers.abs().max() > 0.97 * bound and abs(numbers.mean().item()) < 0.1 * bound
    assert not EncoderWithHead(clip, 4, torch.eye(4, clip.embed_dim)).head.bias.any()


def test_a_phase_runs_after_accelerate_was_used_otherwise(clip, task):
    "accelerate keeps one state per process; a notebook may have used another precision or device before."
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    module = EncoderWithHead(clip, 4, seed=0)
    history = train(module, task.unlabelled, range(8), {"label": task.audit.train[:8]}, Schedule(epochs=1), 24, task.augmentation, 0, "phase", progress=False)
    assert np.isfinite(history[0]["loss"]) and AcceleratorState().mixed_precision == "no"


def test_training_views_show_the_whole_image():
    "Section 2.5: resize to a square, then crop; the test view cuts the middle."
    wide = np.zeros((1, 24, 48, 3), np.uint8)
    wide[:, :, :6] = 255
    seen = []
    view = lambda pixels, u, size: seen.append(pixels) or pixels
    view.n_numbers, view.stored_size = 1, lambda size: size
    list(batches(ArrayImages(wide), [0], 1, 24, (0, "phase", 0), view))
    assert seen[0][..., 0].float().mean() > 200, "the left margin is in the training view"
    assert not ArrayImages(wide).batch([0], 24)[..., 0].any(), "and not in the test view"


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_a_head_that_cannot_be_is_refused_before_any_training(clip, task, monkeypatch, tower):
    import coft.collaborate
    monkeypatch.setattr(coft.collaborate, "train", lambda *args, **kwargs: pytest.fail("a phase was trained"))
    if tower == "vit":
        method, model, message = CoFT(head_input="pre_proj"), clip, "a text head lives in the projected space"
    else:
        method, model, message = CoFT(preset="paper", head_input="pre_proj"), load_clip("RN50-quickgelu", "random"), "projects inside its attention pooling"
    with pytest.raises(ValueError, match=message):
        method.fit(model, task, progress=False)


def test_models_of_one_weights_file_differ_by_architecture_and_pixels(clip):
    "RN50 and RN50-quickgelu have the same tensors and other features."
    other = lambda **change: FrozenCLIP(clip.model, clip.tokenizer, **dict(name=clip.name, pretrained=clip.pretrained, weights_sha256=clip.weights_sha256, mean=clip.mean.flatten().tolist(), std=clip.std.flatten().tolist()) | change)
    assert other().model_sha256 == clip.model_sha256
    assert len({clip.model_sha256, other(name="embedded-quickgelu").model_sha256, other(mean=(0.4, 0.5, 0.6)).model_sha256, other(std=(0.3, 0.3, 0.3)).model_sha256}) == 4


# Training curves

def scalars_in(folder):
    "Tag -> [(step, value)] of a run of TensorBoard"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_reach_tensorboard_and_change_nothing(clip, task, quick, quick_run, tmp_path):
    with tracking("tensorboard", tmp_path):
        fitted = CoFT(**quick).fit(clip, task, seed=0, progress=False)
    assert np.array_equal(fitted.predict_proba(task.test), quick_run.fitted.predict_proba(task.test))
    run, = tmp_path.iterdir()
    assert run.name.startswith("toy-coft-seed0-")
    found, histories = scalars_in(run), fitted.trace["histories"]
    assert {tag.rpartition("/")[0] for tag in found} == set(histories) == {f"Phase {p}, model {g}" for p in ("I", "II") for g in (1, 2)}
    for title, history in histories.items():
        assert found[f"{title}/loss"] == [(i, pytest.approx(h["loss"], rel=1e-6)) for i, h in enumerate(history, 1)]
    assert "Phase I, model 1/L2" in found


def test_every_tracker_gets_a_run_for_each_fit(clip, task, monkeypatch, tmp_path):
    from accelerate import tracking as theirs
    told = []

    class Pretended:
        def __init__(self, **place): told.append(place)
        def start(self): told.append("start")
        def log(self, values, step=None): told.append((step, *(k for k in values if not k.endswith("images_per_second"))))
        def finish(self): told.append("finish")

    monkeypatch.setattr("coft.trainer.find_spec", lambda name: name)
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(theirs.LOGGER_TYPE_TO_CLASS, name, Pretended)
        with tracking(name, tmp_path / name):
            get_method("top-k", preset="paper", top_k=4, epochs=2).fit(clip, task, progress=False)
            get_method("zero-shot").fit(clip, task, progress=False)
    (project, start, first, second, finish), (experiment, *rest) = told[:5], told[5:]
    assert project["run_name"] == experiment["experiment_name"] == "coft" and project["name"] == experiment["run_name"] and project["name"].startswith("toy-top-k-seed0-")
    assert first == second == (None, "top-K self-training/loss", "top-K self-training/epoch") and (start, finish) == ("start", "finish")
    assert rest == ["start", (1, "top-K self-training/loss"), (2, "top-K self-training/loss"), "finish"]


def test_a_job_says_where_its_curves_go(task, monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "toy", lambda: task)
    p = Parameters(tasks="toy", methods="top-k", out_dir=str(tmp_path), device="cpu", trackers="tensorboard")
    settings = dict(preset="paper", top_k=4, epochs=1)
    record, = run_variant("top-k", settings, p, "toy", 0)
    run, = (tmp_path / "curves").iterdir()
    assert list(scalars_in(run)) and "trackers" not in str(record)
    again, = run_variant("top-k", settings, replace(p, trackers=None), "toy", 0)
    assert again == record, "curves are no part of what a run is"


@pytest.mark.filterwarnings("ignore:precision")
def test_a_job_says_how_its_model_is_computed(task, monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "toy", lambda: task)
    p = Parameters(tasks="toy", methods="top-k", out_dir=str(tmp_path), device="cpu", compute=dict(text_memory=0.5))
    assert p.load_model().compute == Compute(text_memory=0.5) and replace(p, compute={}).load_model().compute == Compute()
    settings = dict(preset="paper", top_k=4, epochs=1)
    first, = run_variant("top-k", settings, p, "toy", 0)
    again, = run_variant("top-k", settings, replace(p, compute={}), "toy", 0)
    other, = run_variant("top-k", settings, replace(p, compute=dict(precision="bf16")), "toy", 0)
    assert again == first and other["key"] != first["key"] and other["settings"] == first["settings"] and other["weights_sha256"] == first["weights_sha256"]


def test_a_state_of_another_precision_is_refused(tmp_path):
    layer = torch.nn.Linear(2, 2)
    parts = layer, *Schedule().build(list(layer.parameters()), 3)
    PhaseState(tmp_path, "phase", dict(seed=0, precision="bf16")).write(*parts, [])
    assert "precision was 'bf16' and is None" in message_of(PhaseState(tmp_path, "phase", dict(seed=0)).restore, *parts)


def test_a_tracker_that_cannot_be_is_refused(monkeypatch, tmp_path):
    assert "Did you mean 'tensorboard'" in message_of(Parameters, trackers="tensorbord")
    monkeypatch.setattr("coft.trainer.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=f"trackers: '{name}' was given, but its package is not installed. pip install {name}"), tracking(name, tmp_path):
            pass
