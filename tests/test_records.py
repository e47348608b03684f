"What a record is named after, and what it says where labels are missing."
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
from coft.data import Audit
from coft.experiment import find_or_run
from coft.results import Records
from helpers import QUICK


def test_a_task_without_training_labels_is_recorded_without_their_report(clip, task, tmp_path):
    (stage, record), _ = find_or_run("coft", QUICK, clip, replace(task, _labels=Audit(None, task.audit.test)), 0, Records(tmp_path), progress=False)
    assert record["pseudo_labels"] == stage["pseudo_labels"] == {} and record["accuracy"] > 0


def test_a_task_without_test_labels_is_refused_before_any_training(clip, task, tmp_path, monkeypatch):
    import coft.collaborate
    monkeypatch.setattr(coft.collaborate, "train", lambda *args, **kwargs: pytest.fail("a phase was trained"))
    with pytest.raises(ValueError, match=r"task 'toy': nobody has labelled its test images.*Call fit and predict"):
        find_or_run("coft", QUICK, clip, replace(task, _labels=Audit(task.audit.train, None)), 0, Records(tmp_path), progress=False)


def test_other_weights_of_the_labelling_model_are_another_run(clip, task, tmp_path, monkeypatch):
    "A checkpoint keeps its path when it is replaced."
    import coft.experiment
    asked = QUICK | dict(label_model="embedded")
    first, found = find_or_run("coft", asked, clip, task, 0, Records(tmp_path), progress=False)
    assert not found and find_or_run("coft", asked, clip, task, 0, Records(tmp_path), progress=False)[1]
    monkeypatch.setattr(coft.experiment, "load_clip", lambda *args: SimpleNamespace(model_sha256="other weights"))
    second, found = find_or_run("coft", asked, clip, task, 0, Records(tmp_path), progress=False)
    assert not found and second[-1]["key"] != first[-1]["key"] and second[-1]["settings"] == first[-1]["settings"]


def write_some(folder, writer, others):
    "Twenty records, begun when all writers are there."
    records = Records(folder)
    others.wait()
    for i in range(20):
        records.add(dict(schema=1, key=f"{writer}-{i}", text="x" * 5000), {"test_right": np.array([[True]])})


def test_two_processes_that_write_at_once_lose_no_line(tmp_path):
    context = get_context("fork")
    together = context.Barrier(2)
    writers = [context.Process(target=write_some, args=(tmp_path, w, together)) for w in "ab"]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    found = [r["key"] for r in Records(tmp_path).load()]
    assert sorted(found) == sorted(f"{w}-{i}" for w in "ab" for i in range(20))
    assert not (tmp_path / "records.cut.jsonl").exists()
