"""What test_emulation.py sends to the emulated side."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

MIDR = "/sys/devices/system/cpu/cpu1/regs/identification/midr_el1"


def cpu():
    """What libraries see of the core: HWCAP, /proc/cpuinfo, and /sys."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    with open("/proc/cpuinfo") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    with open(MIDR) as file:
        midr = int(file.read(), 16)
    return {
        "features": set(fields["Features\t"].split()),
        "part": int(fields["CPU part\t"], 16),
        "variant": int(fields["CPU variant\t"], 16),
        "revision": int(fields["CPU revision\t"], 16),
        "midr": midr,
        "hwcap2_bf16": bool(getauxval(26) >> 14 & 1),
    }


def echo(value):
    return value


def write_everywhere():
    print("python")
    print("error", file=sys.stderr)
    os.write(1, b"descriptor\n")
    ctypes.CDLL(None).puts(b"C library")  # buffered by C, as oneDNN's log is


def read_environment(names):
    return {name: os.environ.get(name) for name in names}


def fail():
    raise ValueError("on purpose")


def unpicklable():
    return lambda: None


def sleep(seconds):
    time.sleep(seconds)


def process():
    """The process that jobs are forked from: it leads the group of the one that watches this job."""
    return os.getpgid(os.getppid())


def meet(folder, name, other):
    """Whether the job of the other name runs at the same time."""
    (Path(folder) / name).touch()
    deadline = time.monotonic() + 60
    while not (found := (Path(folder) / other).exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def start_and_sleep(path):
    Path(path).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
    time.sleep(1000)


def crash():
    print("last words", file=sys.stderr, flush=True)
    os.abort()


def tensor_product(left, right):
    return left @ right


def torch_facts():
    import torch
    import torchvision

    kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]]), torch.tensor([0.5, 0.9]), 0.5)
    return {
        "version": torch.__version__.split("+")[0],
        "vision": torchvision.__version__.split("+")[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.is_available(),
        "gpus": torch.cuda.device_count(),
        "nms": kept.tolist(),
        "inverse": torch.linalg.inv(torch.eye(3) * 4)[0, 0].item(),  # LAPACK
    }


def packed_calls():
    """One packed convolution and one packed Linear, with oneDNN's log on for the second call of each only."""
    import torch
    from torch.backends import mkldnn

    ops = torch.ops.mkldnn
    torch.manual_seed(0)
    x, weight = torch.randn(32, 64), torch.randn(96, 64)
    one = [1, 1]
    as_conv = ops._reorder_convolution_weight(weight[:, :, None, None], [0, 0], one, one, 1, [32, 64, 1, 1])
    as_linear = ops._reorder_linear_weight(weight, 32)
    calls = {
        "convolution": lambda: ops._convolution_pointwise(
            x[:, :, None, None], as_conv, None, [0, 0], one, one, 1, "relu", [], ""
        ),
        "linear": lambda: ops._linear_pointwise(x, as_linear, None, "none", [], ""),
    }
    expected = x @ weight.t()
    cosine = torch.nn.functional.cosine_similarity
    cosines = {}
    with torch.no_grad():
        for name, call in calls.items():
            call()
            print(f"# {name}", flush=True)
            with mkldnn.verbose(mkldnn.VERBOSE_ON):
                result = call()
            reference = expected.relu() if name == "convolution" else expected
            cosines[name] = cosine(result.flatten(), reference.flatten(), 0).item()
    return cosines
