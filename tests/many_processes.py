"What two processes do together, and one alone; `test_many_processes` compares them."
import os
import signal
import sys
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import coft.trainer
import numpy as np
import torch
from coft.clip import FrozenCLIP, load_clip
from coft.collaborate import CoFTSettings, PromptedModel
from coft.contrast import MomentumContrast, Views
from coft.data import TASKS, glyphs_task
from coft.experiment import Parameters, run_variant
from coft.glyphs import Writing
from coft.processes import n_processes, once, over_images
from coft.trainer import EncoderWithHead, Schedule, train
from torch import nn

N, BATCH, SIZE = 15, 7, 24 # batches of 7, 7 and 1 image: parts of 4 and 3, and one that cannot be divided
TASK = glyphs_task("toy-for-many", Writing("stix", "0123", 72), n_test=40, seed=3)
LABEL = np.arange(N) % 4
ACCEPTED = np.arange(N) % 5 == 0


def frozen(dtype):
    clip = load_clip("embedded")
    copied = FrozenCLIP(deepcopy(clip.model).to(dtype), clip.tokenizer, clip.name, clip.pretrained, clip.weights_sha256)
    copied.mean, copied.std = clip.mean.to(dtype), clip.std.to(dtype)
    return copied


def prompted(clip, light_module):
    model = PromptedModel(clip, TASK.class_names, CoFTSettings(n_context=4, n_visual=4, light_module=light_module), seed=0)
    return model, dict(label=LABEL), TASK.augmentation


def fine_tuned(clip):
    return EncoderWithHead(clip, 4, seed=0), dict(label=LABEL), TASK.augmentation


def contrasted(clip):
    module = MomentumContrast(EncoderWithHead(clip, 4, seed=0), 2 * BATCH, gamma=0.5, momentum=0.9, seed=0)
    return module, dict(label=LABEL, accepted=ACCEPTED), Views((TASK.augmentation,) * 2)


class Coupled(nn.Module):
    "A loss that is no mean over images; what it says of dividing batches counts for itself alone, not for its heirs"
    def __init__(self, clip):
        super().__init__()
        self.layer = nn.Linear(3, 4, dtype=clip.model.logit_scale.dtype)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 12).view(4, 3))
            self.layer.bias.zero_()

    def forward(self, pixels, label, u=None):
        return {"loss": self.layer(pixels.to(self.layer.weight.dtype).mean((2, 3))).var(0, correction=0).add(0.01).log().mean(), "images": torch.tensor(float(len(pixels)))}


class Overflowing(Coupled):
    "Not finite for the image with label 9 alone"
    shares_batches = True

    def forward(self, pixels, label, u=None):
        score = self.layer(pixels.mean((2, 3))).mean(1)
        return {"loss": torch.where(label == 9, torch.inf, score).mean()}


KINDS = {"dual prompt": lambda clip: prompted(clip, "visual_prompt"), "lora": lambda clip: prompted(clip, "lora"), "adapter": lambda clip: prompted(clip, "adapter"),
         "full fine-tuning": fine_tuned, "momentum contrast": contrasted, "coupled": lambda clip: (Coupled(clip), dict(label=LABEL), TASK.augmentation)}


def trained(kind, dtype, max_steps=None, epochs=7, **more):
    "The module after training, and its history"
    module, columns, views = KINDS[kind](frozen(dtype))
    module.to(dtype)
    schedule = Schedule("sgd", lr=0.05, epochs=epochs, batch_size=BATCH)
    history = train(module, TASK.unlabelled, np.arange(N), columns, schedule, SIZE, views, 0, "phase", progress=False, title=kind, max_steps=max_steps, **more)
    return module, [{k: v for k, v in h.items() if k != "images_per_second"} for h in history]


def gradient(kind):
    "Of one step in float32"
    module, _ = trained(kind, torch.float32, max_steps=1)
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}


