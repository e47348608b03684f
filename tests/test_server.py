"The box behind HTTP: the same numbers, nothing else to be had, nothing paid twice."
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from coft.blackbox import BlackBoxVLM, BudgetExhausted, Pictures
from coft.craft import CraFT
from coft.server import Ledger, RemoteBox, make_app, pack_array
from starlette.testclient import TestClient

COMMAND = Path(sys.executable).parent / "coft"
TINY = dict(shots=4, budget=200, views="task", intrinsic_dim=32)


@pytest.fixture
def remote(clip, monkeypatch):
    "Makes a client whose requests go straight into an application."
    import coft.server

    def make(app=None, **kwargs):
        box = RemoteBox("http://testserver", **kwargs)
        box._client = TestClient(app or make_app(BlackBoxVLM(clip)), headers=box._client.headers)
        return box
    return make


@pytest.fixture
def question(clip, task):
    box = BlackBoxVLM(clip)
    contexts = box.embed_text("a photo of a") + np.random.default_rng(0).standard_normal((5, 4, 96)).astype(np.float32) / 10
    return contexts, task.class_names, task.unlabelled.batch(range(12), 24).numpy()


def body(contexts, names, pixels, **more):
    return dict(context=pack_array(contexts), class_names=list(names), images=pack_array(pixels)) | more


# The same numbers

@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_both_boxes_answer_alike(clip, remote, question, kind):
    contexts, names, pixels = question
    pixels = pixels if kind == "uint8" else pixels.astype(np.float32) / 255
    here, there = BlackBoxVLM(clip), remote()
    for images in (pixels, Pictures(pixels)):
        assert np.abs(here.logits(contexts, names, images) - there.logits(contexts, names, images)).max() < 1e-5
    assert np.array_equal(here.embed_text("a photo of a"), there.embed_text("a photo of a"))
    assert here.info().items() <= there.info().items() and there.image_size == 24


def test_craft_ends_with_the_same_numbers(clip, task, remote):
    here, there = CraFT(**TINY).fit(clip, task, progress=False), CraFT(**TINY).fit(remote(), task, progress=False)
    assert np.abs(here.predict_all(task.test) - there.predict_all(task.test)).max() < 1e-5 and here.facts == there.facts


def test_a_question_that_is_too_large_goes_in_parts(clip, remote, question):
    contexts, names, pixels = question
    small = remote(make_app(BlackBoxVLM(clip), max_body=40_000))
    assert np.abs(small.logits(contexts, names, Pictures(pixels), candidates=True) - BlackBoxVLM(clip).logits(contexts, names, pixels)).max() < 1e-5
    assert small.usage() == {"prompt_queries": 5, "image_forwards": 60} and small.n_prompt_queries == 5
    with pytest.raises(ValueError, match="do not fit into a request of 10000 bytes"):
        remote(make_app(BlackBoxVLM(clip), max_body=10_000)).logits(contexts, names, pixels)


def test_images_that_are_known_are_not_sent_again(clip, remote, question):
    contexts, names, pixels = question
    box, pictures = remote(), Pictures(pixels)
    box.logits(contexts, names, pictures)
    sent = []
    request = box._client.request
    box._client.request = lambda *args, **kwargs: sent.append(kwargs["json"]) or request(*args, **kwargs)
    box.logits(contexts + 1, names, pictures)
    assert len(sent) == 1 and "images" not in sent[0] and sent[0]["image_ids"] == pictures.ids


# What the server refuses

@pytest.fixture
def http(clip):
    return TestClient(make_app(BlackBoxVLM(clip), max_body=200_000))


def test_there_are_three_questions_and_nothing_else(http):
    routes = {(route.path, *sorted(route.methods)) for route in http.app.routes}
    assert routes == {("/info", "GET"), ("/embed_text", "POST"), ("/logits", "POST")}
    for path in ("/", "/docs", "/openapi.json", "/weights", "/features"):
        assert http.get(path).status_code == 404


