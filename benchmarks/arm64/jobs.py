"""What is counted: each function here prepares one call, on the emulated side, and returns it."""

from __future__ import annotations

import gc
import mmap
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from armopt.errors import InputError
from armopt.ir.records import Site
from armopt.kernels import table
from armopt.kernels.base import KernelCall
from armopt.kernels.geometry import output_size
from armopt.kernels.onednn import pointwise as generated_code
from armopt.kernels.onednn import primitives
from armopt.kernels.onednn.attention import Attention, Wanted
from armopt.kernels.onednn.workspaces import Workspaces
from armopt.kernels.post_ops import UNARY
from armopt.runtime import attend, host_check, own
from armopt.runtime.bind import Single, finish, single
from armopt.runtime.python_calls import BINDINGS, CASTS

Prepared = Callable[[], Any]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BundleCall:
    """A call of a loaded bundle, checks and structure of the inputs included, as users call it."""

    model: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.model(*self.args, **self.kwargs)

    @property
    def inputs(self) -> Sequence[torch.Tensor]:
        """The flat tensors that the graph gets."""
        return self.model.flatten(self.args, self.kwargs)  # type: ignore[no-any-return]

    @property
    def graph_module(self) -> fx.GraphModule:
        """The bound graph of the bucket that these inputs select."""
        return self.model._select(self.inputs).__self__  # type: ignore[no-any-return]


def bundle(path: str, inputs: str = "") -> BundleCall:
    """A bundle on this host.

    Args:
        path: The bundle.
        inputs: A file made by torch.save of ``(args, kwargs)``; by default zeros of the shapes in the manifest.
    """
    import armopt

    model = armopt.load(path)
    fallen = [bound for entries in model.kernels for bound in entries if bound.kernel != bound.planned]
    for bound in fallen[:5]:
        warnings.warn(f"{bound.node}: {bound.kernel} instead of {bound.planned}: {bound.reason}", stacklevel=1)
    if inputs:
        args, kwargs = torch.load(inputs, weights_only=True)
        return BundleCall(model, args, kwargs)
    bucket = model.manifest.plan[0].bucket
    tensors = {}
    for spec in model.manifest.model.inputs:
        shape = [bucket.get(size, size) if isinstance(size, str) else size for size in spec.shape]
        tensors[spec.name] = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
    try:  # as eager mode is called here: by position
        return BundleCall(model, model.flatten(tuple(tensors.values()), {}), {})
    except InputError:  # of inputs that are nested, the names alone are known
        return BundleCall(model, (), tensors)


def module_bundle(path: str, workload: str) -> Prepared:
    """A bundle of kind "module" in the workload's own Python."""
    import armopt
    from benchmarks.arm64.workloads import WORKLOADS

    model = armopt.load(path, model=WORKLOADS[workload].make)
    _, inputs = WORKLOADS[workload].build_quickly()
    return lambda: model(*inputs)


def load_bundle(path: str) -> Prepared:
    """Loading a bundle."""
    import armopt

    return lambda: armopt.load(path)


def load_exported(workload: str) -> Prepared:
    """torch.export.load of the same model; this process writes the file, because another release's may not load."""
    from benchmarks.arm64.workloads import WORKLOADS

    model, inputs = WORKLOADS[workload].build_quickly()
    with torch.no_grad():
        exported = torch.export.export(model, inputs)
    path = Path(tempfile.mkdtemp(prefix="armopt-exported-")) / "model.pt2"
    torch.export.save(exported, path)
    return lambda: torch.export.load(path)


def memory(path: str, first: str) -> dict[str, int]:
    """Bytes of memory that loading a bundle takes, and those of its weights in the bundle and in FP32.

    ``peak`` and ``resident`` are those of the first load, in which kernels are probed: oneDNN's objects and work space
    count as well. ``loaded`` is what a second copy takes: weights and graphs alone. `first`, another bundle, has all
    code loaded before.
    """
    import armopt

    armopt.load(first)
    gc.collect()
    before = own_memory()
    with watching() as seen:
        model = armopt.load(path)
    gc.collect()
    resident = own_memory()
    copy = armopt.load(path)
    gc.collect()
    loaded = own_memory() - resident
    del copy
    taken = {"peak": max(*seen, resident) - before, "resident": resident - before, "loaded": loaded}
    return {**taken, **asdict(model.manifest.weights)}


