"""What a task is: it recognises a model's outputs, looks at one sample after the other, and gives figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:  # help lists tasks without importing torch
    import torch

    from armopt.accuracy.metrics import Metric

#: Tensors by name: ``logits``, ``0.boxes``.
Outputs: TypeAlias = "Mapping[str, torch.Tensor]"
#: A model as a function from named inputs to named outputs.
Run: TypeAlias = "Callable[[Outputs], Outputs]"


@dataclass(frozen=True, slots=True)
class Sample:
    """One call of both sides.

    Attributes:
        inputs: By name.
        reference: What the original gives in FP32.
        found: What the bundle gives.
        run_reference: Calls the original again, on other inputs of the same shapes.
        run_found: Calls the bundle again.
        memo: What a task found out of the original alone, for when the sample is compared with another candidate.
    """

    inputs: Outputs
    reference: Outputs
    found: Outputs
    run_reference: Run
    run_found: Run
    memo: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A task collects over samples; :meth:`results` gives its figures.

    Attributes:
        metrics: The figures it gives.
        needs: What outputs it needs, for a message.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    needs: ClassVar[str]

    @classmethod
    @abstractmethod
    def fits(cls, inputs: Outputs, outputs: Outputs, *, asked: bool) -> bool:
        """Whether a model with these outputs does this task; if `asked` for, whether it can at all."""

    @abstractmethod
    def update(self, sample: Sample) -> None:
        """Looks at one sample."""

    @abstractmethod
    def results(self) -> dict[str, float]:
        """The figures over all samples, by metric; one that no sample could give is left out."""

    @classmethod
    def align(cls, reference: Outputs, found: Outputs) -> tuple[Outputs, Outputs]:
        """Both sides with what belongs together at the same place, where a model orders by its own results."""
        return reference, found


def last(name: str) -> str:
    """The last part of an output's name: ``logits`` of ``0.logits``."""
    return name.rsplit(".", 1)[-1]


def scores(outputs: Outputs, dimensions: int, names: Sequence[str]) -> str | None:
    """The name of the output with scores of two classes or more along dimension 1; None where there is none.

    Of several with so many dimensions the first, unless one is called as in `names`.
    """
    fitting = [n for n, y in outputs.items() if y.dim() == dimensions and y.shape[1] >= 2 and y.is_floating_point()]
    named = [name for name in fitting if last(name) in names]
    return next(iter(named or fitting), None)


def images(inputs: Outputs) -> list[torch.Tensor]:
    """The inputs that look like images: [batch, channels, height, width] of floats."""
    return [x for x in inputs.values() if x.dim() == 4 and x.is_floating_point() and x.shape[1] <= 4]


def tokens(inputs: Outputs) -> dict[str, torch.Tensor]:
    """The inputs that look like tokens: [batch, length] of integers, by name."""
    import torch

    return {
        name: x
        for name, x in inputs.items()
        if x.dim() == 2 and x.dtype in (torch.int64, torch.int32) and "mask" not in name and "type" not in name
    }
