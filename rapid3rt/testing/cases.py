# SPDX-License-Identifier: Apache-2.0
"""Cases of every op: the shapes that tests check are the shapes that benches time.

A case knows how to make its inputs from its name alone (the name seeds them), and how many floating-point operations
and bytes its op must spend: bytes count each tensor that the op must touch once. CASES are small, for tests; those
marked `bench` are timed too. REAL_CASES have the size of real models and are only timed: each is made by the function
that makes the small cases of its op.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from rapid3rt.testing.attention import Heads, packed_heads, random_lists, text_lists

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Make = Callable[[torch.Generator, torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of one op.

    make: generator and dtype to the op's positional arguments. flops: arithmetic of the call. values: elements of the
    op's dtype that the call reads and writes. writes: positions of the arguments that the op writes.
    """

    op: str
    name: str
    make: Make
    flops: int
    values: int
    writes: tuple[int, ...] = ()
    bench: bool = False

    def __str__(self) -> str:
        return f"{self.op} {self.name}"

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Make fresh inputs; the same for the same case and dtype."""
        seed = zlib.crc32(str(self).encode())
        return self.make(torch.Generator().manual_seed(seed), dtype)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that the call must move."""
        return self.values * dtype.itemsize


def clone_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the tensors of a call, for ops that write."""
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def result_tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that an op returned, as a tuple."""
    return tuple(t for t in (result if isinstance(result, tuple) else (result,)) if t is not None)


def permuted_rows(g: torch.Generator, total: int, num_rows: int) -> torch.Tensor:
    """Unique ids in a random order: int32 `[num_rows]`."""
    return torch.randperm(total, generator=g)[:num_rows].to(torch.int32)


def _normal(g: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=g).to(dtype)


def _gather(shape: tuple[int, ...], num_rows: int, bench: bool = False, label: str = "") -> Case:
    size = num_rows * torch.Size(shape[1:]).numel()
    return Case(
        op="gather_rows",
        name=f"{label}{shape} rows {num_rows}",
        make=lambda g, dtype: (_normal(g, dtype, *shape), permuted_rows(g, shape[0], num_rows)),
        flops=0,
        values=2 * size,
        bench=bench,
    )


def _scatter(shape: tuple[int, ...], num_rows: int, bench: bool = False, label: str = "") -> Case:
    size = num_rows * torch.Size(shape[1:]).numel()
    return Case(
        op="scatter_rows",
        name=f"{label}{shape} rows {num_rows}",
        make=lambda g, dtype: (
            _normal(g, dtype, *shape),
            _normal(g, dtype, num_rows, *shape[1:]),
            permuted_rows(g, shape[0], num_rows),
        ),
        flops=0,
        values=2 * size,
        writes=(0,),
        bench=bench,
    )


def _lookup(
    rows: int, orders: int, tokens: int, width: int, bench: bool = False, label: str = ""
) -> Case:
    size = rows * tokens * width

    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        embedded = _normal(g, dtype, rows, tokens, width)
        slots = _normal(g, dtype, rows + 2, orders, tokens, width)
        coef = torch.randn((rows, orders), generator=g)
        return embedded, slots, permuted_rows(g, rows + 2, rows), coef

    return Case(
        op="cache_lookup",
        name=f"{label}R{rows} O{orders} I{tokens} D{width}",
        make=make,
        flops=2 * orders * size,
        values=(2 + orders) * size,
        bench=bench,
    )


def _lookup_norm(
    rows: int, orders: int, tokens: int, width: int, bench: bool = False, label: str = ""
) -> Case:
    base = _lookup(rows, orders, tokens, width, label=label)
    size = rows * tokens * width

    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        modulation = (_normal(g, dtype, rows, width), _normal(g, dtype, rows, width))
        return *base.make(g, dtype), *modulation, 1e-6

    return Case(
        op="cache_lookup_norm",
        name=base.name,
        make=make,
        flops=base.flops + 8 * size,
        values=base.values,
        bench=bench,
    )


