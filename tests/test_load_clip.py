"Every kind of model and weights that load_clip takes, and what it says where it takes none."
import re
import warnings
from copy import deepcopy
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
import torch.nn.functional as F
from coft.clip import EMBEDDED, EMBEDDED_MODELS, PromptEncoder, load_clip, tokenize, weights_digest, zero_shot_head
from open_clip.pretrained import _PRETRAINED, _pcfg
from safetensors.torch import save_file

NAMES = ["cat", "a golden retriever puppy"]
TEXTS = [f"a photo of a {n}." for n in NAMES]


def refused(match, *args, **kwargs):
    "The message with which load_clip refuses"
    with pytest.raises(ValueError, match=match) as error:
        load_clip(*args, **kwargs)
    return str(error.value)


# Real architectures, random weights

@pytest.fixture(scope="module", params=["ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "RN50-quickgelu"])
def big(request):
    "A model of real size with random weights; nothing may change them."
    return load_clip(request.param, "random")


def test_both_towers_and_the_prompts_are_those_of_open_clip_and_only_prompts_learn(big):
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image, text, scale = big.model(big.normalize(pixels), open_clip.get_tokenizer(big.name)(TEXTS))
    assert big.image_size == 224 and image.shape == (1, big.embed_dim) == (1, {"ViT-L-14": 768, "RN50-quickgelu": 1024}.get(big.name, 512))
    assert (big.image_features(pixels) - image).abs().max() < 1e-5
    assert (big.text_features(TEXTS[:1]) - text[:1]).abs().max() < 1e-5
    assert big.tau == pytest.approx(1 / float(scale))
    words = big.tokenizer.encode("a photo of a")
    context = big.model.token_embedding(torch.tensor([words])).detach().requires_grad_()
    features = PromptEncoder(big, NAMES, len(words))(context)[0]
    assert (features - text).abs().max() < 1e-5
    features[0].sub(features[1]).pow(2).sum().backward()
    assert context.grad.norm() > 0
    assert not any(p.requires_grad or p.grad is not None for p in big.model.parameters())
    assert not any(m.training for m in big.model.modules())


def test_copy_of_the_image_tower_learns_and_the_original_does_not(big):
    if big.name == "ViT-L-14":
        pytest.skip("a copy of the largest tower with its gradients takes 2.4 GB and shows nothing that ViT-B/16 does not")
    copy = big.copy_visual()
    for name, p in copy.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.ones_(p)
    copy(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))).pow(2).sum().backward()
    without = [n for n, p in copy.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without and copy.conv1.weight.grad.norm() > 0
    assert not any(p.requires_grad or p.grad is not None for p in big.model.parameters())


def test_real_size_comes_back_from_a_filled_cache(big, tmp_path, monkeypatch):
    if big.name != "RN50-quickgelu":
        pytest.skip("one real size is enough; the layouts are shown on small models")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in big.model.state_dict().items()}
    save_file(weights, fill_cache(tmp_path, "timm/resnet50_clip.openai") / "open_clip_model.safetensors")
    clip = load_clip("RN50-quickgelu", "openai", cache_dir=tmp_path)
    assert (clip.name, clip.pretrained) == ("RN50-quickgelu", "openai") and clip.weights_sha256 != big.weights_sha256
    assert_holds(clip, weights)


# A small model under a name of open_clip's

VISION = {"tiny-vit": dict(image_size=32, patch_size=16, width=32, layers=2, head_width=16), "tiny-rn": dict(image_size=32, layers=[1, 1, 1, 1], width=8)}


