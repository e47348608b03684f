"Sweeps: jobs on this machine with a page that computes nothing, and what is handed to Slurm."
import json
import os

import nbformat
import pytest
from coft.cli import app
from coft.sweeps import sweep, sweep_executor, sweep_jobs
from helpers import ROOT, message_of
from typer.testing import CliRunner

PAGE = '''
import json, os
from pathlib import Path
runs = Path(out_dir, "runs")
for task in tasks:
    for seed in seeds:
        if task == "digits" and Path("broken").exists(): raise ValueError("digits: cannot be read today")
        run = runs / f"{task}-{seed}"
        if not run.exists(): run.write_text(json.dumps(dict(threads=os.environ["OMP_NUM_THREADS"], process=os.getppid())))
sorted(p.name for p in runs.iterdir())
'''


def runs_in(folder):
    "What each run noted, by task and seed"
    return {p.name: json.loads(p.read_text()) for p in (folder / "results/runs").iterdir()}


@pytest.fixture
def page(tmp_path, monkeypatch):
    "A checkout with one page that notes what it was asked for."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "settings.ini").write_text("lib_name = coft\n")
    (tmp_path / "nbs/tables").mkdir(parents=True)
    (tmp_path / "results/runs").mkdir(parents=True)
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    notebook.cells = [nbformat.v4.new_code_cell('tasks = None\nseeds = [0]\nout_dir = "results"\nmethods = None', metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(PAGE)]
    nbformat.write(notebook, tmp_path / "nbs/tables/coft-1.ipynb")
    return tmp_path


def test_jobs_run_side_by_side_a_failed_one_is_named_and_made_the_next_time(page):
    jobs, lines = sweep_jobs("coft-1", ["glyphs-toy", "digits"], 1), []
    say = lambda line, **_: lines.append(line)
    (page / "broken").touch()
    message = message_of(sweep, jobs, at_once=2, threads=3, say=say, kind=RuntimeError)
    assert "1 of 2 jobs failed" in message and "coft-1, digits, seed 1: ValueError: digits: cannot be read today" in message
    log, = (page / "results/sweeps/coft-1/logs").glob(message.rsplit("/", 1)[1].removesuffix(")"))
    assert "cannot be read today" in log.read_text()
    assert [j.finished for j in jobs] == [True, False] and len(lines) == 2 and sum("failed" in line for line in lines) == 1
    run = runs_in(page)
    assert run.keys() == {"glyphs-toy-1"} and run["glyphs-toy-1"]["threads"] == "3" and run["glyphs-toy-1"]["process"] != os.getpid()

    (page / "broken").unlink()
    lines.clear()
    whole = sweep(jobs, say=say)
    assert lines[0] == "1 of 2 jobs were finished before." and len(lines) == 2 and all(j.finished for j in jobs)
    shown = nbformat.read(whole, 4).cells[-1].outputs[0]["data"]["text/plain"]
    assert whole == page / "results/pages/coft-1.ipynb" and shown == "['digits-1', 'glyphs-toy-1']"


def test_what_stops_a_sweep_stops_its_jobs_and_loses_no_run(page, monkeypatch):
    def interrupted(line, **_):
        raise KeyboardInterrupt

    jobs = sweep_jobs("coft-1", "glyphs-toy", [0, 1])
    with pytest.raises(KeyboardInterrupt):
        sweep(jobs, at_once=1, say=interrupted)
    assert runs_in(page).keys() == {"glyphs-toy-0"} and [j.finished for j in jobs] == [True, False]
    monkeypatch.setattr("coft.experiment.run_page", lambda *args: args)
    table, given, out_dir = sweep(jobs, "debug", say=lambda line, **_: None)
    assert given["tasks"] == ["glyphs-toy"] and given["seeds"] == [0, 1] and len(runs_in(page)) == 2


def test_another_page_or_another_parameter_is_another_job(page):
    first, = sweep_jobs("coft-1", "glyphs-toy")
    assert sweep_jobs("coft-1", "glyphs-toy") == [first]
    assert sweep_jobs("coft-1", "glyphs-toy", given={"methods": ["coft"]})[0].page != first.page
    path = page / "nbs/tables/coft-1.ipynb"
    path.write_text(path.read_text().replace("sorted(", "list("))
    assert sweep_jobs("coft-1", "glyphs-toy")[0].page != first.page


def test_slurm_gets_what_was_asked_for(tmp_path, monkeypatch):
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    made = sweep_executor("slurm", tmp_path / "logs", jobs=4, threads=8, gpus=1, hours=1.5, options=dict(partition="gpu", account="vision"))
    text = made._executor._make_submission_file_text("python run.py", "0")
    assert {"#SBATCH --cpus-per-task=8", "#SBATCH --gpus-per-node=1", "#SBATCH --time=90", "#SBATCH --partition=gpu", "#SBATCH --account=vision", "#SBATCH --job-name=coft"} <= set(text.splitlines())
    assert made._executor.parameters["array_parallelism"] == 4
    assert "partitoin" in message_of(sweep_executor, "slurm", tmp_path / "logs", 1, options=dict(partitoin="gpu"))


@pytest.mark.parametrize("arguments, parts", [
    (["coft-9", "--tasks", "digits"], ["table: 'coft-9'"]),
    (["coft-1", "--tasks", "digit"], ["tasks: 'digit'", "digits"]),
    (["coft-1", "--tasks", "digits", "--seeds", "0,x"], ["seeds: 'x'"]),
    (["coft-1", "--tasks", "digits", "--set", "metods=coft"], ["'metods'", "methods"]),
    (["coft-1", "--tasks", "digits", "--set", "seeds=[1]"], ["seeds:", "the sweep itself"]),
    (["coft-1", "--tasks", "digits", "--executor", "pbs"], ["executor: 'pbs'", "slurm"]),
    (["coft-1", "--tasks", "digits", "--executor", "slurm"], ["executor: 'slurm'", "sbatch"]),
    (["coft-1", "--tasks", "digits", "--option", "partition=gpu"], ["option: partition", "only Slurm"]),
    (["coft-1", "--tasks", "digits", "--gpus", "99"], ["gpus: 99"]),
], ids=str)
def test_what_no_sweep_can_do_is_said(tmp_path, monkeypatch, arguments, parts):
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = CliRunner().invoke(app, ["sweep", *arguments, "--out-dir", str(tmp_path / "out")])
    assert answer.exit_code == 2 and all(p in answer.stderr for p in parts), answer.stderr


def test_a_dry_run_lists_the_jobs(tmp_path):
    answer = CliRunner().invoke(app, ["sweep", "coft-1", "--tasks", "digits,glyphs", "--seeds", "0,1", "--dry-run", "--out-dir", str(tmp_path)])
    assert answer.exit_code == 0 and answer.stdout.splitlines() == [f"to make   coft-1, {t}, seed {s}" for t in ("digits", "glyphs") for s in (0, 1)]
