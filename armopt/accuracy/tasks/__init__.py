"""The table of tasks: what rounding changes in what a model is for. One file for each task."""

from __future__ import annotations

from armopt.accuracy.tasks.base import Outputs, Sample, Task
from armopt.errors import InputError
from armopt.tables import Line, Table

#: In the order in which they are tried on a model's outputs.
TASKS: Table[type[Task]] = Table(
    "task",
    Line("detection", "armopt.accuracy.tasks.detection:Detection"),
    Line("segmentation", "armopt.accuracy.tasks.segmentation:Segmentation"),
    Line("language", "armopt.accuracy.tasks.language:Language"),
    Line("embedding", "armopt.accuracy.tasks.embedding:Embedding"),
    Line("classification", "armopt.accuracy.tasks.classification:Classification"),
)
#: ``--task none``: no task metrics.
NONE = "none"

__all__ = ["NONE", "TASKS", "Outputs", "Sample", "Task", "find", "task_for"]


def task_for(name: str, inputs: Outputs, outputs: Outputs) -> tuple[type[Task] | None, str]:
    """The task of that name, or the one that the outputs' names, shapes and dtypes speak for.

    Returns:
        The task, None where there is none; and why, in words.

    Raises:
        InputError: There is no such task, or the outputs don't fit it.
    """
    if name == NONE:
        return None, "as asked"
    if not name:
        found = find(inputs, outputs)
        return (None, "no output looks like a known task's") if found is None else (found, "found from the outputs")
    task = TASKS.find(name, where="task (--task)", also=(NONE,))
    if not task.fits(inputs, outputs, asked=True):
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in outputs.items())
        raise InputError(
            f"the outputs don't fit {name}: {shapes}", where="task (--task)", hint=f"It needs {task.needs}"
        )
    return task, "as asked"


def find(inputs: Outputs, outputs: Outputs) -> type[Task] | None:
    """The first task that the outputs speak for; None where nothing does."""
    return next((task for task in TASKS.values() if task.fits(inputs, outputs, asked=False)), None)
