"Light modules: they start as the tower was, learn alone, leave the tower as it was, merge where they can, and come back from a file."
import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from coft.adapters import LIGHT_MODULES, Adapter, LoRA, VisualPrompt, build_light_module, load_light_module, save_light_module
from coft.clip import FrozenCLIP, load_clip, weights_digest
from coft.core import torch_generator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FOR_RESNET = ("lora", "adapter")


def frozen(vision, name):
    "A small model of open_clip's classes with random weights, all of whose parts have an effect"
    torch.manual_seed(0)
    net = open_clip.CLIP(16, vision, dict(context_length=16, vocab_size=64, width=16, heads=2, layers=1), quick_gelu=True)
    with torch.no_grad():
        for key, p in net.named_parameters():
            if key.endswith("bn3.weight"):
                p.fill_(0.5)
            if key.endswith("in_proj_bias"):
                p.normal_(std=0.1)
    return FrozenCLIP(net, None, name, "random", weights_digest(net))


@pytest.fixture(scope="module")
def models(clip):
    "A transformer with layer scale, a ResNet, and the embedded model; nothing may change their weights"
    return {"vit": frozen(dict(image_size=32, patch_size=8, width=48, layers=3, head_width=16, ls_init_value=0.5), "vit"),
            "resnet": frozen(dict(image_size=64, layers=(2, 1, 1, 1), width=16, head_width=64), "resnet"), "embedded": clip}


CASES = [(name, kind) for name in ("vit", "resnet", "embedded") for kind in (FOR_RESNET if name == "resnet" else LIGHT_MODULES)]


@pytest.fixture(params=CASES, ids=["-".join(c) for c in CASES])
def case(request, models):
    name, kind = request.param
    return models[name], kind


def pixels_for(clip, n=2):
    return torch.randn(n, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(0))


def disturbed(module, seed=1, size=0.2):
    "The module with every number drawn anew, as if trained"
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return module


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() < tolerance * max(1, b.abs().max())


def test_start_is_the_identity_except_for_tokens(case):
    clip, kind = case
    plain = clip.model.visual(pixels_for(clip))
    found = build_light_module(kind, clip, seed=0)(pixels_for(clip))
    assert found.shape == plain.shape == (2, clip.embed_dim)
    assert close(found, plain) == (kind != "visual_prompt")


def test_only_the_module_learns(case):
    clip, kind = case
    module, before = disturbed(build_light_module(kind, clip, seed=0)), weights_digest(clip.model)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    F.normalize(module(pixels_for(clip)), dim=-1)[0, 0].backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in module.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in clip.model.parameters())
    optimizer.step()
    assert weights_digest(clip.model) == before
    assert module.n_trainable == sum(p.numel() for p in module.parameters()) == sum(v.numel() for v in module.state_dict().values())


@pytest.mark.parametrize("kind", FOR_RESNET)
def test_first_step_moves_the_zero_half(models, kind):
    module = build_light_module(kind, models["vit"], seed=0)
    module(pixels_for(models["vit"]))[0, 0].backward()
    zero = {n: p for n, p in module.named_parameters() if not p.any()}
    assert zero and any(p.grad.norm() > 0 for p in zero.values())


