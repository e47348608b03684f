"What is computed in another way says the same: each shortcut against the slow path that it replaces, in double precision, and what it saves by counting."
import pickle
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import combinations, islice, permutations, product
from string import ascii_lowercase

import coft.filtering
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from coft.adapters import LIGHT_MODULES, build_light_module
from coft.blackbox import BlackBoxVLM, Pictures
from coft.clip import (MOST_HEADS, Compute, DirectAttention, FrozenCLIP, PromptEncoder, build_embedded, has_bf16, in_parts, load_clip,
                       parts_by_length, text_bytes, tokenize, weights_digest, zero_shot_head)
from coft.collaborate import CoFTPlusSettings, CoFTSettings, PromptedModel, contrast_views, first_labels, similarities
from coft.contrast import MomentumContrast
from coft.data import ArrayImages
from coft.filtering import frozen_features
from coft.members import LightMember
from coft.ours import CoFTXSettings, RunnerUpModel
from coft.prompts import L2_GRAD
from coft.protocol import Run
from coft.trainer import EncoderWithHead, Schedule, train
from helpers import message_of
from open_clip.transformer import ResidualAttentionBlock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

NAMES = ["digit three", "small letter b", "a large and slanted capital letter q", "seven", "the digit two", "letter a", "capital letter d"]
TIGHT = 1e-12


@pytest.fixture
def exact(clip):
    "The embedded model in double precision."
    return FrozenCLIP(deepcopy(clip.model).double(), clip.tokenizer, clip.name, clip.pretrained, clip.weights_sha256, clip.mean.flatten().tolist(), clip.std.flatten().tolist(), clip.preset)


@pytest.fixture
def prompts(exact):
    "An encoder of names of unequal lengths, and two sets of context."
    return PromptEncoder(exact, NAMES, 4), torch.randn(2, 4, exact.model.transformer.width, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 0.02


def small_clip(vision=None, tokenizer=None, **text):
    "A model of open_clip's classes with random weights"
    torch.manual_seed(0)
    text = dict(context_length=tokenizer.context_length if tokenizer else 8, vocab_size=len(tokenizer.kept) if tokenizer else 8, width=32, heads=2, layers=2) | text
    net = open_clip.CLIP(16, vision or dict(image_size=16, patch_size=8, width=16, layers=1, head_width=8), text, quick_gelu=True)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bn3.weight"):
                p.fill_(0.5)
    return FrozenCLIP(net.double(), tokenizer, "small", "random", weights_digest(net))


def with_gradient(encode, leaf):
    leaf = leaf.clone().requires_grad_()
    out = encode(leaf)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaf)[0]


def assert_same(found, expected, tolerance=TIGHT):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and b.abs().max() > 0 and (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def kept_bytes(function, model):
    "Bytes that autograd keeps of a call, the weights of the model aside, and what the call returned"
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights), out


def flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def called(monkeypatch, owner, name):
    "The arguments of every call of a method from here on"
    calls, method = [], getattr(owner, name)

    def remembered(self, *args, **kwargs):
        calls.append(args)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, remembered)
    return calls


WAYS = {
    "shared prefix": lambda encoder: encoder,
    "cut": lambda encoder: encoder.cut,
    "each": lambda encoder: lambda context: torch.stack([one() for one in encoder.each(context)]),
}


@pytest.mark.parametrize("memory", [2.0, 2e-3, 1e-4], ids=["at once", "some of it again", "all of it again"])
@pytest.mark.parametrize("way", WAYS)
def test_prompts_are_encoded_as_the_plain_way_does(exact, prompts, way, memory):
    encoder, context = prompts
    slow = with_gradient(encoder.plain, context)
    exact.compute = Compute(text_memory=memory)
    assert_same(with_gradient(WAYS[way](encoder), context), slow)


def test_names_of_like_length_are_taken_together(prompts, monkeypatch):
    encoder, context = prompts
    at_once = flops(encoder, context)
    monkeypatch.setitem(encoder.forward.__globals__["PART_EFFORT"], "cpu", 1)
    assert_same(with_gradient(encoder, context), with_gradient(encoder.plain, context))
    assert flops(encoder, context) < 0.8 * at_once, "the longest of seven names has three times the tokens of most"