def faults(question):
    contexts, names, pixels = question
    good = body(contexts, names, pixels)
    return {
        "no context": ({k: v for k, v in good.items() if k != "context"}, 422, "context: Field required"),
        "wrong width": (body(contexts[..., :95], names, pixels), 422, "context: an array [prompts, tokens, 96] is needed"),
        "bytes and shape": (good | dict(context=pack_array(contexts) | dict(shape=[5, 4, 97])), 422, "context: 7680 bytes are not an array of shape [5, 4, 97]"),
        "negative shape": (good | dict(context=pack_array(contexts) | dict(shape=[-5, -4, 96])), 422, "context: 7680 bytes are not"),
        "no base64": (good | dict(context=pack_array(contexts) | dict(data="%%%")), 422, "context: its data is no base64"),
        "another type": (good | dict(context=pack_array(contexts) | dict(dtype="object")), 422, "context.dtype: Input should be 'float32' or 'uint8'"),
        "not finite": (body(np.full_like(contexts, np.nan), names, pixels), 422, "1920 of 1920 numbers are not finite"),
        "overflow": (body(np.full_like(contexts, 3e38), names, pixels), 422, "not finite"),
        "image size": (body(contexts, names, pixels[..., :20]), 422, "images: an array [images, 3, 24, 24] is needed"),
        "image values": (body(contexts, names, pixels.astype(np.float32)), 422, "finite floats from 0 to 1"),
        "one class": (body(contexts, names[:1], pixels), 422, "class_names: 1 given"),
        "a word that is unknown": (body(contexts, ["zebra", "digit"], pixels), 422, "does not know 'zebra"),
        "unknown image": (dict(context=pack_array(contexts), class_names=list(names), image_ids=["0" * 64]), 404, "1 image(s) are not known here"),
        "no images": (dict(context=pack_array(contexts), class_names=list(names)), 422, "exactly one of the two"),
        "both": (good | dict(image_ids=["0"]), 422, "exactly one of the two"),
        "empty list": (dict(context=pack_array(contexts), class_names=list(names), image_ids=[]), 422, "image_ids: an empty list"),
        "raw": (good | dict(raw_features=True), 422, "raw_features"),
    }


@pytest.mark.parametrize("fault", list(faults((np.zeros((5, 4, 96), np.float32), ["a", "b"], np.zeros((1, 3, 24, 24), np.uint8)))))
def test_bad_requests_get_a_reason_and_cost_nothing(http, question, fault):
    content, status, reason = faults(question)[fault]
    answer = http.post("/logits", json=content)
    assert answer.status_code == status and reason in answer.json()["detail"], answer.text[:300]
    assert len(answer.text) < 2000, "a refusal does not send the request back"
    assert http.get("/info").json()["image_forwards"] == 0


@pytest.mark.parametrize("how", ["declared", "streamed"])
def test_bodies_that_are_too_large_are_refused(http, how):
    content = b"x" * 300_000 if how == "declared" else iter([b"x" * 100_000] * 3)
    answer = http.post("/logits", content=content)
    assert answer.status_code == 413 and "at most 200000 bytes" in answer.json()["detail"]


