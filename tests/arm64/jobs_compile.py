"""What test_compile.py sends to the emulated side: models that can't be captured whole."""

import warnings

import torch
from torch import nn


class Branches(nn.Module):
    """A convolutional trunk, then the one head or the other, by what the trunk finds."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        self.left, self.right = nn.Linear(32, 64), nn.Linear(32, 64)

    def way(self, x):
        return "left" if float(x.mean()) > 0 else "right"

    def forward(self, x):
        return getattr(self, self.way(x))(self.trunk(x).mean((2, 3)))


def branches(bundle, images):
    """Loads a bundle of kind "module" with the Python of Branches around it; runs it on each image."""
    return _run_parts(bundle, Branches, images)


def detect(bundle, images, size):
    """Loads a bundle of kind "module" with this checkout's own Mask R-CNN around it; runs it once."""
    from tests import detection

    return _run_parts(bundle, lambda: detection.bare_mask_rcnn(size), [images])


def _run_parts(bundle, build, inputs):
    """What a bundle of kind "module" gives for each input, with the log, and the kernels of its parts."""
    import armopt
    from armopt.runtime import onednn_log

    model = armopt.load(bundle, model=build)
    with onednn_log.capture_verbose() as log:
        found = [model(each) for each in inputs]
    kernels = [[(b.node, b.planned, b.kernel, b.reason) for b in bucket] for bucket in model.kernels]
    return {"found": found, "log": log.text, "kernels": kernels}


def generate(config, state, prompt, tokens):
    """Greedy tokens of a GPT-2 by armopt.compile, and the log of all calls after the first pass."""
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision_if_installed()
    import transformers

    import armopt
    from armopt.runtime import onednn_log

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    model.load_state_dict(state)
    options = {"max_new_tokens": tokens, "do_sample": False}
    expected = model.generate(prompt, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = armopt.compile(model, policy="threshold=8")
        found = made.generate(prompt, **options)
    with onednn_log.capture_verbose() as log:
        again = made.generate(prompt, **options)
    layers = [(each.node, each.shape, each.planned, each.kernel) for each in made.forward.explain().layers]
    return {
        "expected": expected,
        "found": found,
        "again": again,
        "log": log.text,
        "layers": layers,
        "warnings": [str(w.message) for w in said],
        "torch": torch.__version__,
    }
