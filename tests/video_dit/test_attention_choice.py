"""Which attention backend is taken, and why one cannot be."""

import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from video_dit import attention
from video_dit.attention import Segments, attend, attention_backend
from video_dit.layers import CrossAttention, SelfAttention
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import pack


def test_misuse_is_named():
    q, segments = torch.zeros(5, 2, 8), Segments.of([2, 3], [2, 3])
    with pytest.raises(ValueError, match="5 queries, 5 keys and 4 values for segments of 5 queries and 5 keys"):
        attend(q, q, q[1:], segments)
    with pytest.raises(ValueError, match="a segment of 2 queries has no keys"):
        Segments.of([1, 2], [1, 0])
    for choose in (attention_backend, lambda name: attend(q, q, q, segments, backend=name)):
        with pytest.raises(ValueError, match="'flash' is unknown: use one of auto, fa3, fa4, sdpa, varlen, xformers"):
            choose("flash")
    for name in ("varlen", "fa3", "fa4", "xformers"):
        with pytest.raises(ValueError, match=f"'{name}' needs CUDA tensors, not cpu; 'auto' takes what fits"):
            attend(q, q, q, segments, backend=name)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(attention._REQUIRED, "varlen", [("no_such_module", "torch>=99")])
    attention._not_installed.cache_clear()
    with pytest.raises(ValueError, match=r"'varlen' needs torch>=99 \(No module named 'no_such_module'\)"):
        attention_backend("varlen")
    attention._not_installed.cache_clear()


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors on a GPU that is not there; set its compute capability and what is not installed."""

    def describe(capability, missing):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "_not_installed", lambda name: "is missing" if name in missing else None)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with FakeTensorMode():
        yield describe


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "missing", "chosen"),
    [
        (BF16, 128, (9, 0), (), "varlen"),
        (FP16, 8, (8, 0), (), "varlen"),
        (BF16, 128, (9, 0), ("varlen",), "xformers"),
        (FP16, 128, (7, 5), (), "xformers"),
        (BF16, 128, (7, 5), (), "sdpa"),
        (BF16, 264, (9, 0), (), "xformers"),
        (FP32, 128, (9, 0), (), "xformers"),
        (FP32, 128, (9, 0), ("xformers",), "sdpa"),
        (BF16, 20, (9, 0), (), "sdpa"),
        (FP64, 128, (9, 0), (), "sdpa"),
    ],
)
def test_auto_takes_the_first_that_fits(monkeypatch, fake_gpu, dtype, width, capability, missing, chosen):
    fake_gpu(capability, missing)
    used = []
    for name in attention._KERNELS:
        monkeypatch.setitem(attention._KERNELS, name, lambda *qkv, name=name: used.append(name))
    q = torch.empty(4, 2, width, dtype=dtype, device="cuda")
    attend(q, q, q, Segments.of([4], [4]))
    assert used == [chosen]


@pytest.mark.parametrize(
    ("name", "dtype", "width", "capability", "message"),
    [
        ("varlen", FP32, 128, (9, 0), "needs float16 or bfloat16, not torch.float32"),
        ("varlen", BF16, 20, (9, 0), "needs a head width that is a multiple of 8 and at most 256, not 20"),
        ("fa4", BF16, 512, (9, 0), "needs a head width that is a multiple of 8 and at most 256, not 512"),
        ("varlen", BF16, 128, (7, 5), "needs a GPU of compute capability 8.0 or more, not an old GPU"),
        ("xformers", FP64, 128, (9, 0), "needs float16, bfloat16 or float32, not torch.float64"),
        ("xformers", BF16, 128, (7, 5), "needs a GPU of compute capability 8.0 or more for bfloat16, not an old GPU"),
        ("xformers", FP32, 6, (9, 0), "needs a head width of whole 16-byte units, not 6 of torch.float32"),
        ("fa3", BF16, 128, (9, 0), "is missing"),
    ],
)
def test_what_does_not_fit_is_named(fake_gpu, name, dtype, width, capability, message):
    fake_gpu(capability, ("fa3",))
    q = torch.empty(4, 2, width, dtype=dtype, device="cuda")
    with pytest.raises(ValueError, match=f"'{name}' {message}; 'auto' takes what fits"):
        attend(q, q, q, Segments.of([4], [4]), backend=name)


def test_a_model_takes_a_backend_by_name(monkeypatch):
    config = VideoDiTConfig(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=8, text_dim=6, freq_dim=8, in_channels=2
    )
    dit = VideoDiT(config)
    packed = pack([torch.randn(2, 1, 4, 4)], [500.0], [torch.randn(3, 6)])
    calls = []
    monkeypatch.setitem(attention._KERNELS, "sdpa", lambda q, k, v, s: calls.append(s) or torch.zeros_like(q))
    dit.use_attention("sdpa")
    dit(packed)
    assert calls == [packed.self_segments, packed.cross_segments] * 2
    modules = [module for module in dit.modules() if isinstance(module, SelfAttention | CrossAttention)]
    assert len(modules) == 4
    for module in modules:
        assert pickle.loads(pickle.dumps(module.attend)).keywords == {"backend": "sdpa"}
    with pytest.raises(ValueError, match="'flash' is unknown"):
        dit.use_attention("flash")
