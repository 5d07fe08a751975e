# SPDX-License-Identifier: Apache-2.0
"""The flex backend on the CPU: lists as FlexAttention's blocks, what is refused and counted; compiled, where slow."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from sparse_pipeline import sample
from torch._subclasses.fake_tensor import FakeTensorMode

from rapid3rt import ops
from rapid3rt.errors import UnsupportedError
from rapid3rt.ops import flex, reference
from rapid3rt.testing.attention import Heads, packed_heads, random_lists
from rapid3rt.testing.cases import Case, cases_of
from rapid3rt.testing.numerics import assert_same_bits, poison_

Arguments = tuple[Any, ...]
LISTED = cases_of("block_sparse_attention")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or flex.missing_reason("cpu", None) is not None,
    reason="compiling FlexAttention for the CPU takes g++ and a recent torch",
)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> flex.CompiledShapes:
    """Nothing compiled yet."""
    fresh = flex.CompiledShapes()
    monkeypatch.setattr(flex, "shapes", fresh)
    return fresh


# Lists as blocks ---------------------------------------------------------------------------------------------------


def split(arguments: Arguments) -> flex.Blocks:
    q, k, _, mode, count, index, _, kv_len, block_q, block_kv = arguments[:10]
    num_q = -(-q.shape[2] // block_q)
    return flex.split_blocks(mode, count, index, kv_len, num_q, k.shape[2], block_kv)


def seen_keys(arguments: Arguments, blocks: flex.Blocks) -> torch.Tensor:
    """What FlexAttention shows of each key: all of a full block, of a partial one what the mask leaves."""
    q, k = arguments[:2]
    kv_len, block_q, block_kv = arguments[7:10]
    num_rows, num_heads, num_q, num_kv = blocks.full_index.shape
    seen = torch.zeros(num_rows, num_heads, num_q, num_kv * block_kv, dtype=torch.bool)
    ends = [k.shape[2]] * num_rows if kv_len is None else kv_len.tolist()
    for row, head, m in torch.cartesian_prod(*map(torch.arange, (num_rows, num_heads, num_q))):
        at = (row, head, m)
        for b in blocks.full_index[at][: blocks.full_count[at]]:
            seen[at][b * block_kv : (b + 1) * block_kv] = True
        for b in blocks.partial_index[at][: blocks.partial_count[at]]:
            seen[at][b * block_kv : min((b + 1) * block_kv, ends[row])] = True
    return seen[..., : k.shape[2]].repeat_interleave(block_q, 2)[:, :, : q.shape[2]]


def allowed_keys(arguments: Arguments) -> torch.Tensor:
    """What the definition shows; nothing where a head is skipped."""
    q, k, _, mode, count, index, _, kv_len, block_q, block_kv = arguments[:10]
    rows = []
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            listed = None if count is None else (count[row, head], index[row, head])
            length = None if kv_len is None else kv_len[row]
            rows.append(
                reference._allowed_keys(
                    mode[row, head], listed, length, (q.shape[2], k.shape[2]), (block_q, block_kv)
                )
                & (mode[row, head] != reference.SKIP)
            )
    return torch.stack(rows).view(*mode.shape, q.shape[2], k.shape[2])


def check_blocks(arguments: Arguments) -> flex.Blocks:
    blocks = split(arguments)
    assert torch.equal(seen_keys(arguments, blocks), allowed_keys(arguments))
    num_kv = -(-arguments[1].shape[2] // arguments[9])
    for part in blocks:
        assert part.is_contiguous()
        assert part.dtype is torch.int32
        assert part.shape == blocks.full_index.shape[: part.dim()]
    for index in (blocks.full_index, blocks.partial_index):
        assert index.shape[-1] == num_kv
        assert bool(((index >= 0) & (index < num_kv)).all()), "an index beyond count too"
    return blocks


@pytest.mark.parametrize("case", LISTED, ids=str)
def test_blocks_show_what_the_definition_shows(case: Case) -> None:
    arguments = case.arguments(torch.float32)
    blocks = check_blocks(arguments)
    if arguments[7] is None:
        assert not blocks.partial_count.any(), "no mask is evaluated without kv_len"


@pytest.mark.parametrize("case", cases_of("block_sparse_attention_"), ids=str)
def test_skipped_heads_have_no_blocks(case: Case) -> None:
    arguments = case.arguments(torch.float32)[2:]
    blocks = check_blocks(arguments)
    assert (arguments[3] == 2).any()
    assert not blocks.full_count[arguments[3] == 2].any()


def listed(geometry: Heads, density: float = 0.5, seed: int = 0) -> list[Any]:
    """A call without log-sum-exp, every head a list."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = packed_heads(g, torch.float32, geometry)
    mode = torch.ones(geometry.rows, geometry.heads, dtype=torch.uint8)
    lists = random_lists(g, geometry, density)
    return [q, k, v, mode, *lists, None, geometry.block, geometry.block, 0.2, False]