def test_context_of_its_own_for_every_class(prompts):
    encoder, _ = prompts
    context = torch.randn(2, len(NAMES), 4, encoder.start.shape[-1], generator=torch.Generator().manual_seed(2), dtype=torch.double) * 0.02
    slow = with_gradient(encoder.plain, context)
    assert_same(with_gradient(encoder, context), slow)
    assert_same([encoder.plain(context[:, k].contiguous(), torch.tensor([k]))[:, 0] for k in range(2)], [slow[0][:, k] for k in range(2)])
    classes = torch.tensor([5, 2])
    assert_same([encoder(context, classes), encoder.each(context)[1](classes)], [slow[0][:, classes], slow[0][1, classes]])


def test_where_tokens_look_ahead_nothing_is_cut(clip):
    ahead = small_clip(tokenizer=clip.tokenizer, no_causal_mask=True)
    words = clip.tokenizer.encode("a photo of the")
    encoder, context = PromptEncoder(ahead, NAMES, len(words)), ahead.model.token_embedding(torch.tensor([words])).detach()
    expected = F.normalize(ahead.model.encode_text(tokenize(clip.tokenizer, [f"a photo of the {n}." for n in NAMES])), dim=-1)
    assert not ahead.causal
    assert_same([encoder(context)[0], encoder.each(context)[0](), ahead.text_features([f"a photo of the {n}." for n in NAMES])], [expected] * 3)
    assert (encoder.cut(context)[0] - expected).abs().max() > 1e-3, "the padding is seen, so cutting it off changes the features"


def test_a_tower_that_is_read_elsewhere_is_refused(clip):
    assert "read at 'last'" in message_of(PromptEncoder, small_clip(tokenizer=clip.tokenizer, pool_type="last"), NAMES, 4)


@pytest.mark.parametrize("memory", [2.0, 1e-4])
def test_texts_are_encoded_as_open_clip_does(exact, memory):
    exact.compute = Compute(text_memory=memory)
    texts = [f"a photo of the {n}." for n in NAMES]
    expected = F.normalize(exact.model.encode_text(tokenize(exact.tokenizer, texts)), dim=-1)
    assert_same([exact.text_features(texts)], [expected])
    assert flops(exact.text_features, texts) < 0.7 * flops(exact.model.encode_text, tokenize(exact.tokenizer, texts))
    described = {n: [f"a photo of the {n}.", f"the {n}."][:1 + i % 2] for i, n in enumerate(NAMES)}
    one_by_one = [F.normalize(exact.text_features(described[n]).mean(0), dim=-1) for n in NAMES]
    assert_same([zero_shot_head(exact, NAMES, described)], [torch.stack(one_by_one)])


def test_no_cut_of_the_lengths_is_cheaper():
    rng = np.random.default_rng(0)
    for effort in (0, 3, 10, 100):
        lengths = rng.integers(1, 9, size=12)
        ranked = sorted(lengths)
        cuts = [(0, *inner, 12) for k in range(12) for inner in combinations(range(1, 12), k)]
        cheapest = min(sum(effort + (j - i) * ranked[j - 1] for i, j in zip(cut, cut[1:])) for cut in cuts)
        parts = parts_by_length(torch.tensor(lengths), 1e9, effort)
        assert sum(effort + len(p) * lengths[p].max() for p in parts) == cheapest
        assert sorted(torch.cat(parts).tolist()) == list(range(12))


def test_imagenet_needs_a_third_of_its_padding():
    encode = open_clip.SimpleTokenizer().encode
    lengths = torch.tensor([len(encode(f"{n}.")) + 1 for n in open_clip.IMAGENET_CLASSNAMES])
    parts = parts_by_length(lengths, 1e9, 64)
    assert (len(lengths), int(lengths.max())) == (1000, 13)
    assert 3 * sum(len(p) * int(lengths[p].max()) for p in parts) < 13_000 and len(parts) < 8


