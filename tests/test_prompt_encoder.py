"Shared-prefix encoding against plain full-length encoding, and visual tokens against written-out attention."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coft.adapters import DEPTHS, VisualPrompt
from coft.clip import PromptEncoder

NAMES = {
    "clip": ["digit three", "small letter b", "a large and slanted capital letter q", "seven"],
    "vit": ["cat", "a golden retriever puppy", "aeroplane", "a rather long name for an otherwise quite ordinary small bird"],
}


@pytest.fixture(params=NAMES)
def model_and_names(request):
    "Both models, each with class names of unequal lengths."
    return request.getfixturevalue(request.param), NAMES[request.param]


def random_context(clip, n_sets, n_context):
    return torch.randn(n_sets, n_context, clip.model.transformer.width, generator=torch.Generator().manual_seed(0)) * 0.02


def features_and_gradient(encode, context):
    leaf = context.clone().requires_grad_()
    features = encode(leaf)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    return features.detach(), torch.autograd.grad((features * weights).sum(), leaf)[0]


def assert_same(fast, slow):
    assert fast[0].shape == slow[0].shape
    assert (fast[0] - slow[0]).abs().max() < 1e-5
    assert slow[1].norm() > 0
    assert (fast[1] - slow[1]).norm() < 1e-4 * slow[1].norm()


@pytest.mark.parametrize("n_sets", [1, 2])
@pytest.mark.parametrize("n_context", [1, 4, 16])
def test_shared_prefix_agrees_with_plain_encoding(model_and_names, n_context, n_sets):
    clip, names = model_and_names
    encoder, context = PromptEncoder(clip, names, n_context), random_context(clip, n_sets, n_context)
    assert len(set(encoder.last.tolist())) > 1, "the names should differ in length"
    fast, slow = features_and_gradient(encoder, context), features_and_gradient(encoder.plain, context)
    assert fast[0].shape == (n_sets, len(names), clip.embed_dim)
    assert torch.allclose(fast[0].norm(dim=-1), torch.ones(n_sets, len(names)), atol=1e-5)
    assert_same(fast, slow)


@pytest.mark.parametrize("classes", [[2], [3, 0, 3]], ids=str)
def test_subset_of_classes_agrees_with_plain_encoding(model_and_names, classes):
    clip, names = model_and_names
    encoder, context, classes = PromptEncoder(clip, names, 4), random_context(clip, 2, 4), torch.tensor(classes)
    slow = features_and_gradient(lambda c: encoder.plain(c, classes), context)
    assert_same(features_and_gradient(lambda c: encoder(c, classes), context), slow)
    assert torch.allclose(slow[0], encoder.plain(context)[:, classes], atol=1e-5)


def test_a_class_does_not_depend_on_the_others(model_and_names):
    clip, names = model_and_names
    context = random_context(clip, 1, 4)
    together, pair = PromptEncoder(clip, names, 4)(context), PromptEncoder(clip, names[:2], 4)(context)
    assert torch.allclose(together[:, :2], pair, atol=1e-5)


def test_real_words_give_what_open_clip_says(model_and_names):
    clip, names = model_and_names
    words = clip.tokenizer.encode("a photo of the")
    context = clip.model.token_embedding(torch.tensor([words])).detach()
    encoder, expected = PromptEncoder(clip, names, len(words)), clip.text_features([f"a photo of the {n}." for n in names])
    assert torch.allclose(encoder.plain(context)[0], expected, atol=1e-5)
    assert torch.allclose(encoder(context)[0], expected, atol=1e-5)


def test_positive_and_negative_context_do_not_mix(model_and_names):
    clip, names = model_and_names
    encoder, context = PromptEncoder(clip, names, 4), random_context(clip, 2, 4)
    leaf = context.clone().requires_grad_()
    gradient, = torch.autograd.grad(encoder(leaf)[0].sum(), leaf)
    assert gradient[0].any() and not gradient[1].any()
    assert torch.allclose(encoder(context)[1:], encoder(context[1:]), atol=1e-6)


def test_context_that_fills_the_model_exactly(model_and_names):
    clip, names = model_and_names
    room = clip.model.context_length - 1 - PromptEncoder(clip, names, 1).length
    context = random_context(clip, 1, room)
    encoder = PromptEncoder(clip, names, room)
    assert torch.allclose(encoder(context), encoder.plain(context), atol=1e-5)
    with pytest.raises(ValueError, match="Shorten the name or lower n_context"):
        PromptEncoder(clip, names, room + 1)


def test_too_long_name_is_named(model_and_names):
    clip, names = model_and_names
    word = names[1].split()[-1]
    long = " ".join([word] * clip.model.context_length)
    with pytest.raises(ValueError) as error:
        PromptEncoder(clip, [*names, long], 16)
    assert long[:30] in str(error.value) and f"room for {clip.model.context_length}" in str(error.value)


def written_out(visual, pixels, tokens):
    "A vision transformer with visual tokens, from its parts; tokens [layers, n, width]"
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = visual.ln_pre(x)
    length = x.shape[1]
    for layer, block in enumerate(visual.transformer.resblocks):
        if layer < len(tokens):
            x = torch.cat([x[:, :length], tokens[layer].expand(len(x), -1, -1)], 1)
        y = block.ln_1(x)
        y, _ = block.attn(y, y, y, need_weights=False)
        x = x + y
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[:, 0]) @ visual.proj


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", ["clip", "vit"])
def test_visual_tokens_agree_with_written_out_attention(request, name, depth):
    clip = request.getfixturevalue(name)
    prompt = VisualPrompt(clip, n_tokens=5, depth=depth, seed=0)
    pixels = torch.randn(2, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(0))
    found, expected = prompt(pixels), written_out(clip.model.visual, pixels, prompt.tokens)
    assert len(prompt.tokens) == (len(clip.model.visual.transformer.resblocks) if depth == "deep" else 1)
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((F.normalize(out, dim=-1) * weights).sum(), prompt.tokens)[0] for out in (found, expected)]
    assert gradients[1].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_tower_is_its_own_again_after_a_call(clip, depth):
    pixels = torch.randn(2, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(0))
    before = clip.model.visual(pixels)
    prompt = VisualPrompt(clip, n_tokens=3, depth=depth)
    assert not torch.allclose(prompt(pixels), before)
    assert torch.equal(clip.model.visual(pixels), before)
    with pytest.raises(RuntimeError):
        prompt(pixels[:, :2])
    assert torch.equal(clip.model.visual(pixels), before), "an error left the tokens attached"


@pytest.mark.parametrize("depth", DEPTHS)
def test_initial_tokens_are_uniform_within_their_bound(vit, depth):
    tokens = VisualPrompt(vit, n_tokens=20, depth=depth).tokens.detach()
    bound = np.sqrt(6 / (3 * 32 * 32 + 768))
    assert tokens.shape == (12 if depth == "deep" else 1, 20, 768)
    assert tokens.abs().max() <= bound and tokens.abs().mean().item() == pytest.approx(bound / 2, rel=0.03)
