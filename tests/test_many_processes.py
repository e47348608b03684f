"Two processes over gloo take the steps of one; they are started once, by torchrun."
import signal
import socket
import sys
from types import SimpleNamespace

import many_processes
import numpy as np
import pytest
import torch
import torch.distributed.run
from coft.results import Records
from coft.trainer import part_of_batch, whole_batch
from helpers import ROOT


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "What one process found, and what each of two found"
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        torch.distributed.run.main(["--standalone", "--nproc_per_node=2", str(ROOT / "tests/many_processes.py"), str(together), str(port)])
    both = [torch.load(together / f"process-{r}.pt", weights_only=False) for r in range(2)]
    return SimpleNamespace(one=many_processes.all_of_it(alone), two=both[0], other=both[1], alone=alone, together=together)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.mark.parametrize("kind", many_processes.KINDS)
def test_a_step_has_the_gradient_of_one_process(runs, kind):
    one, two = runs.one["gradients"][kind], runs.two["gradients"][kind]
    assert largest_difference(one, two) < 1e-5 * max(1, *(float(g.abs().max()) for g in one.values()))
    assert max(float(g.abs().max()) for g in one.values()) > 1e-3


WHOLE = ("dual prompt", "full fine-tuning", "momentum contrast", "coupled")


@pytest.mark.parametrize("kind", WHOLE)
def test_steps_in_float64_agree(runs, kind):
    "Batches that cannot be divided evenly, or not at all, and parts without an accepted label are among them; momentum contrast was killed in between."
    one, two = runs.one["weights"][kind], runs.two["weights"][kind]
    assert largest_difference(one["state"], two["state"]) < 1e-8
    assert len(one["history"]) == len(two["history"]) == 7
    assert all(a[k] == pytest.approx(b[k], abs=1e-8) for a, b in zip(one["history"], two["history"]) for k in a)


def test_a_module_that_does_not_say_so_gets_whole_batches(runs):
    assert runs.two["weights"]["coupled"]["history"][0]["images"] == pytest.approx((7 * 7 + 7 * 7 + 1) / 15)


def test_both_processes_hold_the_same(runs):
    for kind in WHOLE:
        assert largest_difference(runs.two["weights"][kind]["state"], runs.other["weights"][kind]["state"]) == 0
    assert torch.equal(runs.two["features"], runs.other["features"])


def test_the_processes_were_killed_before_they_went_on(runs):
    assert runs.two["ended"] == runs.other["ended"] == -signal.SIGKILL


def test_weights_in_parts_take_the_same_steps(runs):
    "Full fine-tuning beside momentum contrast, interrupted and resumed."
    one, parts = runs.one["in parts"], runs.two["in parts"]
    assert largest_difference(one["state"], parts["state"]) < 1e-8
    assert all(a[k] == pytest.approx(b[k], abs=1e-8) for a, b in zip(one["history"], parts["history"]) for k in a)
    held, there = runs.two["numbers in parts"]
    assert 0.45 < held / there < 0.55


def test_features_are_those_of_one_process_bit_for_bit(runs):
    assert torch.equal(runs.one["features"], runs.two["features"])


def test_what_goes_wrong_in_one_process_is_said_in_both(runs):
    assert runs.two["refused"] == runs.other["refused"] == runs.one["refused"]
    assert "the loss is inf in epoch 1" in runs.one["refused"][0] and "index out of range" in runs.one["refused"][1]


def test_processes_that_hold_different_labels_are_told(runs):
    assert "the processes hold different images or labels" in runs.two["unlike"] == runs.other["unlike"]


def test_a_run_leaves_the_records_of_one_process(runs):
    one, two = (Records(folder / "out") for folder in (runs.alone, runs.together))
    assert [r["key"] for r in two.load()] == [r["key"] for r in one.load()] and len(one.load()) == 2
    for r in one.load():
        a, b = one.arrays(r["key"]), two.arrays(r["key"])
        assert np.abs(a["test_probabilities"] - b["test_probabilities"]).max() < 0.02
    assert not list((runs.together / "out/unfinished").iterdir())


def test_one_process_has_every_batch():
    x = torch.arange(3)
    assert whole_batch(x) is x and part_of_batch() == 1.0
    assert "torch.distributed" in sys.modules and not torch.distributed.is_initialized()