def _store(
    rows: int,
    orders: int,
    tokens: int,
    width: int,
    bench: bool = False,
    label: str = "",
    has_history: bool = False,
) -> Case:
    size = rows * tokens * width

    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        slots = _normal(g, dtype, rows + 2, orders, tokens, width)
        out, embedded = (_normal(g, dtype, rows, tokens, width) for _ in range(2))
        gap = torch.rand(rows, generator=g) * 0.1 + 0.01
        if not has_history:
            gap[::3] = 0
        return slots, out, embedded, permuted_rows(g, rows + 2, rows), gap

    return Case(
        op="cache_store",
        name=f"{label}R{rows} O{orders} I{tokens} D{width}",
        make=make,
        flops=(6 + 2 * orders) * size,
        values=(2 + 2 * orders) * size,
        writes=(0,),
        bench=bench,
    )


def _modulate(
    rows: int,
    tokens: int,
    width: int,
    affine: bool,
    rms: bool,
    bench: bool = False,
    label: str = "",
) -> Case:
    size = rows * tokens * width

    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = _normal(g, dtype, rows, tokens, width)
        scale, shift = (_normal(g, dtype, rows, width) for _ in range(2))
        weight, bias = (_normal(g, dtype, width) if affine else None for _ in range(2))
        return x, scale, shift, weight, bias, 1e-6, rms

    return Case(
        op="norm_modulate",
        name=f"{label}R{rows} I{tokens} D{width}{' affine' * affine}{' rms' * rms}",
        make=make,
        flops=8 * size,
        values=2 * size,
        bench=bench,
    )


def _gate(rows: int, tokens: int, width: int, bench: bool = False, label: str = "") -> Case:
    size = rows * tokens * width
    return Case(
        op="gate_residual",
        name=f"{label}R{rows} I{tokens} D{width}",
        make=lambda g, dtype: (
            _normal(g, dtype, rows, tokens, width),
            _normal(g, dtype, rows, width),
            _normal(g, dtype, rows, tokens, width),
        ),
        flops=2 * size,
        values=3 * size,
        bench=bench,
    )


def _block_lists(
    geometry: Heads, keep: tuple[int, ...], bench: bool = False, label: str = ""
) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, _ = packed_heads(g, dtype, geometry)
        # Small integers: sums are exact in any order, so that the choice does not depend on rounding.
        q, k = (t.float().mul(2).round().clamp(-4, 4).to(dtype) for t in (q, k))
        rows = torch.tensor([keep[i % len(keep)] for i in range(geometry.rows)], dtype=torch.int32)
        text = (geometry.image, geometry.text)
        return q, k, rows, *text, geometry.block, geometry.block, geometry.head_dim**-0.5

    size = geometry.rows * geometry.heads * geometry.tokens * geometry.head_dim
    scores = geometry.rows * geometry.heads * geometry.blocks**2 * geometry.head_dim
    return Case(
        op="build_block_lists",
        name=f"{label}{geometry} keep {keep}",
        make=make,
        flops=2 * size + 2 * scores,
        values=2 * size,
        bench=bench,
    )


def _attention_case(name: str, geometry: Heads, density: float, make: Make, bench: bool) -> Case:
    size = geometry.rows * geometry.heads * geometry.tokens * geometry.head_dim
    return Case(
        op="block_sparse_attention",
        name=name,
        make=make,
        flops=int(4 * size * geometry.tokens * density),
        values=4 * size,
        bench=bench,
    )


def _attention(
    geometry: Heads, density: float, *, ragged: bool = False, gain: float = 1.0, bench: bool = False
) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v = packed_heads(g, dtype, geometry)
        mode = (torch.arange(geometry.rows * geometry.heads) % 3 != 2).to(torch.uint8)
        if bench:
            mode.fill_(1)
        mode = mode.view(geometry.rows, geometry.heads)
        kv_len = None
        if ragged:
            kv_len = torch.randint(0, geometry.tokens + 1, (geometry.rows,), generator=g)
            kv_len = kv_len.to(torch.int32)
        lists = random_lists(g, geometry, density)
        scale = gain * geometry.head_dim**-0.5
        return q, k, v, mode, *lists, kv_len, geometry.block, geometry.block, scale, True

    name = f"{geometry} density {density}{' ragged' * ragged}{f' gain {gain}' * (gain != 1)}"
    return _attention_case(name, geometry, density, make, bench)


