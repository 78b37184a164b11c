"""Repair: networks that BF16 breaks fail their gate, are mended with about the fewest layers, and then pass."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_networks import GATES, build
from torch import nn

import armopt
from armopt.accuracy import compare, gates
from armopt.accuracy.gates import Figures
from armopt.compiler import repair
from armopt.compiler.checks import Checks, Judge
from armopt.errors import AccuracyError, ArmoptWarning
from armopt.ir.records import Decision, Plan, Site
from armopt.kernels import table
from armopt.plan import threshold_policy
from armopt.targets.host import load as load_target
from tests.planning import plan
from tests.sampling import sampled

#: At these small sizes BLAS is cheaper; the tutorial's rule takes BF16 for them all the same.
THRESHOLD = threshold_policy.ThresholdPolicy()


def known_minimum(kind: type[nn.Module], seed: int) -> int:
    """The fewest layers in FP32 with which the gates hold, found by trying all sets of each size."""
    model, x = build(kind, seed)
    recipe, planned = plan(model, x, policy=THRESHOLD)
    sites = recipe.lower_part(planned)[0].sites
    judge = Judge(planned.captured, gates.standard(GATES[kind]), Checks())
    for count in range(len(sites) + 1):
        for chosen in itertools.combinations(sites, count):
            repaired = repair.apply(planned.plans[0], sites, dict.fromkeys(chosen, repair.FULL))
            if judge.validate(recipe.lower_part(planned, [repaired])).passed:
                return count
    raise AssertionError("no set of layers passes")


@pytest.mark.slow
@pytest.mark.parametrize("seed", sampled([0, 1], 2))
@pytest.mark.parametrize("kind", GATES)
def test_what_bf16_breaks_is_mended(kind: type[nn.Module], seed: int, tmp_path: Path) -> None:
    model, x = build(kind, seed)
    path = tmp_path / "bundle"
    with pytest.raises(AccuracyError, match="not deployable"):
        armopt.optimize(
            model, (x,), policy=THRESHOLD, output=path, checks=Checks(gates=GATES[kind], repair=False)
        ).require()
    report = json.loads((path / "report.json").read_text())
    assert (report["passed"], report["repair"]) == (False, None)

    written = armopt.optimize(
        model, (x,), policy=THRESHOLD, output=armopt.Output(path, force=True), checks=Checks(gates=GATES[kind])
    ).manifest
    assert written.accuracy.passed is True
    done = written.accuracy.repair
    assert done is not None
    changed = {change.node for change in done.changes}
    assert 1 <= len(changed) <= known_minimum(kind, seed) + 2
    assert done.evaluations <= repair.EVALUATIONS + 3
    nodes = {node.node: node for node in written.plan[0].nodes}
    assert {name for name, node in nodes.items() if node.reason.startswith("repaired: ")} == changed
    assert {table.get(nodes[name].kernel).activations for name in changed} == {torch.float32}
    assert {node.precision for name, node in nodes.items() if name not in changed} == {"bf16"}
    # and it is the bundle that passes, on its own
    again = armopt.validate(path, against=model, inputs={written.model.inputs[0].name: x}, gates=GATES[kind])
    assert again["passed"] is True


def test_layers_for_every_batch(tmp_path: Path) -> None:
    """What one bucket needs is taken out of BF16 in all, so that weights are stored once."""
    kind = next(iter(GATES))
    model, x = build(kind)
    written = armopt.optimize(model, (x,), policy=THRESHOLD, output=tmp_path / "bundle", batch=(2, 64, 256)).manifest
    assert written.accuracy.passed is True
    planned = [{n.node: n for n in each.nodes} for each in written.plan]
    assert written.accuracy.repair is not None
    for change in written.accuracy.repair.changes:
        assert {table.get(each[change.node].kernel).activations for each in planned} == {torch.float32}


def test_a_gate_that_fp32_fails_too_is_not_repaired(tmp_path: Path) -> None:
    model, x = build(next(iter(GATES)))
    with pytest.raises(AccuracyError, match=r"max_abs is .*no repair: the gates fail with every layer in FP32 too"):
        armopt.optimize(
            model, (x,), policy=THRESHOLD, output=tmp_path / "bundle", checks=Checks(gates=("max_abs<0",))
        ).require()
    with pytest.warns(ArmoptWarning, match="not deployable"):
        armopt.load(tmp_path / "bundle")


# --- the search alone, on plans whose effect is given ----------------------------------------------------

SITE = Site("", "linear", 64, 64, 64, (64, 64), (64, 64))


def given_plan(count: int, bucket: Mapping[str, int] | None = None) -> tuple[Plan, dict[str, Site]]:
    names = [f"n{i}" for i in range(count)]
    decisions = [Decision(name, "linear", "conv1x1_bf16", "bf16", "plain", (64, 64), "") for name in names]
    sites = {name: dataclasses.replace(SITE, node=name, weight_key=name) for name in names}
    return Plan(load_target("graviton3"), "given", bucket or {}, tuple(decisions)), sites


class Effect:
    """Figures of a network whose output is off by the sum of what its layers add."""

    def __init__(self, noise: Mapping[str, float]) -> None:
        self.noise = noise
        self.evaluated: list[Plan] = []

    def figures(self, names: Sequence[str]) -> Figures:
        error = sum(self.noise.get(name, 1e-6) for name in names)
        reference = torch.ones(8)
        return Figures((compare("y", reference, reference + error),), {})

    def evaluate(self, each: Plan) -> Figures:
        self.evaluated.append(each)
        return self.figures([d.node for d in each.decisions if d.precision == "bf16"])

    def alone(self, each: Plan, node: str) -> Figures:
        return self.figures([node])


def search(effect: Effect, count: int, bound: float, **options: Any) -> repair.Repair:
    each, sites = given_plan(count)
    bounds = [gates.Gate("max_abs", "<=", bound)]
    return repair.search([each], [sites], bounds, effect.evaluate, effect.alone, **options)


def test_exactly_the_culprits_are_found_among_many() -> None:
    effect = Effect({"n7": 1.0, "n31": 2.0, "n44": 3.0})
    found = search(effect, 60, 0.1)
    assert {change.node for change in found.changes} == {"n7", "n31", "n44"}
    assert found.passed
    assert {change.precision for change in found.changes} == {"bf16-weights"}  # enough here, and cheaper
    assert found.evaluations <= repair.EVALUATIONS


def test_the_bound_on_evaluations_holds_and_what_is_found_passes() -> None:
    effect = Effect({f"n{i}": 1.0 for i in range(0, 60, 2)})
    for most in (4, 16, 64, 256):
        effect.evaluated.clear()
        found = search(effect, 60, 0.5, evaluations=most)
        assert found.passed
        assert found.evaluations <= most + 3
        needed = {f"n{i}" for i in range(0, 60, 2)}
        assert needed <= {change.node for change in found.changes}
        if most == 256:
            assert needed == {change.node for change in found.changes}


@pytest.mark.parametrize(("harm", "kernel"), [(0, "conv1x1_fastmath"), (1, "blas_fp32_w16"), (2, "blas_fp32")], ids=str)
def test_the_cheapest_remedy_that_is_enough_is_taken(harm: int, kernel: str) -> None:
    """The rounding of results, of operands, or of weights does the harm."""
    each, sites = given_plan(4)
    effect = Effect({"n2": 1.0})

    def evaluate(plan: Plan) -> Figures:
        return effect.figures([d.node for d in plan.decisions if table.get(d.kernel).steps_out_of_bf16 <= harm])

    found = repair.search([each], [sites], [gates.Gate("max_abs", "<=", 0.1)], evaluate, effect.alone)
    assert [(change.node, change.after) for change in found.changes] == [("n2", kernel)]
    share = 0 if harm == 0 else 25
    assert found.said.startswith(f"1 layer repaired: {share} % of the multiplications in FP32")
    assert ("8,192 bytes more of weights" in found.said) is (harm == 2)


def test_a_plan_that_passes_is_left_alone() -> None:
    found = search(Effect({}), 5, 1.0)
    assert (found.passed, found.changes, found.evaluations) == (True, (), 1)
