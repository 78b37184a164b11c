"""What test_bundles.py sends to the emulated side: bundles to load and call, as a server would."""

import json
import os
import runpy
import sys
import time
import warnings

#: What `armopt run` may set.
VARIABLES = (
    "DNNL_DEFAULT_FPMATH_MODE",
    "LRU_CACHE_CAPACITY",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "TORCH_MKLDNN_MATMUL_MIN_DIM",
    "THP_MEM_ALLOC_ENABLE",
    "LD_PRELOAD",
)


def run_environment(bundle, threads):
    """What `armopt run BUNDLE --threads N -- CMD` adds to the environment; without importing torch, as that does.

    test_command_line.py compares the two.
    """
    from pathlib import Path

    from armopt import environment, targets
    from armopt.bundle import manifest

    file = Path(bundle) / manifest.NAME
    described = manifest.from_bytes(file.read_bytes(), file)
    wanted = dict(described.environment)
    wanted |= environment.wanted(
        targets.load(described.target),
        threads=threads,
        build=environment.installed(),
        left_to_aten=bool(described.refused),
        allocator=environment.allocator_library(),
    )
    wanted = environment.only_read(wanted, environment.package_folder())
    assert "torch" not in sys.modules
    return {name: variable.value for name, variable in wanted.items()}


def seen_environment():
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def turn_off_own_primitives():
    """As a build without oneDNN's symbols has it."""
    from armopt.kernels.onednn import primitives

    primitives.api = lambda: "turned off by a test"


def run(bundle, calls, captured=1, environ=None, strict=False, own=True):
    """Loads a bundle, makes all calls once, then each again with oneDNN's log on.

    `environ` is set first: too late, since torch is imported. Without `own` no kernel owns its primitive.
    """
    import torch

    import armopt
    from armopt.runtime import onednn_log

    if not own:
        turn_off_own_primitives()
    os.environ.update(environ or {})
    start = time.monotonic()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = armopt.load(bundle, strict=strict)
    finally:
        for name in environ or {}:
            del os.environ[name]
    loaded = time.monotonic()
    for inputs in calls:
        _call(model, inputs)
    runs = []
    for inputs in calls:
        with onednn_log.capture_verbose() as log:
            for _ in range(captured):
                result = _call(model, inputs)
        runs.append({"output": _first(result), "log": log.text})
    return {
        "attention": _attention_dtypes(model, calls[0]) if "windows" in str(bundle) else [],
        "kernels": [[(b.node, b.planned, b.kernel, b.reason) for b in bucket] for bucket in model.kernels],
        "portable": model.portable,
        "warnings": [str(entry.message) for entry in said],
        "runs": runs,
        "torch": torch.__version__,
        "seconds": (round(loaded - start, 1), round(time.monotonic() - loaded, 1)),
    }


def rows(bundle, x, sizes):
    """What a model of one input and one output gives for each row of `x` alone, and for the first rows together.

    The latter are also written where the caller says.
    """
    import torch

    import armopt

    model = armopt.load(bundle)
    alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    together = [model(x[:size]) for size in sizes]
    written = [model.run(x[:size], out=torch.full_like(y, 7.0)) for size, y in zip(sizes, together, strict=True)]
    return {"alone": alone, "together": together, "written": written}


def load_error(bundle, strict=False, own=True):
    """The error that loading ends with: its class, exit code and text; None where there is none."""
    import armopt

    if not own:
        turn_off_own_primitives()
    try:
        armopt.load(bundle, strict=strict)
    except armopt.ArmoptError as error:
        return type(error).__name__, error.exit_code, str(error)
    return None


def examine(bundle=None, environ=None, without=()):
    """What `armopt doctor` finds. `environ` is set first, too late, since torch is imported; `without` is unset."""
    from armopt.deploy import doctor

    os.environ.update(environ or {})
    for name in without:
        del os.environ[name]
    return doctor.examine(bundle)


def command(*, arguments):
    """`python -m armopt ARGUMENTS`, in this process, where torch is imported already; returns its exit code."""
    before = sys.argv
    sys.argv = ["armopt", *arguments]
    try:
        runpy.run_module("armopt", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def _call(model, inputs):
    return model(inputs[""]) if "" in inputs else model(**inputs)


def _first(result):
    import torch

    if isinstance(result, torch.Tensor):
        return result
    return _first(next(iter(result.values() if hasattr(result, "values") else result)))


if __name__ == "__main__":  # the script of a user: python jobs_bundles.py BUNDLE INPUT OUTPUT
    import armopt

    bundle_path, input_path, output_path = sys.argv[1:]
    from safetensors.torch import load_file, save_file

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded_model = armopt.load(bundle_path)
    output = loaded_model(load_file(input_path)["x"])
    save_file({"y": output.contiguous()}, output_path)
    kernels = sorted({bound.kernel for bucket in loaded_model.kernels for bound in bucket})
    print(
        json.dumps(
            {"environment": seen_environment(), "kernels": kernels, "warnings": [str(w.message) for w in caught]}
        )
    )


def _attention_dtypes(model, inputs):
    """The dtype of each query of PyTorch's attention, seen in a call."""
    from tests.attention import query_dtypes

    return query_dtypes(_call, model, inputs)[1]