def test_seeds_differ_and_repeat(case):
    clip, kind = case
    one, again, other = (build_light_module(kind, clip, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert all(torch.equal(one[k], other[k]) == (not one[k].any()) for k in one)


def test_layers_start_from_different_numbers(models):
    a = [p.A for p in LoRA(models["vit"]).pairs]
    assert len(a) == 6 and not any(torch.equal(a[0], b) for b in a[1:])


def test_numbers_of_the_first_release_stay(clip):
    bound = (6 / (3 * 16 + 96)) ** 0.5
    expected = (2 * torch.rand(5, 20, 96, generator=torch_generator(3, "visual prompt")) - 1) * bound
    for prompt in (VisualPrompt(clip, seed=3), build_light_module("visual_prompt", clip, seed=3)):
        assert torch.equal(prompt.tokens, expected) and list(prompt.state_dict()) == ["tokens"]


def test_tower_is_itself_after_a_call_and_after_an_error(case):
    clip, kind = case
    plain, module = clip.model.visual(pixels_for(clip)), disturbed(build_light_module(kind, clip, seed=0))
    assert not close(module(pixels_for(clip)), plain)
    with pytest.raises(RuntimeError):
        module(pixels_for(clip)[:, :2])
    assert torch.equal(clip.model.visual(pixels_for(clip)), plain)
    with module.attached() as visual:
        assert close(visual(pixels_for(clip)), module_result := visual(pixels_for(clip))) and not close(module_result, plain)
    assert torch.equal(clip.model.visual(pixels_for(clip)), plain)
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in clip.model.modules())


def test_two_modules_on_one_model_do_not_disturb_each_other(case):
    clip, kind = case
    one, two = (disturbed(build_light_module(kind, clip, seed=s), seed=s) for s in (0, 1))
    first, second = one(pixels_for(clip)), two(pixels_for(clip))
    assert not close(first, second)
    assert torch.equal(one(pixels_for(clip)), first) and torch.equal(two(pixels_for(clip)), second)
    gradient = torch.autograd.grad(second[0, 0], list(two.parameters()), retain_graph=True)
    assert any(g.any() for g in gradient) and torch.autograd.grad(second[0, 0], list(one.parameters()), allow_unused=True) == (None,) * len(list(one.parameters()))


@pytest.mark.parametrize("kind", ["visual_prompt", "lora"])
def test_two_of_one_kind_at_once_stop(models, kind):
    clip = models["vit"]
    one, two = (build_light_module(kind, clip, seed=s) for s in (0, 1))
    with one.attached(), pytest.raises(ValueError, match="attached to this tower already"):
        two(pixels_for(clip))
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in clip.model.modules())


# What each change is, written out

def test_lora_on_a_transformer_is_a_change_of_queries_and_values(models):
    clip = models["vit"]
    lora = disturbed(LoRA(clip, rank=2, alpha=3.0))
    changed = dict(clip.model.visual.named_parameters())
    for i, (q, v) in enumerate(zip(lora.pairs[::2], lora.pairs[1::2])):
        rows = [1.5 * q.B @ q.A, torch.zeros(48, 48), 1.5 * v.B @ v.A]
        changed[f"transformer.resblocks.{i}.attn.in_proj_weight"] = changed[f"transformer.resblocks.{i}.attn.in_proj_weight"] + torch.cat(rows)
    assert close(lora(pixels_for(clip)), torch.func.functional_call(clip.model.visual, changed, (pixels_for(clip),)))


def test_lora_on_a_resnet_is_a_change_of_its_pointwise_convolutions(models):
    clip = models["resnet"]
    lora = disturbed(LoRA(clip, rank=2, alpha=3.0))
    changed, names = dict(clip.model.visual.named_parameters()), [f"layer{i}.{j}.conv{k}.weight" for i, n in enumerate((2, 1, 1, 1), 1) for j in range(n) for k in (1, 3)]
    assert len(names) == len(lora.pairs)
    for name, pair in zip(names, lora.pairs):
        changed[name] = changed[name] + 1.5 * (pair.B @ pair.A)[:, :, None, None]
    assert close(lora(pixels_for(clip)), torch.func.functional_call(clip.model.visual, changed, (pixels_for(clip),)))


def test_adapter_on_a_transformer_stands_behind_the_mlp(models):
    clip = models["vit"]
    adapter, visual = disturbed(Adapter(clip, width=4)), clip.model.visual
    x = visual._embeds(pixels_for(clip))
    for block, a in zip(visual.transformer.resblocks, adapter.blocks):
        x = x + block.ls_1(block.attention(block.ln_1(x)))
        h = block.mlp(block.ln_2(x))
        x = x + block.ls_2(h + (h @ a.down.T + a.down_bias).relu() @ a.up.T + a.up_bias)
    assert close(adapter(pixels_for(clip)), visual._pool(x)[0] @ visual.proj)