@pytest.mark.parametrize("sets", [1, 2])
def test_memory_for_the_gradient_is_what_the_law_says(exact, sets):
    names = [f"{kind} {letter}" for kind in ("digit", "letter", "small letter", "capital letter") for letter in "abcdefgh"]
    encoder = PromptEncoder(exact, names, 16)
    leaf = torch.zeros(sets, 16, encoder.start.shape[-1], dtype=torch.double).requires_grad_()
    law = lambda classes: text_bytes(exact.model, sets * classes * encoder.length, 17 + encoder.length, learns=True)
    shared, _ = kept_bytes(lambda: encoder._prefix(leaf), exact.model)
    kept, _ = kept_bytes(lambda: encoder(leaf), exact.model)
    assert 0.5 * law(len(names)) < kept - shared < law(len(names))

    exact.compute = Compute(text_memory=law(16) / 2**30)
    half, _ = kept_bytes(lambda: encoder(leaf), exact.model)
    assert 0.5 * law(8) < half - shared < law(12), "three quarters of the memory are filled, and what is computed again keeps next to nothing"
    parts = []
    in_parts(exact, lambda part, length: parts.append(len(part)) or torch.zeros(len(part), 1), encoder.lengths, sets, True, 17)
    assert sum(parts) == len(names) and max(parts) <= 4, "and has at most a quarter of it when its turn comes"


def test_21_000_classes_keep_what_was_stated_for_their_texts_and_learn(clip):
    many = small_clip(tokenizer=clip.tokenizer)
    encoder = PromptEncoder(many, [f"{kind} {' '.join(letters)}" for kind in ("letter", "digit") for letters in product(ascii_lowercase, repeat=3)][:21_000], 4)
    leaf = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_()
    wanted = text_bytes(many.model, 21_000 * encoder.length, 5 + encoder.length, learns=True)
    many.compute = Compute(text_memory=wanted / 20 / 2**30)
    kept, out = kept_bytes(lambda: encoder(leaf), many.model)
    assert out.shape == (1, 21_000, 16)
    assert 0.3 * wanted / 20 < kept < wanted / 20 + 2 * out.nbytes, "beside the stated memory there are the features"
    assert torch.autograd.grad(out[0, -1].sum(), leaf)[0].abs().max() > 0, "the last part is one that is computed again"


@pytest.mark.parametrize("l2_grad", L2_GRAD)
@pytest.mark.parametrize("kind", [PromptedModel, RunnerUpModel])
def test_negative_prompts_of_a_batch_alone(exact, monkeypatch, kind, l2_grad):
    settings = (CoFTXSettings if kind is RunnerUpModel else CoFTSettings)(n_context=4, n_visual=2, l2_grad=l2_grad, l2_weight=0.7)
    model = kind(exact, NAMES, settings, seed=0)
    model.prompt.double(), model.visual.double()
    pixels = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    batch = dict(label=torch.tensor([1, 1, 5]), u=torch.tensor([0.1, 0.1, 0.8], dtype=torch.double))
    found = {}
    for name in ("losses_together", "losses_apart"):
        v = model.image_features(pixels)
        losses = getattr(model, name)(v, **batch)
        found[name] = [torch.stack(losses).detach(), *torch.autograd.grad(losses[0] + 0.7 * losses[1], [model.prompt.context, model.visual.tokens])]
    assert_same(found["losses_apart"], found["losses_together"])

    asked = called(monkeypatch, PromptEncoder, "_named")
    loss = model(pixels, **batch)["loss"]
    assert loss.item() == pytest.approx((found["losses_together"][0] @ torch.tensor([1, 0.7], dtype=torch.double)).item(), abs=TIGHT)
    complement = model.complement(batch["label"], (v @ model.prompt()[0].T).detach(), batch["u"])
    assert asked[0][0] is None and set(asked[1][0].tolist()) == {1, 5, *complement.tolist()}
    del asked[:]
    model(pixels[[0, 1, 2, 0]], label=torch.tensor([1, 2, 3, 4]), u=torch.zeros(4))
    assert [a[:2] for a in asked] == [(None, 2)], "8 labels of 7 classes: both prompts of all classes in one pass"


def test_both_models_look_at_an_image_once(clip, task, monkeypatch):
    models = [PromptedModel(clip, task.class_names, CoFTSettings(n_context=4, n_visual=2, light_module=kind), seed) for seed, kind in enumerate(("visual_prompt", "lora"))]
    with torch.no_grad():
        for p in models[1].visual.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    expected = []
    for m in models:
        v = m.image_features(task.unlabelled.batch(range(72), clip.image_size)).detach()
        expected.append([(v @ t.T).detach() for t in m.prompt()])
    read = called(monkeypatch, ArrayImages, "batch")
    views = similarities(models, task.unlabelled)
    assert [len(index) for index, *_ in read] == [72]
    for view, (positive, negative) in zip(views, expected):
        assert_same([torch.from_numpy(view.positive), torch.from_numpy(view.negative)], [positive, negative], 1e-5)


