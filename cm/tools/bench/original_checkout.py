"""A consistency distillation step by a checkout of the original repository, timed: a program of its own.

The checkout's package has this package's name, so this file imports neither by name before PYTHONPATH has decided
which it is. Argument: JSON of what to run; prints {"seconds": [...]}. Only the documented names are used.
"""

import copy
import importlib
import json
import sys
import time
from pathlib import Path

import torch


def main(asked: dict) -> dict:
    """Build the three networks by the checkout's functions and time whole steps on random images."""
    device = asked["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    package = importlib.import_module("cm.script_util")
    if not Path(package.__file__).is_relative_to(asked["checkout"]):
        raise SystemExit(f"{asked['checkout']} has no package cm: {package.__file__} was found instead")
    make = package.create_model_and_diffusion
    given = {**asked["model"], "use_fp16": asked["fp16"], "use_new_attention_order": False}
    net, diffusion = make(**given, weight_schedule="uniform", distillation=True)
    teacher_net, teacher_diffusion = make(**given, weight_schedule="uniform", distillation=False)
    diffusion.loss_norm = "l2"
    networks = [net, copy.deepcopy(net), teacher_net]
    for network in networks:
        network.to(device)
        if asked["fp16"]:
            network.convert_to_fp16()
    student, target, teacher = networks
    for frozen in (target, teacher):
        frozen.requires_grad_(False)
    masters = [p.detach().float().clone().requires_grad_() for p in student.parameters()]
    average, followed = ([m.detach().clone() for m in masters] for _ in range(2))
    optimizer = torch.optim.RAdam(masters, lr=asked["lr"], foreach=False)
    side, batch = asked["model"]["image_size"], asked["batch"]
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    labels = {"y": torch.randint(0, 1000, (batch,), device=device)} if asked["model"]["class_cond"] else {}

    def step() -> None:
        terms = diffusion.consistency_losses(
            student,
            images,
            asked["scales"],
            model_kwargs=labels,
            target_model=target,
            teacher_model=teacher,
            teacher_diffusion=teacher_diffusion,
        )
        student.zero_grad()
        terms["loss"].mean().backward()
        with torch.no_grad():
            for master, p in zip(masters, student.parameters()):
                master.grad = p.grad.float()
            optimizer.step()
            for i, (master, p, q) in enumerate(zip(masters, student.parameters(), target.parameters())):
                p.copy_(master)
                average[i].mul_(0.9999).add_(master, alpha=1e-4)
                followed[i].mul_(0.95).add_(master, alpha=0.05)
                q.copy_(followed[i])

    seconds = []
    for k in range(asked["warmup"] + asked["repeats"]):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if k >= asked["warmup"]:
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
