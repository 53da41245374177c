"""A trained model as one file that needs torch and nothing of this repo: `predict.py ckpt/run --export model.pt2`."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from config import one_line
from data_types import InputError
from frame import Frame
from images import per_channel
from vision_task import Task


class Deployed(nn.Module):
    """uint8 images [B, 3, H, W] of the model's size -> what `Task.deployed` has of them, name -> [B, …]: the
    deterministic network in float32 with its normalisation."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task
        for name in ("mean", "std"):
            values = per_channel(tuple(task.config["data"][name]), torch.device("cpu"))
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.model((images - self.mean) / self.std)
        return self.task.deployed(self.task.arrange(outputs))


def export_model(model: nn.Module, task: Task, classes: list[str], path: Path) -> dict[str, Any]:
    """Write the model (on the CPU) to `path` by `torch.export`, for any number of images at a time, with what one has
    to know as metadata.json in it; returns that. Raises InputError where the file cannot be written, or where a task of
    one's own computes what torch.export cannot record."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it, or name another file with --export")
    frame, model.autocast_dtype = Frame.from_config(task.config), None
    deployed, images = Deployed(model, task).eval(), torch.zeros(2, 3, frame.height, frame.width, dtype=torch.uint8)
    deployed.requires_grad_(False)  # who deploys it would keep activations, and read a warning, for nothing
    validate = Distribution._validate_args
    Distribution.set_default_validate_args(False)  # looks at numbers, which are not there while it is recorded
    try:
        with torch.no_grad():
            outputs = {name: list(tensor.shape[1:]) for name, tensor in deployed(images).items()}
            program = torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # whatever its tracing raises
        raise InputError(f"--export: the task cannot be recorded by torch.export ({one_line(error)[:160]})") from error
    finally:
        Distribution.set_default_validate_args(validate)
    about = {"task": task.config["task"], "classes": classes, "height": frame.height, "width": frame.width}
    about |= {"outputs": outputs} | ({} if frame.resize == "stretch" else vars(frame))
    temporary = path.with_name(f".{path.stem}.tmp.pt2")
    try:
        torch.export.save(program, temporary, extra_files={"metadata.json": json.dumps(about)})
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)[:80]
        raise InputError(f"{path}: cannot be written ({reason}); name another file with --export") from None
    finally:
        temporary.unlink(missing_ok=True)
    return about
