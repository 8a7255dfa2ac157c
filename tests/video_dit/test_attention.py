"""Packed attention against a dense mask; the arguments that the CUDA kernels get; every backend where there is CUDA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from video_dit import attention
from video_dit.attention import Run, Segments, attend, attention_backend

HEADS, WIDTH = 2, 8
LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=7)
MIXED = Segments.of([3, 3, 0, 5, 0, 2], [4, 4, 6, 1, 2, 7])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def random_qkv(segments, heads=HEADS, width=WIDTH, dtype=torch.float64, device="cpu"):
    """q, k, v as the layers make them: v a strided part of a wider tensor."""
    torch.manual_seed(0)
    n, m = sum(segments.q_lengths), sum(segments.k_lengths)
    q = torch.randn(n, heads, width, dtype=dtype, device=device)
    k, v = torch.randn(m, 2, heads, width, dtype=dtype, device=device).unbind(1)
    return [x.detach().requires_grad_() for x in (q, k, v)]


def mask_of(segments):
    """n m, true where a query sees a key."""
    blocks = [torch.ones(q, k, dtype=torch.bool) for q, k in zip(segments.q_lengths, segments.k_lengths, strict=True)]
    return torch.block_diag(*blocks).bool()


def dense(q, k, v, segments):
    """The definition: softmax over the keys of the own segment."""
    scores = torch.einsum("n h e, m h e -> h n m", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask_of(segments).to(q.device), -torch.inf).softmax(-1)
    return torch.einsum("h n m, m h e -> n h e", weights, v)


def with_gradients(function, q, k, v, segments):
    """Output and the gradients of a fixed functional of it."""
    output = function(q, k, v, segments)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), (q, k, v))]


def assert_equals_dense(function, segments, tolerance=1e-12):
    qkv = random_qkv(segments)
    for ours, expected in zip(
        with_gradients(function, *qkv, segments), with_gradients(dense, *qkv, segments), strict=True
    ):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# --- segments and the CPU path --------------------------------------------------------------------------------------


def test_equal_neighbours_are_one_run():
    assert MIXED.runs == (Run(2, 3, 4), Run(1, 0, 6), Run(1, 5, 1), Run(1, 0, 2), Run(1, 2, 7))
    assert (MIXED.q_lengths, MIXED.k_lengths) == ([3, 3, 0, 5, 0, 2], [4, 4, 6, 1, 2, 7])


@given(LENGTHS)
@settings(max_examples=60, deadline=None)
def test_equals_a_dense_block_diagonal_mask(lengths):
    assert_equals_dense(attend, Segments.of(*zip(*lengths, strict=True)))


def test_a_pack_without_queries_still_has_gradients():
    segments = Segments.of([0, 0], [3, 2])
    q, k, v = random_qkv(segments)
    output = attend(q, k, v, segments)
    assert output.shape == (0, HEADS, WIDTH)
    for x, gradient in zip((q, k, v), torch.autograd.grad(output.sum(), (q, k, v)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@torch.no_grad()
def test_samples_do_not_see_each_other():
    q, k, v = random_qkv(MIXED, dtype=torch.float32)
    before = attend(q, k, v, MIXED)
    for x, start, stop in ((q, 6, 11), (k, 14, 15), (v, 14, 15)):  # the segment of five queries and one key
        x[start:stop] = x[start:stop] * 3 + 1
    after = attend(q, k, v, MIXED)
    assert not torch.equal(before[6:11], after[6:11])
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[11:], after[11:])


def test_compiles_into_one_graph():
    assert_equals_dense(torch.compile(attend, backend="aot_eager", fullgraph=True), MIXED)


# --- what the CUDA kernels get, without CUDA ------------------------------------------------------------------------


@pytest.fixture
def any_tensor_fits(monkeypatch):
    monkeypatch.setattr(attention, "_flash_misfit", lambda q: None)
    monkeypatch.setattr(attention, "_xformers_misfit", lambda q: None)


def test_offsets_are_starts_and_ends_and_made_once():
    cpu = torch.device("cpu")
    segments = Segments.of([3, 3, 5], [4, 4, 1])
    with torch.inference_mode():
        q_offsets, k_offsets = attention._offsets(segments, cpu)
    assert q_offsets.tolist() == [0, 3, 6, 11]
    assert k_offsets.tolist() == [0, 4, 8, 9]
    assert {q_offsets.dtype, k_offsets.dtype} == {torch.int32}
    assert not q_offsets.is_inference()  # a backward pass could not save it
    assert attention._offsets(Segments.of([3, 3, 5], [4, 4, 1]), cpu)[0] is q_offsets


def varlen_by_loop(q, k, v, q_offsets, k_offsets, longest_q, longest_k):
    """What varlen_attn computes, from its arguments."""
    q_parts, k_parts, v_parts = (
        x.split(offsets.diff().tolist()) for x, offsets in ((q, q_offsets), (k, k_offsets), (v, k_offsets))
    )
    assert longest_q == max(len(part) for part in q_parts)
    assert longest_k == max(len(part) for part in k_parts)
    assert all(len(part) for part in q_parts)
    return torch.cat(
        [dense(a, b, c, Segments.of([len(a)], [len(b)])) for a, b, c in zip(q_parts, k_parts, v_parts, strict=True)]
    )


@given(LENGTHS.filter(lambda lengths: any(q for q, _ in lengths)))
@settings(max_examples=30, deadline=None)
def test_varlen_gets_the_right_cuts(lengths):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_flash_misfit", lambda q: None)
        patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_loop)
        assert_equals_dense(attention_backend("varlen"), Segments.of(*zip(*lengths, strict=True)))


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, classes, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("varlen", {"torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default"}),
        (
            "sdpa",
            {
                "aten._scaled_dot_product_flash_attention.default",
                "aten._scaled_dot_product_flash_attention_backward.default",
            },
        ),
    ],
)
def test_torch_takes_the_arguments(any_tensor_fits, name, expected):
    """Through the real operators, forward and backward, on tensors without data."""
    qkv = random_qkv(MIXED, dtype=torch.bfloat16, device="meta")
    with Operators() as operators:
        outputs = with_gradients(attention_backend(name), *qkv, MIXED)
    assert expected <= operators.names
    assert [x.shape for x in outputs] == [x.shape for x in (qkv[0], *qkv)]


@pytest.mark.parametrize("name", ["FA3", "FA4"])
def test_another_implementation_is_switched_on_once(monkeypatch, any_tensor_fits, name):
    active = []
    monkeypatch.setattr(attention, "_not_installed", lambda name: None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_loop)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active[-1] if active else None)
    for _ in range(2):
        assert_equals_dense(attention_backend(name.lower()), MIXED)
    assert active == [name]
    assert name in torch.nn.attention.list_flash_attention_impls()


def test_xformers_gets_the_right_mask(monkeypatch, any_tensor_fits):
    ops = pytest.importorskip("xformers.ops")

    def by_mask(q, k, v, attn_bias):
        bias = attn_bias.materialize((q.shape[1], k.shape[1]), dtype=q.dtype)
        scores = torch.einsum("b n h e, b m h e -> b h n m", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("b h n m, b m h e -> b n h e", (scores + bias).softmax(-1), v)

    monkeypatch.setattr(ops, "memory_efficient_attention", by_mask)
    assert_equals_dense(attention_backend("xformers"), MIXED)
    mask = attention._block_diagonal_mask(Segments.of([3, 3, 5], [4, 4, 1]), torch.device("cpu"))
    assert torch.equal(mask.materialize((11, 9)) == 0, mask_of(Segments.of([3, 3, 5], [4, 4, 1])))
    assert (mask.q_seqinfo.max_seqlen, mask.k_seqinfo.max_seqlen) == (5, 4)


# --- on CUDA --------------------------------------------------------------------------------------------------------


@pytest.fixture
def torchs_own_flash():
    """Afterwards, FlashAttention is torch's own again."""
    yield
    if torch.nn.attention.current_flash_attention_impl():
        torch.nn.attention.restore_flash_attention_impl()


