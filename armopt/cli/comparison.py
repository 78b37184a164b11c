"""``armopt plan --compare``: what a model would take on several products and numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from armopt.cli import options
from armopt.cli.output import Output, text_table
from armopt.errors import InputError

if TYPE_CHECKING:
    from armopt.capture.submodules import CapturedPart


@dataclass(frozen=True, slots=True)
class Estimate:
    """One model on one product.

    Attributes:
        target: The product.
        threads: Of a call.
        bucket: The sizes.
        milliseconds: Of a call.
        batch: Of the sizes; 1 where there is none.
        weight_bytes: Of all constants, as the kernels store them.
        error: Nine of ten published times lie within this factor of such an estimate.
    """

    target: str
    threads: int
    bucket: str
    milliseconds: float
    batch: int
    weight_bytes: int
    error: float

    @property
    def per_second(self) -> float:
        """Examples."""
        return 1000 * self.batch / self.milliseconds


def read(text: str, option: str, known: str) -> list[str]:
    """Items with commas in between.

    Raises:
        InputError: There are none.
    """
    found = [item.strip() for item in text.split(",") if item.strip()]
    if not found:
        raise InputError("names nothing", where=option, hint=f"Give {known}")
    return found


def read_threads(text: str) -> list[int]:
    """Numbers of threads with commas in between; none where there is no text.

    Raises:
        InputError: One is no number, or below 1 or above 999.
    """
    if not text:
        return []
    found = read(text, "--threads", "numbers, e.g. 1,4,16")
    if bad := [item for item in found if not (item.isascii() and item.isdigit() and 1 <= int(item) <= 999)]:
        raise InputError(f"can't read {bad[0]!r}", where="--threads", hint="Give numbers from 1 to 999, e.g. 1,4,16")
    return [int(item) for item in found]


def estimates(part: CapturedPart, targets: Sequence[str], threads: Sequence[int], policy: str) -> Iterator[Estimate]:
    """The estimates of a part, the whole model, on each product and number of threads.

    Raises:
        InputError: There is no such product, or it has no clock.
    """
    from armopt.plan import latency
    from armopt.plan.cost_policy import CostPolicy, clocked

    for target in targets:
        recipe = options.recipe_for(target, policy)
        known = clocked(recipe.policy)
        if known is None:
            raise InputError(
                f"nothing is known of time on {target}",
                where="--compare",
                hint="Name targets that have a clock (docs/clock.md), and leave out --policy",
            )
        for count in threads or (known.threads,):
            costs = replace(known, threads=count)
            planned = replace(recipe, policy=CostPolicy(costs)).plan_part(part)
            graph = planned.prepared.graph_module
            for plan in planned.plans:
                values = planned.captured.values(plan.bucket)
                yield Estimate(
                    target,
                    costs.threads,
                    ", ".join(f"{name}={size}" for name, size in plan.bucket.items()),
                    latency.microseconds(graph, values, plan, costs) / 1e3,
                    plan.bucket.get("batch", 1),
                    latency.weight_bytes(graph, values, plan),
                    costs.clock.error,
                )


def show(part: CapturedPart, targets: str, threads: Sequence[int], policy: str, out: Output) -> None:
    """Writes the estimates of a model on targets with commas in between.

    Raises:
        InputError: There is no such product, or it has no clock.
    """
    named = read(targets, "--compare", "targets, e.g. graviton3,yitian710")
    found = list(estimates(part, named, threads, policy))
    out.result({"estimates": to_json(found)}, lambda: as_text(found))


def to_json(found: Sequence[Estimate]) -> list[dict[str, Any]]:
    """The estimates as objects."""
    return [{**asdict(each), "per_second": each.per_second} for each in found]


def as_text(found: Sequence[Estimate]) -> str:
    """The estimates for people."""
    rows = [
        (
            each.target,
            each.threads,
            each.bucket,
            _figure(each.milliseconds),
            _figure(each.per_second),
            f"{each.weight_bytes / 1e6:.1f}",
        )
        for each in found
    ]
    table = text_table(("target", "threads", "sizes", "ms", "per second", "weights (MB)"), rows)
    error = max(each.error for each in found)
    return (
        f"{table}\n\nEstimated, never measured: nine of ten published times lie within {error:.1f}x of such an estimate"
        " (docs/clock.md).\nThe order of targets and threads is surer than a single figure. One process, one call at a"
        " time."
    )


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