def own_memory() -> int:
    """Bytes of this process's data that are in memory, a mapped file of weights too; not code, nor the emulator's own.

    Under emulation /proc/self/maps has the emulated process's mappings alone, and /proc/self/pagemap is the system's.
    """
    present = 0
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pages:
        for mapping in maps:
            addresses, rights, *_ = mapping.split(maxsplit=2)
            if rights.startswith("rw"):
                begin, end = (int(address, 16) // mmap.PAGESIZE for address in addresses.split("-"))
                pages.seek(8 * begin)
                entries = torch.frombuffer(bytearray(pages.read(8 * (end - begin))), dtype=torch.int64)
                present += int((entries < 0).sum())  # bit 63
    return present * mmap.PAGESIZE


@contextmanager
def watching() -> Iterator[list[int]]:
    """Bytes of this process's memory, a hundred times a second at most while the block runs."""
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            seen.append(own_memory())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


# --- one kernel -----------------------------------------------------------------------------------


def linear_kernel(kernel: str, m: int, k: int, n: int, post_op: str = "none") -> Single:
    """One of armopt's kernels on one Linear with bias, the weight packed, activations in the kernel's dtype."""
    return kernel_call(kernel, linear_site(m, k, n, post_op))


def linear_site(m: int, k: int, n: int, post_op: str = "none") -> Site:
    """A Linear of [m, k] to [m, n]."""
    return Site("layer", "linear", m, k, n, (m, k), (n, k), post_op=post_op)


def conv_kernel(kernel: str, **arguments: Any) -> Single:
    """One of armopt's kernels on one convolution of two dimensions with bias, channels_last; see :func:`conv_site`."""
    return kernel_call(kernel, conv_site(**arguments))


def conv_site(
    shape: Sequence[int],
    weight: Sequence[int],
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    post_op: str = "none",
) -> Site:
    """A convolution, alike in both dimensions."""
    rows = output_size(shape[2:], weight[2:], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0])
    return Site(
        "layer",
        "conv",
        m=shape[0] * rows[0] * rows[1],
        k=weight[1] * weight[2] * weight[3],
        n=weight[0],
        shape=tuple(shape),
        weight=tuple(weight),
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(1, 1),
        output_padding=(0, 0),
        groups=groups,
        post_op=post_op,
    )


def kernel_call(name: str, site: Site) -> Single:
    """The calls that a kernel emits for one site, as a graph of their own: of its own primitive, where it has one."""
    kernel = table.get(name)
    if reason := kernel.refuses(site):
        raise ValueError(f"{name} refuses: {reason}")
    stored = torch.ones(site.weight, dtype=kernel.rounding.weights)
    bias = torch.ones(site.n, dtype=kernel.activations)
    weight = own.proven(kernel, site, stored, bias)
    return single(kernel, site, kernel.packed_weight(stored, site) if weight is None else weight, bias)


def pointwise(operation: str, dtype: str, elements: int) -> Prepared:
    """A post-op as kernels emit it behind their call, or a cast from a dtype to the other."""
    kind = _DTYPES[dtype]
    x = torch.zeros(1, elements, dtype=kind)
    if operation == "cast":
        cast = CASTS[_DTYPES["fp32" if dtype == "bf16" else "bf16"]]
        return lambda: cast(x)
    if generated_code.takes(operation, kind):
        return pointwise_in_onednn(operation, dtype, elements)
    graph = fx.Graph()
    y, other = graph.placeholder("y"), graph.placeholder("other")
    end = graph.output(y)
    site = linear_site(1, 1, elements, operation)
    kernel = table.get("conv1x1_bf16" if dtype == "bf16" else "aten_linear")  # neither fuses any
    end.args = (KernelCall(kernel, site, end, y, y, None, other, (1, elements)).with_post_op(y),)
    forward = finish(torch.nn.Module(), graph, {}).forward
    return lambda: forward(x, x)


def pointwise_in_pytorch(operation: str, dtype: str, elements: int) -> Prepared:
    """The same by PyTorch's operation, in place."""
    post, x = UNARY[operation], torch.zeros(1, elements, dtype=_DTYPES[dtype])
    return lambda: post.inplace(x, *post.inplace_args, **post.inplace_kwargs)


def pointwise_in_onednn(operation: str, dtype: str, elements: int) -> Prepared:
    """The same by oneDNN's code, whether bundles take it or not.

    Raises:
        OneDnnError: It has none for this core.
    """
    api = primitives.api()
    assert isinstance(api, primitives.Api)
    return generated_code.in_place(api, operation, torch.zeros(1, elements, dtype=_DTYPES[dtype]))


def attention(dtype: str, batch: int, heads: int, tokens: int, size: int, mask: str = "") -> Prepared:
    """Attention on query, key and value as one projection gives them, as bundles run it.

    Args:
        dtype: ``bf16`` or ``fp32``.
        batch: Images or windows.
        heads: Of each.
        tokens: Rows.
        size: Columns of a head.
        mask: What is added to the scores: ``windows``, in FP32; ``causal``; or nothing.
    """
    made = attend.make(_planned(dtype, batch, heads, tokens, size, mask), multiplies_bf16=host_check.multiplies_bf16())
    if made is not None:
        return _own_attention(made, dtype, batch, heads, tokens, size)
    return attention_in_pytorch(dtype, batch, heads, tokens, size, mask)


