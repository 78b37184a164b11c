"""Gates: bounds on figures, as text (``top1>=0.995``), and whether they hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from armopt.accuracy.metrics import METRICS, MIN_COSINE, Accuracy, Metric
from armopt.accuracy.tasks import TASKS
from armopt.errors import InputError, unknown

#: What a bound was given as: an argument, or an option of the command line.
_WHERE = "gates (--gate)"
_PATTERN = re.compile(
    r"\s*(?P<metric>\w+)\s*(\[(?P<output>[^\]]+)\])?\s*(?P<relation>>=|<=|>|<)\s*(?P<bound>[^\s=<>]+)\s*"
)


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound that every bucket has to keep.

    Attributes:
        metric: Name of a figure, of an output or of a task.
        relation: ``>=``, ``>``, ``<=`` or ``<``.
        bound: A finite number.
        output: The one output that counts; all where empty.
    """

    metric: str
    relation: str
    bound: float
    output: str = ""

    def __str__(self) -> str:
        where = f"[{self.output}]" if self.output else ""
        return f"{self.metric}{where}{self.relation}{self.bound:.15g}"

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound; NaN keeps none."""
        match self.relation:
            case ">=":
                return value >= self.bound
            case ">":
                return value > self.bound
            case "<=":
                return value <= self.bound
        return value < self.bound

    def shortfall(self, value: float) -> float:
        """How far a value misses the bound; zero where it holds."""
        if self.holds(value):
            return 0.0
        return math.inf if math.isnan(value) else max(abs(value - self.bound), math.ulp(0.0))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a gate: the worst value, in which bucket and output, and whether it holds.

    The value is NaN where a gate that is always there has nothing to look at.
    """

    gate: Gate
    value: float
    where: str
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """As reports have it; an infinite value as null."""
        value = self.value if math.isfinite(self.value) else None
        return {"gate": str(self.gate), "value": value, "where": self.where, "passed": self.passed}


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured in one bucket: every output's accuracy, and the task's figures."""

    outputs: tuple[Accuracy, ...]
    task: Mapping[str, float]

    def values(self, gate: Gate) -> Iterator[tuple[str, float]]:
        """The values that a gate looks at, each with the output it belongs to.

        Integers and booleans count where their share of equal values is asked for, or the output is named.
        """
        if gate.metric in METRICS:
            for entry in self.outputs:
                value = entry.value(gate.metric)
                asked = gate.output == entry.output
                counts = gate.output == "" and (gate.metric == "equal" or not entry.discrete)
                if value is not None and (asked or counts):
                    yield entry.output, value
        elif gate.metric in self.task:
            yield "", self.task[gate.metric]


def metrics() -> dict[str, Metric]:
    """Every figure that a gate can bound, by name."""
    return {**METRICS, **{metric.name: metric for task in TASKS.values() for metric in task.metrics}}


def parse(text: str) -> Gate:
    """Reads a gate: ``cosine>=0.99``, ``sqnr[logits]>=30``, ``top1>=0.995``.

    Raises:
        InputError: It has another form, the metric is unknown, or the bound is on its wrong side.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise InputError(f"can't read {text!r}", where=_WHERE, hint='Write METRIC>=NUMBER, e.g. "top1>=0.995"')
    known = metrics()
    if match["metric"] not in known:
        raise unknown("metric", match["metric"], known, where=_WHERE)
    try:
        bound = float(match["bound"])
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise InputError(f"{match['bound']!r} in {text!r} is no number", where=_WHERE)
    metric = known[match["metric"]]
    if metric.higher != match["relation"].startswith(">"):
        side = ">=" if metric.higher else "<="
        better = "more" if metric.higher else "less"
        raise InputError(
            f"{text!r} bounds {metric.name} on its good side: {better} is better",
            where=_WHERE,
            hint=f"Write {metric.name}{side}{bound:.15g}",
        )
    return Gate(metric.name, match["relation"], bound, match["output"] or "")


def standard(texts: Sequence[str] = (), min_cosine: float = MIN_COSINE) -> tuple[Gate, ...]:
    """The gates of a command: the cosine of every output, and what `texts` add."""
    return (Gate("cosine", ">=", min_cosine), *(parse(text) for text in texts))


def judge(gates: Sequence[Gate], figures: Mapping[str, Figures], task: str) -> tuple[Verdict, ...]:
    """The worst value for each gate over all buckets, and whether it holds.

    Args:
        gates: What to check.
        figures: By bucket.
        task: Name of the task that was measured, for the message.

    Raises:
        InputError: A gate bounds something that was not measured.
    """
    return tuple(_verdict(gate, figures, task) for gate in gates)


def _verdict(gate: Gate, figures: Mapping[str, Figures], task: str) -> Verdict:
    found = [
        (gate.shortfall(value), -value if metrics()[gate.metric].higher else value, value, bucket, output)
        for bucket, each in figures.items()
        for output, value in each.values(gate)
    ]
    if not found:
        if gate.metric == "cosine" and not gate.output:
            return Verdict(gate, math.nan, "no output of floating point numbers", True)
        raise InputError(_unmeasured(gate, task), where=_WHERE, hint=_hint(gate, figures, task))
    short, _, value, bucket, output = max(found, key=lambda entry: entry[:2])
    where = ", ".join(part for part in (bucket if len(figures) > 1 else "", output) if part)
    return Verdict(gate, value, where, short == 0.0)


def _unmeasured(gate: Gate, task: str) -> str:
    if gate.metric in METRICS:
        return f"{gate} bounds an output that was not measured"
    if task in _owners(gate):
        return f"{gate} can't be measured on so few inputs"
    return f"{gate} was not measured: the task is {task or 'none'}"


def _owners(gate: Gate) -> list[str]:
    """The tasks that a gate's metric belongs to."""
    return [name for name, task in TASKS.items() if any(metric.name == gate.metric for metric in task.metrics)]


def _hint(gate: Gate, figures: Mapping[str, Figures], task: str) -> str:
    if gate.metric == "rmse_ratio" and not gate.output:
        return "The original can't be run in FP64, or FP32 is exact"
    if gate.metric == "equal" and not gate.output:
        return "No output holds integers or booleans"
    if gate.metric == "column" and not gate.output:
        return "No output varies"
    if gate.metric in METRICS:
        names = dict.fromkeys(entry.output for each in figures.values() for entry in each.outputs)
        return f"Outputs are {', '.join(names)}"
    if task in _owners(gate):
        return "Give more inputs (--inputs; to optimize, Checks(inputs=…) or --check-inputs)"
    return f"{gate.metric} belongs to the task {' or '.join(_owners(gate))}"