def test_frozen_features_are_computed_once(clip, task, monkeypatch):
    images = ArrayImages(task.unlabelled.pixels.copy())
    looked = called(monkeypatch, FrozenCLIP, "image_features")
    some = replace(task.blind(), unlabelled=images)
    found = [first_labels(clip, some, t)[0] for t in ("coop", "single", "coop")]
    assert len(looked) == 1 and (found[0] == found[2]).all() and (found[0] != found[1]).any()
    slow = clip.image_features(images.batch(range(72), clip.image_size))
    assert torch.equal(frozen_features(clip, images), slow)
    kept, mine = len(coft.filtering._FEATURES[clip]), Mine(images.pixels)
    assert torch.equal(frozen_features(clip, mine), slow) and frozen_features(clip, mine) is frozen_features(clip, mine)
    assert len(coft.filtering._FEATURES[clip]) == kept + 1
    del mine, looked[:]
    assert len(coft.filtering._FEATURES[clip]) == kept, "features leave with their images"
    monkeypatch.setattr("coft.filtering.KEEP_FEATURES", 10)
    other = ArrayImages(images.pixels[:5])
    assert torch.equal(frozen_features(clip, other), frozen_features(clip, other)) and len(looked) == 2, "too many to be kept"


def test_what_was_computed_once_does_not_outlive_the_weights(exact, task, monkeypatch):
    encoded = called(monkeypatch, FrozenCLIP, "token_features")
    heads = [zero_shot_head(exact, task.class_names, t) for t in (task.template, "the {}.", task.template)]
    assert len(encoded) == 2 and torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])
    heads[0].zero_()
    assert zero_shot_head(exact, task.class_names, task.template).any(), "what a caller does to its head stays with it"
    for names in islice(permutations(task.class_names), 1, MOST_HEADS + 1):
        zero_shot_head(exact, names, "the {}.")
    before = len(encoded)
    zero_shot_head(exact, names, "the {}.")
    assert len(encoded) == before, "the latest head is kept"
    zero_shot_head(exact, task.class_names, "the {}.")
    assert len(encoded) == before + 1, "and the oldest are not"
    images = Floats(torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.double))
    features = frozen_features(exact, images)
    with torch.no_grad():
        exact.model.text_projection.mul_(-1)
        exact.model.visual.proj.mul_(-1)
    assert_same([zero_shot_head(exact, task.class_names, task.template), frozen_features(exact, images)], [-heads[2], -features])


class Floats:
    "An image set of floats as they are"
    def __init__(self, pixels): self.pixels = pixels
    def __len__(self): return len(self.pixels)
    def batch(self, index, size, whole=False): return self.pixels[torch.as_tensor(index)]


@dataclass
class Mine:
    "An image set of the user's, which has no hash"
    pixels: np.ndarray

    def __len__(self): return len(self.pixels)
    def batch(self, index, size, whole=False): return ArrayImages(self.pixels).batch(index, size, whole)



def test_lora_is_merged_for_prediction(clip, task):
    module = build_light_module("lora", clip)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    member = LightMember(clip, module, zero_shot_head(clip, task.class_names, task.template))
    pixels = task.test.batch(range(40), clip.image_size)
    with torch.no_grad():
        slow = member.logits(pixels).softmax(-1)
        member.module = replace_forward(module)
        assert_same([torch.from_numpy(member(task.test))], [slow], 1e-5)


def replace_forward(module):
    "The module, whose own slow way now fails"
    module.forward = lambda pixels: pytest.fail("LoRA was computed beside the weights")
    return module


@pytest.mark.parametrize("kind", LIGHT_MODULES)
def test_blocks_that_are_computed_again_say_the_same(exact, kind):
    module = build_light_module(kind, exact, n_tokens=3).double()
    pixels = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    found = {}
    for again in (False, True):
        exact.compute = Compute(image_checkpoints=again)
        kept, out = kept_bytes(lambda: module(pixels), exact.model)
        found[again] = kept, [out.detach(), *torch.autograd.grad(out.square().sum(), list(module.parameters()))]
    assert_same([g for g in found[True][1] if g.any()], [g for g in found[False][1] if g.any()])
    assert found[True][0] < 0.25 * found[False][0]
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in exact.model.visual.modules()), "the backward pass left something attached"