@pytest.fixture(autouse=True, scope="module")
def tiny():
    "Small architectures, registered with open_clip in both activations."
    with pytest.MonkeyPatch.context() as patch:
        for name, vision in VISION.items():
            config = dict(embed_dim=16, vision_cfg=vision, text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=2))
            patch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
            patch.setitem(open_clip.factory._MODEL_CONFIGS, f"{name}-quickgelu", config | dict(quick_gelu=True))
            patch.setitem(_PRETRAINED, name, dict(plain=_pcfg(hf_hub=f"nobody/{name}/"), quick=_pcfg(hf_hub="nobody/q/", quick_gelu=True)))
            patch.setitem(_PRETRAINED, f"{name}-quickgelu", dict(quick=_pcfg(url="https://nowhere.invalid/quick.pt", hf_hub="nobody/q/", quick_gelu=True)))
        yield


@pytest.fixture(scope="module", params=VISION)
def net(request, tiny):
    "A small open_clip model in OpenAI's activation, as if trained."
    torch.manual_seed(5)
    net = open_clip.create_model(f"{request.param}-quickgelu").eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "bn3.weight" in name:
                p.fill_(0.5)
    net.given_name = request.param
    return net


def fill_cache(folder, repository):
    "The folder of one revision in the layout of the hub's cache"
    root = folder / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("0" * 40)
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def assert_holds(clip, weights):
    "The model holds these numbers in single precision, frozen"
    found = clip.model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], v.to(found[k].dtype)) for k, v in weights.items())
    assert all(v.dtype == torch.float32 for v in clip.model.parameters()) and not any(p.requires_grad for p in clip.model.parameters())


def archive(net, path):
    "OpenAI's file: a TorchScript archive with three numbers beside the weights"
    net = deepcopy(net)
    del net.context_length, net.vocab_size
    for k, v in numbers(net).items():
        net.register_buffer(k, v)
    torch.jit.save(torch.jit.trace_module(net, dict(encode_image=torch.zeros(1, 3, 32, 32)), check_trace=False), path)


def numbers(net):
    return dict(input_resolution=torch.tensor(32), context_length=torch.tensor(16), vocab_size=torch.tensor(49408))