@needs_cuda
@pytest.mark.usefixtures("torchs_own_flash")
@pytest.mark.parametrize("name", ["auto", "sdpa", "varlen", "fa3", "fa4", "xformers"])
@pytest.mark.parametrize("lengths", [([300, 300, 0, 517, 64], [300, 300, 40, 517, 64]), ([130, 0, 7], [77, 5, 512])])
def test_backends_agree_on_cuda(name, lengths):
    major, _ = torch.cuda.get_device_capability()
    if (name == "fa3" and major != 9) or (name == "fa4" and major not in (9, 10)):
        pytest.skip(f"{name} has no kernels for {torch.cuda.get_device_name()}")
    try:
        backend = attention_backend(name)
    except ValueError as error:
        pytest.skip(str(error))
    segments = Segments.of(*lengths)
    qkv = random_qkv(segments, heads=3, width=128, dtype=torch.bfloat16, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in qkv]
    for ours, expected in zip(
        with_gradients(backend, *qkv, segments), with_gradients(dense, *exact, segments), strict=True
    ):
        error = (ours.double() - expected).abs().max()
        assert error <= 2e-2 * expected.abs().max()  # bf16 keeps 8 bits


@needs_cuda
def test_sdpa_never_calls_cudnn():
    segments = Segments.of([300, 300, 517], [300, 300, 517])
    qkv = random_qkv(segments, heads=3, width=128, dtype=torch.bfloat16, device="cuda")
    with torch.profiler.profile() as profile:
        with_gradients(attention_backend("sdpa"), *qkv, segments)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention" in names
    assert not any("cudnn" in name for name in names)
