"Saved results: every method comes back bit for bit, and what does not fit, is damaged or leads elsewhere is refused."
import base64
import json
import os
import shutil
import sys
import threading
import types
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from coft import __version__
from coft.adapters import build_light_module
from coft.blackbox import BlackBoxVLM
from coft.clip import FrozenCLIP, load_clip
from coft.members import LightMember, LinearHead, Member
from coft.protocol import METHODS, Fitted, get_method
from coft.saved import (ABOUT, _digest, export_onnx, export_open_clip, load_fitted, pull_saved, push_saved, read_about,
                        save_fitted)
from helpers import message_of, pretend_training
from safetensors.torch import load_file

TINY = dict(shots=1, budget=8, population=4, intrinsic_dim=4, top_k=2, n_context=2, n_visual=2, cache_views=1, n_prompts=2, rounds=1, steps=2)


def tiny(name, **more):
    "A method with few images and small parts."
    known = [f.name for f in fields(METHODS[name].Settings)]
    return get_method(name, "paper" if known else None, **{k: v for k, v in (TINY | more).items() if k in known})


@pytest.fixture(scope="module")
def fit(clip, task):
    "Fit a method by name, its training pretended; each fit is made once. Some given labels are wrong, for methods that take such."
    done, given = {}, replace(task, _noisy=np.where(np.arange(72) % 3, task.audit.train, 0))

    def fit(name, **more):
        key = name, tuple(more.items())
        if key not in done:
            with pytest.MonkeyPatch.context() as monkeypatch:
                pretend_training(monkeypatch)
                done[key] = tiny(name, **more).fit(clip, given, seed=3, progress=False)
        return done[key]
    return fit


@pytest.fixture
def folder(tmp_path, fit, clip, task):
    "A saved Phase I with zero-shot beside it."
    return save_fitted(tmp_path / "saved", fit("coft-phase1"), clip, task, 3, fit("zero-shot"), [{"accuracy": 0.5}])


def rewrite(folder, change):
    "Change the JSON of a saved result as somebody would who also knows its digest."
    about = json.loads((folder / ABOUT).read_text())
    change(about)
    (folder / ABOUT).write_text(json.dumps(about | {"digest": _digest(about)}))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_saved_and_comes_back_bit_for_bit(name, fit, clip, task, tmp_path):
    fitted = fit(name)
    assert all(isinstance(m, Member) for m in fitted.members), f"{name} answers with something that cannot be written down; see coft.members"
    save_fitted(tmp_path, fitted, clip, task, 3)
    saved = load_fitted(tmp_path)
    assert saved.clip is not clip
    assert (saved.fitted.predict_all(task.test) == fitted.predict_all(task.test)).all()
    assert (saved.fitted.method, saved.fitted.class_names, saved.fitted.settings) == (name, task.class_names, json.loads(json.dumps(fitted.settings)))
    assert saved.fitted.messages == fitted.messages and saved.fallback is None
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"zero-shot", "zero-shot-ensemble", "transclip", "tip-adapter"}))
def test_what_was_learned_is_among_the_tensors(name, fit, clip, task, tmp_path):
    "The saved numbers matter: other ones give other answers."
    save_fitted(tmp_path, fit(name), clip, task, 3)
    for member in load_fitted(tmp_path).fitted.members:
        tensors = {k: v + 0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) if v.is_floating_point() else v for k, v in member.tensors().items()}
        assert (type(member).restore(clip, task.class_names, tensors, member.config())(task.test) != member(task.test)).any()


@pytest.mark.parametrize("light_module", ["lora", "adapter"])
def test_other_light_modules_come_back(light_module, fit, clip, task, tmp_path):
    fitted = fit("coft-phase1", light_module=light_module)
    save_fitted(tmp_path, fitted, clip, task, 3)
    assert (load_fitted(tmp_path, clip=clip).fitted.predict_all(task.test) == fitted.predict_all(task.test)).all()


def test_a_model_that_was_taught_by_another_names_it(fit, clip, task, tmp_path):
    "Phase I of a distillation answers with the teacher's tower, Phase II with the model's own."
    phase1, whole = fit("coft-phase1", label_model="embedded-l"), fit("coft", label_model="embedded-l")
    for name, fitted in (("phase1", phase1), ("whole", whole)):
        saved = load_fitted(save_fitted(tmp_path / name, fitted, clip, task, 3))
        assert (saved.fitted.predict_all(task.test) == fitted.predict_all(task.test)).all()
    assert [m["clip"]["model"] for m in read_about(tmp_path / "phase1")["members"]] == ["embedded-l"] * 2
    assert [m["clip"] for m in read_about(tmp_path / "whole")["members"]] == [None] * 2