def test_a_tower_to_fine_tune_is_computed_as_asked(exact):
    pixels = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    found = {}
    for how in (Compute(), Compute(image_checkpoints=True), Compute(compiled="eager")):
        exact.compute = how
        visual = exact.copy_visual()
        kept, out = kept_bytes(lambda: visual(pixels), visual)
        found[how] = kept, [out.detach(), *torch.autograd.grad(out.square().sum(), list(visual.parameters()))]
        assert visual.state_dict().keys() == exact.model.visual.state_dict().keys()
        assert torch.equal(deepcopy(visual)(pixels), out.detach())
    plain, again, compiled = found.values()
    assert_same(again[1], plain[1])
    assert_same(compiled[1], plain[1])
    assert again[0] < 0.25 * plain[0]


def test_a_resnet_in_another_layout(clip):
    resnet = small_clip(dict(image_size=32, layers=(1, 1, 1, 1), width=8, head_width=16))
    pixels, before = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.double), weights_digest(resnet.model)
    plain = with_gradient(resnet.copy_visual(), pixels)
    resnet.compute = Compute(channels_last=True)
    assert resnet.model.visual.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last) and weights_digest(resnet.model) == before
    assert_same(with_gradient(resnet.copy_visual(), pixels), plain)
    resnet.compute = Compute()
    assert resnet.model.visual.layer1[0].conv2.weight.is_contiguous()
    with pytest.raises(ValueError, match="ModifiedResNet"):
        resnet.compute = Compute(image_checkpoints=True)


@pytest.mark.parametrize("wrong, message", [(dict(text_memory=0), "text_memory"), (dict(image_checkpoints=1), "image_checkpoints"), (dict(compiled="inducter"), "Did you mean 'inductor'"), (dict(precision="fp16"), "Allowed: auto, fp32, bf16")])
def test_wrong_ways_are_named(wrong, message):
    assert message in message_of(Compute, **wrong)


class Operations(TorchDispatchMode):
    "Counts the operations that reach the device"
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attention(self): return sum(n for name, n in self.counts.items() if name.startswith("_scaled_dot_product"))


@pytest.mark.parametrize("kind", [*LIGHT_MODULES, "full fine-tuning", "full fine-tuning, train mode"])
def test_attention_that_learns_never_writes_its_weights_down(clip, kind):
    tower = build_light_module(kind, clip, n_tokens=3) if kind in LIGHT_MODULES else clip.copy_visual().train(kind.endswith("train mode"))
    with Operations() as operations:
        tower(torch.zeros(1, 3, 24, 24))
    without_gradient = operations.counts["_native_multi_head_attention"] # below the first adapter nothing learns
    assert operations.attention + without_gradient == len(clip.model.visual.transformer.resblocks) and without_gradient == (kind == "adapter")
    assert not any("softmax" in name for name in operations.counts)


def test_nothing_of_it_enters_what_a_state_depends_on(exact, task, tmp_path):
    content = []
    for how in (Compute(), Compute(text_memory=0.1, image_checkpoints=True, compiled="eager")):
        exact.compute = how
        content.append((exact.model_sha256, Run(exact, task, 0, CoFTSettings(), folder=tmp_path).content()))
    assert content[0] == content[1]
    exact.compute = Compute(precision="fp32")
    assert Run(exact, task, 0, CoFTSettings(), folder=tmp_path).content() == content[0][1] | dict(precision="fp32"), "what was asked for is a run of its own"