def attention_in_pytorch(dtype: str, batch: int, heads: int, tokens: int, size: int, mask: str = "") -> Prepared:
    """The same by PyTorch's operation."""
    q, k, v = _query_key_value(dtype, batch, heads, tokens, size)
    call = BINDINGS[torch.ops.aten.scaled_dot_product_attention.default]
    added = torch.zeros(batch, heads, tokens, tokens) if mask == "windows" else None
    return lambda: call(q, k, v, added, is_causal=mask == "causal")


def attention_in_onednn(dtype: str, batch: int, heads: int, tokens: int, size: int, mask: str = "") -> Prepared:
    """The same by oneDNN's code, whether bundles take it or not.

    Raises:
        OneDnnError: It has none for this core.
    """
    api, planned = primitives.api(), _planned(dtype, batch, heads, tokens, size, mask)
    assert isinstance(api, primitives.Api)
    made = Attention(api, planned.wanted, planned.constant)
    return _own_attention(made, dtype, batch, heads, tokens, size)


def _planned(dtype: str, batch: int, heads: int, tokens: int, size: int, mask: str) -> attend.Planned:
    wanted = Wanted(batch, heads, tokens, tokens, size, size, _DTYPES[dtype], size**-0.5, mask == "causal")
    if mask != "windows":
        return attend.Planned(wanted)
    return attend.Planned(wanted, torch.float32, torch.zeros(batch, heads, tokens, tokens))


def _own_attention(made: Attention, dtype: str, batch: int, heads: int, tokens: int, size: int) -> Prepared:
    q, k, v = _query_key_value(dtype, batch, heads, tokens, size)
    workspaces = Workspaces()
    workspaces.layers.append(made)
    workspaces.arena, workspaces.places = made.size, {0: 0}
    call, workspace = made.function(0), workspaces.take()
    return lambda: call(workspace, q, k, v)


def _query_key_value(dtype: str, batch: int, heads: int, tokens: int, size: int) -> Sequence[torch.Tensor]:
    qkv = torch.randn(batch, tokens, 3 * heads * size, generator=torch.Generator().manual_seed(0)).to(_DTYPES[dtype])
    return [part.unflatten(-1, (heads, size)).transpose(1, 2) for part in qkv.chunk(3, -1)]


# --- what else users could call -------------------------------------------------------------------


def linear_contender(how: str, m: int, k: int, n: int) -> Prepared:
    """One Linear with bias, called in another way: see CONTENDERS."""
    torch.manual_seed(0)
    return CONTENDERS[how](torch.randn(m, k), torch.randn(n, k), torch.randn(n))


def _packed_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Prepared:
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(w, x.shape[0])
    return lambda: ops._linear_pointwise(x, packed, b, "none", [], "")


def _cast_conv(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Prepared:
    call = linear_kernel("conv1x1_bf16", x.shape[0], x.shape[1], w.shape[0])
    forward = call.graph_module.forward
    return lambda: forward(x.bfloat16()).float()


def _linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Prepared:
    return lambda: functional.linear(x, w, b)


def _linear_bf16(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Prepared:
    return _linear(x.bfloat16(), w.bfloat16(), b.bfloat16())


def _addmm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Prepared:
    transposed = w.t().contiguous()
    return lambda: torch.addmm(b, x, transposed)


def _without_mkldnn(make: Callable[..., Prepared]) -> Callable[..., Prepared]:
    def prepare(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Prepared:
        call = make(x, w, b)

        def run() -> Any:
            torch._C._set_mkldnn_enabled(False)  # not mkldnn.flags: it costs more than a small layer
            try:
                return call()
            finally:
                torch._C._set_mkldnn_enabled(True)

        return run

    return prepare


#: Ways to call one Linear that are not armopt's, by name.
CONTENDERS: dict[str, Callable[..., Prepared]] = {
    "F.linear": _linear,
    "F.linear bf16": _linear_bf16,
    "BLAS f32 (addmm on [K, N])": _addmm,
    "BLAS bf16 (mkldnn off)": _without_mkldnn(_linear_bf16),
    "_linear_pointwise, packed": _packed_linear,
    "conv1x1_bf16 with casts": _cast_conv,
}


def linear_as_conv(m: int, k: int, n: int, layout: str, dtype: str = "bfloat16") -> Prepared:
    """One Linear as a packed 1x1 convolution, with its rows where `layout` says: images, height or width."""
    ops = torch.ops.mkldnn
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    shape = {"images": (m, 1, 1, k), "height": (1, m, 1, k), "width": (1, 1, m, k)}[layout]
    x, bias = torch.randn(m, k).to(kind), torch.randn(n).to(kind)
    one, none = [1, 1], [0, 0]
    channels_first = [shape[0], k, *shape[1:3]]
    packed = ops._reorder_convolution_weight(torch.randn(n, k, 1, 1).to(kind), none, one, one, 1, channels_first)

    def run() -> torch.Tensor:
        image = x.view(shape).permute(0, 3, 1, 2)
        y = ops._convolution_pointwise(image, packed, bias, none, one, one, 1, "none", [], "")
        return y.permute(0, 2, 3, 1).view(m, n)  # type: ignore[no-any-return]

    return run
