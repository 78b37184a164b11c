"""A model whose parts run a bundle's graphs: the Python between them is the model's own, never the bundle's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from armopt.bundle.manifest import Manifest
from armopt.bundle.reader import Bundle
from armopt.errors import BundleError, InputError
from armopt.models import huggingface, references
from armopt.runtime import surroundings
from armopt.runtime.loaded import Loaded
from armopt.runtime.model import Model

#: References that a bundle may name and this process follows: they lead to torchvision alone.
_BUILT_IN = "torchvision:"


def find_factory(bundle: Bundle, model: Any) -> Callable[[], torch.nn.Module] | None:
    """What builds the model around a bundle's graphs; None where the graph is the whole model.

    Args:
        bundle: The bundle.
        model: As given to :func:`armopt.load`: a reference, a function, a module, or None.

    Raises:
        InputError: It is missing or surplus, or names nothing.
    """
    described = bundle.manifest
    where = str(bundle.path)
    if not described.is_module:
        if model is not None:
            raise InputError("the bundle holds the whole model", where=where, hint="Leave out model=")
        return None
    named = described.model.factory
    if model is None:
        if not named.startswith(_BUILT_IN):
            hint = f"It was made with {named}: pass that function" if named else "Pass what builds the model"
            raise InputError(
                'is of kind "module", and a bundle holds no code', where=where, hint=f"{hint}: model=factory"
            )
        return references.resolve(named)
    if isinstance(model, str):
        return references.resolve(model)
    return references.checked(model, "model=")


def assemble(
    bundle: Bundle, factory: Callable[[], torch.nn.Module], parts: Mapping[str, Callable[..., Any]]
) -> torch.nn.Module:
    """Builds the model and puts a bundle's graphs in the places of its parts.

    Raises:
        BundleError: The model is not the one that the bundle was made from.
    """
    model = factory().eval()
    for path in parts:
        try:
            model.get_submodule(path)
        except AttributeError:
            raise _other_model(bundle, f"has a graph for {path}, which {type(model).__name__} lacks") from None
    inside = tuple(f"{path}." for path in parts)
    try:
        rest = {name: bundle.copy(tensor) for name, tensor in bundle.rest.items()}
        missing, unexpected = model.load_state_dict(rest, strict=False)
    except RuntimeError as error:  # another shape: the second line says which
        raise _other_model(bundle, str(error).splitlines()[-1].strip()) from None
    if wrong := [*(name for name in missing if not name.startswith(inside)), *unexpected]:
        raise _other_model(bundle, f"{type(model).__name__} and the bundle differ in {wrong[0]}")
    for path, graph in parts.items():
        part = model.get_submodule(path)
        for module in part.modules():  # its weights are the graph's
            module._parameters = {name: _held_elsewhere(tensor) for name, tensor in module._parameters.items()}
            module._buffers = {name: _held_elsewhere(tensor) for name, tensor in module._buffers.items()}
        part.__dict__["forward"] = graph
    huggingface.leave_caches_off(model)  # the graphs were captured without
    return model.requires_grad_(False)


def _held_elsewhere(tensor: torch.Tensor | None) -> Any:
    """For Python that asks what a part's weight is like: a tensor of that shape and dtype, without memory, of NaNs."""
    if tensor is None:
        return None
    value = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
    stand_in = torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)
    return torch.nn.Parameter(stand_in, False) if isinstance(tensor, torch.nn.Parameter) else stand_in


def _other_model(bundle: Bundle, what: str) -> BundleError:
    return BundleError(what, where=str(bundle.path), hint="Give the factory that the bundle was made with")


class ModuleModel(Loaded):
    """A bundle of kind "module" ready to run. Call it as the original model.

    Attributes:
        module: The model; the parts in the bundle run its graphs.
        parts: The graphs by path.
    """

    def __init__(self, manifest: Manifest, module: torch.nn.Module, parts: Mapping[str, Model]) -> None:
        self.manifest = manifest
        self.module = module
        self.parts = dict(parts)
        self.portable = any(part.portable for part in parts.values())
        self.kernels = tuple(entries for part in parts.values() for entries in part.kernels)
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        with torch.no_grad(), surroundings.as_captured():
            return self.module(*args, **kwargs)
