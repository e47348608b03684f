"The command `coft`, and how fast package and command answer."
import json
import subprocess
import sys
import time
from pathlib import Path

import coft
import pytest
from coft.cli import app
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
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["ok", what] for what in ("packages", "device", "weights", "data", "folder")]


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
    assert sum(line.startswith("ok ") for line in answer.stdout.splitlines()) == 4, "the other checks go on"


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


def test_help_answers_at_once():
    seconds, text = best_of_three(COMMAND, "--help")
    assert "doctor" in text and seconds < 1.5


@pytest.mark.parametrize("name", coft.__all__)
def test_public_names_can_be_had(name):
    assert getattr(coft, name) is not None and name in dir(coft)


def test_unknown_name_of_the_package_is_told_with_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'Coft'.*CoFT"):
        coft.Coft
    assert len(set(coft.__all__)) == len(coft.__all__)