def trained_in(clip, task, kind, **how):
    "The types in which the layers of a step came out."
    clip.compute, seen = Compute(**how), set()
    model = {"Phase I": lambda: PromptedModel(clip, task.class_names, CoFTSettings(n_context=2, n_visual=2), 0), "Phase II": lambda: EncoderWithHead(clip, len(task.class_names)),
             "contrast": lambda: MomentumContrast(EncoderWithHead(clip, len(task.class_names)), 8, 0.1, 0.9, 0.1, 0)}[kind]()
    hook = lambda module, given, out: seen.add(out.dtype)
    for m in (*model.modules(), *clip.model.modules()):
        if isinstance(m, torch.nn.Linear):
            m.register_forward_hook(hook)
    columns = {"label": np.arange(8) % 4} | ({"accepted": np.ones(8, bool)} if kind == "contrast" else {})
    views = contrast_views(task, CoFTPlusSettings()) if kind == "contrast" else task.augmentation
    train(model, task.unlabelled, range(8), columns, Schedule(epochs=1, batch_size=8), clip.image_size, views, 0, "phase", progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return set(seen)


@pytest.mark.filterwarnings("ignore:precision")
@pytest.mark.parametrize("kind", ["Phase I", "Phase II", "contrast"])
def test_a_cpu_trains_in_bf16_where_it_is_asked_for_alone(clip, task, kind, monkeypatch):
    mine = FrozenCLIP(deepcopy(clip.model), clip.tokenizer, clip.name, clip.pretrained, clip.weights_sha256, preset=clip.preset)
    monkeypatch.setattr("coft.trainer.has_bf16", lambda device: True)
    assert torch.bfloat16 in trained_in(mine, task, kind, precision="bf16")
    assert trained_in(mine, task, kind) == trained_in(mine, task, kind, precision="fp32") == {torch.float32}


def test_a_cpu_that_is_slower_in_bf16_says_so(exact, monkeypatch):
    for has in (True, False):
        monkeypatch.setattr("coft.clip.has_bf16", lambda device, has=has: has)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            exact.compute = Compute(precision="bf16")
        assert [str(t.message).startswith("precision: 'bf16' was given, and this cpu has no instructions") for t in told] == [True] * (not has)


@pytest.mark.parametrize("found", ["avx512_bf16", "amx_tile", None])
def test_what_torch_says_of_the_processor_is_believed(monkeypatch, found):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == found, raising=False)
    assert has_bf16("cpu") == (found is not None) and not has_bf16("meta")


def test_a_box_encodes_the_texts_of_a_question_once(clip, task, monkeypatch):
    box, rng = BlackBoxVLM(clip), np.random.default_rng(0)
    contexts = 0.02 * rng.standard_normal((3, 4, clip.model.transformer.width))
    pixels = [Pictures(task.unlabelled.batch(range(i, i + 8), 24).numpy()) for i in (0, 8)]
    slow = [BlackBoxVLM(clip).logits(contexts, task.class_names, p) for p in pixels]
    encoded = called(monkeypatch, PromptEncoder, "forward")
    found = [box.logits(contexts, task.class_names, p, candidates=i == 0) for i, p in enumerate(pixels)]
    assert len(encoded) == 1 and all((a == b).all() for a, b in zip(found, slow))
    assert (box.n_prompt_queries, box.n_image_forwards) == (3, 2 * 3 * 8), "what is charged stays what it was"
    box.logits(contexts[1:], task.class_names, pixels[0]), box.logits(contexts[1:], task.class_names[::-1], pixels[0])
    assert len(encoded) == 3


# Attention without PyTorch's copies

def plain_attention(module):
    "A copy whose attention is PyTorch's own again: the slow reference"
    module = deepcopy(module)
    for m in module.modules():
        if type(m) is DirectAttention:
            m.__class__ = torch.nn.MultiheadAttention
    return module


def block_of_vit_b16():
    torch.manual_seed(0)
    block = ResidualAttentionBlock(768, 12)
    torch.nn.init.normal_(block.attn.in_proj_bias, std=0.3)
    torch.nn.init.normal_(block.attn.out_proj.bias, std=0.3)
    block.attn.__class__ = DirectAttention
    return block


def attention_case(name, n):
    "A module, what goes into it besides x, and x [n, tokens, width]"
    rng = torch.Generator().manual_seed(1)
    if name == "block of ViT-B/16":
        return block_of_vit_b16(), {}, torch.randn(n, 197, 768, generator=rng)
    model, tower = name.rsplit(" ", 1)
    net = load_clip(model, "random" if model == "photos" else None).model
    if tower == "text":
        return net.transformer, dict(attn_mask=net.attn_mask[:9, :9]), 0.1 * torch.randn(n, 9, net.transformer.width, generator=rng)
    tokens = net.visual.positional_embedding.shape[0] + 4
    return net.visual.transformer, {}, torch.randn(n, tokens, net.visual.transformer.width, generator=rng)


def everything(module, x, more):
    "Output and the gradients of x and of all weights that learn"
    leaf = x.clone().requires_grad_()
    out = module(leaf, **more)
    learns = [p for p in module.parameters() if p.requires_grad]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [leaf, *learns])]


