"""The network as compiled CUDA graphs: one launch a forward instead of one for every kernel.

A forward of one row is bound by launches: at 7B shapes an H100 needs about 10 ms for 512 tokens and 5 ms for reading
the weights, and the eager loop takes 26. A graph has fixed shapes and addresses, so rows go into batches of powers of
two, prompts are padded on the left to multiples of 64 columns (of an eighth of the length beyond 1,024, so that shapes
stay few), and predicted positions to multiples of 32.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dream_lightning.errors import UserError
from dream_lightning.kernels.fused_projections import fuse_weights_, fused_projections
from dream_lightning.sampling.canvas import Canvas
from dream_lightning.sampling.params import Algorithm
from dream_lightning.sampling.token_sampling import best_tokens

_COLUMNS, _POSITIONS = 64, 32
_WARM_UP = 3  # forwards before a capture: compilation, and what libraries allocate at their first call


class CompiledDenoiser:
    """A DreamModel that `diffusion_generate` takes in its place: the same weights, read where they are.

    Args:
        model: a DreamModel on a CUDA device. It may be trained between two generations.
        capture: False runs the layers as they are, in the same fixed shapes and buffers, on any device: for tests.
        mode: of torch.compile, such as `max-autotune-no-cudagraphs`, which takes minutes to try kernels.
        keep_alive: hold the model, so that this may take its place.

    Raises:
        UserError: the model is not on a CUDA device, or on several, or its weights are sharded.
    """

    def __init__(
        self, model: nn.Module, *, capture: bool = True, mode: str | None = None, keep_alive: bool = True
    ) -> None:
        if any(hasattr(p, "device_mesh") for p in model.parameters()):
            raise UserError(
                "the model's weights are sharded over ranks, which a graph cannot gather: set compile to False"
            )
        self.original, self._kept = weakref.ref(model), model if keep_alive else None
        self.model = CUDAGraphRunner(model.model, capture, mode)
        self._best = torch.compile(best_tokens)
        self._capture = capture

    @property
    def config(self) -> Any:
        """That of the original."""
        return self.original().config

    @property
    def lm_head(self) -> nn.Module:
        """That of the original, in which it may be exchanged."""
        return self.original().lm_head

    def modules(self) -> Iterator[nn.Module]:
        """Those of the original."""
        return self.original().modules()

    def eval(self) -> None:
        """Put the original into eval mode."""
        self.original().eval()

    def into_bucket(self, canvas: Canvas) -> Canvas:
        """The canvas in one of few shapes, its own rows first and its own columns last."""
        rows, length = canvas.x.shape
        grain = max(_COLUMNS, (1 << length.bit_length() - 1) // 8)
        columns = -(-length // grain) * grain
        pad = self.config.pad_token_id or 0
        return canvas.padded_to(1 << (rows - 1).bit_length(), columns, pad)

    def positions(self, number: int) -> int:
        """How many positions to predict where so many are wanted."""
        return -(-number // _POSITIONS) * _POSITIONS

    def best(self, logits: Tensor, alg: Algorithm, forbidden: int | None) -> tuple[Tensor, Tensor]:
        """`choosing.best_tokens`: one kernel, or where there is none compiled once for all numbers of positions."""
        if not self._capture:
            return best_tokens(logits, alg, forbidden)
        if alg != "topk_margin":
            from dream_lightning.kernels import fused_best_tokens as fused  # which needs triton

            return fused.best_tokens(logits, alg, forbidden)
        torch._dynamo.maybe_mark_dynamic(logits, 0)
        return self._best(logits, alg, forbidden)


class CUDAGraphRunner:
    """The layers of a model as one CUDA graph for each combination of input shapes."""

    def __init__(self, trunk: nn.Module, capture: bool, mode: str | None) -> None:
        self._trunk, self._capture, self._mode = weakref.ref(trunk), capture, mode
        self._forget()

    def _forget(self) -> None:
        devices = sorted({str(p.device) for p in self._trunk().parameters()})
        # What runs elsewhere is not captured, and never runs again.
        if self._capture and (len(devices) > 1 or not devices[0].startswith("cuda")):
            raise UserError(f"the model is on {', '.join(devices)}, CUDA graphs need one GPU: set compile to False")
        self._graphs: dict[tuple, _Graph] = {}
        self._caches: dict[tuple[int, int], Any] = {}  # the one used last comes last
        # Without one of its own a capture takes torch's, which is of the device where anybody captured first.
        self._stream = torch.cuda.Stream(devices[0]) if self._capture else None
        self._pool = None
        fuse_weights_(self._trunk())
        self._captured = _captured(self._trunk())

    def refresh(self) -> None:
        """Forget the graphs if a weight has moved or adapters were switched; graphs see weights changed in place."""
        if self._captured != _captured(self._trunk()):
            self._forget()

    def new_cache(self, rows: int, length: int) -> Any:
        """The cache of this shape; there is one, because graphs know its address.

        All together hold at most twice what the largest holds, enough for a batch that is let go row by row. Those not
        used for the longest time go, and their graphs.
        """
        cache = self._caches.pop((rows, length), None)
        if cache is None:
            most = 2 * max(rows * length, *map(prod, self._caches), 0)
            while sum(map(prod, self._caches)) + rows * length > most:
                self._drop(self._caches.pop(next(iter(self._caches))))
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside
                cache = self._trunk().new_cache(rows, length)
        self._caches[rows, length] = cache
        return cache

    def _drop(self, cache: Any) -> None:
        self._graphs = {key: graph for key, graph in self._graphs.items() if graph.cache is not cache}
        if not self._graphs:  # a pool that no graph holds must not be used again
            self._pool = None

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        columns: Tensor | None = None,
        span: tuple[int, int] | None = None,
    ) -> Tensor:
        """As `DreamBaseModel.forward`. The result is overwritten by the next call."""
        inputs = [input_ids, attention_mask, position_ids, columns]
        key = (*(None if t is None else t.shape for t in inputs), id(cache), span, *_autocast(input_ids.device.type))
        if key not in self._graphs:
            with torch.inference_mode(False), torch.no_grad():
                self._graphs[key] = self._new_graph(inputs, cache, span)
        return self._graphs[key](inputs)

    def _new_graph(self, inputs: list[Tensor | None], cache: Any, span: tuple[int, int] | None) -> "_Graph":
        static = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in inputs]
        ids, attention_mask, position_ids, columns = static
        trunk = self._trunk()

        def forward() -> Tensor:
            with fused_projections(trunk, ids.numel()):
                return trunk(ids, attention_mask, position_ids, cache, columns, span)

        if not self._capture:
            return _Graph(static, cache, forward)
        # Of the weights' device, which need not be the current one.
        with torch.cuda.device(ids.device), _compiled_parts(trunk, self._mode), _no_autocast_cache():
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UP):
                    forward()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: a data loader's thread may pin memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = forward()
        self._pool = self._pool or graph.pool()
        return _Graph(static, cache, graph.replay, output)


def _captured(trunk: nn.Module) -> list:
    """What graphs take as it is: the places and types of weights and buffers, how PEFT's adapters are switched."""
    adapted = [layer for layer in trunk.modules() if hasattr(layer, "merged_adapters")]
    switches = [(a.disable_adapters, *a.active_adapters, *a.merged_adapters, *a.scaling.values()) for a in adapted]
    return [(t.data_ptr(), t.dtype) for t in (*trunk.parameters(), *trunk.buffers())] + switches