LAYOUTS = {
    "training.pt": lambda net, path: torch.save({"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "optimizer": {"state": {}}}, path),
    "compiled.pt": lambda net, path: torch.save({"state_dict": {f"module._orig_mod.{k}": v for k, v in net.state_dict().items()}}, path),
    "plain.bin": lambda net, path: torch.save(net.state_dict(), path),
    "plain.safetensors": lambda net, path: save_file(net.state_dict(), path),
    "half.pt": lambda net, path: torch.save({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, path),
    "scale.pt": lambda net, path: torch.save(net.state_dict() | dict(logit_scale=net.logit_scale.detach()[None]), path),
    "openai_state.pt": lambda net, path: torch.save(net.state_dict() | numbers(net), path),
    "openai_archive.pt": archive,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_checkpoint_comes_back(net, layout, tmp_path):
    LAYOUTS[layout](net, tmp_path / layout)
    clip = load_clip(f"{net.given_name}-quickgelu", tmp_path / layout)
    half = (lambda v: v.half() if v.is_floating_point() else v) if layout == "half.pt" else (lambda v: v)
    assert_holds(clip, {k: half(v) for k, v in net.state_dict().items()})
    assert clip.pretrained == str(tmp_path / layout) and clip.weights_sha256 == weights_digest(clip.model)
    if layout != "half.pt":
        pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        image, text, _ = net(clip.normalize(pixels), open_clip.get_tokenizer(net.given_name)(TEXTS))
        assert torch.allclose(clip.image_features(pixels), image, atol=1e-5) and torch.allclose(clip.text_features(TEXTS), text, atol=1e-5)


@pytest.mark.parametrize("layout", ["openai_state.pt", "openai_archive.pt"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_openai_checkpoint_needs_its_activation(net, layout, tmp_path):
    LAYOUTS[layout](net, tmp_path / layout)
    assert f"use '{net.given_name}-quickgelu'" in refused("activation", net.given_name, tmp_path / layout)


def test_pixel_statistics_of_a_checkpoint(net, tmp_path):
    path, name = tmp_path / "w.safetensors", f"{net.given_name}-quickgelu"
    save_file(net.state_dict(), path)
    clip = load_clip(name, path, mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.3))
    assert clip.mean.flatten().tolist() == pytest.approx([0.5] * 3) and clip.std.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    refused("three numbers", name, path, mean=0.5)
    refused("only a local checkpoint", name, "random", std=(0.1, 0.2, 0.3))


def test_shapes_that_do_not_fit_are_named(net, tmp_path):
    path, name = tmp_path / "other.pt", f"{net.given_name}-quickgelu"
    state = net.state_dict() | {"text_projection": torch.zeros(32, 24)}
    torch.save(state, path)
    message = refused("1 shapes differ", name, path)
    assert "text_projection is expected as [32, 16] and found as [32, 24]" in message and name in message and str(path) in message
    state.pop("ln_final.bias")
    torch.save(state | {"logit_bias": torch.zeros(1)}, path)
    message = refused("expected are missing: ln_final.bias", name, path)
    assert re.search(r"1 of the \d+ tensors found are unknown: logit_bias", message)


def test_position_embeddings_are_not_stretched(net, tmp_path):
    name = "visual.positional_embedding" if "vit" in net.given_name else "visual.attnpool.positional_embedding"
    torch.save(net.state_dict() | {name: torch.zeros(17, net.state_dict()[name].shape[1])}, tmp_path / "larger.pt")
    assert f"{name} is expected as" in refused("shapes differ", f"{net.given_name}-quickgelu", tmp_path / "larger.pt")


@pytest.mark.parametrize("content, match", [
    (lambda path: path.write_bytes(b"no weights"), "cannot be read as a checkpoint"),
    (lambda path: torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Path("x")}, path), "a state dict of tensors alone"),
    (lambda path: torch.save([1, 2], path), "cannot be read as a checkpoint"),
    (lambda path: torch.save({"vision_model.x": torch.zeros(1)}, path), "layout of transformers"),
], ids=["bytes", "objects", "list", "transformers"])
def test_a_file_that_is_no_checkpoint(content, match, tmp_path):
    content(tmp_path / "file.pt")
    assert str(tmp_path / "file.pt") in refused(match, "tiny-vit", tmp_path / "file.pt")


# Tags, caches and downloads

def test_filled_cache_works_offline(net, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.save(net.state_dict(), fill_cache(tmp_path, f"nobody/{net.given_name}") / "open_clip_pytorch_model.bin")
    clip = load_clip(net.given_name, "plain", cache_dir=tmp_path)
    assert_holds(clip, net.state_dict())
    assert clip.pretrained == "plain"


def test_failed_download_says_how_to_get_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused("by hand", "tiny-vit-quickgelu", "quick", cache_dir=tmp_path)
    for part in ("'quick'", "'tiny-vit-quickgelu'", str(tmp_path), "https://huggingface.co/nobody/q", "https://nowhere.invalid/quick.pt", "`pretrained`", "`cache_dir`"):
        assert part in message
    message = refused("by hand", "ViT-L-14", "laion2b_s32b_b82k", cache_dir=tmp_path)
    assert "mean=(0.5, 0.5, 0.5)" in message and "laion/CLIP-ViT-L-14-laion2B-s32B-b82K" in message


def test_weights_of_a_tag_that_do_not_fit(net, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    save_file({"x": torch.zeros(1)}, fill_cache(tmp_path, f"nobody/{net.given_name}") / "open_clip_model.safetensors")
    refused("were found, but do not fit", net.given_name, "plain", cache_dir=tmp_path)


def test_cache_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    refused("cache_dir: .* is a file", "tiny-vit", "plain", cache_dir=tmp_path / "file")


ACTIVATION = [("ViT-B-32", "openai"), ("ViT-B-32", "laion400m_e32"), ("ViT-B-16", "dfn2b"), ("ViT-L-14", "metaclip_400m"), ("ViT-H-14-378", "dfn5b"), ("RN50", "openai"), ("RN101", "yfcc15m"), ("RN50x64", "openai")]


@pytest.mark.parametrize("model, tag", ACTIVATION, ids=str)
def test_weights_of_another_activation_are_refused(model, tag):
    assert f"use '{model}-quickgelu'" in refused("activation", model, tag)


def test_every_tag_either_has_its_activation_or_is_refused():
    supported = [m for m in open_clip.list_models() if not m.startswith(("coft-", "tiny-")) and not unsupported(m)]
    assert len(supported) > 35
    for model in supported:
        quick = open_clip.get_model_config(model).get("quick_gelu", False)
        for tag in open_clip.list_pretrained_tags_by_model(model):
            if open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False) != quick:
                refused("activation", model, tag)


def unsupported(model):
    with pytest.raises(ValueError) as error:
        load_clip(model)
    return "is not supported" in str(error.value)


@pytest.mark.parametrize("model, family", [("ViT-B-16-SigLIP", "SigLIP"), ("ViT-B-16-SigLIP2", "SigLIP"), ("coca_ViT-B-32", "CoCa"), ("roberta-ViT-B-32", "text tower comes from Hugging Face"), ("convnext_base", "timm"),
                                           ("EVA02-B-16", "timm"), ("MobileCLIP-S1", "timm"), ("ViT-L-14-CLIPA", "tokenizer"), ("ViT-H-14-worldwide-quickgelu", "tokenizer"), ("PE-Core-B-16", "timm")])
def test_unsupported_towers_are_refused_by_name(model, family):
    message = refused("is not supported", model, "random")
    assert repr(model) in message and family in message


def test_wrong_tag_lists_only_tags_that_work():
    message = refused("neither a file nor a tag", "ViT-B-32", "laion")
    own, other = message.split("(and for 'ViT-B-32-quickgelu':")
    assert "laion2b_s34b_b79k" in own and "openai" in other and "openai" not in own
    assert "openai, yfcc15m, cc12m" in refused("neither a file nor a tag", "RN50", "laion")


def test_a_file_named_like_a_tag_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("openai").write_text("x")
    refused("activation", "ViT-B-32", "openai")


@pytest.mark.parametrize("given", [3, None, True, ["openai"]], ids=str)
def test_pretrained_of_another_kind(given):
    refused("pretrained: .* was given for 'ViT-B-32'", "ViT-B-32", given)


# The embedded models

@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_embedded_models(name):
    clip = load_clip(name)
    assert (clip.name, clip.pretrained, clip.image_size, clip.preset) == (name, "fonts", 24, "embedded")
    assert load_clip(name, "random").weights_sha256 != clip.weights_sha256
    assert sum(p.numel() for p in clip.model.parameters()) < 2e6
    head = zero_shot_head(clip, ["digit one", "digit two"], "a photo of the {}.")
    assert head.shape == (2, clip.embed_dim)
    refused("'fonts', 'random'", name, "openai")
    with pytest.raises(ValueError, match="mean: only a local checkpoint"):
        load_clip(name, mean=(0, 0, 0))
    assert (EMBEDDED / f"coft-{name}.safetensors").stat().st_size < 4e6


def test_the_larger_embedded_model_is_larger():
    small, large = (sum(p.numel() for p in load_clip(m).model.visual.parameters()) for m in EMBEDDED_MODELS)
    assert large > 1.5 * small


def test_configurations_of_the_package_are_not_offered_twice():
    load_clip("embedded")
    assert "coft-embedded" not in refused("not known", "coft-embedded", "random").split("Allowed:")[1]


# Texts

LONG = "a photo of the digit three, " * 12 + "bold."


def test_long_text_is_an_error_unless_cut_is_asked_for(clip):
    with pytest.raises(ValueError, match="would be cut, the first being"):
        clip.text_features(["digit one", LONG])
    with pytest.raises(ValueError, match="long_texts: 'trim' is not known. .*Allowed: error, cut"):
        tokenize(clip.tokenizer, ["digit one"], "trim")


def test_cut_text_is_its_beginning_and_one_warning_counts(clip):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = clip.text_features(["digit one", LONG, "digit two, " * 40], long_texts="cut")
    assert len(caught) == 1 and "2 of 3 texts" in str(caught[0].message) and repr(LONG[:77] + "...") in str(caught[0].message)
    ids = clip.tokenizer.encode(LONG)[:clip.tokenizer.context_length - 2]
    tokens = torch.tensor([[clip.tokenizer.sot_token_id, *ids, clip.tokenizer.eot_token_id]])
    assert torch.allclose(found[1], F.normalize(clip.model.encode_text(tokens), dim=-1)[0], atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(found[0], clip.text_features(["digit one"], long_texts="cut")[0], atol=1e-6)


def test_cut_tokens_are_those_of_open_clip(big_tokenizer):
    text = "a very long description " * 30
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        assert torch.equal(tokenize(big_tokenizer, [text], "cut"), big_tokenizer([text]))


@pytest.fixture
def big_tokenizer():
    return open_clip.get_tokenizer("ViT-B-32")


def test_head_from_descriptions(clip):
    written = {"digit_three": ["a photo of the digit three.", "two loops, open to the left."], "digit one ": ["a photo of the digit one."], "digit nine": ["never used"]}
    head = zero_shot_head(clip, ["digit one", "digit three"], {k: v for k, v in written.items() if k != "digit nine"})
    for row, key in zip(head, ("digit one ", "digit_three")):
        mean = clip.text_features(written[key]).mean(0)
        assert torch.allclose(row, F.normalize(mean, dim=-1), atol=1e-6)


def test_head_with_long_descriptions_warns_once(clip):
    written = {"digit three": [LONG, "a photo of the digit three."], "digit one": [LONG]}
    with pytest.raises(ValueError, match="2 text"):
        zero_shot_head(clip, ["digit one", "digit three"], written)
    with pytest.warns(UserWarning, match="2 of 3 texts") as caught:
        assert zero_shot_head(clip, ["digit one", "digit three"], written, long_texts="cut").shape == (2, clip.embed_dim)
    assert len(caught) == 1


@pytest.mark.parametrize("descriptions, match", [
    ({"digit one": ["a line."]}, "1 of 2 classes have no descriptions, the first being 'digit two'"),
    ({"digit one": ["a line."], "digit two": []}, "whole sentences .* 'digit two'"),
    ({"digit one": ["a line."], "digit two": "a loop."}, "whole sentences .* 'digit two'"),
    ({"digit one": ["a line."], "digit two": ["a {}."]}, "whole sentences .* 'digit two'"),
    ({"digit one": ["a line."], "digit two": [3]}, "whole sentences .* 'digit two'"),
    ({"digit one": ["a line."], "digit two": 3}, "whole sentences .* 'digit two'"),
    ({}, "2 of 2 classes"),
], ids=str)
def test_descriptions_that_cannot_be_used(clip, descriptions, match):
    with pytest.raises(ValueError, match=match):
        zero_shot_head(clip, ["digit one", "digit two"], descriptions)


@pytest.mark.parametrize("model", ["ViT-H-14-quickgelu", "ViT-H-14-378-quickgelu"])
def test_weights_of_squashed_images_are_refused(model):
    with pytest.raises(ValueError, match=r"'dfn5b'.*resized by 'squash'.*Use other weights"):
        load_clip(model, "dfn5b")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=r"device: .* was given, and torch cannot use it here.*'cpu'"):
        load_clip(device=device)


def test_a_home_folder_is_expanded_and_pixel_spread_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    net = load_clip("RN50", "random").model
    torch.save(net.state_dict(), tmp_path / "w.pt")
    assert load_clip("RN50", "~/w.pt").model_sha256 != load_clip("RN50", "~/w.pt", std=(0.2, 0.2, 0.2)).model_sha256
    with pytest.raises(ValueError, match=r"std: \(0, 0, 0\) was given; numbers above 0"):
        load_clip("RN50", "~/w.pt", std=(0, 0, 0))