@pytest.mark.parametrize("learn", [False, True], ids=["frozen", "weights learn"])
@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("name", [*(f"{m} {t}" for m in ("embedded", "embedded-l", "photos") for t in ("image", "text")), "block of ViT-B/16"])
def test_direct_attention_has_the_numbers_of_pytorchs(name, n, learn):
    "The same bits on the processor it was written on; on others a matrix product may round its rows in another way."
    module, more, x = attention_case(name, n)
    module.requires_grad_(learn)
    plain = plain_attention(module)
    assert any(type(m) is DirectAttention for m in module.modules()) and not any(type(m) is DirectAttention for m in plain.modules())
    found, expected = everything(module, x, more), everything(plain, x, more)
    assert len(found) == 2 + learn * len(list(module.parameters())) and all(e.any() for e in expected[:2])
    with torch.no_grad():
        found, expected = [*found, module(x, **more)], [*expected, plain(x, **more)]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("learn", [False, True], ids=["frozen", "weights learn"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_direct_attention_in_other_types(tower, learn):
    module, more, x = attention_case(f"embedded {tower}", 5)
    module.requires_grad_(learn)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = everything(module, x, more), everything(plain_attention(module), x, more)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() < 0.02 * b.norm()
    module, more, x = module.double(), {k: v.double() for k, v in more.items()}, x.double()
    assert_same(everything(module, x, more), everything(plain_attention(module), x, more))


def test_what_attention_saves(clip):
    blocks, counts = len(clip.model.visual.transformer.resblocks), []
    x = torch.randn(16, 41, clip.model.visual.transformer.width).requires_grad_()
    for tower in (clip.model.visual.transformer, plain_attention(clip.model.visual.transformer)):
        with Operations() as operations:
            tower(x).sum().backward()
        assert operations.attention == 2 * blocks
        counts.append(operations.counts)
    direct, plain = counts
    assert plain["bmm"] == 2 * blocks and direct["bmm"] == 0, "with frozen weights PyTorch multiplies token by token"
    assert direct["clone"] <= plain["clone"] - 2 * blocks


def test_images_without_a_gradient_keep_pytorchs_fast_path(clip):
    with torch.no_grad(), Operations() as operations:
        clip.image_features(torch.zeros(8, 3, 24, 24))
    assert operations.counts["_native_multi_head_attention"] == len(clip.model.visual.transformer.resblocks) and operations.attention == 0


def test_another_use_of_attention_is_pytorchs():
    attention, x = block_of_vit_b16().attn.requires_grad_(False), torch.randn(4, 6, 768, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain, other = plain_attention(attention), torch.randn(4, 3, 768, generator=torch.Generator().manual_seed(1))
    hidden = torch.zeros(4, 6, dtype=torch.bool)
    hidden[:, 4:] = True
    for args, more in [((x, x, x), {}), ((x, other, other), dict(need_weights=False)), ((x, x, x), dict(need_weights=False, key_padding_mask=hidden)), ((x, x, x, hidden, False), {}),
                       ((x[0], x[0], x[0]), dict(need_weights=False)), ((x, x, x), dict(need_weights=False, attn_mask=torch.zeros(48, 6, 6)))]:
        for a, b in zip(attention(*args, **more), plain(*args, **more)):
            assert (a is b is None) or torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("vision", [dict(image_size=32, layers=(1, 1, 1, 1), width=8, head_width=16), dict(image_size=16, patch_size=8, width=16, layers=1, head_width=8, block_type="custom", qk_norm=True)], ids=["resnet", "custom attention"])
def test_other_attention_stays_what_it_is(vision):
    model = small_clip(vision).model
    assert not any(isinstance(m, DirectAttention) for m in model.visual.modules())
    assert all(type(b.attn) is DirectAttention for b in model.transformer.resblocks)


def test_a_tower_with_direct_attention_is_open_clips_to_the_outside(clip):
    pixels, fresh = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0)), build_embedded()[0].eval().requires_grad_(False)
    assert [type(b.attn) for b in fresh.visual.transformer.resblocks] == [torch.nn.MultiheadAttention] * 5
    fresh.load_state_dict(clip.model.state_dict())
    assert torch.allclose(fresh.visual(pixels), clip.model.visual(pixels), atol=1e-5)
    for copy in (clip.copy_visual(), pickle.loads(pickle.dumps(clip.model.visual))):
        assert [type(b.attn) for b in copy.transformer.resblocks] == [DirectAttention] * 5
        assert list(copy.state_dict()) == list(fresh.visual.state_dict())