def test_adapter_on_a_resnet_stands_behind_every_block(models):
    clip = models["resnet"]
    adapter, visual = disturbed(Adapter(clip, width=4)), clip.model.visual
    x, blocks = visual.stem(pixels_for(clip)), iter(adapter.blocks)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        for block in layer:
            x, a = block(x), next(blocks)
            x = x + F.conv2d(F.conv2d(x, a.down[:, :, None, None], a.down_bias).relu(), a.up[:, :, None, None], a.up_bias)
    assert close(adapter(pixels_for(clip)), visual.attnpool(x))


def test_modules_of_different_kinds_work_together(models):
    clip = models["vit"]
    prompt, lora = disturbed(VisualPrompt(clip, 3)), disturbed(LoRA(clip))
    with lora.attached(), prompt.attached() as visual:
        both = visual(pixels_for(clip))
    merged = lora.merged()
    twin = FrozenCLIP(open_clip.CLIP(16, dict(image_size=32, patch_size=8, width=48, layers=3, head_width=16), dict(context_length=16, vocab_size=64, width=16, heads=2, layers=1)), None, "twin", "random", "")
    twin.model.visual = merged
    prompt.clip = twin
    assert close(both, prompt(pixels_for(clip)))


# Merging

@pytest.mark.parametrize("name", ["vit", "resnet", "embedded"])
def test_merged_tower_says_the_same(models, name):
    clip = models[name]
    lora, before = disturbed(LoRA(clip, rank=3)), weights_digest(clip.model)
    merged = lora.merged()
    assert close(merged(pixels_for(clip)), lora(pixels_for(clip))) and not close(merged(pixels_for(clip)), clip.model.visual(pixels_for(clip)))
    assert merged.state_dict().keys() == clip.model.visual.state_dict().keys() and weights_digest(clip.model) == before
    assert not any(p.requires_grad for p in merged.parameters()) and not merged.training
    assert close(lora(pixels_for(clip)), merged(pixels_for(clip))), "merging must not change the module"


def test_what_cannot_be_merged_says_why(models):
    for kind, why in (("visual_prompt", "inputs of the attention"), ("adapter", "ReLU")):
        with pytest.raises(ValueError, match=why):
            build_light_module(kind, models["vit"], seed=0).merged()
    lora = LoRA(models["vit"])
    with lora.attached(), pytest.raises(ValueError, match="attached to the tower"):
        lora.merged()


# Files

SIZES = dict(n_tokens=3, depth="shallow", rank=2, alpha=5.0, width=4)


def test_module_comes_back_from_its_file(case, tmp_path):
    clip, kind = case
    module = disturbed(build_light_module(kind, clip, seed=4, **SIZES))
    path = save_light_module(module, tmp_path / "module.safetensors")
    again = load_light_module(path, clip)
    assert type(again) is type(module) and again.settings == module.settings
    assert torch.equal(again(pixels_for(clip)), module(pixels_for(clip)))
    with safe_open(path, "pt") as file:
        fits = json.loads(file.metadata()["light_module"])
    assert (fits["kind"], fits["model"], fits["pretrained"], fits["weights_sha256"]) == (kind, clip.name, clip.pretrained, clip.weights_sha256)
    assert [p.name for p in tmp_path.iterdir()] == ["module.safetensors"]


def test_sizes_may_be_numbers_of_numpy(models, tmp_path):
    path = save_light_module(LoRA(models["vit"], rank=np.int64(2), alpha=np.float32(3)), tmp_path / "lora.safetensors")
    assert load_light_module(path, models["vit"]).settings == dict(rank=2, alpha=3.0)


