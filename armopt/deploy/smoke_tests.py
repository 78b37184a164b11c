"""One small layer on each backend: does it answer, under its own name, with right numbers?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from armopt.environment.process import is_arm
from armopt.errors import first_line
from armopt.ir.records import Target

if TYPE_CHECKING:
    import torch


#: The smoke test of layers as primitives of armopt's own.
OWN = "own primitives"
#: Rows, terms and columns of the smoke tests: large enough for every backend, small enough for an emulated core.
_SHAPE = (32, 64, 96)
#: Least cosine similarity to FP64 of a product of BF16 operands: 8 bits of mantissa leave 5 nines, zeros leave none.
_MIN_COSINE = 0.9999


@dataclass(frozen=True, slots=True)
class Check:
    """One smoke test.

    Attributes:
        name: The backend.
        status: ``ok``, ``failed``, or ``skipped`` where this host or build can't have it.
        found: What answered: the implementation and the dtype of its weights, or why not.
    """

    name: str
    status: Literal["ok", "failed", "skipped"]
    found: str


class WrongError(Exception):
    """A smoke test's own verdict."""


class Backends:
    """The layers that the smoke tests run; each method returns what answered, or raises WrongError."""

    def kernel(self, name: str) -> str:
        """A Linear by one of armopt's own kernels, judged by its probe; returns what answered.

        Raises:
            WrongError: The probe refuses it, or the numbers are wrong.
        """
        import torch

        from armopt.ir.records import Op, Site
        from armopt.kernels import table
        from armopt.runtime import onednn_log, probe

        kernel = table.get(name)
        rows, terms, columns = _SHAPE
        x, weight, exact = _operands(rows)
        site = Site("smoke_test", Op.LINEAR, rows, terms, columns, (rows, terms), (columns, terms))
        packed = kernel.packed_weight(weight, site)
        call = _call(kernel, site, packed)
        x = x.to(kernel.activations)
        with torch.no_grad():
            call(x)  # the first call may prepare what later calls reuse
            with onednn_log.capture_verbose() as log:
                result = call(x)
        if reason := probe.judge(kernel, site, log.executions):
            raise WrongError(reason)
        ran = [e for e in log.executions if e.primitive == "convolution"]
        what = ", ".join(f"{e.implementation} on {e.weight_dtype} weights" for e in ran)
        return agreement(result, exact, what)

    def own(self, name: str) -> str:
        """A Linear as the primitive of one of armopt's kernels; returns what answers.

        Raises:
            WrongError: This build lets none be made, or the numbers are wrong.
        """
        import torch

        from armopt.ir.records import Op, Site
        from armopt.kernels import table
        from armopt.runtime import own

        if reason := own.unavailable():
            raise WrongError(reason)
        kernel = table.get(name)
        rows, terms, columns = _SHAPE
        x, weight, exact = _operands(rows)
        site = Site("smoke_test", Op.LINEAR, rows, terms, columns, (rows, terms), (columns, terms))
        layer = own.proven(kernel, site, weight, torch.zeros(columns, dtype=kernel.activations))
        if layer is None:
            raise WrongError("oneDNN offers none but a reference, or its numbers are wrong")
        return agreement(own.alone(layer, site)(x.to(kernel.activations)), exact, layer.implementation)

    def blas_fp32(self) -> str:
        """BLAS's product in FP32."""
        import torch

        x, weight, exact = _operands(_SHAPE[0])
        bias = torch.zeros(_SHAPE[2])
        return agreement(torch.addmm(bias, x.float(), weight.float().T.contiguous()), exact, "sgemm")

    def blas_bf16(self, rows: int) -> str:
        """BLAS's product in BF16, of so many rows."""
        import torch

        x, weight, exact = _operands(rows)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch 2.10 warns of TF32 on GPUs here
            with torch.backends.mkldnn.flags(enabled=False):
                result = torch.nn.functional.linear(x, weight)
        return agreement(result, exact, "sbgemm" if rows > 1 else "BF16 gemv")


