"""What coft's steps take, part by part, beside the plain way: every function returns rows of one table.

A row is one number of one repetition: measure, backbone, classes, context, images, way, note, part, unit, repetition, value.
`summary` makes medians and quartiles of them, `ratios` divides two ways or parts within each repetition.
"""
import io
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, product
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from coft.blackbox import BlackBoxVLM, Pictures
from coft.clip import FrozenCLIP, PromptEncoder, load_clip, text_bytes, weights_digest, zero_shot_head
from coft.collaborate import CoFTSettings, PromptedModel, cross_validate, first_labels
from coft.core import generator
from coft.craft import PromptGenerator, fitness
from coft.data import ArrayImages, Augmentation, batches
from coft.filtering import Similarities, select_topk
from coft.glyphs import CHARACTERS, character_name
from coft.images import FileImages, Part, make_task
from coft.prompts import dual_prompt_losses
from coft.protocol import get_method
from coft.trainer import EncoderWithHead, predict, train
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain

ROOT = Path(__file__).resolve().parent.parent
KEYS = ["measure", "backbone", "classes", "context", "images", "way", "note", "part", "unit"]
LOOKS = "red black white small giant striped spotted golden wooden old wild common northern southern eastern western sea river mountain forest desert garden house field grey blue green brown silver dwarf royal crested".split()
TOLERANCE = dict(loss=1e-4, gradient=1e-3)


def class_names(clip, n):
    "So many class names that the model's vocabulary can write: those of ImageNet, and of more classes these behind an adjective."
    if clip.preset == "embedded":
        made = [f"{character_name(c)}{look}" for look, c in product(("", ", bold", ", thin"), CHARACTERS)]
    else:
        made = list({name.lower(): name for name in [*IMAGENET_CLASSNAMES, *(" ".join(words) for words in product(LOOKS, IMAGENET_CLASSNAMES))]}.values())
    if n > len(made):
        raise ValueError(f"classes: {n} were asked for; there are names of {len(made)} for {clip.name!r}.")
    return made[:n]


def template(clip):
    "A sentence that the model's vocabulary can write."
    return "the {}." if clip.preset == "embedded" else "a photo of a {}."


def noise(n, size, seed=0):
    "Images of random pixels."
    return ArrayImages(np.random.default_rng(seed).integers(256, size=(n, size, size, 3), dtype=np.uint8))