def test_what_stands_in_the_json(folder, fit, clip, task):
    saved = load_fitted(folder, clip=clip)
    about, fitted = saved.about, fit("coft-phase1")
    assert (about["schema"], about["version"], about["seed"], about["task"]) == (1, __version__, 3, task.name)
    assert (about["model"], about["pretrained"], about["weights_sha256"]) == (clip.name, clip.pretrained, clip.weights_sha256)
    assert about["templates"] == dict(template=task.template, templates=list(task.templates), llm_templates=list(task.llm_templates))
    assert about["settings"]["n_visual"] == 2 and about["data_sha256"] == task.data_sha256
    assert about["facts"] == fitted.facts and about["messages"] == fitted.messages
    assert sorted(about["files"]) == ["fallback-1.safetensors", "member-1.safetensors", "member-2.safetensors", "records.jsonl"]
    assert (saved.fallback.predict_all(task.test) == fit("zero-shot").predict_all(task.test)).all()
    assert saved.records == [{"accuracy": 0.5}]


def test_a_later_result_replaces_an_earlier_one(folder, fit, clip, task):
    save_fitted(folder, fit("zero-shot"), clip, task, 0)
    assert sorted(p.name for p in folder.iterdir()) == [ABOUT, "member-1.2.safetensors"], "no file of the earlier one was written over"
    assert load_fitted(folder, clip=clip).fitted.method == "zero-shot"
    save_fitted(folder, fit("coft-phase1"), clip, task, 3, records=[{"accuracy": 0.5}])
    assert sorted(p.name for p in folder.iterdir()) == [ABOUT, "member-1.safetensors", "member-2.safetensors", "records.jsonl"]


def test_saving_twice_writes_the_same_bytes(folder, fit, clip, task, tmp_path):
    again = save_fitted(tmp_path / "again", fit("coft-phase1"), clip, task, 3, fit("zero-shot"), [{"accuracy": 0.5}])
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_cannot_be_written_leaves_an_earlier_result_alone(folder, fit, clip, task):
    function = Fitted("mine", task.class_names, [lambda images: np.ones((len(images), 4)) / 4])
    assert "member 1 of 'mine' is a function" in message_of(save_fitted, folder, function, clip, task, 0)
    assert "4 classes" in message_of(save_fitted, folder, fit("zero-shot"), clip, replace(task, class_names=list("abcd")), 0)
    odd = Fitted("zero-shot", task.class_names, fit("zero-shot").members, facts={"odd": object()})
    assert "object cannot be written" in message_of(save_fitted, folder, odd, clip, task, 0, kind=TypeError)
    assert load_fitted(folder, clip=clip).fitted.method == "coft-phase1"


@pytest.mark.parametrize("step", ["safetensors.torch.save_file", "coft.saved._file_sha256"])
def test_saving_that_breaks_off_leaves_an_earlier_result_whole(folder, fit, clip, task, tmp_path, monkeypatch, step):
    def full(*args, **kwargs):
        raise OSError("no space left on device")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        for where in (folder, tmp_path / "first"):
            with pytest.raises(OSError):
                save_fitted(where, fit("zero-shot"), clip, task, 0)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert load_fitted(folder, clip=clip).fitted.method == "coft-phase1"
    assert "saving was broken off" in message_of(load_fitted, tmp_path / "first", kind=FileNotFoundError)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_kill_between_any_two_files_leaves_one_whole_result(folder, fit, clip, task, monkeypatch, at):
    "Two members, records, the fallback and the JSON are put in place one after the other."
    made, replace_one = [], os.replace

    def killed(old, new):
        if not Path(old).name.startswith("."):
            made.append(new)
            if len(made) == at:
                raise KeyboardInterrupt
        replace_one(old, new)
    save = lambda: save_fitted(folder, fit("coft-phase1", light_module="lora"), clip, task, 4, fit("zero-shot"), [{"accuracy": 0.6}])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coft.saved.os.replace", killed)
        save()
    saved = load_fitted(folder, clip=clip)
    assert (saved.about["seed"], saved.records) == (3, [{"accuracy": 0.5}]) and (saved.fitted.predict_all(task.test) == fit("coft-phase1").predict_all(task.test)).all()
    again = load_fitted(save(), clip=clip)
    assert (again.about["seed"], again.records) == (4, [{"accuracy": 0.6}]) and {p.name for p in folder.iterdir()} == {ABOUT, *again.about["files"]}


