"""What the peers of this field compute, as plainly as it can be written.

Every prompt of every class at the model's full length (77 tokens with CLIP), positive and negative one after the other,
`nn.MultiheadAttention`, float32. Weights are those of the given model; what is trained starts as a copy of our own.
"""
import torch
import torch.nn.functional as F
from torch import nn


def block(b, x, mask=None):
    "One residual attention block of CLIP."
    if not isinstance(b.attn, nn.MultiheadAttention):
        raise TypeError(f"the plain way needs PyTorch's MultiheadAttention; this model has a {type(b.attn).__name__}.")
    y = b.ln_1(x)
    x = x + b.ls_1(nn.MultiheadAttention.forward(b.attn, y, y, y, need_weights=False, attn_mask=mask)[0])
    return x + b.ls_2(b.mlp(b.ln_2(x)))


def image_features(visual, x, fresh=()):
    "Vision transformer on normalised pixels [n, 3, h, w]; `fresh` [layers, tokens, width] are the prompt tokens that each block gets anew."
    if not hasattr(visual, "class_embedding"):
        raise TypeError(f"the plain way has vision transformers only; this image tower is a {type(visual).__name__}.")
    x = visual.conv1(x).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x, n = visual.ln_pre(x), x.shape[1]
    for i, b in enumerate(visual.transformer.resblocks):
        if i < len(fresh):
            x = torch.cat([x[:, :n], fresh[i].expand(len(x), -1, -1)], 1)
        x = block(b, x)
    return visual.ln_post(x)[:, 0] @ visual.proj


class Prompts(nn.Module):
    "Learnable context in front of every class name, as CoOp keeps it: embeddings of whole prompts, of which the context is exchanged."

    def __init__(self, clip, class_names, n_context):
        super().__init__()
        self.model, tokenizer = clip.model, clip.tokenizer
        ids = torch.zeros(len(class_names), clip.model.context_length, dtype=torch.long)
        for row, name in zip(ids, class_names):
            own = [*tokenizer.encode(f"{name}."), tokenizer.eot_token_id]
            row[0] = tokenizer.sot_token_id
            row[1 + n_context:1 + n_context + len(own)] = torch.tensor(own)
        embedded = clip.model.token_embedding(ids.to(clip.device)).detach()
        self.register_buffer("start", embedded[:, :1])
        self.register_buffer("rest", embedded[:, 1 + n_context:])
        self.register_buffer("end", ids.argmax(1).to(clip.device))

    def forward(self, context):
        "Features [C, d] of unit length for one context [M, w]."
        model = self.model
        x = torch.cat([self.start, context.expand(len(self.start), -1, -1), self.rest], 1) + model.positional_embedding
        for b in model.transformer.resblocks:
            x = block(b, x, model.attn_mask)
        x = model.ln_final(x)[torch.arange(len(x), device=x.device), self.end]
        return F.normalize(x @ model.text_projection, dim=-1)


class Phase1(nn.Module):
    "One model of CoFT's Phase I: context vectors of both prompts and visual prompt tokens, started as those of `ours`."

    def __init__(self, clip, class_names, ours):
        super().__init__()
        self.clip = clip
        self.context = nn.Parameter(ours.prompt.context.detach().clone())
        self.tokens = nn.Parameter(ours.visual.tokens.detach().clone())
        self.prompts = Prompts(clip, class_names, self.context.shape[1])

    def image_features(self, pixels):
        return F.normalize(image_features(self.clip.model.visual, self.clip.normalize(pixels), self.tokens), dim=-1)

    def forward(self, pixels, label, u):
        "L1 + L2 (CoFT Eqs. 4 and 6) on a batch; all classes of both prompts are encoded."
        positive, negative = self.prompts(self.context[0]), self.prompts(self.context[1])
        v, tau, C = self.image_features(pixels), self.clip.tau, len(positive)
        s_pos, s_neg = v @ positive.T / tau, v @ negative.T / tau
        other = (label + 1 + (u * (C - 1)).long()) % C
        clean = [torch.stack([s_pos, s_neg], -1)[torch.arange(len(v), device=v.device), k].log_softmax(-1) for k in (label, other)]
        l2 = -(clean[0][:, 0] + clean[1][:, 1]).mean()
        return {"loss": F.cross_entropy(s_pos, label) + l2}

    def gradients(self):
        "By name: of both contexts and of the visual tokens."
        return {"V+": self.context.grad[0], "V-": self.context.grad[1], "Pv": self.tokens.grad}


class Encoder(nn.Module):
    "Phase II: an image tower, all of it trained, and a linear head; both copies of those of `ours`."

    def __init__(self, clip, ours):
        super().__init__()
        from copy import deepcopy
        self.clip, self.visual, self.head = clip, deepcopy(ours.visual), deepcopy(ours.head)

    def features(self, pixels):
        return image_features(self.visual, self.clip.normalize(pixels))

    def classify(self, v):
        return self.head(v)


@torch.no_grad()
def craft_generation(prompts, contexts, v, labels, tau):
    "Cross-entropy [P] of the candidate contexts [P, M, w] on cached image features [n, d], one candidate after the other (CraFT, 4.2)."
    return torch.stack([F.cross_entropy(v @ prompts(context).T / tau, labels) for context in contexts])
