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
from coft.clip import load_clip
from coft.craft import CraFT
from coft.server import Ledger, RemoteBox, make_app, pack_array, running_server
from starlette.testclient import TestClient

COMMAND = Path(sys.executable).parent / "coft"
TINY = dict(preset="paper", shots=4, budget=200, views="task", intrinsic_dim=32)


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


def test_huge_shapes_of_nothing_are_refused_at_once(http, question):
    contexts, names, pixels = question
    begin = time.monotonic()
    empty = pack_array(pixels) | dict(shape=[10**9, 0, 1, 1], data="")
    for content in (body(contexts, names, pixels) | dict(images=empty), body(contexts, names, pixels) | dict(context=pack_array(contexts) | dict(shape=[], data=""))):
        assert http.post("/logits", json=content).status_code == 422
    many = body(contexts, [f"digit {i}" for i in range(25_001)], pixels)
    assert "class_names" in TestClient(make_app(BlackBoxVLM(load_clip()))).post("/logits", json=many).json()["detail"]
    assert "at most 300" in http.post("/logits", json=body(contexts, ["digit " * 60, *names], pixels)).json()["detail"]
    assert time.monotonic() - begin < 10


def test_one_prompt_without_its_first_axis_is_one_prompt(http, question):
    contexts, names, pixels = question
    assert http.post("/logits", json=body(contexts[0], names, pixels, candidates=True)).status_code == 200
    assert http.get("/info").json()["prompt_queries"] == 1 and http.get("/info").json()["image_forwards"] == 12


def test_answers_that_would_be_too_large_are_refused(http, question, monkeypatch):
    import coft.server
    monkeypatch.setattr(coft.server, "MAX_ANSWER", 10_000)
    answer = http.post("/logits", json=body(*question))
    assert answer.status_code == 422 and "too much at a time" in answer.json()["detail"]


def test_a_server_with_another_model_is_noticed(remote, question):
    box = remote()
    box.info()
    box._info["model_sha256"] = "0" * 64
    with pytest.raises(ValueError, match=r"409.*holds another model \(embedded / fonts\)"):
        box.logits(*question)


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
    assert http.post("/logits", content=b"{", headers=headers).status_code == (422 if status == 200 else 401), "the body is not looked at before the token"


def test_the_servers_own_budget_ends_a_run(clip, task, remote):
    box = remote(make_app(BlackBoxVLM(clip), ledger=Ledger(max_prompt_queries=100)))
    fitted = CraFT(**TINY).fit(box, task, progress=False)
    assert "80 of 100 prompt queries were used, and 40 more" in fitted.messages[0] and fitted.facts["prompt queries"] == 80
    assert fitted.predict_proba(task.test).shape == (40, 4), "the last whole generation answers"


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


def test_a_journal_belongs_to_one_process_at_a_time(tmp_path, remote, question):
    box = remote(journal=tmp_path)
    box.logits(*question, candidates=True)
    other = [sys.executable, "-c", f"from coft.server import RemoteBox; print(RemoteBox('http://a', journal={str(tmp_path)!r}).n_prompt_queries)"]
    refused = subprocess.run(other, capture_output=True, text=True)
    assert refused.returncode and "is in use by another process" in refused.stderr
    box.close()
    assert subprocess.run(other, capture_output=True, text=True).stdout == "5\n", "given back with close"


