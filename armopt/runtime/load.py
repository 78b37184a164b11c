"""Loads a bundle, checks this host, proves which kernels run, and runs it."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import fx

from armopt import environment
from armopt.bundle import reader
from armopt.bundle.program import Program
from armopt.errors import ArmoptWarning, HostError
from armopt.runtime import forks, host_check, module, surroundings
from armopt.runtime.bind import Binder, Bound
from armopt.runtime.forks import FORKS
from armopt.runtime.loaded import Factory, Origin
from armopt.runtime.model import Forward, Model
from armopt.runtime.module import ModuleModel

_log = logging.getLogger(__name__)
_RESTART = "Start the process with: armopt run BUNDLE -- CMD"


def load(
    path: str | Path, *, model: Factory | None = None, strict: bool = False, tuning: str | Path | None = None
) -> Model | ModuleModel:
    """Loads a bundle for this host.

    On the target's architecture each kernel is run once with oneDNN's log on; one that answers with a reference
    implementation, or reorders its weight on every call, is replaced by the next best, with a warning. On another
    architecture the portable twins run: the target's rounding, not its speed.

    Args:
        path: The bundle, a folder or a zip.
        model: For a bundle of kind "module": what builds the model whose Python runs between the graphs; its weights
            count for nothing. torchvision's own models need none. Code is never taken out of a bundle.
        strict: Whether any difference between this host and the manifest is an error.
        tuning: A file from ``armopt tune`` on this host; by default the one that ``ARMOPT_TUNING`` names.

    Returns:
        A callable that takes and returns what the original model did.

    Raises:
        BundleError: The bundle is damaged, or another model is given than it was made from.
        HostError: This host lacks a CPU feature that the bundle needs, or, if strict, differs at all.
        InputError: `model` is missing, or builds none.
    """
    with surroundings.as_captured():
        bundle = reader.read(path)
        factory = module.find_factory(bundle, model)
        parts = load_parts(bundle, strict=strict, tuning=tuning, stacklevel=3)
        made = (
            parts[""]
            if factory is None
            else ModuleModel(bundle.manifest, module.assemble(bundle, factory, parts), parts)
        )
    if not made.portable:
        _close_file(bundle)
    bundle.check_unchanged()
    made.origin = Origin(Path(path).absolute(), bundle.manifest.digest, model, strict, tuning)
    _log.info("loaded %s: %r", path, made)
    return made


def load_parts(
    bundle: reader.Bundle, *, strict: bool = False, tuning: str | Path | None = None, stacklevel: int = 2
) -> dict[str, Model]:
    """The graphs of a bundle, ready to run, by path of the part; the whole model's is empty.

    Raises:
        HostError: See :func:`load`.
    """
    forks.refuse_load(str(bundle.path))
    described = bundle.manifest
    if not described.accuracy.passed:
        warnings.warn(
            f"{bundle.path} is marked as not deployable: its accuracy gate failed (see its report.json)",
            ArmoptWarning,
            stacklevel=stacklevel,
        )
    portable = host_check.is_portable(described.machine)
    if portable:
        aim = f"{described.target} ({described.machine})"
        warnings.warn(
            f"the bundle is for {aim}, this host is {platform.machine()}: "
            "portable twins run, with the target's rounding but not its speed",
            ArmoptWarning,
            stacklevel=stacklevel,
        )
        for program in bundle.programs:
            _copy_all(program, bundle.copy)
        twins = {part.path: [(p, p.graph_module.forward, ()) for p in part.programs] for part in bundle.parts}
        return _models(bundle, twins, portable=True)
    host_check.check_host(
        described.target,
        described.environment,
        described.required_features,
        described.versions,
        strict=strict,
        remedy=_RESTART,
        stacklevel=stacklevel + 1,
    )
    bound: dict[str, list[_Bound]] = {}
    verdicts: dict[str, str | None] = {}
    fast_math, times, bf16_attention = (
        environment.fast_math(os.environ),
        host_check.timings_for(tuning),
        host_check.multiplies_bf16(),
    )
    FORKS.worked_at = FORKS.count
    with host_check.remembering(verdicts) as remembered:
        for part in bundle.parts:
            binder = Binder(fast_math, times, verdicts, remembered, bf16_attention=bf16_attention, copy=bundle.copy)
            for program in part.programs:
                module, entries = binder.bind(program)
                _leave_file(module, program, bundle.copy)
                bound.setdefault(part.path, []).append((program, module.forward, entries))
    if changed := host_check.changes(entries for each in bound.values() for _, _, entries in each):
        if strict:
            raise HostError(changed, hint=_RESTART)
        warnings.warn(changed, ArmoptWarning, stacklevel=stacklevel)
    return _models(bundle, bound, portable=False)


def _leave_file(module: fx.GraphModule, program: Program, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Copies what a bound graph keeps as it is stored: whoever writes to the file later changes no loaded model."""
    stored = {tensor.data_ptr() for tensor in program.graph_module.buffers()}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor: torch.Tensor = getattr(module, str(node.target))
        if tensor.layout is torch.strided and tensor.data_ptr() in stored:
            object.__setattr__(module, str(node.target), copy(tensor))


def _copy_all(program: Program, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Copies all tensors of a stored graph, whose twins run here."""
    buffers = program.graph_module._buffers
    for name, tensor in buffers.items():
        assert tensor is not None
        buffers[name] = copy(tensor)


def _on_demand(program: Program, bundle: reader.Bundle) -> Forward:
    """A stored graph that takes its weights into memory when it is first called."""

    def forward(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        _copy_all(program, bundle.copy)
        bundle.check_unchanged()
        results: Sequence[torch.Tensor] = program.graph_module.forward(*tensors)
        return results

    return forward


def _close_file(bundle: reader.Bundle) -> None:
    """Takes the weights out of all stored graphs that no model runs; being cycles, they would hold the file open."""
    for part in bundle.parts:
        for program in part.programs[bool(part.path) :]:  # as _models keeps one
            program.graph_module._buffers.clear()


_Bound = tuple[Program, Forward, Sequence[Bound]]


def _models(bundle: reader.Bundle, bound: Mapping[str, Sequence[_Bound]], *, portable: bool) -> dict[str, Model]:
    return {
        part.path: Model(
            bundle.manifest,
            part.signature,
            [(program.bucket, forward) for program, forward, _ in bound[part.path]],
            portable=portable,
            kernels=[entries for _, _, entries in bound[part.path]],
            empty=_on_demand(part.programs[0], bundle) if part.path else None,
        )
        for part in bundle.parts
    }