def test_files_that_are_no_part_of_an_earlier_result_stay(tmp_path, fit, clip, task):
    (tmp_path / "records.jsonl").write_text("of a job")
    saved = load_fitted(save_fitted(tmp_path, fit("zero-shot"), clip, task, 0, records=[{"accuracy": 0.5}]), clip=clip)
    assert (tmp_path / "records.jsonl").read_text() == "of a job" and saved.records == [{"accuracy": 0.5}]


def test_a_result_of_a_box_is_loaded_from_its_model(fit, clip, task, tmp_path):
    fitted = tiny("craft").fit(BlackBoxVLM(clip), task, progress=False)
    save_fitted(tmp_path, fitted, BlackBoxVLM(clip), task, 0)
    box = BlackBoxVLM(clip)
    for given in (None, clip, box):
        assert (load_fitted(tmp_path, clip=given).fitted.predict_all(task.test) == fitted.predict_all(task.test)).all()
    assert box.n_image_forwards == len(task.test)


# What is refused

def test_another_frozen_model_is_refused(folder):
    said = message_of(load_fitted, folder, clip=load_clip("embedded-l"))
    assert "model: expected 'embedded', found 'embedded-l'" in said and "weights_sha256: expected" in said
    said = message_of(load_fitted, folder, clip=load_clip("embedded", "random"))
    assert "weights_sha256: expected" in said and "model: expected" not in said


def test_other_pixel_statistics_are_refused(folder, clip):
    other = FrozenCLIP(clip.model, clip.tokenizer, clip.name, clip.pretrained, clip.weights_sha256, (0.4, 0.5, 0.5), (0.5, 0.5, 0.5), clip.preset)
    assert "image_mean: expected [0.5, 0.5, 0.5], found [0.4" in message_of(load_fitted, folder, clip=other)


def test_weights_that_are_not_there_are_named(folder):
    rewrite(folder, lambda about: about.update(pretrained="lost.pt", model="ViT-B-32"))
    assert "give it as `clip`" in message_of(load_fitted, folder)


@pytest.mark.parametrize("schema, advice", [(2, "Install a newer coft"), (0, "Save the result again"), ("1", "Save the result again"), (None, "Save the result again")])
def test_another_schema_is_refused(folder, schema, advice):
    rewrite(folder, lambda about: about.update(schema=schema))
    said = message_of(load_fitted, folder)
    assert f"schema 1 is expected, {schema!r} was found" in said and advice in said