ODD = Heads(rows=2, heads=2, image=100, text=37, head_dim=16, block=32)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 128, 129, 136, 137])
def test_a_ragged_length_cuts_at_most_one_block_of_a_list(length: int) -> None:
    arguments = listed(ODD, 0.6)
    arguments[3][0, 0] = 0
    arguments[7] = torch.tensor([length, 137 - length], dtype=torch.int32)
    blocks = check_blocks(tuple(arguments))
    assert int(blocks.partial_count.max()) <= 1
    assert bool(blocks.partial_count[0, 0].any()) is bool(length % 32), "the dense head"


def test_a_length_of_whole_blocks_needs_no_mask() -> None:
    arguments = listed(Heads(rows=2, heads=1, image=128, text=0, head_dim=16, block=32))
    arguments[7] = torch.tensor([128, 64], dtype=torch.int32)
    assert not check_blocks(tuple(arguments)).partial_count.any()


def test_dense_heads_need_no_lists() -> None:
    arguments = listed(ODD)
    arguments[3].zero_()
    arguments[4:7] = [None] * 3
    blocks = check_blocks(tuple(arguments))
    assert blocks.full_count.unique().tolist() == [5]


def test_lists_may_be_shorter_than_the_keys_and_shared_by_all_heads() -> None:
    arguments = listed(ODD)
    index = torch.tensor([[1, 4], [0, 2**31 - 1], [3, 9], [2**31 - 1, 0], [0, 1]])
    count = torch.tensor([2, 1, 1, 0, 2])
    arguments[4] = count.int().expand(2, 2, 5)
    arguments[5] = index.int().expand(2, 2, 5, 2)
    assert arguments[5].stride()[:2] == (0, 0)
    blocks = check_blocks(tuple(arguments))
    assert blocks.full_count[1, 1].tolist() == count.tolist()
    arguments[4], arguments[5] = arguments[4] * 0, arguments[5][..., :0]
    assert not check_blocks(tuple(arguments)).full_count.any()


def test_tails_of_both_sides_may_differ() -> None:
    arguments = listed(ODD)
    arguments[0] = arguments[0][:, :, :70]
    arguments[4], arguments[5] = arguments[4][:, :, :3], arguments[5][:, :, :3]
    check_blocks(tuple(arguments))


# What it is told, what it refuses ----------------------------------------------------------------------------------

GPUS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize("capability", GPUS, ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_divide_the_block_and_fit_the_gpu(
    capability: tuple[int, int], block: int, head_dim: int, itemsize: int
) -> None:
    options = flex.kernel_options("cuda", capability, head_dim, itemsize, block)
    assert options["FORCE_USE_FLEX_ATTENTION"] is True
    datacenter = capability in ((8, 0), (9, 0), (10, 0))
    assert ("BLOCK_M" not in options) is (datacenter and block == 128), "FlexAttention's own"
    if "BLOCK_M" in options:
        rows, keys, stages = (int(options[n]) for n in ("BLOCK_M", "BLOCK_N", "num_stages"))
        assert block % rows == 0 == block % keys
        width = itemsize * 2 ** (head_dim - 1).bit_length()
        # q once, k and v once per stage; 99 KiB is what consumer GPUs have.
        assert (rows + 2 * stages * keys) * width <= (
            160 if datacenter else 99
        ) * 1024 + datacenter * 2**16


def test_flux_on_a_consumer_gpu_takes_two_stages() -> None:
    options = flex.kernel_options("cuda", (8, 9), 128, 2, 128)
    assert (options["BLOCK_M"], options["BLOCK_N"], options["num_stages"]) == (128, 64, 2)


def test_the_kernel_for_single_queries_is_out_of_reach_on_the_cpu() -> None:
    assert flex.kernel_options("cpu", None, 64, 4, 32) == {"PARTITION_SIZE": 1}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (("cpu", 64, 32, True), "gives no log-sum-exp on the CPU"),
        (("cuda", 8, 128, False), "head dim of at least 16 on CUDA, got 8"),
        (("cuda", 64, 32, False), "blocks of 64 or 128 tokens on CUDA, got 32"),
    ],
)
def test_what_it_cannot_do_is_said(call: tuple[Any, ...], reason: str) -> None:
    assert reason in str(flex.refusal(*call))


