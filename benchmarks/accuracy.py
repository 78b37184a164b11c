"""Accuracy of whole models in BF16 against FP32, as `armopt validate` measures it: docs/accuracy.md.

    python -m benchmarks.accuracy                      # all, prints the page
    python -m benchmarks.accuracy --write              # all, and writes docs/accuracy.md
    python -m benchmarks.accuracy --only gpt2 --write  # one; the others' rows stay as last measured

Each model has its full size and seeded random weights, is planned for graviton3 as `armopt optimize` does by default,
and is compared on seeded inputs. Portable twins run, which round as the kernels do (tests/arm64).
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armopt.bundle.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / ".cache" / "accuracy"
PAGE = ROOT / "docs" / "accuracy.md"
TARGET = "graviton3"
MIN_COSINE = 0.999

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """A model, the calls to compare, and the gates that it has to pass besides the cosine."""

    title: str
    build: Callable[[], Any]
    calls: Callable[[], list[Call]]
    gates: tuple[str, ...]
    single_graph: bool = True


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


def _resnet50() -> Any:
    import torch

    from armopt.models import references

    torch.manual_seed(0)
    return references.resolve("torchvision:resnet50")().eval()


def _images() -> list[Call]:
    import torch

    return [((torch.randn(8, 3, 224, 224, generator=_generator(seed)),), {}) for seed in range(4)]


def _gpt2() -> Any:
    from armopt.models import torchvision_ops
    from benchmarks import random_weights

    torchvision_ops.ensure_torchvision()
    import torch
    import transformers

    torch.manual_seed(0)
    return random_weights.randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)).eval())


def _bert() -> Any:
    from armopt.models import torchvision_ops
    from benchmarks import random_weights

    torchvision_ops.ensure_torchvision()
    import torch
    import transformers

    torch.manual_seed(0)
    return random_weights.randomize(transformers.BertModel(transformers.BertConfig()).eval())


def _tokens(vocabulary: int, batch: int, length: int) -> Callable[[], list[Call]]:
    def calls() -> list[Call]:
        import torch

        def one(seed: int) -> Call:
            ids = torch.randint(0, vocabulary, (batch, length), generator=_generator(seed))
            return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        return [one(seed) for seed in range(4)]

    return calls


def _mask_rcnn() -> Any:
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision()
    import torch
    from torchvision.models import detection

    from tests.detection import spread

    torch.manual_seed(3)
    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, box_nms_thresh=0.9)
    return spread(model.eval())  # so that there is something to detect


def _photographs() -> list[Call]:
    import torch

    def one(seed: int) -> Any:  # smooth, as photographs are
        coarse = torch.rand(1, 3, 12, 16, generator=_generator(seed))
        return torch.nn.functional.interpolate(coarse, (480, 640), mode="bicubic").clamp(0, 1)[0]

    return [(([one(seed)],), {}) for seed in range(2)]


MODELS = {
    "resnet50": Model("ResNet-50", _resnet50, _images, ("top5>=0.99",)),
    "gpt2": Model("GPT-2 (124 M)", _gpt2, _tokens(50257, 2, 64), ("next_token>=0.9", "kl<=0.01")),
    "bert": Model("BERT base", _bert, _tokens(30522, 2, 128), ("ranking>=0.95",)),
    "maskrcnn": Model("Mask R-CNN", _mask_rcnn, _photographs, ("box_recall>=0.9",), single_graph=False),
}


def measure(name: str) -> dict[str, Any]:
    """Optimizes and validates one model; the report's figures."""
    import torch

    from armopt.bundle import schema

    torch.set_num_threads(1)
    each = MODELS[name]
    with tempfile.TemporaryDirectory(prefix="armopt-accuracy-") as folder:
        written, found = (_in_one_graph if each.single_graph else _in_parts)(each, Path(folder) / "bundle")
    found["kernels"] = sorted({node.kernel for plan in written.plan for node in plan.nodes})
    found["repair"] = schema.builtins(written.accuracy.repair)
    return {"model": name, **{key: found[key] for key in _KEPT}}