def test_json_that_is_none_is_refused(http):
    answer = http.post("/logits", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 422 and "JSON" in answer.json()["detail"]


@pytest.mark.parametrize("shown, status", [(None, 401), ("Bearer wrong", 401), ("secret", 401), ("Bearer s\u00e9cret".encode(), 401), ("Bearer secret", 200)])
def test_a_token_is_needed_where_one_is_set(clip, shown, status):
    http = TestClient(make_app(BlackBoxVLM(clip), token="secret"))
    headers = {"authorization": shown} if shown else {}
    for answer in (http.get("/info", headers=headers), http.post("/embed_text", json=dict(text="a photo"), headers=headers)):
        assert answer.status_code == status
    assert status == 200 or "Authorization: Bearer" in answer.json()["detail"]


def test_the_servers_own_budget_ends_a_run(clip, task, remote):
    box = remote(make_app(BlackBoxVLM(clip), ledger=Ledger(max_prompt_queries=100)))
    with pytest.raises(BudgetExhausted, match="80 of 100 prompt queries were used, and 40 more"):
        CraFT(**TINY).fit(box, task, progress=False)


# What the client does

def test_a_wrong_token_says_so(clip, remote):
    with pytest.raises(PermissionError, match="A token is needed"):
        remote(make_app(BlackBoxVLM(clip), token="secret"), token="other").info()


def test_an_absent_server_is_asked_again_and_then_named():
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9 did not answer for 1 s .*Start the server again"):
        RemoteBox("http://127.0.0.1:9", patience=1).info()
    assert time.monotonic() - begin >= 0.9


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(remote, status, question):
    box = remote()
    box.info()
    answers, request = [httpx.Response(status, json=dict(detail="later"))] * 2, box._client.request
    box._client.request = lambda *args, **kwargs: answers.pop() if answers else request(*args, **kwargs)
    assert box.logits(*question).shape == (5, 12, 4) and not answers


def test_the_rate_is_held(remote):
    box = remote(requests_per_second=20)
    begin = time.monotonic()
    for i in range(5):
        box.embed_text("a photo" + " of" * i)
    assert time.monotonic() - begin >= 4 / 20


def test_the_clients_budget_holds_over_restarts(tmp_path, remote, question):
    contexts, names, pixels = question
    first = remote(journal=tmp_path, max_prompt_queries=8)
    first.logits(contexts, names, pixels, candidates=True)
    again = remote(journal=tmp_path, max_prompt_queries=8)
    assert again.n_prompt_queries == 5
    again.logits(contexts, names, pixels, candidates=True)
    assert again.n_prompt_queries == 5, "an answer from the journal is paid already"
    with pytest.raises(BudgetExhausted, match="5 of 8 prompt queries were used, and 5 more"):
        again.logits(contexts + 1, names, pixels, candidates=True)


def test_the_journal_answers_without_the_server(tmp_path, remote, question):
    box = remote(journal=tmp_path)
    answer = box.logits(*question)
    box._client.request = lambda *args, **kwargs: pytest.fail("asked again")
    assert np.array_equal(box.logits(*question), answer)
    box.forget_answers()
    assert not list((tmp_path / "answers").glob("*.npy")) and box.n_image_forwards == 60


def test_a_ledger_with_a_cut_line_counts_the_others(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.charge("a", 40, 640), ledger.charge("b", 40, 640), ledger.charge("a", 40, 640)
    (tmp_path / "ledger").write_text((tmp_path / "ledger").read_text() + '["c", 4')
    again = Ledger(tmp_path / "ledger")
    assert (again.n_prompt_queries, again.n_image_forwards) == (80, 1280)
    again.charge("d", 1, 2)
    assert Ledger(tmp_path / "ledger").n_prompt_queries == 81


# A server that dies

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(port, ledger):
    return subprocess.Popen([COMMAND, "serve", "--port", str(port), "--ledger", str(ledger)], env=os.environ | {"OMP_NUM_THREADS": "1", "COFT_TOKEN": "secret"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextmanager
def stopped_at_the_end(*processes):
    processes = list(processes)
    try:
        yield processes
    finally:
        for p in processes:
            p.kill()
            p.wait()


def test_a_server_killed_in_mid_generation_costs_nothing(clip, task, tmp_path, monkeypatch):
    "kill -9 while it answers, start it again: the same numbers, and the server's own count is that of an unbroken run."
    import coft.server
    port, ledger = free_port(), tmp_path / "ledger"
    with stopped_at_the_end(start(port, ledger)) as servers:
        box = RemoteBox(f"http://127.0.0.1:{port}", token="secret", journal=tmp_path / "journal", patience=120)
        asked, part = [], RemoteBox._answer_part

        def answer_part(self, *args):
            asked.append(1)
            if len(asked) in (4, 7):
                threading.Timer(0.004, servers[-1].send_signal, [signal.SIGKILL]).start()
                threading.Timer(0.5, lambda: servers.append(start(port, ledger))).start()
            return part(self, *args)

        monkeypatch.setattr(RemoteBox, "_answer_part", answer_part)
        broken = CraFT(**TINY).fit(box, task, progress=False, folder=tmp_path / "state")
        assert len(servers) == 3 and [s.poll() for s in servers] == [-signal.SIGKILL, -signal.SIGKILL, None]
        used = box.usage()
    whole = CraFT(**TINY).fit(clip, task, progress=False)
    assert np.abs(broken.trace["context"] - whole.trace["context"]).max() < 1e-5
    assert broken.facts == whole.facts and [h["best"] for h in broken.trace["history"]] == pytest.approx([h["best"] for h in whole.trace["history"]], abs=1e-5)
    assert used == {"prompt_queries": whole.facts["prompt queries"], "image_forwards": whole.facts["image forwards"]}


def test_a_port_that_is_taken_and_a_model_that_is_unknown(tmp_path):
    done = subprocess.run([COMMAND, "serve", "--model", "embeded"], capture_output=True, text=True)
    assert done.returncode == 2 and "Did you mean 'embedded'" in done.stderr and "Traceback" not in done.stderr