def test_blocks_of_64_need_a_newer_torch_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_SMALL_BLOCK_TORCH", "99")
    assert "blocks of 64 tokens from torch 99 on" in str(flex.refusal("cuda", 64, 64, True))
    assert flex.refusal("cuda", 64, 128, True) is None


def test_devices_that_it_does_not_serve_are_told() -> None:
    assert "not on 'mps'" in str(flex.missing_reason("mps", None))
    assert "no CUDA GPU" in str(flex.missing_reason("cuda", None))


@pytest.fixture
def old_torch_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_CPU_TORCH", "2.6")


@pytest.mark.usefixtures("old_torch_is_fine")
def test_a_log_sum_exp_is_refused_on_the_cpu_before_anything_is_compiled(
    shapes: flex.CompiledShapes,
) -> None:
    arguments = listed(ODD)
    arguments[-1] = True
    with pytest.raises(UnsupportedError, match="no log-sum-exp"):
        ops.block_sparse_attention(*arguments, backend="flex")
    out, lse = torch.zeros(2, 2, 137, 16), torch.zeros(2, 2, 137)
    with pytest.raises(UnsupportedError, match="no log-sum-exp"):
        ops.block_sparse_attention_(out, lse, *arguments[:-1], backend="flex")
    assert not shapes.functions


@pytest.mark.usefixtures("old_torch_is_fine")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (3, torch.full((2, 2), 2, dtype=torch.uint8), "use block_sparse_attention_"),
        (3, torch.full((2, 2), 3, dtype=torch.uint8), "mode must be"),
        (4, torch.full((2, 2, 5), 6, dtype=torch.int32), "count must be in"),
        (5, torch.full((2, 2, 5, 5), 5, dtype=torch.int32), "index must be ascending"),
        (6, torch.zeros(20, dtype=torch.int32), "order must be unique"),
        (7, torch.tensor([138, 0], dtype=torch.int32), "kv_len must be in"),
    ],
)
def test_wrong_lists_are_refused_on_the_cpu(
    position: int, value: torch.Tensor, message: str
) -> None:
    arguments = listed(ODD, 1.0)
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.block_sparse_attention(*arguments, backend="flex")


@pytest.mark.usefixtures("old_torch_is_fine")
def test_an_output_within_the_inputs_is_refused() -> None:
    arguments = listed(ODD)
    with pytest.raises(ValueError, match="out must share no memory with q"):
        ops.block_sparse_attention_(arguments[0], None, *arguments[:-1], backend="flex")


@pytest.mark.usefixtures("old_torch_is_fine")
@pytest.mark.parametrize(("rows", "tokens"), [(0, 137), (2, 0)])
def test_a_call_without_queries_or_keys_compiles_nothing(
    rows: int, tokens: int, shapes: flex.CompiledShapes
) -> None:
    q = torch.randn(rows, 2, 137, 16)
    k = torch.randn(rows, 2, tokens, 16)
    mode = torch.zeros(rows, 2, dtype=torch.uint8)
    call = (q, k, k, mode, None, None, None, None, 32, 32, 1.0)
    out, lse = ops.block_sparse_attention(*call, backend="flex")
    assert out.shape == q.shape
    assert not out.any()
    assert lse.shape == (0,)
    assert not shapes.functions


# Never eagerly -----------------------------------------------------------------------------------------------------


def dense(rows: int = 1, tokens: int = 40, kv_len: torch.Tensor | None = None) -> Arguments:
    """A dense call: there, masks alone say what is seen, so that a compiler that runs eagerly gives the result."""
    q, k, v = torch.randn(3, rows, 2, tokens, 16, generator=torch.Generator().manual_seed(0))
    mode = torch.zeros(rows, 2, dtype=torch.uint8)
    return q, k, v, mode, None, None, None, kv_len, 32, 32, 0.25


