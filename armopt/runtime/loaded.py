"""What every loaded bundle is, whether it holds one graph or the parts of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from armopt.bundle.manifest import Manifest
from armopt.errors import BundleError, InputError
from armopt.runtime.bind import Bound

#: What builds a model: a reference, a function without arguments, or the model itself.
Factory = str | Callable[[], torch.nn.Module] | torch.nn.Module


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a bundle was loaded from, and how: enough to load it again in another process.

    Attributes:
        path: Of the bundle.
        digest: Of the bundle, so that another one in its place is noticed.
        model: As given to :func:`armopt.load`.
        strict: As given to :func:`armopt.load`.
        tuning: As given to :func:`armopt.load`.
    """

    path: Path
    digest: str
    model: Factory | None = None
    strict: bool = False
    tuning: str | Path | None = None


class Loaded:
    """A bundle that is ready to run. Call it as the original model.

    It is no ``torch.nn.Module``: it has no parameters to look at, to train or to convert. What serves such a module
    unchanged (``eval()``, ``to("cpu")``, ``train(False)``) serves it too; all else says why not.

    Attributes:
        manifest: Of the bundle.
        portable: Whether the kernels' portable twins run: the same rounding, on a host that is not the target.
        kernels: For each bucket, what every node runs.
        training: Always false.
    """

    manifest: Manifest
    portable: bool
    kernels: Sequence[Sequence[Bound]]
    origin: Origin | None = None
    training = False

    def __repr__(self) -> str:
        described = self.manifest
        sizes = [", ".join(f"{name} {size}" for name, size in each.bucket.items()) for each in described.plan]
        buckets = f" at {'; '.join(dict.fromkeys(filter(None, sizes)))}" if any(sizes) else ""
        ran = [bound.kernel for entries in self.kernels for bound in entries]
        planned = [node.kernel for each in described.plan for node in each.nodes]
        counts = Counter(ran or planned).most_common()
        kernels = ", ".join(f"{count} {name}" for name, count in counts) or "no layers"
        how = "portable twins" if self.portable else "native kernels"
        return f"<armopt {type(self).__name__} for {described.target}{buckets}: {kernels}; {how}>"

    def eval(self) -> Self:
        """Itself: a bundle only infers."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Itself where `mode` is false.

        Raises:
            InputError: `mode` is true.
        """
        if mode:
            raise InputError(
                "a bundle can't be trained",
                where=type(self).__name__,
                hint="Train the original model, and optimize it again",
            )
        return self

    def cpu(self) -> Self:
        """Itself: a bundle runs on the CPU."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Itself where no gradients are asked for.

        Raises:
            InputError: They are.
        """
        return self.train(requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Itself for the CPU; takes what ``torch.nn.Module.to`` takes.

        Raises:
            InputError: Another device, or another dtype: the plan decides which layers work in BF16.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "cpu":
            raise InputError(f"a bundle runs on the CPU, not on {device}", where=type(self).__name__)
        if dtype is not None:
            raise InputError(
                f"a bundle can't be converted to {dtype}: its plan decides which layers work in BF16",
                where=type(self).__name__,
                hint="Optimize the model again, with other gates or another policy",
            )
        return self

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and hasattr(torch.nn.Module, name):
            raise AttributeError(
                f"a loaded bundle has no {name!r}: it is no torch.nn.Module, its weights are packed for its kernels"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> tuple[Callable[..., Loaded], tuple[Origin]]:
        """Pickled, it is its place: packed weights belong to one process. It is loaded again from there."""
        if self.origin is None:
            raise InputError("was not loaded from a bundle, so it can't be pickled", where=type(self).__name__)
        if isinstance(self.origin.model, torch.nn.Module):
            raise InputError(
                "can't be pickled: it was loaded into a module that exists already",
                where=str(self.origin.path),
                hint="Load it with model=factory, a function that builds the module",
            )
        return reload, (self.origin,)


def reload(origin: Origin) -> Loaded:
    """Loads a bundle again, in the process that unpickles it.

    Raises:
        BundleError: It is gone, or another bundle is in its place.
    """
    from armopt.runtime.load import load  # which makes what this module describes

    made = load(origin.path, model=origin.model, strict=origin.strict, tuning=origin.tuning)
    if made.manifest.digest != origin.digest:
        raise BundleError(
            "another bundle is in its place than the one that was pickled",
            where=str(origin.path),
            hint="Load the bundle again in the process that pickles it",
        )
    return made