@pytest.mark.parametrize("name", ["member-1.safetensors", "fallback-1.safetensors", "records.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "cut off", "one bit", "of another result"])
def test_a_damaged_file_is_refused(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    changed = {"cut off": content[:-1], "one bit": content[:-1] + bytes([content[-1] ^ 1]), "of another result": (folder / "member-2.safetensors").read_bytes()}
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    said = message_of(load_fitted, folder)
    assert name in said and ("is missing" if damage == "missing" else "is expected") in said


def test_a_json_that_was_changed_is_refused(folder):
    text = (folder / ABOUT).read_text()
    (folder / ABOUT).write_text(text.replace('"seed": 3', '"seed": 4'))
    assert "changed after it was written" in message_of(load_fitted, folder)
    (folder / ABOUT).write_text(text[:-20])
    assert "no JSON" in message_of(load_fitted, folder)
    (folder / ABOUT).write_text("[]")
    assert "list was found" in message_of(load_fitted, folder)


@pytest.mark.parametrize("field, value", [("class_names", "abc"), ("members", []), ("seed", "3"), ("files", None), ("members", [{"kind": "head"}]), ("unknown", 1)])
def test_a_json_of_another_form_is_refused(folder, field, value):
    rewrite(folder, lambda about: about.update({field: value}))
    assert field in message_of(load_fitted, folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/member.safetensors", "..", "sub\\member", "", ".hidden"])
def test_a_file_name_that_leaves_the_folder_is_refused(folder, name):
    shutil.copy(folder / "member-1.safetensors", folder.parent / "outside.safetensors")
    digest = json.loads((folder / ABOUT).read_text())["files"]["member-1.safetensors"]

    def change(about):
        about["members"][0]["file"], about["files"][name] = name, digest
    rewrite(folder, change)
    assert f"the file name {name!r} leads out of the folder" in message_of(load_fitted, folder)


def test_a_link_that_leaves_the_folder_is_refused(folder):
    path = folder / "member-1.safetensors"
    shutil.move(path, folder.parent / "outside.safetensors")
    path.symlink_to(folder.parent / "outside.safetensors")
    assert "leads out of the folder" in message_of(load_fitted, folder)


def test_a_member_that_is_not_listed_among_the_files_is_refused(folder):
    rewrite(folder, lambda about: about["files"].pop("member-1.safetensors"))
    assert "sha256 None is expected" in message_of(load_fitted, folder)


def test_tensors_that_do_not_fit_are_refused(folder):
    def swap(about):
        about["members"][0]["config"]["settings"]["n_tokens"] = 3
    rewrite(folder, swap)
    said = message_of(load_fitted, folder)
    assert "member-1.safetensors" in said and "tokens is expected as [5, 3, 96] and found as [5, 2, 96]" in said


def test_a_member_without_its_values_is_refused(folder):
    rewrite(folder, lambda about: about["members"][1].update(config={"module": "visual_prompt"}))
    assert "member-2.safetensors: it does not fit 'coft-phase1'" in message_of(load_fitted, folder)


def test_a_kind_that_nobody_knows_is_refused(folder):
    rewrite(folder, lambda about: about["members"][0].update(kind="pickle"))
    assert "'pickle' is not known" in message_of(load_fitted, folder)


def test_no_folder_and_an_empty_folder(tmp_path):
    assert "no such folder" in message_of(load_fitted, tmp_path / "none", kind=FileNotFoundError)
    assert "holds no saved result" in message_of(load_fitted, tmp_path, kind=FileNotFoundError)


def test_a_folder_that_is_a_file_is_refused(tmp_path, fit, clip, task):
    (tmp_path / "file").write_text("")
    assert "is a file" in message_of(save_fitted, tmp_path / "file", fit("zero-shot"), clip, task, 0)


# Size, open_clip, ONNX, hub

def test_phase_1_of_a_vit_b_16_stays_below_2_mb():
    "Both models of the paper's Phase I with 100 classes, counted on a model without numbers."
    with torch.device("meta"):
        net = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None, device="meta")
    clip = FrozenCLIP(net, None, "ViT-B-16-quickgelu", "openai", "")
    member = LightMember(clip, build_light_module("visual_prompt", clip), torch.zeros(100, 512))
    sizes = {k: v.numel() * v.element_size() for k, v in member.tensors().items()}
    assert sizes == {"head": 100 * 512 * 4, "module.tokens": 12 * 20 * 768 * 4}
    assert 2 * sum(sizes.values()) < 2e6


@pytest.mark.parametrize("name, more", [("coft", {"head_init": "text"}), ("coft", {"head_input": "pre_proj"}), ("coft-phase1", {"light_module": "lora"})])
def test_open_clip_loads_what_is_exported(name, more, fit, clip, task, tmp_path):
    fitted = fit(name, **more)
    for i, path in enumerate(export_open_clip(fitted, tmp_path)):
        net, head = open_clip.create_model("coft-embedded", pretrained=str(path)).eval(), load_file(tmp_path / f"head-{i + 1}.safetensors")
        untouched = [k for k in clip.model.state_dict() if not k.startswith("visual.")]
        assert all(torch.equal(net.state_dict()[k], clip.model.state_dict()[k]) for k in untouched)
        if "pre_proj" in more.values():
            net.visual.proj = None
        with torch.no_grad():
            v = net.encode_image(clip.normalize(task.test.batch(range(10), 24)), normalize="pre_proj" not in more.values())
        scores = v @ head["head"].T / clip.tau if "head" in head else v @ head["weight"].T + head["bias"]
        assert np.allclose(scores.softmax(-1), fitted.members[i](task.test)[:10], atol=1e-4)


def test_load_clip_loads_what_is_exported(tmp_path):
    clip = load_clip("photos", "random")
    module = build_light_module("lora", clip)
    for pair in module.pairs:
        torch.nn.init.normal_(pair.B, std=0.5, generator=torch.Generator().manual_seed(0))
    fitted = Fitted("coft-phase1", ["cat", "dog"], [LightMember(clip, module, torch.eye(2, clip.embed_dim))])
    again = load_clip("photos", str(export_open_clip(fitted, tmp_path)[0]))
    pixels = torch.rand(2, 3, clip.image_size, clip.image_size)
    expected = torch.nn.functional.normalize(module(clip.normalize(pixels)), dim=-1).detach()
    assert torch.allclose(again.image_features(pixels), expected, atol=1e-5) and not torch.allclose(clip.image_features(pixels), expected, atol=1e-2)


def test_only_towers_of_their_own_are_exported(fit, tmp_path):
    assert "open_clip loads by name" in message_of(export_open_clip, fit("zero-shot"), tmp_path)
    assert "further inputs of the attention" in message_of(export_open_clip, fit("coft-phase1"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["coft", "coft-phase1", "tip-adapter", "lafter"])
def test_onnx_says_what_torch_says(name, fit, task, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    fitted = fit(name)
    assert export_onnx(fitted, tmp_path / "model.onnx") < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    pixels = task.test.batch(range(7), 24).numpy().astype(np.float32) / 255
    assert np.allclose(session.run(None, {"pixels": pixels})[0], fitted.predict_proba(task.test)[:7], atol=1e-4)
    assert torch.backends.mha.get_fastpath_enabled()


def test_onnx_is_refused_where_there_is_no_graph(fit, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    assert "black box" in message_of(export_onnx, fit("craft"), tmp_path / "model.onnx")
    assert "depends on the others" in message_of(export_onnx, fit("transclip"), tmp_path / "model.onnx")
    monkeypatch.setattr("coft.saved.ONNX_TOLERANCE", -1.0)
    assert "nothing was written" in message_of(export_onnx, fit("zero-shot"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_says_what_to_install(fit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", types.ModuleType("onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert 'pip install "coft[onnx]"' in message_of(export_onnx, fit("zero-shot"), tmp_path / "model.onnx", kind=ImportError)


class Hub(BaseHTTPRequestHandler):
    "As much of a model hub as an upload and a download of small files ask for."
    files, created, protocol_version = {}, [], "HTTP/1.1"
    commit = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *args): pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self.answer({"url": f"{here}/somebody/toy", "id": "somebody/toy", "name": "somebody/toy"})
        if self.path.endswith("/preupload/main"):
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"success": True, "commitOid": self.commit, "commitUrl": f"{here}/somebody/toy/commit/{self.commit}", "hookOutput": ""})
        self.answer({"error": self.path}, 404)

    def do_GET(self):
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/somebody/toy/resolve/") and name in self.files:
            content = self.files[name]
            return self.answer(content, ETag=f'"{len(content)}-{name}"', X_Repo_Commit=self.commit)
        if path.startswith("/api/models/somebody/toy/tree/"):
            return self.answer([{"type": "file", "path": n, "size": len(c), "oid": f"{len(c)}-{n}"} for n, c in self.files.items()])
        if path.startswith("/api/models/somebody/toy"):
            return self.answer({"id": "somebody/toy", "sha": self.commit, "private": True, "disabled": False, "gated": False, "tags": [], "siblings": [{"rfilename": n} for n in self.files]})
        self.answer({"error": self.path}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "Address of a hub that runs here."
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Hub, "files", {"README.md": b"not asked for"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_result_goes_to_a_hub_and_comes_back(folder, hub, tmp_path, fit, clip, task):
    (folder / "notes.txt").write_text("private")
    assert Hub.commit in push_saved(folder, "somebody/toy", token="hf_x", endpoint=hub)
    assert sorted(Hub.files) == ["README.md", ABOUT, "fallback-1.safetensors", "member-1.safetensors", "member-2.safetensors", "records.jsonl"]
    assert Hub.created[-1].get("visibility") == "private" or Hub.created[-1]["private"] is True
    pulled = pull_saved("somebody/toy", tmp_path / "pulled", token="hf_x", endpoint=hub)
    assert not (pulled / "README.md").exists()
    assert (load_fitted(pulled, clip=clip).fitted.predict_all(task.test) == fit("coft-phase1").predict_all(task.test)).all()


def test_nothing_damaged_goes_to_a_hub_or_comes_from_it(folder, hub, tmp_path):
    push_saved(folder, "somebody/toy", token="hf_x", endpoint=hub)
    Hub.files["member-1.safetensors"] += b"x"
    assert "is expected" in message_of(pull_saved, "somebody/toy", tmp_path / "pulled", token="hf_x", endpoint=hub)
    (folder / "member-1.safetensors").write_bytes(b"")
    assert "is expected" in message_of(push_saved, folder, "somebody/toy", token="hf_x", endpoint=hub)
