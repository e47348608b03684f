"""One of two models in a process of its own: python -m benchmarks.pair '{"what": "Phase I step", "model": 0, ...}'

It makes one step, says so, and then as many as each line of its input asks for; after them it says so again. So two of these
processes make their steps at the same time, and whoever asked them takes the time.
"""
import json
import sys

import torch
from coft.clip import load_clip

from benchmarks.measure import steps_of_one


def work(what, model, backbone, pretrained, n_classes, batch, device="cpu", threads=None):
    "Make steps as long as there are lines to read."
    if threads:
        torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    step = steps_of_one(load_clip(backbone, pretrained, device), what, n_classes, batch, model)
    n = "1"
    while n:
        for _ in range(int(n)):
            step()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        print("done", flush=True)
        n = sys.stdin.readline()


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))