class Clock:
    "Seconds since the last look, added up by part."

    def __init__(self, device):
        self.device, self.parts = device, {}
        self.start()

    def start(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.last = time.perf_counter()

    def __call__(self, part):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now


def alternating(ways, repetitions):
    "Call the functions of `ways` in turn, forwards and backwards, after one call that does not count; what each returns, by repetition and name."
    for call in ways.values():
        call()
    found = []
    for r in range(repetitions):
        order = list(ways.items())
        found.append({name: call() for name, call in (order if r % 2 == 0 else order[::-1])})
    return found


def rows_of(found, measure, unit="s", notes=None, **where):
    "Rows of one table from what `alternating` returned: way -> part -> value; `notes` say of a way what is not plain to see."
    return [dict(backbone="", classes=0, context=0, images=0) | dict(measure=measure, unit=unit, repetition=r, way=way, note=(notes or {}).get(way, ""), part=part, value=value) | where
            for r, ways in enumerate(found) for way, parts in ways.items() for part, value in parts.items()]


def summary(rows):
    "Median and quartiles over the repetitions."
    groups = pd.DataFrame(rows).groupby(KEYS, sort=False).value
    return groups.agg(median="median", q1=lambda v: v.quantile(0.25), q3=lambda v: v.quantile(0.75), repetitions="count").reset_index()


def wide(table):
    "A summary as it is read: a column for each part, medians with their quartiles; of the rest, what is the same everywhere is left out but for backbone, classes and way."
    told = [f"{r.median:.3g}" + (f" ({r.q1:.3g} to {r.q3:.3g})" if r.repetitions > 1 else "") for r in table.itertuples()]
    keys = [k for k in KEYS[:-2] if table[k].nunique() > 1 or (k in ("backbone", "classes", "way") and table[k].any())]
    return table.assign(value=told, part=table.part + " (" + table.unit + ")").pivot_table(index=keys, columns="part", values="value", aggfunc="first", sort=False, fill_value="").reset_index().rename_axis(columns=None)


def ratios(rows, measure, over, under):
    "Rows of `over` divided by `under`, two pairs of (way, part), within every repetition of a measure."
    table, where = pd.DataFrame(rows, columns=[*KEYS, "repetition", "value"]), ["backbone", "classes", "context", "images", "repetition"]
    pick = lambda way, part: table[(table.measure == measure) & (table.way == way) & (table.part == part)]
    found = pick(*over).merge(pick(*under), on=where, suffixes=("_over", "_under"))
    said = lambda a, b: a if a == b or not b else b if not a else f"{a} / {b}"
    return [dict({k: r[k] for k in where}, measure=measure, way=said(over[0], under[0]), part=said(over[1], under[1]), note=said(r["note_over"], r["note_under"]), unit="times", value=r["value_over"] / r["value_under"])
            for r in found.to_dict("records")]


@contextmanager
def answering(module, **methods):
    "These methods of one object answer otherwise inside the block."
    for name, method in methods.items():
        object.__setattr__(module, name, method)
    try:
        yield
    finally:
        for name in methods:
            object.__delattr__(module, name)


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def split_step(features, rest, optimizer, device, precision="fp32"):
    "One training step, taken apart at the image features: seconds of image tower, of what comes behind it, of the optimiser. The gradients are those of the whole."
    optimizer.zero_grad()
    clock = Clock(device)
    with autocast(device, precision):
        v = features()
    clock("image tower")
    leaf = v.detach().requires_grad_()
    with autocast(device, precision):
        loss = rest(leaf)
    loss.backward()
    clock("behind it")
    if leaf.grad is None:
        raise RuntimeError("the loss does not look at the image features that it was given, so the step cannot be taken apart")
    v.backward(leaf.grad)
    clock("image tower")
    optimizer.step()
    clock("optimiser")
    return clock.parts


def behind(model, pixels, label, u):
    "The rest of a Phase I step, as a function of the image features."
    def rest(leaf):
        with answering(model, image_features=lambda pixels: leaf):
            return model(pixels=pixels, label=label, u=u)["loss"]
    return rest


class Phase1:
    "Our model of Phase I and the plain one, with the same numbers, on one batch."

    def __init__(self, clip, n_classes, batch, n_context=16, seed=0, light_module=None):
        self.clip, self.device, self.names = clip, clip.device, class_names(clip, n_classes)
        kind = light_module or ("visual_prompt" if hasattr(clip.model.visual, "class_embedding") else "lora")
        self.settings = replace(CoFTSettings(), n_context=n_context, light_module=kind)
        self.ours = PromptedModel(clip, self.names, self.settings, seed)
        self.images, self.batch = noise(batch, Augmentation().stored_size(clip.image_size)), batch
        rng = generator(seed, "benchmark")
        self.label = torch.from_numpy(rng.integers(n_classes, size=batch)).to(self.device)
        self.u = torch.from_numpy(rng.random(batch)).to(self.device)
        self.epoch = count()

    @cached_property
    def plain(self):
        "The plain model, made when it is first asked for, as a copy of what ours is then; None where the plain way has no such light module."
        return plain.Phase1(self.clip, self.names, self.ours) if self.settings.light_module == "visual_prompt" else None

    def draw(self):
        "A batch as training draws it, and the seconds that it took."
        clock = Clock(self.device)
        (_, pixels), = batches(self.images, range(self.batch), self.batch, self.clip.image_size, (0, "benchmark", next(self.epoch)), Augmentation(), device=self.device)
        clock("data")
        return pixels.to(self.device), clock.parts

    def loss_alone(self):
        "Seconds of both losses and their gradients, given features."
        C, d = len(self.names), self.clip.embed_dim
        v, positive, negative = (F.normalize(torch.randn(n, d, device=self.device), dim=-1).requires_grad_() for n in (self.batch, C, C))
        clock = Clock(self.device)
        l1, l2 = dual_prompt_losses(v, positive, negative, self.label, (self.label + 1) % C, self.clip.tau)
        (l1 + l2).backward()
        clock("loss")
        return clock.parts

    def step(self, model, precision="fp32"):
        "A step of this model: data, image tower, text tower, loss, optimiser, whole."
        optimizer, _ = self.settings.schedule(1).build([p for p in model.parameters() if p.requires_grad], 1000)

        def call():
            pixels, parts = self.draw()
            parts |= split_step(lambda: model.image_features(pixels), behind(model, pixels, self.label, self.u), optimizer, self.device, precision)
            parts |= self.loss_alone()
            parts["text tower"] = max(0.0, parts.pop("behind it") - parts["loss"])
            return parts | {"whole": sum(parts.values())}
        return call

    def differences(self):
        "How far the plain way's loss and gradients are from ours, relative to their size."
        pixels = self.draw()[0]
        found = {}
        for way, model in (("ours", self.ours), ("plain", self.plain)):
            model.zero_grad()
            loss = model(pixels=pixels, label=self.label, u=self.u)["loss"]
            loss.backward()
            found[way] = dict(loss=loss.detach()[None], **({"V+": self.ours.prompt.context.grad[0], "V-": self.ours.prompt.context.grad[1], "Pv": self.ours.visual.tokens.grad} if way == "ours" else self.plain.gradients()))
        return {k: float((found["ours"][k] - found["plain"][k]).norm() / found["plain"][k].norm()) for k in found["plain"]}


@contextmanager
def computed(clip, **how):
    "Inside this block the towers are computed as `coft.clip.Compute` says of these names."
    kept, clip.compute = clip.compute, replace(clip.compute, **how)
    try:
        yield
    finally:
        clip.compute = kept


def text_differences(clip, n_classes, n_context=16, chunk=100):
    """How far the plain way's features of one prompt for every class, and the gradient of their context, are from ours, relative to their size.

    Ours are computed at once, and with memory for half of them, so that the others are computed again for the gradient; the plain way takes `chunk` classes at a time.
    """
    names, rng = class_names(clip, n_classes), generator(0, "benchmark", "texts")
    encoder = PromptEncoder(clip, names, n_context)
    start, weights = (torch.from_numpy(rng.standard_normal(shape)).float().to(clip.device) for shape in ((n_context, encoder.start.shape[-1]), (n_classes, clip.embed_dim)))

    def made(parts):
        context, features = (0.02 * start).requires_grad_(), []
        for encode, w in parts:
            t = encode(context)
            (t * w).sum().backward()
            features.append(t.detach())
        return {"features": torch.cat(features), "V+": context.grad}
    slow = made((plain.Prompts(clip, names[i:i + chunk], n_context), weights[i:i + chunk]) for i in range(0, n_classes, chunk))
    half, found = text_bytes(clip.model, int(encoder.lengths.sum()), 1 + n_context + int(encoder.lengths.max()), learns=True) / 2**31, {}
    for how, memory in (("at once", clip.compute.text_memory), ("half again", half)):
        with computed(clip, text_memory=memory):
            ours = made([(lambda context: encoder(context[None])[0], weights)])
        found[how] = {k: float((ours[k] - slow[k]).norm() / slow[k].norm()) for k in slow}
    return found


def phase1(clip, n_classes, batch, repetitions, n_context=16, plain_classes=100, precisions=("fp32",)):
    """Rows of a Phase I step, ours in every precision and the plain way in float32.

    Above `plain_classes` the plain way is measured with so many, and its text tower and losses are multiplied: its memory would not hold more.
    """
    few = Phase1(clip, min(n_classes, plain_classes), batch, n_context)
    case = few if n_classes <= plain_classes else Phase1(clip, n_classes, batch, n_context)
    ways = {"ours" + (f", {p}" if p != "fp32" else ""): case.step(case.ours, p) for p in precisions}
    if few.plain is not None:
        step = few.step(few.plain)

        def scaled():
            parts = step()
            for part in ("text tower", "loss"):
                parts[part] *= n_classes / min(n_classes, plain_classes)
            return parts | {"whole": sum(v for k, v in parts.items() if k != "whole")}
        ways["plain"] = scaled
    notes = {} if few is case else {"plain": f"from {plain_classes} classes"}
    return rows_of(alternating(ways, repetitions), "Phase I step", notes=notes, backbone=clip.name, classes=n_classes, context=n_context, images=batch)


class FullFineTuning:
    "Our encoder of Phase II and the plain one, with the same numbers, on one batch."

    def __init__(self, clip, n_classes, batch):
        self.case, self.clip = Phase1(clip, n_classes, batch, light_module="lora"), clip
        self.ours = self.made()

    @cached_property
    def plain(self):
        "The plain encoder, made when it is first asked for, as a copy of what ours is then; None for a ResNet."
        return plain.Encoder(self.clip, self.ours) if hasattr(self.clip.model.visual, "class_embedding") else None

    def made(self, **how):
        "Our encoder, computed as `coft.clip.Compute` says of these names."
        with computed(self.clip, **how):
            return EncoderWithHead(self.clip, len(self.case.names))

    def step(self, model, precision="fp32"):
        "A step of this model: data, image tower, loss, optimiser, whole."
        optimizer, _ = CoFTSettings().schedule(2).build(list(model.parameters()), 1000)

        def call():
            pixels, parts = self.case.draw()
            parts |= split_step(lambda: model.features(pixels), lambda v: F.cross_entropy(model.classify(v), self.case.label), optimizer, self.clip.device, precision)
            parts["loss"] = parts.pop("behind it")
            return parts | {"whole": sum(parts.values())}
        return call

    def differences(self):
        "As of `Phase1`; the gradient of all weights together."
        pixels, found = self.case.draw()[0], {}
        for way, model in (("ours", self.ours), ("plain", self.plain)):
            model.zero_grad()
            loss = F.cross_entropy(model.classify(model.features(pixels)), self.case.label)
            loss.backward()
            found[way] = dict(loss=loss.detach()[None], weights=torch.cat([p.grad.flatten() for p in model.parameters()]))
        return {k: float((found["ours"][k] - found["plain"][k]).norm() / found["plain"][k].norm()) for k in found["plain"]}


def full_fine_tuning(clip, n_classes, batch, repetitions, precisions=("fp32",), compiled="", with_plain=True):
    "Rows of a step of full fine-tuning; in the precision that training takes, the last one on a GPU and else the first, also with the tower compiled by a backend of torch.compile, and of a ResNet with its channels last."
    case = FullFineTuning(clip, n_classes, batch)
    ways = {"ours" + (f", {p}" if p != "fp32" else ""): case.step(case.ours, p) for p in precisions}
    others = ({"compiled": dict(compiled=compiled)} if compiled else {}) | ({"channels last": dict(channels_last=True)} if case.plain is None else {})
    usual, precision = list(zip(ways, precisions))[-1 if clip.device.type == "cuda" else 0]
    ways |= {f"{usual}, {name}": case.step(case.made(**how), precision) for name, how in others.items()}
    if with_plain and case.plain is not None:
        ways["plain"] = case.step(case.plain)
    return rows_of(alternating(ways, repetitions), "full fine-tuning step", backbone=clip.name, classes=n_classes, images=batch)


def what_layouts_save(rows):
    "Rows of how many times faster a step of full fine-tuning is compiled, or with channels last."
    ways = dict.fromkeys(r["way"] for r in rows)
    return [found for way in ways for name in ("compiled", "channels last") if way.endswith(f", {name}") for found in ratios(rows, "full fine-tuning step", (way.removesuffix(f", {name}"), "whole"), (way, "whole"))]


class Craft:
    "One generation of CraFT's prompt search, on cached image features."

    def __init__(self, clip, n_classes, n_images, population=40):
        self.clip, self.names, self.population = clip, class_names(clip, n_classes), population
        self.box = BlackBoxVLM(clip)
        self.pictures = Pictures(noise(n_images, clip.image_size).batch(range(n_images), clip.image_size).numpy())
        self.labels = torch.arange(n_images) % n_classes
        start = self.box.embed_text("the" if clip.preset == "embedded" else "a photo of a")
        self.search, self.width = PromptGenerator(start, population=population), len(start)
        self.prompts = plain.Prompts(clip, self.names, len(start))
        self.v = clip.image_features(torch.from_numpy(self.pictures.pixels))

    def generation(self, seed):
        "Contexts [population, n, w] of candidates that were not asked about before."
        return self.search.context(generator(seed, "benchmark").standard_normal((self.population, self.search.A.shape[1])))

    def ours(self, contexts):
        "Fitness of all candidates, as a run of `craft` asks for it."
        return fitness(torch.from_numpy(self.box.logits(contexts, self.names, self.pictures, candidates=True)), self.labels, None, 0.0)

    def plain(self, contexts):
        "Fitness of candidates, one after the other at the full length."
        return plain.craft_generation(self.prompts, torch.from_numpy(contexts).to(self.clip.device), self.v, self.labels.to(self.clip.device), self.clip.tau).cpu()

    def differences(self, candidates=None):
        "Largest relative distance of the fitness of a candidate."
        contexts = self.generation(0)
        ours, theirs = self.ours(contexts)[:candidates], self.plain(contexts[:candidates])
        return dict(fitness=float(((ours - theirs) / theirs).abs().max()))


def craft(clip, n_classes, n_images, repetitions, loop=40):
    """Rows of one generation of 40 candidates; the plain loop is made for `loop` of them and counted for all.

    Every call asks about a generation of its own, because a box keeps the texts of its last question; in a repetition both ways have the same.
    """
    case = Craft(clip, n_classes, n_images)

    def timed(call, candidates):
        seeds = count()

        def run():
            contexts = case.generation(next(seeds))[:candidates]
            clock = Clock(clip.device)
            call(contexts)
            clock("whole")
            return {"whole": clock.parts["whole"] * case.population / candidates}
        return run
    ways = {"ours": timed(case.ours, case.population), "plain": timed(case.plain, loop)}
    notes = {} if loop == case.population else {"plain": f"from {loop} of {case.population} candidates"}
    return rows_of(alternating(ways, repetitions), "CraFT generation", notes=notes, backbone=clip.name, classes=n_classes, context=case.width, images=n_images)


def text_tower(clip, n_classes, n_context, repetitions, with_plain=True):
    "Rows of one forward and backward pass of one prompt for every class."
    names = class_names(clip, n_classes)
    ways, encoders = {}, {"ours": PromptEncoder(clip, names, n_context), **({"plain": plain.Prompts(clip, names, n_context)} if with_plain else {})}
    start = 0.02 * torch.randn(n_context, clip.model.token_embedding.embedding_dim, device=clip.device)
    for way, encoder in encoders.items():
        def call(encoder=encoder, way=way):
            context = start.clone().requires_grad_()
            clock = Clock(clip.device)
            encoder(context[None] if way == "ours" else context).sum().backward()
            clock("whole")
            return clock.parts
        ways[way] = call
    return rows_of(alternating(ways, repetitions), "text tower", backbone=clip.name, classes=n_classes, context=n_context)


def prediction(clip, n_classes, n_images, repetitions, batch=64):
    "Rows of images per second: to probabilities from pixels in memory and from JPEGs of 375 x 500, decoding included, and the image tower on prepared pixels."
    encoder, images = EncoderWithHead(clip, n_classes, zero_shot_head(clip, class_names(clip, n_classes), template(clip))), noise(n_images, clip.image_size)
    files = FileImages(pictures_in_files(n_images), keep_bytes=0)
    ready = [clip.normalize(pixels) for _, pixels in batches(images, range(n_images), batch, clip.image_size)]

    @torch.no_grad()
    def bare():
        for x in ready:
            encoder.visual(x)

    def rate(call):
        def run():
            clock = Clock(clip.device)
            call()
            clock("whole")
            return {"whole": n_images / clock.parts["whole"]}
        return run
    ours = {name: rate(lambda images=images: predict(encoder.logits, images, clip.image_size, batch, clip.device)) for name, images in (("ours", images), ("ours, JPEGs", files))}
    ways = ours | {"image tower alone": rate(bare)}
    return rows_of(alternating(ways, repetitions), "prediction", "images/s", backbone=clip.name, classes=n_classes, images=n_images)


def selection(n_images, n_classes, repetitions):
    "Rows of what is done with the scores of all images once a tower has made them: S*, labels, verdicts; scores are random."
    rng = np.random.default_rng(0)
    scores = [rng.random((n_images, n_classes), dtype=np.float32) for _ in range(4)]
    views = [Similarities(scores[2 * g], scores[2 * g + 1], 0.01) for g in range(2)]

    def run():
        clock = Clock(torch.device("cpu"))
        select_topk(views[0].probabilities, 16)
        clock("S*")
        cross_validate(views)
        clock("labels and verdicts")
        return clock.parts | {"whole": sum(clock.parts.values())}
    return rows_of(alternating({"ours": run}, repetitions), "selection", classes=n_classes, images=n_images)


def training(clip, task, repetitions, steps=10):
    """Rows of seconds per step of `coft.trainer.train` with the settings that the main job takes, beside the image tower's forward and backward on batches of the same size.

    Phase I learns from the zero-shot labels of as many images as S* has, Phase II from those of all images.
    """
    settings = get_method("coft").settings_for(clip.preset)
    P, _ = first_labels(clip, task)
    chosen = select_topk(P, settings.top_k, settings.fill_short)
    everything = np.arange(len(P)), P.argmax(1)
    found = []
    for phase, (index, labels) in ((1, chosen), (2, everything)):
        schedule = settings.schedule(phase)
        model = PromptedModel(clip, task.class_names, settings, 0) if phase == 1 else EncoderWithHead(clip, len(task.class_names))
        optimizer, _ = schedule.build([p for p in model.parameters() if p.requires_grad], 1000)
        n = min(schedule.batch_size, len(index))
        (place, pixels) = next(batches(task.unlabelled, index, n, clip.image_size, (0, f"phase{phase}", 0), task.augmentation))
        pixels, label, u = pixels.to(clip.device), torch.from_numpy(labels[place]).to(clip.device), torch.rand(n, device=clip.device)

        def alone():
            if phase == 1:
                parts = [split_step(lambda: model.image_features(pixels), behind(model, pixels, label, u), optimizer, clip.device) for _ in range(steps)]
            else:
                parts = [split_step(lambda: model.features(pixels), lambda v: F.cross_entropy(model.classify(v), label), optimizer, clip.device) for _ in range(steps)]
            return {"image tower": float(np.median([p["image tower"] for p in parts]))}

        def whole():
            begin = time.perf_counter()
            few = np.resize(np.arange(len(index)), n * steps)
            train(model, task.unlabelled, index[few], {"label": labels[few]}, replace(schedule, batch_size=n), clip.image_size, task.augmentation, 0, f"phase{phase}", progress=False, max_steps=steps)
            return {"whole": (time.perf_counter() - begin) / steps}
        made, steps_of_a_run = alternating({"image tower": alone, "training": whole}, repetitions), 2 * schedule.epochs * int(np.ceil(len(index) / schedule.batch_size))
        where = dict(measure=f"training, Phase {'I' * phase}", backbone=clip.name, classes=len(task.class_names), images=n)
        found += rows_of([{"training": m["training"] | m["image tower"]} for m in made], **where) + rows_of([{"training": {"steps": steps_of_a_run}} for _ in made], unit="of a run", **where)
    return found


def share_of_training(rows):
    "Rows of the share of the image tower in the training time of a whole run, from the rows of `training`."
    table = pd.DataFrame(rows).pivot_table(index=["repetition", "measure"], columns="part", values="value")
    per = table.assign(whole=table.whole * table.steps, tower=table["image tower"] * table.steps).groupby("repetition")[["tower", "whole"]].sum()
    return rows_of([{"training": {"image tower": share}} for share in 100 * per.tower / per.whole], "training, both phases", "%", backbone=rows[0]["backbone"], classes=rows[0]["classes"])


class Bytes(TorchDispatchMode):
    "Adds up the bytes that every operation reads and writes, views left out."

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = lambda values: [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]
        given, made = leaves((args, kwargs or {})), leaves(out)
        if not function.is_view:
            self.total += sum(t.nbytes for t in (*given, *made))
        return out


def counted(call):
    "Floating-point operations of matrices and convolutions, and bytes of all operations, in one call."
    with FlopCounterMode(display=False) as flops:
        call()
    with Bytes() as moved:
        call()
    return dict(operations=flops.get_total_flops(), bytes=moved.total)


def rates(device, precision, n, repetitions, times=1):
    "What the processor does at best: operations per second of a square product of n x n matrices, bytes per second of a copy; the best of several, each `times` times in a row."
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, best = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype), {}
    product, long = torch.empty_like(a), torch.zeros(8 * n * n, device=device)
    target = torch.zeros_like(long)
    for _ in range(repetitions + 1):
        clock = Clock(torch.device(device))
        for _ in range(times):
            torch.mm(a, b, out=product)
        clock("product")
        for _ in range(times):
            target.copy_(long)
        clock("copy")
        for k, v in clock.parts.items():
            best[k] = min(best.get(k, v), v)
    return dict(operations=times * 2 * n**3 / best["product"], bytes=times * 2 * long.nbytes / best["copy"])