def test_a_ledger_with_a_cut_line_counts_the_others(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.charge("a", 40, 640), ledger.charge("b", 40, 640), ledger.charge("a", 40, 640)
    (tmp_path / "ledger").write_text((tmp_path / "ledger").read_text() + '["c", 4')
    again = Ledger(tmp_path / "ledger")
    assert (again.n_prompt_queries, again.n_image_forwards) == (80, 1280)
    again.charge("d", 1, 2)
    assert Ledger(tmp_path / "ledger").n_prompt_queries == 81


def test_an_answer_without_its_line_is_charged_when_it_is_found(tmp_path, remote, question):
    remote(journal=tmp_path).logits(*question, candidates=True)
    (tmp_path / "paid.jsonl").unlink()
    again = remote(journal=tmp_path)
    again.logits(*question, candidates=True)
    assert (again.n_prompt_queries, again.n_image_forwards) == (5, 60)
    assert remote(journal=tmp_path).n_prompt_queries == 5


def test_a_damaged_answer_is_asked_for_again_and_paid_once(tmp_path, remote, question):
    box = remote(journal=tmp_path)
    answer = box.logits(*question)
    for file in (tmp_path / "answers").glob("*.npy"):
        file.write_bytes(b"")
    assert np.array_equal(box.logits(*question), answer) and box.n_image_forwards == 60 and box.usage()["image_forwards"] == 60


def test_a_lost_answer_is_paid_once(remote, question):
    "The server charged and answered; the answer was lost on its way."
    box = remote()
    box.info()
    request, lost = box._client.request, []

    def drop(*args, **kwargs):
        answer = request(*args, **kwargs)
        if not lost:
            lost.append(1)
            raise httpx.ReadError("connection reset")
        return answer

    box._client.request = drop
    box.logits(*question, candidates=True)
    assert lost and box.usage() == {"prompt_queries": 5, "image_forwards": 60}


def test_a_split_question_that_is_too_dear_costs_nothing(clip, remote, question):
    contexts, names, pixels = question
    box = remote(make_app(BlackBoxVLM(clip), max_body=40_000), max_image_forwards=59)
    with pytest.raises(BudgetExhausted, match="0 of 59 image forwards were used, and 60 more"):
        box.logits(contexts, names, Pictures(pixels))
    assert box.usage()["image_forwards"] == 0


def test_a_run_at_its_exact_budget_goes_on_after_its_last_payment(clip, task, tmp_path, remote, monkeypatch):
    tiny, kept = TINY | dict(budget=80), dict(journal=tmp_path / "journal", max_prompt_queries=80)
    whole = CraFT(**tiny).fit(clip, task, progress=False)
    app = make_app(BlackBoxVLM(clip))
    with monkeypatch.context() as patch:
        refine, calls = CraFT._fit.__globals__["_Tuning"]._refine, []

        def interrupted(self, *args):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return refine(self, *args)

        patch.setattr(CraFT._fit.__globals__["_Tuning"], "_refine", interrupted)
        with pytest.raises(KeyboardInterrupt):
            CraFT(**tiny).fit(remote(app, **kept), task, progress=False, folder=tmp_path / "state")
    box = remote(app, **kept)
    assert box.n_prompt_queries == 80, "everything is paid"
    fitted = CraFT(**tiny).fit(box, task, progress=False, folder=tmp_path / "state")
    assert not fitted.messages and fitted.facts == whole.facts and box.n_prompt_queries == 80
    assert np.abs(fitted.predict_all(task.test) - whole.predict_all(task.test)).max() < 1e-5


@pytest.mark.parametrize("make, message", [(lambda tmp: RemoteBox("127.0.0.1:8765"), "url: '127.0.0.1:8765' was given"), (lambda tmp: RemoteBox("http://a", journal=tmp / "file"), "journal: .* cannot be a folder"),
                                           (lambda tmp: Ledger(tmp), "is a folder; a file is needed"), (lambda tmp: Ledger(tmp / "damaged"), "line 1 of .* cannot be read")], ids=["url", "journal", "folder", "damaged"])
def test_places_that_cannot_serve_are_named(tmp_path, make, message):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "damaged").write_text('5\n["a", 1, 2]\n')
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_another_web_server_is_named(remote):
    from fastapi import FastAPI
    other = FastAPI()
    other.get("/info")(lambda: dict(name="something else"))
    with pytest.raises(ConnectionError, match="is no server of coft: 'model_sha256' is missing"):
        remote(other).info()


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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([COMMAND, "serve", "--port", port], capture_output=True, text=True)
        with pytest.raises(RuntimeError, match=f"somebody listens on {port} already"), running_server(port=int(port)):
            pass
    assert done.returncode == 2 and f"127.0.0.1:{port} cannot be listened on" in done.stderr and "Traceback" not in done.stderr
