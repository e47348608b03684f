"The command `coft`, and how fast package and command answer."
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import coft
import coft.cli as module
import nbformat
import pytest
from coft.cli import app
from coft.experiment import TABLES
from coft.results import Records
from papermill import PapermillExecutionError
from typer.testing import CliRunner

COMMAND = Path(sys.executable).parent / "coft"


def best_of_three(*command):
    "Seconds of the fastest of three runs, and the output of the last"
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
    return min(seconds), done.stdout


def test_doctor_finds_everything_in_order():
    done = subprocess.run([COMMAND, "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["ok", what] for what in ("packages", "device", "precision", "weights", "cache", "data", "data", "folder")]


def test_doctor_answers_in_json():
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    assert answer.exit_code == 0
    checks = {c["what"]: c for c in json.loads(answer.stdout)}
    assert all(c["ok"] for c in checks.values())
    assert "torch" in checks["packages"]["found"] and "digits (1257 unlabelled, 540 test)" in checks["data"]["found"]


def test_doctor_says_what_to_do_about_damaged_weights(damaged_weights):
    answer = CliRunner().invoke(app, ["doctor"])
    assert answer.exit_code == 1
    wrong, advice = (line for line in answer.stdout.splitlines() if line.startswith("WRONG") or "->" in line)
    assert "weights" in wrong and "expected sha256" in wrong and "pip install" in advice
    assert sum(line.startswith("ok ") for line in answer.stdout.splitlines()) == 7, "the other checks go on"


def test_doctor_tells_machines_about_damaged_weights(damaged_weights):
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    assert answer.exit_code == 1
    broken, = (c for c in json.loads(answer.stdout) if not c["ok"])
    assert broken["what"] == "weights" and broken["advice"]


def test_doctor_says_where_results_cannot_go(monkeypatch):
    monkeypatch.setattr("coft.cli.os.access", lambda *args: False)
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    broken, = (c for c in json.loads(answer.stdout) if not c["ok"])
    assert answer.exit_code == 1 and broken["what"] == "folder" and "out_dir" in broken["advice"]


def test_unknown_command_is_an_error():
    answer = CliRunner().invoke(app, ["docter"])
    assert answer.exit_code != 0 and "doctor" in answer.output


def test_import_takes_less_than_a_second():
    seconds, loaded = best_of_three(sys.executable, "-c", "import sys, coft; print('torch' in sys.modules, 'open_clip' in sys.modules)")
    assert loaded.split() == ["False", "False"]
    assert seconds < 1


@pytest.mark.parametrize("command", [[], ["adapt"], ["predict"], ["evaluate"], ["report"], ["reproduce"], ["sweep"], ["doctor"], ["serve"]])
def test_help_takes_less_than_half_a_second(command):
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    done = subprocess.run([COMMAND, *command, "--help"], capture_output=True, text=True, check=True)
    assert spent() - before < 0.5, "seconds of the processor"
    assert len(done.stdout) > 150 and ("xit codes" in done.stdout or command == ["serve"])


def test_doctor_looks_for_data_sets(tmp_path):
    (tmp_path / "caltech-101").mkdir()
    for root, ok, found in ((tmp_path, True, "caltech101, caltech101-32 of"), (tmp_path / "caltech-101", False, "none of"), (tmp_path / "gone", False, "is no folder")):
        check = module.check_data_sets(root)
        assert (check.ok, bool(check.advice)) == (ok, True) and found in check.found


def test_doctor_names_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(module, "_driver_sees", lambda: "GPU 0: some card")
    assert not module.check_device().ok and "pytorch.org" in module.check_device().advice


def test_doctor_says_when_the_disk_is_full(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**29))
    assert not module.check_cache().ok and "HF_HOME" in module.check_cache().advice


def test_reproduce_runs_the_page_with_the_parameters_given(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("coft.experiment.run_page", lambda *args: asked.append(args) or tmp_path / "page.ipynb")
    answer = CliRunner().invoke(app, ["reproduce", "overview", "--set", "methods=zero-shot", "--set", "seeds=[0, 1]", "--out-dir", str(tmp_path), "-q"])
    assert answer.exit_code == 0, answer.stderr
    assert asked == [("overview", {"methods": "zero-shot", "seeds": [0, 1], "out_dir": str(tmp_path)}, str(tmp_path), False)]


@pytest.mark.parametrize("given, parts", [(["coft-9"], ["table: 'coft-9'", "coft-1"]), (["overview", "--set", "seed=1"], ["parameter of overview: 'seed'", "seeds"])])
def test_reproduce_names_what_it_does_not_know(given, parts):
    answer = CliRunner().invoke(app, ["reproduce", *given])
    assert answer.exit_code == 2 and all(part in answer.stderr for part in parts)


def test_settings_are_read_as_json_or_as_messages_print_them():
    given = ["a=False", "b=false", "c=None", "d=1e-3", "e=[0, 1]", "f=text", "g=x=y"]
    assert module._settings(given) == dict(a=False, b=False, c=None, d=0.001, e=[0, 1], f="text", g="x=y")


def test_reproduce_makes_a_real_page(tmp_path):
    given = [f"--set={k}={v}" for k, v in dict(methods="zero-shot", tasks="glyphs-toy", seeds="[1]", device="cpu").items()]
    answer = subprocess.run([COMMAND, "reproduce", "coft-1", *given, "--out-dir", tmp_path / "out", "--quiet", "--json"], cwd=tmp_path, capture_output=True, text=True)
    page = tmp_path / "out/pages/coft-1.ipynb"
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == {"page": str(page)}
    cells = [c for c in nbformat.read(page, 4).cells if c.cell_type == "code"]
    assert all(c.execution_count for c in cells) and any("image/png" in o.get("data", {}) for c in cells for o in c.outputs)
    assert [(r["method"], r["task"], r["seed"]) for r in Records(tmp_path / "out").load()] == [("zero-shot", "glyphs-toy", 1)]


def test_reproduce_says_why_a_page_stopped(monkeypatch, tmp_path):
    def stopped(*args):
        raise PapermillExecutionError(5, 5, "p = parameters_from(...)", "ValueError", "seeds: an empty list was given.", "")
    monkeypatch.setattr("coft.experiment.run_page", stopped)
    answer = CliRunner().invoke(app, ["reproduce", "coft-1", "--out-dir", str(tmp_path)])
    assert answer.exit_code == 1 and answer.stderr.count("\n") == 1
    assert "ValueError: seeds: an empty list was given." in answer.stderr and f"{tmp_path}/pages/coft-1.ipynb" in answer.stderr


def test_reproduce_lists_every_table():
    answer = CliRunner().invoke(app, ["reproduce"])
    lines = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines())
    assert list(lines) == TABLES and all(lines.values())
    assert json.loads(CliRunner().invoke(app, ["reproduce", "--json"]).stdout) == lines


@pytest.mark.parametrize("name", coft.__all__)
def test_public_names_can_be_had(name):
    assert getattr(coft, name) is not None and name in dir(coft)


def test_unknown_name_of_the_package_is_told_with_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'Coft'.*CoFT"):
        coft.Coft
    assert len(set(coft.__all__)) == len(coft.__all__)
