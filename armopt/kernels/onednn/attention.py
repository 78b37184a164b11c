"""Attention as primitives of its own: the scores of many heads by one product, their softmax in place, and a second
product with the values.

PyTorch's attention calls BLAS for each head and block. On Arm only OpenBLAS has a product in BF16, and builds with
another BLAS work in FP32, head by head; the Compute Library multiplies FP32 in BF16 for all heads at once. Query, key
and value are copied to where each head's rows lie together. `python -m benchmarks.arm64.attention` counts both.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from armopt.kernels.onednn import compute_library, implementations
from armopt.kernels.onednn.arguments import kept_in
from armopt.kernels.onednn.attention_call import Causal, Part, Steps, added
from armopt.kernels.onednn.pointwise import has_wide_vectors
from armopt.kernels.onednn.primitives import (
    DST,
    DST_DESC,
    SCRATCHPAD,
    SCRATCHPAD_DESC,
    SRC,
    SRC_DESC,
    WEIGHTS,
    WEIGHTS_DESC,
    Api,
    Argument,
    Handle,
    OneDnnError,
    aligned,
)
from armopt.kernels.onednn.workspaces import Workspace

#: Bytes of scores that one product gives, for each thread: more would leave the caches before the softmax reads them.
SCORES = 1 << 20
#: Bytes of scores of one head, and of copies of all. Beyond them PyTorch's attention runs, which keeps none.
_MOST_SCORES, _MOST_COPIES = 1 << 22, 1 << 26
#: Of fewer queries the copies of key and value take more than the products.
_LEAST_QUERIES = 8
#: Of fewer keys OpenBLAS is as quick: on vectors of 128 bits, and on those of 256.
_LEAST_KEYS = 48
_LEAST_KEYS_OF_WIDE = {torch.bfloat16: 64, torch.float32: 192}
_ALIGNMENT = 64
_DESCS = {SRC: SRC_DESC, WEIGHTS: WEIGHTS_DESC, DST: DST_DESC, SCRATCHPAD: SCRATCHPAD_DESC}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Attention of one shape.

    Attributes:
        batch: Images, sentences or windows.
        heads: Of each.
        queries: Rows of the query.
        keys: Rows of key and value.
        size: Columns of query and key.
        width: Columns of the value.
        dtype: Of query, key, value and result. In BF16 products are of BF16 values, with sums in FP32.
        scale: By which scores are multiplied.
        is_causal: Whether a query sees no key that stands behind it.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    size: int
    width: int
    dtype: torch.dtype
    scale: float
    is_causal: bool = False

    @property
    def has_any(self) -> bool:
        """Whether there is any score and any result."""
        return min(self.batch, self.heads, self.queries, self.keys, self.size, self.width) > 0

    def like(self) -> torch.Tensor:
        """A result without memory. It lies as that of PyTorch does: heads inside of rows."""
        made = torch.empty(self.batch, self.queries, self.heads, self.width, dtype=self.dtype).transpose(1, 2)
        made.untyped_storage().resize_(0)
        return made

    def together(self, threads: int) -> int:
        """How many heads one product takes: a part of a batch's, or those of some of the batch."""
        most = max(threads, SCORES * threads // (4 * self.queries * self.keys))
        if most >= self.heads:
            return self.heads * _divisor(self.batch, most // self.heads)
        return _divisor(self.heads, most)

    @property
    def is_small(self) -> bool:
        """Whether it fits into memory that is kept for it."""
        columns = 2 * self.queries * self.size + self.keys * (self.size + self.width)
        copies = 4 * self.batch * self.heads * columns
        return 4 * self.queries * self.keys <= _MOST_SCORES and copies <= _MOST_COPIES


def is_quicker(wanted: Wanted, *, multiplies_bf16: bool) -> bool:
    """Whether it takes less than PyTorch's (`python -m benchmarks.arm64.attention`).

    Args:
        wanted: The attention.
        multiplies_bf16: Whether PyTorch's BLAS has a product in BF16, as OpenBLAS has on Arm: quick at small ones.
    """
    with_openblas = _LEAST_KEYS_OF_WIDE[wanted.dtype] if has_wide_vectors() else _LEAST_KEYS
    least = with_openblas if multiplies_bf16 else 1
    return wanted.is_small and wanted.queries >= _LEAST_QUERIES and wanted.keys >= least


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to a limit."""
    return next(each for each in range(min(number, most), 0, -1) if number % each == 0)


@dataclass(frozen=True, slots=True)
class _Form:
    """How products may be made.

    Attributes:
        work: Dtype of the copies of query, key and value, of probabilities, and of the products' results.
        fast_math: Whether FP32 is multiplied in BF16.
        by: Parts of names of implementations that do so.
    """

    work: torch.dtype
    fast_math: bool
    by: tuple[str, ...]


_FORMS = {
    torch.bfloat16: (_Form(torch.float32, True, ("acl",)), _Form(torch.bfloat16, False, ("brg",))),
    torch.float32: (_Form(torch.float32, False, ("acl", "brg")),),
}


@dataclass(frozen=True, slots=True)
class _Made:
    """The primitives for one number of threads; each takes so many heads."""

    form: _Form
    together: int
    descriptions: tuple[Handle, Handle, Handle]
    primitives: tuple[Handle, Handle, Handle]
    implementation: str


def _describe(api: Api, wanted: Wanted, together: int, form: _Form) -> tuple[list[Handle], str] | None:
    """The product of query and key, the softmax, the product with the value, and who does the first; None where
    oneDNN offers no such code."""
    n, m, k = together, wanted.queries, wanted.keys
    attributes = api.attributes(fast_math=form.fast_math, post_op="")
    query, value, result = (
        api.strided((n, rows, columns), (rows * columns, columns, 1), form.work)
        for rows, columns in ((m, wanted.size), (k, wanted.width), (m, wanted.width))
    )
    key = api.strided((n, wanted.size, k), (wanted.size * k, 1, wanted.size), form.work)
    scores, weights = (api.strided((n, m, k), (m * k, k, 1), dtype) for dtype in (torch.float32, form.work))

    def is_meant(description: Handle) -> bool:
        return any(part in api.implementation(description) for part in form.by)

    try:
        found = [
            implementations.choose(api, lambda: api.matmul((query, key, scores), attributes), takes=is_meant),
            implementations.choose(api, lambda: api.softmax(scores, weights, 2, attributes)),
            implementations.choose(api, lambda: api.matmul((weights, value, result), attributes), takes=is_meant),
        ]
    except OneDnnError:
        return None
    chosen = [each for each in found if each is not None]
    return None if len(chosen) < len(found) else ([handle for handle, _ in chosen], chosen[0][1])


class Attention:
    """Attention of fixed size; see `workspaces.Call`.

    Attributes:
        wanted: Its sizes.
        mask: What is added to the scores in every call.
        implementation: Who multiplies, as oneDNN names it.
    """

    packed: tuple[torch.Tensor, ...] = ()

    def __init__(self, api: Api, wanted: Wanted, mask: torch.Tensor | None = None) -> None:
        """Makes the primitives.

        Args:
            api: oneDNN.
            wanted: Its sizes.
            mask: That of every call, whose rows all show a key; it is copied. None where calls give it.

        Raises:
            OneDnnError: oneDNN has only references for it on this host.
        """
        self.wanted, self._api = wanted, api
        self.mask = None if mask is None else added(mask.clone())
        self._causal = Causal.of(wanted.queries, wanted.keys) if wanted.is_causal else None
        self._like = wanted.like()
        self._made: dict[int, _Made] = {}
        self.implementation = self._for(torch.get_num_threads()).implementation

    def _for(self, threads: int) -> _Made:
        if threads not in self._made:
            together = self.wanted.together(threads)
            for form in _FORMS[self.wanted.dtype]:
                found = _describe(self._api, self.wanted, together, form)
                if found is not None:
                    (first, second, third), name = found
                    made = (self._api.primitive(first), self._api.primitive(second), self._api.primitive(third))
                    self._made[threads] = _Made(form, together, (first, second, third), made, name)
                    break
            else:
                raise OneDnnError(f"nothing but a reference for {self.wanted}")
        return self._made[threads]

    def resized(self, wanted: Wanted) -> Attention:
        """This attention at other sizes.

        Raises:
            OneDnnError: oneDNN has only references for them on this host.
        """
        return Attention(self._api, wanted)

    @property
    def size(self) -> int:
        """See `workspaces.Call`."""
        wanted = self.wanted
        return wanted.batch * wanted.heads * wanted.queries * wanted.width * wanted.dtype.itemsize

    def prepare(self, threads: int) -> int:
        """See `workspaces.Call`."""
        made = self._for(threads)
        if "acl" in made.implementation:
            compute_library.warn_of_other_threads(threads)
        return sum(map(_padded, self._parts(made)))

    def _parts(self, made: _Made) -> list[int]:
        """Bytes of the copies of query, key, value and result, of scores, of probabilities in BF16, of scratchpads."""
        wanted, api = self.wanted, self._api
        all_heads = wanted.batch * wanted.heads * made.form.work.itemsize
        columns = wanted.queries * wanted.size, wanted.keys * wanted.size, wanted.keys * wanted.width
        copies = [all_heads * each for each in (*columns, wanted.queries * wanted.width)]
        scores = made.together * wanted.queries * wanted.keys
        apart = 0 if made.form.work == torch.float32 else scores * made.form.work.itemsize
        scratch = max(api.size(api.part(each, SCRATCHPAD_DESC)) for each in made.descriptions)
        return [*copies, scores * 4, apart, scratch]

    def arguments(self, threads: int, scratch: torch.Tensor, place: torch.Tensor | None) -> Steps:
        """See `workspaces.Call`."""
        wanted, made = self.wanted, self._made[threads]
        sizes = self._parts(made)
        first = aligned(scratch) - scratch.data_ptr()
        starts = [first + sum(map(_padded, sizes[:index])) for index in range(len(sizes))]
        *held, scores, weights, pad = (scratch[at : at + size] for at, size in zip(starts, sizes, strict=True))
        rows = (wanted.queries, wanted.keys, wanted.keys, wanted.queries)
        copies = [
            each.view(made.form.work).view(wanted.batch, wanted.heads, count, -1)
            for each, count in zip(held, rows, strict=True)
        ]
        n, heads = made.together, wanted.heads
        scores = scores.view(torch.float32).view(max(1, n // heads), min(n, heads), wanted.queries, wanted.keys)
        parts = self._calls(made, copies, scores, weights if weights.numel() else scores, pad)
        # a query that is rounded is scaled by powers of two alone, which keep it what it is
        is_exact = wanted.dtype == torch.float32 or math.frexp(wanted.scale)[0] == 0.5
        steps = Steps(copies, scores, parts, self._like, wanted.scale, is_exact, self._causal, self.mask)
        if place is not None:
            steps.kept = kept_in(place, self._like)
        return steps

    def _calls(
        self,
        made: _Made,
        copies: Sequence[torch.Tensor],
        scores: torch.Tensor,
        weights: torch.Tensor,
        pad: torch.Tensor,
    ) -> list[Part]:
        """Those of each number of heads that go together."""
        query, key, value, result = (each.flatten(0, 1) for each in copies)
        heads, together = self.wanted.heads, made.together

        def call(index: int, tensors: Mapping[int, torch.Tensor]) -> Callable[[], int]:
            return _execution(self._api, made, index, {**tensors, SCRATCHPAD: pad})

        softmax = call(1, {SRC: scores, DST: weights})
        found = []
        for start in range(0, self.wanted.batch * heads, together):
            end = start + together
            which = (
                slice(start // heads, -(-end // heads)),
                slice(start % heads, start % heads + min(together, heads)),
            )
            multiply = call(0, {SRC: query[start:end], WEIGHTS: key[start:end], DST: scores})
            weigh = call(2, {SRC: weights, WEIGHTS: value[start:end], DST: result[start:end]})
            found.append(Part(multiply, softmax, weigh, which))
        return found

    def function(self, index: int) -> Callable[..., torch.Tensor]:
        """A function of a workspace, in which its arguments are at `index`, of query, key and value, and of a mask."""

        def run(
            workspace: Workspace, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            steps: Steps = workspace.arguments[index]
            return steps.run(q, k, v, mask)

        return run


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _execution(api: Api, made: _Made, index: int, tensors: Mapping[int, torch.Tensor]) -> Callable[[], int]:
    """A call of one of the primitives on tensors, which returns oneDNN's status."""
    description = made.descriptions[index]
    memories = [api.memory(api.part(description, _DESCS[which]), x.data_ptr()) for which, x in tensors.items()]
    array = (Argument * len(memories))(*(Argument(w, m.pointer) for w, m in zip(tensors, memories, strict=True)))
    place = ctypes.c_void_p(ctypes.addressof(array))
    call = functools.partial(api.execute, made.primitives[index].pointer, api.stream.pointer, len(memories), place)
    call.__dict__["owned"] = array, memories, made
    return call