@pytest.fixture
def eager_compiler(shapes: flex.CompiledShapes, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Dynamo as always, and behind it a compiler that takes no time."""

    def run_graph(self: flex.CompiledShapes, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.compiles += 1
        return graph.forward

    monkeypatch.setattr(flex.CompiledShapes, "_inductor", run_graph)
    monkeypatch.setattr(flex, "_CPU_TORCH", "2.6")
    torch.compiler.reset()
    return shapes


def check_dense(arguments: Arguments) -> None:
    got, lse = ops.block_sparse_attention(*arguments, backend="flex")
    want, _ = reference.block_sparse_attention(*arguments)
    torch.testing.assert_close(got, want)
    assert got.transpose(1, 2).is_contiguous()
    assert lse.shape == (0,)


@pytest.mark.slow
def test_every_shape_is_compiled_once_however_many_there_are(
    eager_compiler: flex.CompiledShapes,
) -> None:
    for _ in range(2):
        for tokens in range(33, 45):  # more than Dynamo's limit of 8
            check_dense(dense(tokens=tokens))
    assert len(eager_compiler.functions) == eager_compiler.compiles == 12
    assert eager_compiler.recompiles == 0


def test_other_lists_and_lengths_do_not_compile_anew(eager_compiler: flex.CompiledShapes) -> None:
    for length in (0, 1, 40, 17):
        check_dense(dense(rows=2, kv_len=torch.tensor([length, 40 - length], dtype=torch.int32)))
    arguments = listed(ODD)
    for seed in range(3):
        ops.block_sparse_attention(*listed(ODD, 0.3, seed), backend="flex")
    arguments[3] = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8)
    ops.block_sparse_attention(*arguments, backend="flex")
    assert eager_compiler.compiles == 2


def test_what_torch_is_set_to_does_not_matter(eager_compiler: flex.CompiledShapes) -> None:
    check_dense(dense())
    with torch.no_grad():
        check_dense(dense())
    arguments = dense()
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = ops.block_sparse_attention(*arguments, backend="flex")
    assert got.dtype is torch.float32
    assert eager_compiler.compiles == 1


def test_recompiles_are_counted_and_the_limit_is_an_error(
    eager_compiler: flex.CompiledShapes,
) -> None:
    check_dense(dense())
    with torch.inference_mode():
        arguments = dense()
        check_dense(arguments)  # tensors of another kind, the shape is the same
    assert eager_compiler.recompiles == 1
    assert len(eager_compiler.functions) == 1


def test_a_limit_of_dynamo_is_a_loud_error(eager_compiler: flex.CompiledShapes) -> None:
    if not hasattr(torch._dynamo.config, "recompile_limit"):
        pytest.skip("the limit has another name in this torch")
    with torch._dynamo.config.patch(recompile_limit=1):
        check_dense(dense())
        with torch.inference_mode():
            arguments = dense()
            with pytest.raises(
                UnsupportedError, match=r"cannot be compiled for this call.*[Ll]imit"
            ):
                ops.block_sparse_attention(*arguments, backend="flex")
    assert eager_compiler.compiles == 1


@pytest.mark.usefixtures("eager_compiler")
def test_a_log_sum_exp_is_the_natural_one_and_empty_rows_have_none() -> None:
    """As GPUs give it: the CPU's code generator alone cannot."""
    kv_len = torch.tensor([0, 17], dtype=torch.int32)
    for arguments in (dense(), dense(rows=2, kv_len=kv_len)):
        for got, want in zip(
            flex.block_sparse_attention(*arguments, True),
            reference.block_sparse_attention(*arguments, True),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
            assert got.dtype is torch.float32
    mode = torch.tensor([[2, 0], [0, 2]], dtype=torch.uint8)
    out, lse = torch.full((2, 2, 40, 16), 7.0), torch.full((2, 2, 40), 7.0)
    expected = out.clone(), lse.clone()
    call = (*arguments[:3], mode, *arguments[4:])
    flex.block_sparse_attention_(out, lse, *call)
    reference.block_sparse_attention_(*expected, *call)
    for got, want in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(got, want)
        assert_same_bits("skipped heads", got[mode == 2], want[mode == 2])


@pytest.mark.usefixtures("eager_compiler")
def test_it_never_runs_without_being_compiled() -> None:
    eagerly, told = torch.compiler.set_stance("force_eager"), "FlexAttention must be compiled"
    with eagerly, pytest.raises(UnsupportedError, match=told):
        ops.block_sparse_attention(*dense(), backend="flex")


@pytest.mark.usefixtures("eager_compiler")
def test_a_compiler_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(flex.CompiledShapes, "_inductor", fail)
    with pytest.raises(UnsupportedError) as caught:
        ops.block_sparse_attention(*dense(), backend="flex")
    message = str(caught.value)
    assert "use backend='reference'" in message
    assert "no g++ here" in message
    assert "\n" not in message


# Compiled ----------------------------------------------------------------------------------------------------------


def without_lse(case: Case, dtype: torch.dtype) -> Arguments:
    return (*case.arguments(dtype)[:11], False)


def check_compiled(arguments: Arguments, *, dtype: torch.dtype = torch.float32) -> None:
    got, _ = ops.block_sparse_attention(*arguments, backend="flex")
    want, _ = reference.block_sparse_attention(*arguments)
    close = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    assert got.transpose(1, 2).is_contiguous()
    again, _ = ops.block_sparse_attention(*arguments, backend="flex")
    assert_same_bits("a second run", again, got)


COMPILED = [
    case
    for case in LISTED
    if not case.bench
    and any(part in str(case) for part in ("ragged", "N1+0", "N3+0", "N104+25", "K128"))
]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_attention_has_the_values_of_the_definition(case: Case) -> None:
    check_compiled(without_lse(case, torch.float32))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_attention_takes_half_precision(dtype: torch.dtype) -> None:
    case = next(case for case in LISTED if "K40" in str(case) and "ragged" in str(case))
    check_compiled(without_lse(case, dtype), dtype=dtype)


@needs_compiler
@pytest.mark.slow
def test_lists_change_without_compiling_and_unlisted_keys_are_not_read(
    shapes: flex.CompiledShapes,
) -> None:
    for seed in range(3):
        arguments = listed(ODD, 0.4, seed)
        arguments[3][0, 1] = seed % 2
        check_compiled(tuple(arguments))
    assert shapes.compiles == 1
    arguments = listed(ODD, 1.0)
    arguments[7] = torch.tensor([50, 64], dtype=torch.int32)
    for x in arguments[1:3]:
        poison_(x[0, :, 50:])
        poison_(x[1, :, 64:])
    check_compiled(tuple(arguments))
    assert shapes.compiles == 2


@needs_compiler
@pytest.mark.slow
def test_skipped_heads_keep_their_bytes() -> None:
    case = cases_of("block_sparse_attention_")[0]
    out, _, *arguments = case.arguments(torch.float32)
    poison_(out)
    mode = arguments[3]
    result, expected = out.clone(), torch.zeros_like(out)
    ops.block_sparse_attention_(result, None, *arguments, backend="flex")
    reference.block_sparse_attention_(expected, None, *arguments)
    assert_same_bits("skipped heads", result[mode == 2], out[mode == 2])
    torch.testing.assert_close(result[mode != 2], expected[mode != 2], rtol=2e-5, atol=2e-5)


@needs_compiler
@pytest.mark.slow
def test_an_outer_graph_of_any_compiler_sees_the_lists() -> None:
    def twice(*arguments: Any) -> torch.Tensor:
        return 2 * ops.block_sparse_attention(*arguments, backend="flex")[0]

    arguments = tuple(listed(ODD, 0.4))
    with torch.no_grad():
        got = torch.compile(twice, backend="aot_eager", fullgraph=True)(*arguments)
    want = 2 * reference.block_sparse_attention(*arguments)[0]
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@needs_compiler
@pytest.mark.slow
def test_a_default_device_does_not_matter() -> None:
    arguments = tuple(listed(ODD, 0.4))
    with torch.device("meta"):
        got, _ = ops.block_sparse_attention(*arguments, backend="flex")
    want, _ = reference.block_sparse_attention(*arguments)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


# opcheck's modes reach into FlexAttention, which knows none of them.
@pytest.mark.usefixtures("eager_compiler")
@pytest.mark.parametrize("packed", [True, False])
def test_the_fake_tells_the_truth(packed: bool) -> None:
    arguments = dense(rows=2)
    if packed:
        q, k, v = torch.randn(2, 40, 3, 2, 16).permute(2, 0, 3, 1, 4)
        arguments = (q, k, v, *arguments[3:])
    real = flex.block_sparse_attention(*arguments)
    with FakeTensorMode() as mode:
        told = flex.block_sparse_attention(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
        )
    for a, b in zip(real, told, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


# A pipeline --------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_pipeline_gives_the_images_of_the_reference(
    kind: str, attention: str, shapes: flex.CompiledShapes
) -> None:
    got = sample(kind, attention, "flex", "cpu")
    assert shapes.functions, "the sparse rows went through FlexAttention"
    assert shapes.recompiles == 0
    torch.testing.assert_close(
        got, sample(kind, attention, "reference", "cpu"), rtol=1e-3, atol=1e-3
    )