def real_attention(label: str, geometry: Heads, density: float) -> Case:
    """Attention of a real model over lists such as `build_block_lists` makes, at a density of computed pairs."""

    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v = packed_heads(g, dtype, geometry)
        mode = torch.full((geometry.rows, geometry.heads), int(density < 1), dtype=torch.uint8)
        lists = text_lists(g, geometry, density)
        scale = geometry.head_dim**-0.5
        return q, k, v, mode, *lists, None, geometry.block, geometry.block, scale, False

    name = f"{label}{geometry} density {density}"
    return _attention_case(name, geometry, density, make, bench=True)


def real_lists(label: str, geometry: Heads) -> Case:
    """Lists of a real model that keep a quarter of the image's blocks."""
    keep = -(-geometry.image // (4 * geometry.block))
    return _block_lists(geometry, (keep,), bench=True, label=label)


def _attention_in_place(geometry: Heads, density: float) -> Case:
    base = _attention(geometry, density)

    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v, mode, *rest, _ = base.make(g, dtype)
        mode[0, 0] = 2
        out = torch.full_like(q.contiguous(), 7.0)
        lse = torch.full(q.shape[:3], 7.0)
        return out, lse, q, k, v, mode, *rest

    return Case(
        op="block_sparse_attention_",
        name=base.name,
        make=make,
        flops=base.flops,
        values=base.values,
        writes=(0, 1),
    )


def _geometries(tokens: tuple[int, ...], block: int) -> Iterator[Heads]:
    for n in tokens:
        text = n // 5
        yield Heads(rows=2, heads=3, image=n - text, text=text, head_dim=64, block=block)


TINY = Heads(rows=16, heads=2, image=256, text=64, head_dim=64, block=32)
SMALL = Heads(rows=2, heads=2, image=100, text=37, head_dim=40, block=32)

CASES: tuple[Case, ...] = (
    _gather((16, 256, 128), 16, bench=True),
    _gather((9, 513, 512), 8),
    _gather((5, 3, 7), 2),
    _gather((4, 1), 1),
    _gather((6, 4, 4), 0),
    _scatter((16, 256, 128), 16, bench=True),
    _scatter((9, 513, 512), 8),
    _scatter((5, 4, 3, 3), 3),
    _scatter((7, 1), 7),
    _scatter((6, 4, 4), 0),
    *(
        make(rows, orders, tokens, width, bench)
        for make in (_lookup, _lookup_norm, _store)
        for rows, orders, tokens, width, bench in (
            (16, 1, 256, 128, True),
            (3, 3, 65, 40, False),
            (1, 2, 1, 1, False),
            (2, 1, 129, 203, False),
            (3, 2, 260, 640, False),
            (0, 1, 8, 8, False),
        )
    ),
    _modulate(16, 256, 128, affine=False, rms=False, bench=True),
    _modulate(3, 63, 203, affine=True, rms=False),
    _modulate(2, 1, 17, affine=True, rms=True),
    _modulate(2, 65, 64, affine=False, rms=True),
    _modulate(3, 260, 1030, affine=True, rms=False),
    _gate(16, 256, 128, bench=True),
    _gate(3, 63, 203),
    _gate(3, 260, 640),
    _block_lists(TINY, (4,), bench=True),
    _block_lists(SMALL, (2, 0)),
    _block_lists(SMALL, (1, 99)),
    *(_block_lists(geometry, (3, 1)) for geometry in _geometries((1, 31, 64, 239), 32)),
    _block_lists(Heads(rows=1, heads=2, image=256, text=0, head_dim=64, block=64), (2,)),
    _block_lists(Heads(rows=1, heads=1, image=0, text=40, head_dim=64, block=32), (2,)),
    _attention(TINY, 0.5, bench=True),
    _attention(TINY, 0.25, bench=True),
    _attention(SMALL, 0.3, ragged=True),
    _attention(SMALL, 0.5, gain=30.0),
    *(_attention(geometry, 0.4) for geometry in _geometries((1, 3, 63, 65, 129, 239), 32)),
    *(_attention(geometry, 0.5, ragged=True) for geometry in _geometries((64, 127, 203), 64)),
    _attention(Heads(rows=1, heads=1, image=300, text=20, head_dim=128, block=128), 0.5),
    _attention(
        Heads(rows=1, heads=2, image=190, text=20, head_dim=64, block=128), 0.5, ragged=True
    ),
    _attention(
        Heads(rows=1, heads=2, image=190, text=20, head_dim=128, block=64), 0.5, ragged=True
    ),
    _attention_in_place(SMALL, 0.5),
    _attention_in_place(Heads(rows=3, heads=1, image=64, text=1, head_dim=64, block=64), 0.9),
)

FLUX = Heads(rows=1, heads=4, image=4096, text=512, head_dim=128, block=128)
SD3 = Heads(rows=1, heads=8, image=4096, text=333, head_dim=64, block=128)
# The tiny world and its neighbours: batches of 8, blocks of 32.
SHORT = tuple(
    Heads(rows=8, heads=2, image=tokens - text, text=text, head_dim=64, block=32)
    for tokens, text in ((288, 32), (512, 64), (1100, 76))
)


def _real_cases() -> Iterator[Case]:
    """At the sizes of FLUX and SD3, for benches."""
    for label, geometry in (("flux ", FLUX), ("sd3 ", SD3)):
        for block in (64, 128):
            sized = replace(geometry, block=block)
            for density in (1.0, 0.5, 0.25):
                yield real_attention(label, sized, density)
            yield real_lists(label, sized)
    for geometry in SHORT:
        for density in (1.0, 0.5, 0.25):
            yield real_attention("short ", geometry, density)
    for label, width in (("flux ", 3072), ("sd3 ", 1536)):
        tokens = 4096
        yield _gather((4, tokens, width), 2, bench=True, label=label)
        yield _scatter((4, tokens, width), 2, bench=True, label=label)
        for orders in (1, 3):
            yield _lookup(1, orders, tokens, width, bench=True, label=label)
            yield _lookup_norm(1, orders, tokens, width, bench=True, label=label)
            yield _store(1, orders, tokens, width, bench=True, label=label, has_history=True)
        yield _modulate(1, tokens, width, affine=False, rms=False, bench=True, label=label)
        yield _gate(1, tokens, width, bench=True, label=label)


REAL_CASES: tuple[Case, ...] = tuple(_real_cases())


def _crowded_cases() -> Iterator[Case]:
    for head_dim, block, heads in ((64, 64, 64), (64, 128, 48), (128, 64, 48), (128, 128, 48)):
        image = 70 if block == 64 else 150
        geometry = Heads(rows=8, heads=heads, image=image, text=20, head_dim=head_dim, block=block)
        yield _attention(geometry, 0.7)
    for blocks in (70, 600):
        geometry = Heads(rows=1, heads=2, image=32 * blocks, text=40, head_dim=16, block=32)
        yield _block_lists(geometry, (37,))
    yield _modulate(2, 3, 8200, affine=True, rms=False)
    yield _modulate(2, 3, 20003, affine=True, rms=False)
    yield _lookup_norm(2, 2, 3, 16400)


CROWDED_CASES: tuple[Case, ...] = tuple(_crowded_cases())
"""Small work in many pieces: more tiles than a GPU holds at once, more blocks than a warp has lanes, wide rows."""


def cases_of(*ops: str) -> list[Case]:
    """The cases of some ops."""
    return [case for case in CASES if case.op in ops]