def floor(clip, what, n_classes, batch, repetitions, precision, n):
    "Rows of a step beside its floor: seconds, seconds that its operations and its bytes take at best, and the share of the matrix rate; `n` as of `rates`, on a GPU with many products in a row."
    case = Phase1(clip, n_classes, batch) if what == "Phase I step" else FullFineTuning(clip, n_classes, batch)
    step = case.step(case.ours, precision)
    needs, best = counted(step), rates(clip.device, precision, n, repetitions, 32 if clip.device.type == "cuda" else 1)
    least = {k: needs[k] / best[k] for k in needs}
    found = [{precision: dict(step=parts["whole"] - parts["data"], operations=least["operations"], bytes=least["bytes"])} for parts in (w["ours"] for w in alternating({"ours": step}, repetitions))]
    where = dict(backbone=clip.name, classes=n_classes, images=batch)
    share = [{precision: {"share of the matrix rate": 100 * f[precision]["operations"] / f[precision]["step"]}} for f in found]
    return rows_of(found, f"floor, {what}", **where) + rows_of(share, f"floor, {what}", "%", **where)


def steps_of_one(clip, what, n_classes, batch, seed=0):
    "One training step of one of the two models, data included, as a function without arguments."
    case = Phase1(clip, n_classes, batch, seed=seed) if what == "Phase I step" else FullFineTuning(clip, n_classes, batch)
    return case.step(case.ours)