def test_module_of_another_model_is_refused(models, tmp_path):
    path = save_light_module(LoRA(models["vit"]), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="made for 'vit'.*model: expected 'vit', found 'resnet'.*weights_sha256: expected"):
        load_light_module(path, models["resnet"])
    with pytest.raises(ValueError, match="weights_sha256: expected '.*', found '.*'") as error:
        load_light_module(path, frozen(dict(image_size=32, patch_size=8, width=48, layers=2, head_width=16), "vit"))
    assert "model: expected" not in str(error.value)


def test_damaged_files_are_refused(models, tmp_path):
    clip = models["vit"]
    path = save_light_module(LoRA(clip), tmp_path / "lora.safetensors")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path) | {"pairs.0.A": torch.zeros(7, 48)}, path, header)
    with pytest.raises(ValueError, match=r"pairs.0.A is expected as \[4, 48\] and found as \[7, 48\]"):
        load_light_module(path, clip)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no file of `save_light_module`"):
        load_light_module(path, clip)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no file of `save_light_module`"):
        load_light_module(path, clip)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_light_module(tmp_path / "gone.safetensors", clip)


# Wrong arguments

@pytest.mark.parametrize("kind, settings, match", [
    ("prompt", {}, "kind: 'prompt' is not known.*Allowed: visual_prompt, lora, adapter"),
    ("lora", dict(rank=0), "rank: 0 was given"), ("lora", dict(rank=49), "rank: 49 was given.*at most 48"), ("lora", dict(rank=2.5), "rank: 2.5"),
    ("lora", dict(alpha=0), "alpha: 0 was given"), ("adapter", dict(width=0), "width: 0 was given"),
    ("visual_prompt", dict(n_tokens=0), "n_visual: 0"), ("visual_prompt", dict(depth="medium"), "visual_depth: 'medium'"),
], ids=str)
def test_wrong_settings_are_named(models, kind, settings, match):
    with pytest.raises(ValueError, match=match):
        build_light_module(kind, models["vit"], seed=0, **settings)


def test_tokens_need_a_transformer(models):
    with pytest.raises(ValueError, match="'resnet' is a ModifiedResNet. Allowed for it: lora, adapter"):
        build_light_module("visual_prompt", models["resnet"], seed=0)


@pytest.mark.parametrize("kind", FOR_RESNET)
def test_towers_of_other_libraries_are_refused(kind):
    net = frozen(dict(image_size=32, patch_size=8, width=48, layers=1, head_width=16), "other").model
    net.visual = torch.nn.Conv2d(3, 3, 1)
    net.visual.image_size, net.visual.output_dim = 32, 3
    with pytest.raises(ValueError, match="'other' is a Conv2d"):
        build_light_module(kind, FrozenCLIP(net, None, "other", "random", ""), seed=0)


# Real sizes

@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "RN50-quickgelu"])
def test_real_towers(name, request):
    clip = request.getfixturevalue("vit") if name.startswith("ViT") else load_clip(name, "random")
    for key, p in clip.model.named_parameters():
        if key.endswith("bn3.weight"):  # zero in a fresh ResNet, which would hide its branches
            torch.nn.init.constant_(p, 0.2)
    pixels = pixels_for(clip, 1)
    plain, lora = clip.model.visual(pixels), LoRA(clip)
    assert close(lora(pixels), plain) and close(Adapter(clip)(pixels), plain)
    found = F.normalize(disturbed(lora, size=0.02)(pixels), dim=-1)
    assert not close(found, F.normalize(plain, dim=-1))
    found[0, 0].backward()
    assert lora.pairs[0].A.grad.norm() > 0 and not any(p.grad is not None for p in clip.model.parameters())
    assert close(F.normalize(lora.merged()(pixels), dim=-1), found)
    assert lora.n_trainable == (147456 if name.startswith("ViT") else 143104)
