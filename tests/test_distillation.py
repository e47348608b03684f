"PromptKD's second stage, restated without the package."
import math

import numpy as np
import pytest
import torch
from coft.clip import load_clip, weights_digest
from coft.collaborate import task_head
from coft.distillation import PromptKD, PromptKDSettings, Student, StudentMember, distillation_loss
from helpers import message_of

QUICK = dict(preset="paper", label_model="embedded-l", epochs=1, optimizer="adamw", batch_size=10, views="task")


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence_slow(student, teacher, temperature):
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    return temperature**2 * sum(a * math.log(a / b) for ps, qs in zip(p, q) for a, b in zip(ps, qs)) / student.size


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_that_of_the_formula(temperature):
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 3)) * 3
    found = distillation_loss(torch.tensor(student), torch.tensor(teacher), temperature).item()
    assert found == pytest.approx(divergence_slow(student, teacher, temperature)) != pytest.approx(divergence_slow(teacher, student, temperature))


def test_a_step_is_that_of_the_formulas(clip, task):
    "Features of the student go through two layers and batch norm into the teacher's space, and meet its text features."
    teacher, settings = load_clip("embedded-l"), PromptKDSettings(hidden=12, n_visual=2)
    head = task_head(teacher, task)
    model = Student(clip, teacher, head, settings, seed=1)
    pixels = task.unlabelled.batch(range(9), clip.image_size).float() / 255
    found = model(pixels)["loss"].item()
    with torch.no_grad():
        v = model.visual(clip.normalize(pixels)).numpy().astype(float)
        taught = teacher.image_features(pixels).numpy().astype(float) @ head.numpy().astype(float).T / teacher.tau
    (w1, b1), (w2, b2) = ([p.detach().numpy().astype(float) for p in (model.projection[i].weight, model.projection[i].bias)] for i in (0, 3))
    h = v @ w1.T + b1
    h = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5), 0) @ w2.T + b2
    scores = h / np.linalg.norm(h, axis=1, keepdims=True) @ head.numpy().T / clip.tau
    assert found == pytest.approx(1000 * divergence_slow(scores, taught, 1.0), rel=1e-3)
    assert model.visual.tokens.shape == (3, 2, 96) and w1.shape == (12, clip.embed_dim) and w2.shape == (teacher.embed_dim, 12)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {"visual.tokens", *(f"projection.{i}.{k}" for i in (0, 1, 3) for k in ("weight", "bias"))}


def test_answers_do_not_depend_on_their_batch_and_one_image_is_enough(clip, task):
    model = Student(clip, clip, task_head(clip, task), PromptKDSettings(n_visual=2))
    pixels = task.unlabelled.batch(range(6), clip.image_size)
    model(pixels)
    assert torch.allclose(model.logits(pixels)[:1], model.logits(pixels[:1]), atol=1e-4)
    assert torch.isfinite(model(pixels[:1])["loss"])


def test_the_teacher_labels_and_stays_and_no_label_is_seen(clip, task, relabelled):
    teacher = load_clip("embedded-l")
    before = weights_digest(teacher.model), weights_digest(clip.model)
    one, two = (PromptKD(**QUICK).fit(clip, t, progress=False) for t in (task, relabelled))
    assert (one.predict_all(task.test) == two.predict_all(task.test)).all() and before == (weights_digest(teacher.model), weights_digest(clip.model))
    v = teacher.image_features(task.unlabelled.batch(range(72), 24))
    labels = (v @ teacher.text_features([task.template.format(n) for n in task.class_names]).T).argmax(1).numpy()
    assert (one.trace["selected_labels"] == labels).all() and "embedded-l" in one.facts["teacher"]
    member, = one.members
    again = StudentMember.restore(clip, task.class_names, {k: v.clone() for k, v in member.tensors().items()}, member.config())
    assert again.module.teacher is None and (again(task.test) == member(task.test)).all(), "a saved student needs no teacher"


@pytest.mark.parametrize("settings, message", [(dict(label_pretrained="openai"), "without label_model"), (dict(temperature=0), "temperature: 0"), (dict(n_visual=0), "n_visual: 0"), (dict(views="moco"), "views: 'moco'")])
def test_bad_settings_are_named(settings, message):
    assert message in message_of(PromptKD, **settings)


def test_a_teacher_of_another_size_is_named(clip, vit, task):
    assert "24 pixels" in message_of(Student, vit, clip, torch.zeros(4, 64), PromptKDSettings())
