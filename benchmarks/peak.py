"""Peak memory of one step, in a process of its own: python -m benchmarks.peak '{"what": "Phase I step", "way": "plain", ...}'

Printed as JSON: `peak_mb`, the most that the process ever held, and `step_mb`, by how much the step raised that above what
it found, or, where the system does not let the peak be forgotten, by how much loading or the step did. On a GPU both are those of the card. The kernel's VmHWM is read where it exists: `ru_maxrss` of a process also holds
what its parent had when it started it.
"""
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from coft.clip import load_clip

from benchmarks.measure import FullFineTuning, Phase1, narrow_clip

STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes():
    "The most memory that this process held."
    found = [line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")] if STATUS.is_file() else []
    return 1024 * int(found[0]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak():
    "Count the peak from here on; false where the system does not let us."
    before = peak_bytes()
    try:
        REFS.write_text("5")
    except OSError:
        return False
    return peak_bytes() < before


def one(what, way, backbone, pretrained, n_classes, batch, device="cpu", precision="fp32", text_memory=None):
    "Memory of one step of `way`, \"ours\" or \"plain\"; `backbone` \"narrow\" is that of `narrow_clip`, `text_memory` as of `coft.clip.Compute`."
    clip = narrow_clip(device) if backbone == "narrow" else load_clip(backbone, pretrained, device)
    if text_memory is not None:
        clip.compute = replace(clip.compute, text_memory=text_memory)
    case = Phase1(clip, n_classes, batch) if what == "Phase I step" else FullFineTuning(clip, n_classes, batch)
    step = case.step(getattr(case, way), precision)
    if clip.device.type == "cuda":
        before = torch.cuda.memory_allocated(clip.device)
        torch.cuda.reset_peak_memory_stats(clip.device)
    else:
        forget_peak()
        before = psutil.Process().memory_info().rss
    step()
    peak = torch.cuda.max_memory_allocated(clip.device) if clip.device.type == "cuda" else peak_bytes()
    return dict(peak_mb=peak / 2**20, step_mb=(peak - before) / 2**20)


if __name__ == "__main__":
    print(json.dumps(one(**json.loads(sys.argv[1]))))