def steps(kind, **more):
    "Weights, buffers and means in float64, after 7 epochs of 3 steps"
    module, history = trained(kind, torch.float64, **more)
    return dict(state=module.state_dict(), history=history)


def cut_off(folder):
    "Killed in the middle of the third epoch"
    forward, calls = MomentumContrast.forward, []

    def deadly(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2 * 3 + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *args, **kwargs)

    MomentumContrast.forward = deadly
    trained("momentum contrast", torch.float64, folder=folder)


def in_a_forked_process(work, port):
    "Run `work` in a copy of every process; how it ended"
    pid = os.fork()
    if not pid:
        os.environ.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def predicted():
    clip = load_clip("embedded")
    return over_images(clip.image_features, TASK.unlabelled, clip.image_size, batch_size=16)


def refused():
    "What every process is told when a loss is not finite in one of them, and when something fails in the main one"
    module, columns = Overflowing(load_clip("embedded")), dict(label=np.where(np.arange(N) == 3, 9, LABEL))
    told = []
    for work in (lambda: train(module, TASK.unlabelled, np.arange(N), columns, Schedule(batch_size=N, epochs=1), SIZE, TASK.augmentation, 0, "phase", progress=False), lambda: once(lambda: [][0])):
        try:
            work()
        except (FloatingPointError, IndexError) as e:
            told.append(str(e))
    return told


def unlike():
    "What is said where the processes hold different labels"
    try:
        train(EncoderWithHead(load_clip("embedded"), 4), TASK.unlabelled, np.arange(N), dict(label=LABEL[::int(os.environ["RANK"]) * 2 - 1].copy()), Schedule(epochs=1), SIZE, TASK.augmentation, 0, "phase", progress=False)
    except ValueError as e:
        return str(e)


@contextmanager
def remembered_parts():
    "How many numbers of the module this process holds, and how many there are"
    told, share = [], coft.trainer._sharded

    def remember(*args):
        copied = share(*args)
        told.extend((sum(p.to_local().numel() for p in copied.parameters()), sum(p.numel() for p in copied.parameters())))
        return copied

    coft.trainer._sharded = remember
    try:
        yield told
    finally:
        coft.trainer._sharded = share


def run(folder):
    "A whole run of CoFT, as the main job and the pages make it"
    TASKS[TASK.name] = lambda: TASK
    settings = dict(preset="paper", top_k=4, n_context=4, n_visual=4, phase1_epochs=1, phase1_batch_size=8, phase2_epochs=1, phase2_batch_size=16)
    run_variant("coft", settings, Parameters(tasks=TASK.name, methods=["coft"], out_dir=str(folder), device="cpu"), TASK.name, 0)


def all_of_it(folder):
    "Everything that is compared; the state of a phase that was cut off may stand in `folder`"
    contrast = steps("momentum contrast", folder=folder / "cut off")
    found = dict(gradients={k: gradient(k) for k in KINDS}, weights={k: steps(k) for k in ("dual prompt", "full fine-tuning", "coupled")} | {"momentum contrast": contrast}, features=predicted(), refused=refused())
    if n_processes() == 1:
        found["in parts"] = steps("momentum contrast", epochs=3)
    else:
        found["unlike"] = unlike()
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        trained("momentum contrast", torch.float64, max_steps=3, epochs=3, folder=folder / "in parts")
        with remembered_parts() as found["numbers in parts"]:
            found["in parts"] = steps("momentum contrast", epochs=3, folder=folder / "in parts")
        del os.environ["ACCELERATE_USE_FSDP"]
    run(folder / "out")
    return found


if __name__ == "__main__":
    folder, port = Path(sys.argv[1]), sys.argv[2]
    ended = in_a_forked_process(lambda: cut_off(folder / "cut off"), port)
    found = all_of_it(folder) | dict(ended=ended)
    torch.save(found, folder / f"process-{os.environ['RANK']}.pt")