def smoke_tests(host: Target, facts: Mapping[str, str], backends: Backends | None = None) -> tuple[Check, ...]:
    """Runs one small layer on each backend: does it answer, under its own name, with right numbers?

    Args:
        host: This machine.
        facts: Of this process, see :func:`armopt.environment.build.record`.
        backends: What runs them; this process's own by default.
    """
    backends = backends or Backends()
    if not facts.get("torch"):
        return (Check("torch", "failed", "none is installed"),)
    if not is_arm(host):
        names = ("oneDNN BF16", "fast math", "oneDNN FP32", "BLAS BF16", "BLAS BF16, one row")
        skipped = tuple(Check(name, "skipped", "not an Arm server: portable twins run") for name in names)
        return (*skipped, _run("BLAS FP32", backends.blas_fp32), _run(OWN, lambda: backends.own("conv1x1_fp32")))
    half: dict[str, Callable[[], str]] = {
        "oneDNN BF16": lambda: backends.kernel("conv1x1_bf16"),
        "fast math": lambda: backends.kernel("conv1x1_fastmath"),
        "BLAS BF16": lambda: backends.blas_bf16(_SHAPE[0]),
        "BLAS BF16, one row": lambda: backends.blas_bf16(1),
    }
    whole: dict[str, Callable[[], str]] = {
        "oneDNN FP32": lambda: backends.kernel("conv1x1_fp32"),
        "BLAS FP32": backends.blas_fp32,
        OWN: lambda: backends.own("conv1x1_bf16" if host.bf16 else "conv1x1_fp32"),
    }
    found = []
    for name, test in half.items():
        if not host.bf16:
            found.append(Check(name, "skipped", f"{host.core} has no BF16"))
        elif name == "BLAS BF16" and facts.get("sbgemm") == "no":
            found.append(Check(name, "failed", f"{facts.get('blas', 'this BLAS')} has no sbgemm"))
        else:
            found.append(_run(name, test))
    return (*found, *(_run(name, test) for name, test in whole.items()))


def _run(name: str, test: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", test())
    except WrongError as wrong:
        return Check(name, "failed", str(wrong))
    except Exception as error:  # a broken build may raise anything at all
        return Check(name, "failed", f"{type(error).__name__}: {first_line(error)}")


def _operands(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input [rows, K], weight [N, K], rounded to BF16, and their product in FP64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    _, terms, columns = _SHAPE
    x = torch.randn(rows, terms, generator=generator).bfloat16()
    weight = torch.randn(columns, terms, generator=generator).bfloat16()
    return x, weight, x.double() @ weight.double().T


def agreement(result: torch.Tensor, exact: torch.Tensor, what: str) -> str:
    """What answered, if its result is right: the angle to the exact one, and its length.

    Raises:
        WrongError: It is not.
    """
    import torch

    found = result.double().flatten()
    cosine = float(torch.nn.functional.cosine_similarity(found, exact.flatten(), 0))
    # the angle is blind to a common factor
    ratio = float(found.norm() / exact.norm())
    if not cosine >= _MIN_COSINE or abs(ratio - 1) > 0.01:
        zeros = "all zeros" if not found.any() else f"cosine similarity {cosine:.4f}, {ratio:.3g} of the length"
        raise WrongError(f"{what} gives wrong numbers: {zeros}")
    return what


def _call(kernel: Any, site: Any, packed: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The kernel's own call as a function of its input."""
    import torch
    from torch import fx

    from armopt.kernels.base import KernelCall

    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    marker = graph.call_function(torch.ops.aten.alias.default, (x,))
    result = kernel.emit(KernelCall(kernel, site, marker, x, weight, None, None, [*site.shape[:-1], site.n]))
    graph.output(result)
    graph.erase_node(marker)
    module = fx.GraphModule(torch.nn.Module(), graph)
    return lambda value: module(value, packed)