class Pair:
    "Both models in processes of their own, which wait until they are asked for steps."

    def __init__(self, what, backbone, pretrained, n_classes, batch, devices, threads):
        cases = [dict(what=what, model=g, backbone=backbone, pretrained=pretrained, n_classes=n_classes, batch=batch, device=str(device), threads=threads) for g, device in enumerate(devices)]
        self.processes = [subprocess.Popen([sys.executable, "-m", "benchmarks.pair", json.dumps(c)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for c in cases]
        self.wait()

    def wait(self):
        for process in self.processes:
            if process.stdout.readline() != "done\n":
                self.end()
                raise RuntimeError("a process of a pair of models ended before its steps were made; what it says stands above.")

    def __call__(self, steps):
        for process in self.processes:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        self.wait()

    def end(self):
        for process in self.processes:
            process.stdin.close()
            process.kill()
            process.wait()


def two_models(what, backbone, pretrained, n_classes, batch, repetitions, device="cpu", steps=3):
    """Rows of seconds for one step of both models: in one process in turn, in two processes at once that share the processor, and, with two GPUs, on one each.

    On a CPU each of two processes has half of the threads.
    """
    clip, on_gpu = load_clip(backbone, pretrained, device), torch.device(device).type == "cuda"
    alone = [steps_of_one(clip, what, n_classes, batch, seed) for seed in range(2)]
    threads = None if on_gpu else max(1, torch.get_num_threads() // 2)
    pairs = {"two processes": Pair(what, backbone, pretrained, n_classes, batch, [device] * 2, threads)}
    if on_gpu and torch.cuda.device_count() > 1:
        pairs["two devices"] = Pair(what, backbone, pretrained, n_classes, batch, ["cuda:0", "cuda:1"], None)

    def in_turn(n):
        for step in alone * n:
            step()

    def timed(call):
        def run():
            clock = Clock(clip.device)
            call(steps)
            clock("whole")
            return {"whole": clock.parts["whole"] / steps}
        return run
    try:
        found = alternating({"one process": timed(in_turn)} | {way: timed(pair) for way, pair in pairs.items()}, repetitions)
    finally:
        for pair in pairs.values():
            pair.end()
    return rows_of(found, f"two models, {what}", backbone=backbone, classes=n_classes, images=batch)


def what_pays(rows):
    "Of rows of `two_models`, by measure and backbone: the way with the lowest median, and how many times faster it is than one process by median and quartiles."
    told = []
    for (measure, backbone), part in pd.DataFrame(rows).groupby(["measure", "backbone"], sort=False):
        best = part.groupby("way", sort=False).value.median().idxmin()
        gain = pd.Series([r["value"] for r in ratios(part.to_dict("records"), measure, ("one process", "whole"), (best, "whole"))])
        sure = best == "one process" or gain.quantile(0.25) > 1
        told.append(dict(step=measure.removeprefix("two models, "), backbone=backbone, pays=best if sure else "one process", fastest=best, **{"times faster than one process": f"{gain.median():.3g} ({gain.quantile(0.25):.3g} to {gain.quantile(0.75):.3g})"}))
    return pd.DataFrame(told)


@contextmanager
def reference_path():
    "Inside this block prompts are encoded whole at the model's full length, and both prompts of all classes on every step, as the parity assertions have it."
    kept = PromptEncoder.forward, PromptEncoder.each, PromptedModel.losses_apart
    PromptEncoder.forward, PromptedModel.losses_apart = PromptEncoder.plain, PromptedModel.losses_together
    PromptEncoder.each = lambda self, context: [lambda classes=None, one=one: self.plain(one[None], classes)[0] for one in context]
    try:
        yield
    finally:
        PromptEncoder.forward, PromptEncoder.each, PromptedModel.losses_apart = kept


def agreement(clip, task, seeds, measure="accuracy", text_memory=None, **settings):
    "Rows of the accuracy of CoFT in percent, ours and by the reference path, a repetition for each seed; `text_memory` as of `coft.clip.Compute`, for ours."
    def accuracy(seed):
        return {"accuracy": 100 * float(np.mean([(p.argmax(1) == task.audit.test).mean() for p in get_method("coft", **settings).fit(clip, task, seed, progress=False).predict_all(task.test)]))}
    found = []
    for seed in seeds:
        with computed(clip, **({} if text_memory is None else dict(text_memory=text_memory))):
            ours = accuracy(seed)
        with reference_path():
            found.append({"ours": ours, "reference": accuracy(seed)})
    return rows_of(found, measure, "%", backbone=clip.name, classes=len(task.class_names), images=len(task.unlabelled))


def agreement_in_parts(clip, task, seeds, **settings):
    """As `agreement`, where ours takes its other paths: negative prompts of a batch alone, and texts that are computed again for the gradient.

    A batch has so few images that their labels and complement labels are not all classes; the memory holds half of the tokens of the class names.
    """
    lengths = PromptEncoder(clip, task.class_names, 16).lengths
    memory = text_bytes(clip.model, int(lengths.sum()), 17 + int(lengths.max()), learns=True) / 2**31
    few = dict(phase1_batch_size=(len(task.class_names) - 1) // 2, n_context=16, top_k=4)
    return agreement(clip, task, seeds, "accuracy, in parts", memory, **few | settings)


def within_the_spread(rows):
    "Rows of one number: how far the mean accuracies of `agreement` are apart, in standard deviations over the seeds; none with a single seed."
    table = pd.DataFrame(rows).pivot_table(index="repetition", columns="way", values="value")
    if len(table) < 2:
        return []
    spread, apart = float(table.reference.std()), abs(float((table.ours - table.reference).mean()))
    return rows_of([{"ours, reference": {"apart": 0.0 if not apart else apart / spread if spread else float("inf")}}], rows[0]["measure"], "standard deviations", **{k: rows[0][k] for k in ("backbone", "classes", "images")})


def pictures_in_files(n, side=(375, 500)):
    "JPEGs of smooth colours, as large as photographs usually are, in memory."
    rng, files = np.random.default_rng(0), []
    for _ in range(n):
        file = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8)).resize(side[::-1], Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def feeding(size, n_images, repetitions, batch=64, processes=2, side=(375, 500), device="cpu"):
    """Rows of random views per second from JPEGs, for a step that takes no time: decoded in turn in threads, ahead in other processes, and kept from the pass before.

    The views are made on `device`; to a GPU the images go through pinned memory.
    """
    files, epoch = pictures_in_files(n_images, side), count()

    def rate(keep_bytes, workers):
        images = FileImages(files, keep_bytes=keep_bytes)

        def run():
            clock = Clock(torch.device(device))
            for _ in batches(images, range(n_images), batch, size, (0, "feeding", next(epoch)), Augmentation(), device=device, workers=workers):
                pass
            clock("whole")
            return {"whole": n_images / clock.parts["whole"]}
        return run
    ways = {"decoded in turn": rate(0, 0), f"decoded ahead by {processes}": rate(0, processes), "kept": rate(2**40, 0)}
    return rows_of(alternating(ways, repetitions), "feeding", "images/s", images=n_images)


def whole_run(clip, n_images, n_classes, side=(375, 500), **settings):
    """Row of the minutes that CoFT takes with the settings of the paper on so many JPEGs, decoding included.

    The labels of a model with random weights may pass no judge, so nobody judges them: all images are learned from, which takes longest.
    """
    task = make_task("benchmark", class_names(clip, n_classes), Part(pictures_in_files(n_images, side)), template=template(clip))
    begin = time.perf_counter()
    fitted = get_method("coft", "paper", **dict(judge="nobody") | settings).fit(clip, task, progress=False)
    minutes, accepted = (time.perf_counter() - begin) / 60, [int(fitted.trace[f"accepted_{g}"].sum()) for g in (1, 2)]
    return rows_of([{"ours": {"whole": minutes}}], "CoFT", "min", notes={"ours": f"{accepted[0]} and {accepted[1]} labels accepted"}, backbone=clip.name, classes=n_classes, images=n_images)


def peak_memory(note="", **case):
    "Row of the peak memory of one step in a process of its own; arguments as of `benchmarks.peak.one`."
    done = subprocess.run([sys.executable, "-m", "benchmarks.peak", json.dumps(case)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory of {case} could not be measured:\n{done.stderr.strip()}")
    told = json.loads(done.stdout.splitlines()[-1])
    where = dict(backbone=case["backbone"], classes=case["n_classes"], images=case["batch"])
    return rows_of([{case["way"]: {"step": told["step_mb"], "process": told["peak_mb"]}}], f"peak memory, {case['what']}", "MB", notes={case["way"]: note}, **where)


def peaks(cases, repetitions):
    "Rows of the peak memory of every case, in turn, forwards and backwards; `cases` are arguments of `peak_memory`."
    return [row | dict(repetition=r) for r in range(repetitions) for case in (cases if r % 2 == 0 else cases[::-1]) for row in peak_memory(**case)]


def memory_per_class(rows):
    "Rows of the memory of a step for every further class, ours over the plain way's, from the fewest to the most classes of both; none where it does not grow there."
    table, found = pd.DataFrame(rows).query("part == 'step'").pivot_table(index=["repetition", "classes"], columns="way", values="value").dropna(), []
    for _, one in table.groupby("repetition"):
        grown, counts = one.iloc[-1] - one.iloc[0], one.index.get_level_values("classes")
        if grown.plain > 0:
            found.append({"ours / plain": {"per class": float(grown.ours / grown.plain)}})
    where = {k: rows[0][k] for k in ("backbone", "images", "measure")}
    return rows_of(found, unit="times", notes={"ours / plain": f"from {counts[0]} to {counts[-1]} classes"}, **where) if found else []


def narrow_clip(device="cpu"):
    "A model with random weights whose towers have two blocks of 64 numbers, and with the vocabulary and the 77 tokens of CLIP: what grows with the classes is most of its memory."
    torch.manual_seed(0)
    tower = dict(width=64, layers=2)
    net = open_clip.CLIP(64, dict(image_size=32, patch_size=16, head_width=32, **tower), dict(heads=2, **tower), quick_gelu=True)
    return FrozenCLIP(net.to(device), open_clip.get_tokenizer("ViT-B-32"), "narrow", "random", weights_digest(net))


def many_classes(n_classes, text_memory, repetitions, batch=32, device="cpu"):
    "Rows of the peak memory of a Phase I step of `narrow_clip`: with 100 classes, with so many and `text_memory` GiB for their texts, and with as much as these want."
    case = dict(what="Phase I step", way="ours", backbone="narrow", pretrained=None, batch=batch, device=device)
    told = f"text memory {text_memory:g} GiB"
    return peaks([case | dict(n_classes=n, text_memory=memory, note=note) for n, memory, note in ((min(100, n_classes), text_memory, told), (n_classes, text_memory, told), (n_classes, 1024.0, "text memory without bound"))], repetitions)


@dataclass(frozen=True)
class Aim:
    "What was aimed at, and where in the table it is found."
    what: str
    bound: str  # "at least", "at most" or "more than"
    number: float
    measure: str
    way: str
    part: str
    where: dict = field(default_factory=dict)  # further columns
    gpu: bool = False  # whether it is meant for a GPU alone
    backbone: str = ""  # the one that is looked at closely, by default

    def reached(self, value):
        return {"at least": value >= self.number, "at most": value <= self.number, "more than": value > self.number}[self.bound]

    def row(self, table, backbone, on_gpu):
        "The aim beside what the summary `table` has of it: median, quartiles where it was measured more than once, and whether the median is on the right side."
        wanted = dict(measure=self.measure, way=self.way, part=self.part, backbone=self.backbone or backbone) | self.where
        fit = table[np.logical_and.reduce([table[k] == v for k, v in wanted.items()])] if on_gpu or not self.gpu else table[:0]
        told = {"what": self.what, "aim": f"{self.bound} {self.number:g}"}
        if not len(fit):
            return told | {"measured": "not measured", "reached": ""}
        one = fit.iloc[-1]
        spread = f" ({one.q1:.3g} to {one.q3:.3g})" if one.repetitions > 1 else ""
        return told | {"measured": f"{one['median']:.3g}{spread}" + f" {one.note}" * bool(one.note), "reached": "yes" if self.reached(one["median"]) else "no"}


P, PLAIN = "Phase I step", "plain / ours"
AIMS = (
    Aim("text tower, times faster, 100 classes", "at least", 15, P, PLAIN, "text tower", dict(classes=100)),
    Aim("whole step, times faster, 100 classes", "at least", 1.7, P, PLAIN, "whole", dict(classes=100)),
    Aim("whole step, times faster, 1,000 classes", "at least", 7, P, PLAIN, "whole", dict(classes=1000)),
    Aim("whole step over its image tower, 100 classes", "at most", 1.15, P, "ours", "whole / image tower", dict(classes=100)),
    Aim("whole step over its image tower, 1,000 classes", "at most", 1.35, P, "ours", "whole / image tower", dict(classes=1000)),
    Aim("whole step, times faster in bf16, 100 classes", "more than", 1, P, "ours / ours, bf16", "whole", dict(classes=100)),
    Aim("peak memory over the plain way's, 100 classes", "at most", 0.5, f"peak memory, {P}", "ours / plain", "process", dict(classes=100)),
    Aim("memory of a further class over the plain way's", "at most", 0.15, f"peak memory, {P}", "ours / plain", "per class"),
    Aim("CraFT generation, times faster, 100 classes", "at least", 10, "CraFT generation", PLAIN, "whole", dict(classes=100)),
    Aim("prediction over the image tower's own rate", "at least", 0.9, "prediction", "ours / image tower alone", "whole"),
    Aim("image tower in the main job's training time (%)", "at least", 80, "training, both phases", "training", "image tower", backbone="embedded"),
    Aim("accuracies apart from the reference path (standard deviations over seeds)", "at most", 1, "accuracy", "ours, reference", "apart", backbone="embedded"),
    Aim("the same with negative prompts of a batch alone and texts computed again", "at most", 1, "accuracy, in parts", "ours, reference", "apart", backbone="embedded"),
    Aim("full fine-tuning, share of the card's bf16 matrix rate (%)", "at least", 45, "floor, full fine-tuning step", "bf16", "share of the matrix rate", gpu=True),
    Aim("CoFT on 4,000 images of 224 pixels (min)", "at most", 5, "CoFT", "ours", "whole", dict(images=4000), gpu=True))


def aims(table, backbone, on_gpu):
    "All aims beside what was measured with the model that is looked at closely."
    return pd.DataFrame([aim.row(table, backbone, on_gpu) for aim in AIMS])