def _in_one_graph(each: Model, bundle: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest, and what `armopt validate` says of the calls."""
    import armopt

    model, calls = each.build(), each.calls()
    args, kwargs = calls[0]
    first = next(iter(inspect.signature(model.forward).parameters))
    inputs = [kwargs or {first: args[0]} for args, kwargs in calls]
    written = armopt.optimize(
        model,
        kwargs or args,
        output=armopt.Output(bundle, keep_reference=True),
        target=TARGET,
        checks=armopt.Checks(gates=each.gates, inputs=inputs),
    ).manifest
    found = armopt.validate(bundle, inputs=inputs, gates=each.gates, min_cosine=MIN_COSINE)
    shapes = ["x".join(map(str, spec.shape)) for spec in written.model.inputs]
    return written, {**found, "layers": len(found["nodes"]), "input": ", ".join(shapes)}


def _in_parts(each: Model, bundle: Path) -> tuple[Manifest, dict[str, Any]]:
    """The same of a model whose parts alone are graphs: compared as it is called."""
    import armopt
    from armopt import accuracy
    from armopt.accuracy import gates

    model, calls = each.build(), [args for args, _ in each.calls()]
    written = armopt.optimize(
        model, calls, kind="module", output=bundle, target=TARGET, checks=armopt.Checks(min_cosine=-1.0)
    ).manifest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = armopt.load(bundle, model=each.build)
    bounds = [gates.parse(text) for text in each.gates]
    outcome, _ = accuracy.compare_callables(model, loaded, calls, gates=bounds)
    layers = sum(len(plan.nodes) for plan in written.plan)
    shape = "x".join(map(str, calls[0][0][0].shape))
    return written, {**outcome.to_json(), "nodes": [], "layers": layers, "input": shape}


_KEPT = (
    *("passed", "gates", "outputs", "task", "samples", "layers", "kernels", "repair", "input", "nodes"),
    *("cosine", "max_abs"),
)


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page, from what was measured."""
    lines = [
        "# Accuracy",
        "",
        "BF16 as planned for graviton3 against the model in FP32, measured by `armopt validate` on seeded inputs.",
        "Models have their full size and seeded random weights, so a classifier's margins are thinner than a trained",
        "one's, and detection ranks proposals by next to nothing: most boxes that are not found again changed rank.",
        "Portable twins ran, which round as the kernels do on the emulated core. Written by",
        "`python -m benchmarks.accuracy --write`.",
        "",
        "| model | calls | layers | output | cosine | SQNR | largest error, relative | RMSE over FP32's | passed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        (entries,) = found["outputs"].values()
        for i, entry in enumerate(entries):
            lead = (MODELS[name].title, f"{found['samples']} of {found['input']}", str(found["layers"]))
            sqnr = "-" if entry["sqnr_db"] is None else f"{entry['sqnr_db']:.1f} dB"
            alike = f"{entry['cosine']:.6f}" if entry["equal"] is None else f"{100 * entry['equal']:.4g} % equal"
            ratio = "-" if entry["rmse_ratio"] is None else f"{entry['rmse_ratio']:.3g}"
            row = (
                *(lead if i == 0 else ("", "", "")),
                *(entry["output"], alike, sqnr, f"{entry['max_rel']:.2g}", ratio),
                "" if i else ("yes" if found["passed"] else "NO"),
            )
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", "All figures are the worst of all calls.", "", "## Tasks and gates", ""]
    lines += ["| model | task | figures | gates | repaired |", "| --- | --- | --- | --- | --- |"]
    for name, found in results.items():
        (figures,) = found["task"]["metrics"].values()
        said = ", ".join(f"{metric} {value:.6g}" for metric, value in figures.items())
        held = ", ".join(f"`{gate['gate']}`" for gate in found["gates"])
        repaired = found["repair"]["said"] if found["repair"] else "nothing"
        lines.append(f"| {MODELS[name].title} | {found['task']['name']} | {said} | {held} | {repaired} |")
    lines += ["", "## Where the error comes from", ""]
    lines.append("The layers that add most, relative to their FP32 result, alone and with what is carried along.")
    lines += ["", "| model | layer | kernel | alone | carried | comes from |", "| --- | --- | --- | --- | --- | --- |"]
    for name, found in results.items():
        for node in found["nodes"][:3]:
            row = (MODELS[name].title, node["node"], node["kernel"])
            figures = (f"{node['isolated']:.1e}", f"{node['cumulative']:.1e}", node["comes_from"])
            lines.append(f"| {' | '.join((*row, *figures))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measures, prints, and writes where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy.md")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        found = measure(name)
        (RESULTS / f"{name}.json").write_text(json.dumps(found))
        print(f"{name}: cosine {found['cosine']:.6f}, {'passed' if found['passed'] else 'FAILED'}")
    files = {name: RESULTS / f"{name}.json" for name in MODELS}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    text = page(results)
    if arguments.write:
        PAGE.write_text(text)
    print(text)
    return 0 if all(found["passed"] for found in results.values()) else 4


if __name__ == "__main__":
    raise SystemExit(main())
