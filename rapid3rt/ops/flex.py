# SPDX-License-Identifier: Apache-2.0
"""The flex backend: attention over block lists by PyTorch's FlexAttention, compiled once per shape.

Lists become the full blocks of a BlockMask, in which no mask is evaluated; the block that a ragged `kv_len` cuts is the
one partial block of its list. FlexAttention masks tokens behind the end by itself. Lists are inputs of the compiled
function: other lists, modes and lengths of the same shape run without compiling again.

FlexAttention that is not compiled looks at masks alone, never at blocks: it would answer as if every list were full.
So nothing here ever runs eagerly: where Dynamo does not or cannot compile, the call raises UnsupportedError. The ops
are opaque to an outer torch.compile for the same reason: its backend need not be Inductor.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

import torch

from rapid3rt.errors import UnsupportedError
from rapid3rt.ops import checks, library, reference

Key = tuple[object, ...]
Function = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

# Versions of 2025 drop the indices of full blocks on the CPU: not served unless held to the reference here.
_CPU_TORCH = "2.13"
# Versions before hold their default tile of 128 against the block, whatever tile is asked for.
_SMALL_BLOCK_TORCH = "2.9"
_CAPABILITY = (8, 0)
# KiB of shared memory that a CUDA block may take, by compute capability; consumer GPUs have 99.
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_CONSUMER_KIB = 99
# Query tile, key tile, stages of the pipeline, warps; the first that fits is taken.
_TILES = (
    *((128, 64, 3, 8), (128, 64, 2, 8), (128, 32, 2, 4)),
    *((64, 64, 3, 4), (64, 64, 2, 4), (64, 32, 2, 4), (32, 32, 1, 4)),
)


def missing_reason(device_type: str, capability: tuple[int, int] | None) -> str | None:
    """Why FlexAttention cannot serve a device, None when it can. capability: of the CUDA GPU, None without one."""
    if device_type == "cpu":
        if torch.__version__ < _CPU_TORCH:
            return f"FlexAttention on the CPU needs torch {_CPU_TORCH}, this is {torch.__version__}"
        return None
    if device_type != "cuda":
        return f"FlexAttention is used on CPU and CUDA alone, not on {device_type!r}"
    if capability is None:
        return "there is no CUDA GPU"
    if capability < _CAPABILITY:
        return "FlexAttention needs a GPU of compute capability 8.0, this one has {}.{}".format(
            *capability
        )
    if not _has_triton():
        return "FlexAttention needs Triton, which is not installed: pip install triton"
    return None


def refusal(device_type: str, head_dim: int, block: int, lse: bool) -> str | None:
    """Why FlexAttention cannot serve a call on a device that it serves, None when it can."""
    if device_type == "cpu":
        return "FlexAttention gives no log-sum-exp on the CPU" if lse else None
    if head_dim < 16:
        return f"FlexAttention needs a head dim of at least 16 on CUDA, got {head_dim}"
    if block < 64:
        return f"FlexAttention takes blocks of 64 or 128 tokens on CUDA, got {block}"
    if block < 128 and torch.__version__ < _SMALL_BLOCK_TORCH:
        needed = f"from torch {_SMALL_BLOCK_TORCH} on, this is {torch.__version__}"
        return f"FlexAttention takes blocks of {block} tokens {needed}"
    return None


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class Blocks(NamedTuple):
    """Key blocks per query block as FlexAttention wants them, all contiguous.

    partial_count, full_count: int32 `[R, H, Mq]`. partial_index, full_index: int32 `[R, H, Mq, Mk]`, ascending, some
    block of the row beyond its count.
    """

    partial_count: torch.Tensor
    partial_index: torch.Tensor
    full_count: torch.Tensor
    full_index: torch.Tensor


def split_blocks(
    mode: torch.Tensor,
    count: torch.Tensor | None,
    index: torch.Tensor | None,
    kv_len: torch.Tensor | None,
    num_q: int,
    len_kv: int,
    block: int,
) -> Blocks:
    """Turn modes and lists into full and partial key blocks: dense heads see all, skipped ones none.

    Parameters
    ----------
    mode, count, index, kv_len: as in `block_sparse_attention`. num_q: Mq. len_kv: key tokens. block: tokens per block.
    """
    num_kv = -(-len_kv // block)
    heads = tuple(mode.shape)
    place = torch.arange(num_kv, dtype=torch.int32, device=mode.device)
    seen = torch.where(mode == reference.DENSE, num_kv, 0).to(torch.int32)[..., None]
    chosen = place.expand(*heads, num_q, num_kv)
    if count is not None and index is not None:
        is_list = (mode == reference.LIST)[..., None]
        seen = torch.where(is_list, count, seen)
        if index.shape[-1] < num_kv:
            index = torch.nn.functional.pad(index, (0, num_kv - index.shape[-1]))
        # What stands beyond count may be anything, and FlexAttention computes addresses of it.
        in_list = is_list[..., None] & (place < seen[..., None])
        chosen = torch.where(in_list, index, chosen)
    seen = seen.expand(*heads, num_q).contiguous()
    chosen = chosen.contiguous()
    if kv_len is None:
        return Blocks(torch.zeros_like(seen), torch.zeros_like(chosen), seen, chosen)
    # Lists ascend: the blocks before the cut are the first ones.
    cut = (kv_len // block).to(torch.int32)[:, None, None, None]
    in_row = place < seen[..., None]
    full = (in_row & (chosen < cut)).sum(-1, dtype=torch.int32)
    ragged = (kv_len % block != 0)[:, None, None]
    partial = ((in_row & (chosen == cut)).any(-1) & ragged).to(torch.int32)
    return Blocks(partial, cut.clamp_max(num_kv - 1).expand_as(chosen).contiguous(), full, chosen)


def kernel_options(
    device_type: str, capability: tuple[int, int] | None, head_dim: int, itemsize: int, block: int
) -> dict[str, int | bool]:
    """What FlexAttention is told about its kernel.

    Its kernels for few queries are put out of reach: they have constraints of their own. Its default tiles neither
    divide blocks of 64 nor fit the shared memory of consumer GPUs; where they do both, they are left alone.
    """
    if device_type == "cpu" or capability is None:
        return {"PARTITION_SIZE": 1}
    options: dict[str, int | bool] = {"FORCE_USE_FLEX_ATTENTION": True}
    if block == 128 and capability in _SHARED_KIB:
        return options
    shared = 1024 * _SHARED_KIB.get(capability, _CONSUMER_KIB)
    width = itemsize * (1 << (head_dim - 1).bit_length())
    for rows, keys, stages, warps in _TILES:
        if rows <= block and (rows + 2 * stages * keys) * width <= shared:
            tile = {"BLOCK_M": rows, "BLOCK_N": keys, "num_stages": stages, "num_warps": warps}
            return options | tile
    return options


@dataclass(slots=True)
class CompiledShapes:
    """The functions that were compiled, one per shape, and how often that happened.

    functions: by shapes, strides, dtype, device and constants of the call. compiles: runs of the compiler, one for each
    function and one more wherever something else has changed: tensors of inference mode, settings of torch.
    """

    functions: dict[Key, Function] = field(default_factory=dict)
    compiles: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def recompiles(self) -> int:
        """Compilations beyond the first of each shape."""
        return max(0, self.compiles - len(self.functions))

    def get(self, key: Key, make: Callable[[], FunctionType]) -> Function:
        """The compiled function of a key. make: gives the plain one."""
        function = self.functions.get(key)
        if function is None:
            with self.lock:
                function = self.functions.get(key) or self._compile(key, make())
        return function

    def _compile(self, key: Key, plain: FunctionType) -> Function:
        # Dynamo counts recompiles per code object, and gives up at the eighth: each shape has a code object of its own.
        name = f"attend_{len(self.functions)}"
        code = plain.__code__.replace(co_name=name)
        own = FunctionType(code, plain.__globals__, name, None, plain.__closure__)
        compiled = torch.compile(own, backend=self._inductor, fullgraph=True, dynamic=False)
        self.functions[key] = compiled
        return compiled

    def _inductor(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.compiles += 1
        return compile_fx(graph, inputs)


shapes = CompiledShapes()


def _plain(
    lengths: tuple[int, int], block: int, scale: float, lse: bool, options: dict[str, int | bool]
) -> Any:
    """The function that is compiled: q, k, v, blocks and kv_len to out and log-sum-exp."""
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    request = getattr(flex, "AuxRequest", None)  # torch 2.9 and later
    told: dict[str, Any] = {"return_lse": lse}
    if lse and request is not None:
        told = {"return_aux": request(lse=True)}

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        partial_count: torch.Tensor,
        partial_index: torch.Tensor,
        full_count: torch.Tensor,
        full_index: torch.Tensor,
        kv_len: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not torch.compiler.is_compiling():
            raise UnsupportedError(
                "FlexAttention must be compiled, and torch.compile is switched off or gave up: "
                "TORCH_COMPILE_DISABLE, torch.compiler.set_stance and torch._dynamo.config can do that"
            )

        def is_seen(
            b: torch.Tensor, h: torch.Tensor, q_index: torch.Tensor, kv_index: torch.Tensor
        ) -> torch.Tensor:
            del h, q_index
            # Without kv_len a mask that hides nothing: the CPU's code generator wants one.
            return kv_index < (lengths[1] if kv_len is None else kv_len[b])

        mask = flex.BlockMask(
            seq_lengths=lengths,
            kv_num_blocks=partial_count,
            kv_indices=partial_index,
            full_kv_num_blocks=full_count,
            full_kv_indices=full_index,
            q_num_blocks=None,
            q_indices=None,
            full_q_num_blocks=None,
            full_q_indices=None,
            BLOCK_SIZE=(block, block),
            mask_mod=is_seen,
        )
        result = flex.flex_attention(
            q, k, v, block_mask=mask, scale=scale, kernel_options=options, **told
        )
        if not lse:
            return result, None
        out, sums = result
        return out, sums if request is None else sums.lse

    return attend


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: tuple[torch.Tensor | None, ...],
    block: int,
    scale: float,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Out `[R, H, Nq, K]` of any layout and the log-sum-exp; skipped heads give 0."""
    mode, count, index, _, kv_len = lists
    assert mode is not None
    lengths = (q.shape[2], k.shape[2])
    blocks = split_blocks(mode, count, index, kv_len, -(-lengths[0] // block), lengths[1], block)
    if kv_len is not None:  # a masked key has weight 0, but 0 NaN is NaN
        valid = torch.arange(lengths[1], device=v.device) < kv_len[:, None]
        v = torch.where(valid[:, None, :, None], v, 0)
    layouts = tuple((tuple(x.shape), x.stride()) for x in (q, k, v))
    key = (layouts, q.dtype, q.device, block, scale, lse, kv_len is None)

    def make() -> Any:
        found = capability(q.device)
        options = kernel_options(q.device.type, found, q.shape[3], q.element_size(), block)
        return _plain(lengths, block, scale, lse, options)

    function = shapes.get(key, make)
    # The same state of torch at every call, or Dynamo would compile anew; autocast would change the dtype.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return _call(function, (q, k, v, *blocks, kv_len))


def _call(
    function: Function, arguments: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from torch._dynamo import exc

    limit = getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException)  # torch 2.7 and later
    try:
        return function(*arguments)
    except (exc.TorchDynamoException, limit) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UnsupportedError(
            f"FlexAttention of torch {torch.__version__} cannot be compiled for this call, use backend='reference': "
            f"{type(error).__name__}: {' '.join(lines[:2])}"
        ) from error


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, None for others and where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def _functional(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mode: torch.Tensor,
    count: torch.Tensor | None,
    index: torch.Tensor | None,
    order: torch.Tensor | None,
    kv_len: torch.Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
    lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.block_sparse_attention`."""
    lists = (mode, count, index, order, kv_len)
    if not q.numel() or not k.shape[2]:
        return reference.block_sparse_attention(q, k, v, *lists, block_q, block_kv, scale, lse)
    reference.refuse_skip(mode)
    reference.check_lists(*lists, -(-k.shape[2] // block_kv), k.shape[2])
    out, sums = _attend(q, k, v, lists, block_q, scale, lse)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, q.new_empty(0, dtype=torch.float32) if sums is None else sums.contiguous()


def _in_place(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mode: torch.Tensor,
    count: torch.Tensor | None,
    index: torch.Tensor | None,
    order: torch.Tensor | None,
    kv_len: torch.Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
) -> None:
    """As `reference.block_sparse_attention_`."""
    lists = (mode, count, index, order, kv_len)
    if not q.numel() or not k.shape[2]:
        reference.block_sparse_attention_(out, lse, q, k, v, *lists, block_q, block_kv, scale)
        return
    checks.expect_attention_apart(out, lse, q, k, v)
    reference.check_lists(*lists, -(-k.shape[2] // block_kv), k.shape[2])
    result, sums = _attend(q, k, v, lists, block_q, scale, lse is not None)
    keep = (mode == reference.SKIP)[..., None]
    torch.where(keep[..., None], out, result, out=out)
    if lse is not None and sums is not None:
        torch.where(keep, lse, sums, out=lse)


_library = torch.library.Library("rapid3rt", "FRAGMENT")
library.register(_library, "flex_attention", "block_sparse_attention", _functional, _functional)
library.register(_library, "flex_attention_", "block_sparse_attention_", _in_place, _in_place)

block_sparse_attention = torch.ops.rapid3rt.flex_attention.default
block_sparse_attention_ = torch.ops.rapid3rt.flex_attention_.default
