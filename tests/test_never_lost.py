"A run that is killed, again and again, ends where the unbroken run ends, bit for bit."
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from coft.clip import load_clip
from coft.collaborate import CoFT, CoFTPlus
from coft.experiment import find_or_run
from coft.results import Records
from helpers import QUICK, QUICK_PLUS, ROOT, broken_off

KILLS = 20
# A process of its own, with one thread: it forks children that fit, kills them, and prints what happened.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from coft.clip import load_clip
from coft.collaborate import CoFTPlus
from coft.data import glyphs_task
from coft.glyphs import Writing
from helpers import QUICK_PLUS
import coft.trainer, accelerate
out, kills = Path(sys.argv[1]), int(sys.argv[2])
clip, task = load_clip("embedded"), glyphs_task("toy", Writing("stix", "0123", 72), n_test=40, seed=3)

def run(name):
    fitted = CoFTPlus(**QUICK_PLUS).fit(clip, task, seed=0, progress=False, folder=out/name)
    np.save(out/f"{name}.npy", fitted.predict_all(task.test))

def child(name):
    pid = os.fork()
    if pid: return pid
    try: run(name); os._exit(0)
    except BaseException as e: print(repr(e), file=sys.stderr); os._exit(1)

begin = time.perf_counter()
assert os.waitstatus_to_exitcode(os.waitpid(child("unbroken"), 0)[1]) == 0
whole, draw, killed, states = time.perf_counter() - begin, random.Random(0), 0, []
for i in range(kills):
    pid = child("broken")
    time.sleep(draw.uniform(0.02, 0.12) * whole)
    os.kill(pid, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    states.append(len([p for p in (out/"broken").glob("*.pt") if not p.name.startswith(".")]) if (out/"broken").exists() else 0)
    if len(states) > 3 and len(set(states[-4:])) == 1: whole *= 1.3 # a busy machine got nowhere in four tries
assert os.waitstatus_to_exitcode(os.waitpid(child("broken"), 0)[1]) == 0
print(json.dumps(dict(killed=killed, states=states)))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "Folder with the states and predictions of an unbroken and of a broken run, and what the driver printed."
    out = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", DRIVER, str(out), str(KILLS)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


def test_twenty_kills_hit_a_running_process_and_it_got_on(killed):
    _, said = killed
    assert said["killed"] >= 15, "most kills must meet a living process"
    assert max(said["states"]) >= 1 and len(set(said["states"])) >= 2


def test_the_broken_run_ends_bit_identical(killed):
    out, _ = killed
    assert (np.load(out / "unbroken.npy") == np.load(out / "broken.npy")).all()
    names = sorted(p.name for p in (out / "unbroken").glob("*.pt"))
    assert len(names) == 6
    for name in names:
        a, b = (torch.load(out / kind / name, weights_only=True) for kind in ("unbroken", "broken"))
        assert a["module"].keys() == b["module"].keys() and all(torch.equal(a["module"][k], b["module"][k]) for k in a["module"])
        assert [{k: v for k, v in h.items() if k != "images_per_second"} for h in a["history"]] == [{k: v for k, v in h.items() if k != "images_per_second"} for h in b["history"]]


def test_a_finished_phase_is_not_run_again(clip, task, tmp_path, monkeypatch):
    first = CoFTPlus(**QUICK_PLUS).fit(clip, task, progress=False, folder=tmp_path)
    monkeypatch.setattr("coft.trainer.batches", lambda *args: pytest.fail("a finished phase asked for images")
                        if len(args) > 4 and args[4] is not None else batches(*args))
    from coft.data import batches
    again = CoFTPlus(**QUICK_PLUS).fit(clip, task, progress=False, folder=tmp_path)
    assert (again.predict_all(task.test) == first.predict_all(task.test)).all()


def test_a_state_of_other_settings_is_refused(clip, task, tmp_path):
    CoFT(**QUICK).fit(clip, task, progress=False, folder=tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another run: phase1_lr was 0.001 and is 0.002.*another folder"):
        CoFT(**QUICK | dict(phase1_lr=2e-3)).fit(clip, task, progress=False, folder=tmp_path)
    with pytest.raises(ValueError, match=r"seed was 0 and is 1"):
        CoFT(**QUICK).fit(clip, task, seed=1, progress=False, folder=tmp_path)


@pytest.mark.parametrize("method, name, value", [(CoFT, "l2_weight", 0.0), (CoFT, "l2_grad", "neg_only"), (CoFT, "context_std", 0.5), (CoFT, "head_init", "text"), (CoFTPlus, "gamma", 1.0), (CoFTPlus, "momentum", 0.5), (CoFTPlus, "contrast_tau", 0.5)], ids=lambda v: v if isinstance(v, str) else getattr(v, "name", ""))
def test_a_state_of_any_other_setting_is_refused(clip, task, tmp_path, method, name, value):
    quick = (QUICK_PLUS if method is CoFTPlus else QUICK) | dict(phase1_epochs=1)
    method(**quick).fit(clip, task, progress=False, folder=tmp_path)
    with pytest.raises(ValueError, match=rf"belongs to another run: {name} was .* and is {value!r}"):
        method(**quick | {name: value}).fit(clip, task, progress=False, folder=tmp_path)


def test_a_state_of_another_model_or_task_is_refused(clip, task, tmp_path):
    CoFT(**QUICK).fit(clip, task, progress=False, folder=tmp_path)
    with pytest.raises(ValueError, match=r"model was .* and is"):
        CoFT(**QUICK).fit(load_clip("embedded-l"), task, progress=False, folder=tmp_path)
    with pytest.raises(ValueError, match=r"data was .* and is"):
        CoFT(**QUICK).fit(clip, replace(task, template="a drawing of a {}."), progress=False, folder=tmp_path)


def test_numbers_of_numpy_are_plain_ones(clip, task, tmp_path, quick_run):
    for _ in range(2):
        fitted = CoFT(**QUICK | dict(phase1_lr=np.float64(1e-3), n_context=np.int64(4))).fit(clip, task, seed=np.int64(0), progress=False, folder=tmp_path / "run", phases=tmp_path / "phases")
        assert (fitted.predict_all(task.test) == quick_run.fitted.predict_all(task.test)).all()


@pytest.mark.parametrize("at", [1, 3])
def test_ctrl_c_leaves_a_state_from_which_the_run_goes_on(clip, task, tmp_path, monkeypatch, at, quick_run):
    import coft.trainer
    with broken_off(monkeypatch, coft.trainer.PhaseState, at):
        CoFT(**QUICK).fit(clip, task, progress=False, folder=tmp_path)
    fitted = CoFT(**QUICK).fit(clip, task, progress=False, folder=tmp_path)
    assert (fitted.predict_all(task.test) == quick_run.fitted.predict_all(task.test)).all()


def test_the_main_job_continues_and_says_so(clip, task, tmp_path, monkeypatch):
    import coft.collaborate
    records, phase2 = Records(tmp_path), coft.collaborate.phase2
    with monkeypatch.context() as patch:
        patch.setattr(coft.collaborate, "phase2", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            find_or_run("coft", QUICK, clip, task, 0, records, progress=False)
    assert not records.load() and len(list((tmp_path / "unfinished").glob("*/*.pt"))) == 2
    (stage, whole), found = find_or_run("coft", QUICK, clip, task, 0, records, progress=False)
    assert not found and whole["resumed"] and coft.collaborate.phase2 is phase2
    assert not list((tmp_path / "unfinished").glob("*")), "the states of a finished run are deleted"
