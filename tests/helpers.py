"What several test files share and is no fixture."
import inspect
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("COFT_TEST_DATA", ROOT.parent / "shared/data"))
# CoFT on the small task in about a second, whatever the presets hold
QUICK = dict(preset="paper", top_k=4, n_context=4, n_visual=4, phase1_optimizer="adamw", phase1_lr=1e-3, phase1_epochs=2,
             phase1_batch_size=8, phase2_optimizer="adamw", phase2_lr=1e-4, phase2_epochs=1, phase2_batch_size=16)
# CoFT+ on the small task in a few seconds: two rounds, contrast, templates of a language model
QUICK_PLUS = QUICK | dict(rounds=2, contrast_views="task", template_set="llm", phase2_batch_size=24)


def text_features_slow(clip, names, context):
    "Every prompt on its own, at full length: start, context, name, full stop, end"
    model, tokenizer, out = clip.model, clip.tokenizer, []
    for name in names:
        ids = [tokenizer.sot_token_id, *[0] * len(context), *tokenizer.encode(name + "."), tokenizer.eot_token_id]
        x = model.token_embedding(torch.tensor(ids + [0] * (model.context_length - len(ids))))
        x = torch.cat([x[:1], context, x[1 + len(context):]]) + model.positional_embedding
        x = model.ln_final(model.transformer(x[None], attn_mask=model.attn_mask)[0])[len(ids) - 1] @ model.text_projection
        out.append(x / x.norm())
    return torch.stack(out)


def remember_models(monkeypatch):
    "Patch both phases of CoFT; the dictionary returned will hold every model that they train, by the name of its phase."
    import coft.collaborate
    models = {}

    def remember(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            models[inspect.signature(function).bind(*args, **kwargs).arguments["name"]] = result[0]
            return result
        return call

    for name in ("phase1", "phase2"):
        monkeypatch.setattr(coft.collaborate, name, remember(getattr(coft.collaborate, name)))
    return models


def same_tensors(a, b):
    "Whether two modules hold the same numbers, bit for bit."
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@contextmanager
def broken_off(monkeypatch, owner, at):
    "Ctrl-C right behind the `at`-th state that `owner.write` keeps; the block must end by it."
    kept, write = [], owner.write

    def interrupted(self, *args, **state):
        write(self, *args, **state)
        kept.append(1)
        if len(kept) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, "write", interrupted)
        yield


def real(*parts):
    "A file of the real data, or a skipped test."
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data: {'/'.join(parts)} is not there (set COFT_TEST_DATA)")
    return path


def message_of(function, *args, kind=ValueError, **kwargs):
    "The message of the error that this call must raise."
    with pytest.raises(kind) as error:
        function(*args, **kwargs)
    return str(error.value)


def pretend_training(monkeypatch):
    "Every training of a method moves what it may move by small random numbers, instead of learning."
    import coft.rivals
    import coft.trainer

    def moved(module, *args, **kwargs):
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape, generator=rng))
        return [dict(loss=1.0, accepted=1.0, images_per_second=1.0)]

    train = coft.trainer.train
    for name, module in list(sys.modules.items()):
        if name.startswith("coft.") and getattr(module, "train", None) is train:
            monkeypatch.setattr(module, "train", moved)
