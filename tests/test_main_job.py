"The main job, as a user runs it: papermill on nbs/experiments.ipynb."
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from coft.experiment import Parameters, project_root, run_experiment
from helpers import ROOT

FIELDS = {"schema", "key", "method", "task", "model", "pretrained", "seed", "accuracy", "n_train", "n_test", "seconds", "peak_memory_mb",
          "preset", "settings", "versions", "git", "weights_sha256", "data_sha256"}
FIGURES = {f"{name}.png" for name in ("overview", "class_quality", "clean_histogram", "selection_by_confidence", "reliability", "confusion", "images")}
TINY = {"coft": {"top_k": 4, "phase1_epochs": 1, "phase2_epochs": 1}}


def run_notebook(folder, **parameters):
    "Run the page as papermill does; what it wrote and what it showed"
    out = folder / "out.ipynb"
    papermill.execute_notebook(ROOT / "nbs/experiments.ipynb", out, progress_bar=False, kernel_name="python3",
                               parameters={"out_dir": str(folder), "device": "cpu", "progress": False} | parameters)
    return results(folder, out)


def results(folder, notebook):
    outputs = [o for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code" for o in cell.outputs]
    shown = "\n".join(str(o.get("text") or o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/plain") or "") for o in outputs)
    lines = (folder / "records.jsonl").read_text().splitlines()
    return SimpleNamespace(folder=folder, records=[json.loads(line) for line in lines], shown=shown, table=pd.read_csv(folder / "table.csv"),
                           markdown=(folder / "table.md").read_text(), figures={p.name for p in (folder / "figures").glob("*.png")})


def runs(result): return sorted((r["method"], r["task"], r["seed"]) for r in result.records)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "zero-shot on glyphs-dev with seed 0"
    return run_notebook(tmp_path_factory.mktemp("first"), methods="zero-shot", tasks="glyphs-dev")


@pytest.fixture(scope="module")
def changed(first):
    "The same folder again, with another task and another seed"
    return run_notebook(first.folder, methods="zero-shot", tasks=["glyphs-dev", "digits"], seeds=[0, 1])


@pytest.fixture(scope="module")
def small_coft(tmp_path_factory):
    "CoFT on digits with settings that make it short, and zero-shot"
    return run_notebook(tmp_path_factory.mktemp("coft"), methods=["zero-shot", "coft"], tasks="digits", settings=TINY)


# What is written

def test_parameters_reach_the_run(first):
    assert runs(first) == [("zero-shot", "glyphs-dev", 0)]


def test_a_record_has_every_field(first, small_coft):
    for record in first.records + small_coft.records:
        assert FIELDS <= record.keys(), f"missing: {FIELDS - record.keys()}"
        assert 0 <= record["accuracy"] <= 100 and record["seconds"] > 0 and record["peak_memory_mb"] > 50
        assert len(record["weights_sha256"]) == len(record["data_sha256"]) == 64
        assert {"python", "coft", "torch", "open_clip_torch"} <= record["versions"].keys()


def test_a_record_says_what_was_run(first, small_coft):
    record, = first.records
    assert (record["schema"], record["model"], record["pretrained"], record["n_train"], record["n_test"]) == (1, "embedded", "fonts", 1200, 2000)
    coft = next(r for r in small_coft.records if r["method"] == "coft")
    assert (coft["n_train"], coft["n_test"], coft["preset"]) == (1257, 540, "embedded")
    assert {k: coft["settings"][k] for k in TINY["coft"]} == TINY["coft"]


def test_table_and_overview_are_written(first):
    assert first.table[["task", "method", "seeds"]].values.tolist() == [["glyphs-dev", "zero-shot", 1]]
    assert first.table.accuracy[0] == pytest.approx(first.records[0]["accuracy"])
    assert f"| glyphs-dev | zero-shot | {first.records[0]['accuracy']:.1f} |" in first.markdown
    assert "overview.png" in first.figures


def test_coft_and_its_first_stage_have_all_accuracies(small_coft):
    assert runs(small_coft) == [("coft", "digits", 0), ("coft-phase1", "digits", 0), ("zero-shot", "digits", 0)]
    for record in small_coft.records:
        if record["method"] != "zero-shot":
            singles = [record["accuracy_1"], record["accuracy_2"]]
            assert record["accuracy"] == pytest.approx(np.mean(singles)) and 0 <= record["accuracy_ensemble"] <= 100


def test_all_figures_are_written_and_are_pictures(small_coft):
    assert FIGURES <= small_coft.figures
    for name in FIGURES:
        assert (small_coft.folder / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_gain_and_interval_are_in_the_table(small_coft):
    table = small_coft.table.set_index("method")
    for method in ("coft-phase1", "coft"):
        assert table.gain[method] == pytest.approx(table.accuracy[method] - table.accuracy["zero-shot"])
        assert table.low[method] <= table.gain[method] <= table.high[method]
    assert pd.isna(table.gain["zero-shot"])


# Another run

def test_changed_parameters_change_the_run(changed):
    assert runs(changed) == [("zero-shot", t, s) for t in ("digits", "glyphs-dev") for s in (0, 1)]
    assert sorted(changed.table.task) == ["digits", "glyphs-dev"] and set(changed.table.seeds) == {2}
    assert "digits-overview.png" in changed.figures


def test_finished_runs_are_reused_and_the_job_says_so(first, changed):
    assert "1 of 4 runs were finished before and reused." in changed.shown
    assert changed.records[0] == first.records[0], "the finished record was written anew"
    assert "reused" not in first.shown


def test_misspelt_parameter_fails_with_the_message(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError) as error:
        run_notebook(tmp_path, method="zero-shot")
    assert "parameter: 'method' is not known. Did you mean 'methods'" in str(error.value)
    assert not (tmp_path / "records.jsonl").exists()


def test_changed_settings_are_another_run(tmp_path):
    keys = []
    for settings in ({}, {"zero-shot": {}}, {"top-k": {"epochs": 1, "top_k": 2}}, {"top-k": {"epochs": 1, "top_k": 3}}):
        method = next(iter(settings), "zero-shot")
        made = run_experiment(Parameters(methods=method, tasks="glyphs-dev", settings=settings, out_dir=str(tmp_path), progress=False), say=lambda *a, **k: None)
        keys.append(made.runs[0]["key"])
    assert keys[0] == keys[1] and len(set(keys)) == 3


# Where

@pytest.mark.parametrize("inside", [".", "nbs", "coft/embedded"])
def test_a_relative_folder_starts_at_the_projects_root(inside, monkeypatch):
    monkeypatch.chdir(ROOT / inside)
    assert project_root() == ROOT == project_root(ROOT / inside)


def test_outside_a_checkout_it_starts_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("lib_name = another\n")
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path.resolve()


def test_an_absolute_folder_stays_where_it_is(tmp_path):
    assert project_root() / Parameters(out_dir=str(tmp_path)).out_dir == tmp_path


# A killed run

KILLED_JOB = """
import sys
from coft.experiment import Parameters, run_experiment
settings = {"top-k": {"top_k": 2, "epochs": 1}}
run_experiment(Parameters(methods=["zero-shot", "top-k"], tasks="glyphs-dev", seeds=[0, 1, 2], settings=settings, out_dir=sys.argv[1], progress=False))
"""


def kill_after_the_first_record(folder):
    "Start the job in a process of its own and kill it as soon as its first record stands; what it had written"
    path = folder / "records.jsonl"
    job = subprocess.Popen([sys.executable, "-c", KILLED_JOB, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(12_000):
            if (path.exists() and path.read_text().count("\n")) or job.poll() is not None:
                break
            time.sleep(0.01)
    finally:
        if job.poll() is None:
            os.kill(job.pid, signal.SIGKILL)
        _, errors = job.communicate()
    assert job.returncode == -signal.SIGKILL, f"the job ended by itself: {errors.decode()[-2000:]}"
    return path.read_text().splitlines()


def test_a_killed_run_continues(tmp_path):
    before = [line for line in kill_after_the_first_record(tmp_path) if line.endswith("}")]
    assert 1 <= len(before) < 6
    said = []
    made = run_experiment(Parameters(methods=["zero-shot", "top-k"], tasks="glyphs-dev", seeds=[0, 1, 2], settings={"top-k": {"top_k": 2, "epochs": 1}}, out_dir=str(tmp_path), progress=False),
                          say=lambda text, **_: said.append(text))
    after = (tmp_path / "records.jsonl").read_text().splitlines()
    assert after[:len(before)] == before, "a finished record was lost or written anew"
    found = [(r["method"], r["seed"]) for r in map(json.loads, after)]
    assert sorted(found) == sorted((m, s) for m in ("zero-shot", "top-k") for s in range(3)), "each run is there once"
    assert len(made.runs) == 6 and sum("(reused)" in text for text in said) == len(before)