class _Graph:
    """A forward with fixed inputs, into which those of a call are copied.

    Of all but the ids, which hooks may change in place, only those that are not the last call's tensors. It holds its
    cache, so that no other one gets its address.
    """

    def __init__(self, static: list[Tensor | None], cache: Any, run: Any, output: Tensor | None = None) -> None:
        self._static, self.cache, self._run, self._output = static, cache, run, output
        self._last: list[Tensor | None] = [None] * len(static)

    def __call__(self, inputs: list[Tensor | None]) -> Tensor:
        ids, *_ = self._static
        for static, given, last in zip(self._static, inputs, self._last, strict=True):
            if static is ids or given is not last:
                static.copy_(given)
        self._last = inputs
        returned = self._run()
        return returned if self._output is None else self._output


_COMPILED: "weakref.WeakKeyDictionary[nn.Module, CompiledDenoiser]" = weakref.WeakKeyDictionary()


def compiled(model: "nn.Module | CompiledDenoiser") -> CompiledDenoiser:
    """The model's CompiledDenoiser: made at the first call, later the same with its graphs."""
    if isinstance(model, CompiledDenoiser):
        fast = model
    else:
        if model not in _COMPILED:
            _COMPILED[model] = CompiledDenoiser(model, keep_alive=False)
        fast = _COMPILED[model]
    fast.model.refresh()
    return fast


def release(model: nn.Module) -> None:
    """Free the graphs and caches that `compiled` keeps for a model: gigabytes that training needs; code stays."""
    _COMPILED.pop(model, None)


@contextmanager
def _compiled_parts(trunk: nn.Module, mode: str | None) -> Iterator[None]:
    """Layers, and what is many small kernels beside them, compiled for the shapes that come; afterwards as before."""
    parts = (trunk.rotary, *trunk.layers, trunk.norm)
    before = [part._compiled_call_impl for part in parts]
    for part in parts:
        part.compile(dynamic=False, mode=mode)
    try:
        # All layers share one compilation a shape. Beyond the limit torch would run them uncompiled, so raise instead.
        limits = {"recompile_limit": 1024, "accumulated_recompile_limit": 4096}
        with torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):
            yield
    finally:
        for part, impl in zip(parts, before, strict=True):
            part._compiled_call_impl = impl


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Cast weights inside the graph: autocast's copies, made before, would stay as they are while training goes on."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _autocast(device: str) -> tuple:
    return (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
