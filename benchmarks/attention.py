"""Attention over packs of mixed lengths: the backends of video_dit/attention.py, and on a CPU the other ways to do it.

    python benchmarks/attention.py

On a CPU, one small mixed pack: our call for each run of equal segments against torch's attention with a dense
block-diagonal mask, on the padded batch with a mask (padding it not counted) and on a jagged nested tensor. On a GPU,
at Wan-1.3B's 12 heads x 128 in bf16: every backend that is installed, and torch's own choice of kernel run by run.
Rates count useful work only: 4 q k heads e a segment forward, 2.5 times that backward (FlashAttention's count).
All take turns in one run, but for fa3 and fa4, which switch the whole process. Writes results/attention.json.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from measure import gemm_ceiling, interleave, machine, peak_memory_bytes, ratio, write_result
from torch import Tensor
from torch.nn import functional as F

from video_dit.attention import Attend, Segments, attend, attention_backend
from video_dit.packing import WAN_PATCH
from video_dit.shapes import Stride, VideoShape

WAN_VAE = Stride(4, 8, 8)
MIXED = [(1, 480, 832)] * 4 + [(17, 256, 256)] * 4 + [(33, 256, 448)] * 3 + [(65, 256, 448)]
MIXED += [(33, 480, 832), (49, 480, 832)]  # 65,392 tokens
TEXT_TOKENS = [512, 37, 120, 64, 80, 230, 15, 99, 410, 60, 77, 150, 33, 280]


class Case(NamedTuple):
    """Queries, keys and values to attend over, and how they are cut."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    segments: Segments

    @property
    def flops(self) -> int:
        """Useful operations of a forward pass."""
        _, heads, width = self.q.shape
        return sum(4 * run.repeats * run.q_length * run.k_length * heads * width for run in self.segments.runs)


def make_case(name: str, segments: Segments, heads: int, width: int, device: str, dtype: torch.dtype) -> Case:
    """Random tensors, laid out as the model's layers leave them."""
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    n, m = sum(segments.q_lengths), sum(segments.k_lengths)
    q, (k, v) = random(n, heads, width), random(m, 2, heads, width).unbind(1)
    return Case(name, *(x.detach().requires_grad_() for x in (q, k, v)), segments)


def cpu_cases(longest: int) -> list[Case]:
    """Eight lengths up to `longest`, as many queries as keys."""
    lengths = [longest * part // 16 for part in (1, 2, 3, 4, 5, 8, 10, 16)]
    return [make_case("mixed pack", Segments.of(lengths, lengths), 12, 64, "cpu", torch.float32)]


def gpu_cases() -> list[Case]:
    """One clip of each of two sizes, a mixed pack, and its tokens to their texts."""

    def tokens(shapes: list[tuple[int, int, int]]) -> list[int]:
        return [VideoShape(*shape).latent(WAN_VAE).grid(WAN_PATCH).num_tokens for shape in shapes]

    small, large, mixed = tokens([(33, 256, 448)]), tokens([(81, 480, 832)]), tokens(MIXED)
    segments = {
        "33x256x448": Segments.of(small, small),
        "81x480x832": Segments.of(large, large),
        "mixed pack": Segments.of(mixed, mixed),
        "mixed pack to texts": Segments.of(mixed, TEXT_TOKENS),
    }
    return [make_case(name, cut, 12, 128, "cuda", torch.bfloat16) for name, cut in segments.items()]


# --- peers ----------------------------------------------------------------------------------------------------------


def by_dense_mask(case: Case) -> Attend:
    """All queries to all keys, under a mask of n x m."""
    blocks = [torch.ones(run.q_length, run.k_length) for run in case.segments.runs for _ in range(run.repeats)]
    mask = torch.block_diag(*blocks).bool()

    def run(q: Tensor, k: Tensor, v: Tensor, _: Segments) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # 1 heads n e
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return run


def padded(case: Case) -> tuple[Case, Tensor]:
    """The batch as long as its longest segment, b n heads e, and which of its rows are real, b n."""
    lengths = torch.tensor(case.segments.q_lengths)
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    batch = [torch.zeros(*real.shape, *case.q.shape[1:]) for _ in range(3)]
    for x, values in zip(batch, (case.q, case.k, case.v), strict=True):
        x[real] = values.detach()
    return Case(case.name, *(x.requires_grad_() for x in batch), case.segments), real


def by_key_mask(real: Tensor) -> Attend:
    """The padded batch, b n heads e, with the padding hidden from the queries."""

    def run(q: Tensor, k: Tensor, v: Tensor, _: Segments) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # b heads n e
        return F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2)

    return run


def by_nested_tensor(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """torch's jagged layout."""
    offsets = F.pad(torch.tensor(segments.q_lengths).cumsum(0), (1, 0)).to(q.device)
    jagged = [torch.nested.nested_tensor_from_jagged(x.contiguous(), offsets).transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*jagged).transpose(1, 2).values()


def by_torchs_choice(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Segment by segment, with whatever kernel torch prefers."""
    parts = zip(q.split(segments.q_lengths), k.split(segments.k_lengths), v.split(segments.k_lengths), strict=True)
    outputs = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0] for part in parts]
    return torch.cat(outputs, 1).transpose(0, 1)


def on_cpu(case: Case) -> dict[str, tuple[Attend, Case]]:
    """What runs on a CPU, each with its form of the same tensors; checked to compute the same."""
    batch, real = padded(case)
    ways: dict[str, tuple[Attend, Case]] = {
        "sdpa": (attend, case),
        "dense mask": (by_dense_mask(case), case),
        "padded, key mask": (by_key_mask(real), batch),
        "nested tensor": (by_nested_tensor, case),
    }
    expected = attend(*case[1:])
    for name, (function, form) in ways.items():
        output = function(*form[1:])
        error = (output[real] if form is batch else output).sub(expected).abs().max()
        assert error < 1e-5, f"{name} is off by {error}"
    return ways


def on_gpu(case: Case) -> dict[str, tuple[Attend, Case]]:
    """Every backend that is installed here, checked against torch's own choice."""
    ways: dict[str, tuple[Attend, Case]] = {"torch's choice": (by_torchs_choice, case)}
    for name in ("sdpa", "varlen", "xformers", "fa3", "fa4"):
        try:
            ways[name] = (attention_backend(name), case)
            with torch.no_grad():
                error = (ways[name][0](*case[1:]) - by_torchs_choice(*case[1:])).abs().max()
            assert error < 2e-2, f"{name} is off by {error}"
        except (ValueError, RuntimeError) as reason:
            ways.pop(name, None)
            print(f"{case.name}: without {name}: {reason}")
        restore_flash()
    return ways


def restore_flash() -> None:
    """torch's own FlashAttention again."""
    if torch.nn.attention.current_flash_attention_impl():
        torch.nn.attention.restore_flash_attention_impl()


# --- the race -------------------------------------------------------------------------------------------------------


def forward(function: Attend, case: Case) -> None:
    """As in sampling."""
    with torch.no_grad():
        function(*case[1:])


def forward_and_backward(function: Attend, case: Case) -> None:
    """As in training."""
    output = function(*case[1:])
    torch.autograd.grad(output, case[1:4], torch.ones_like(output))


def race(ways: Mapping[str, tuple[Attend, Case]], step: Callable[..., None], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; what switches the process runs on its own."""
    calls = {name: functools.partial(step, *way) for name, way in ways.items()}
    times = interleave({name: call for name, call in calls.items() if not name.startswith("fa")}, rounds)
    for name in calls.keys() - times.keys():
        times |= interleave({name: calls[name]}, rounds)
        restore_flash()
    return times


def figures_of(case: Case, ways: Mapping[str, tuple[Attend, Case]], rounds: int, ceiling: float) -> dict[str, dict]:
    """Race all ways through one case, print a row each and return the numbers."""
    figures: dict[str, dict] = {}
    for step, flops in ((forward, case.flops), (forward_and_backward, 3.5 * case.flops)):
        times = race(ways, step, rounds)
        rows = figures[step.__name__] = {}
        for name in times:
            median_s = statistics.median(times[name])
            share = flops / median_s / ceiling
            faster = ratio(times, "sdpa", name)  # of itself: 1
            memory_bytes = peak_memory_bytes(functools.partial(step, *ways[name]))
            restore_flash()
            print(
                f"{case.name:20} {step.__name__:21} {name:17} {median_s * 1e3:9.2f} ms {flops / median_s / 1e9:9.1f} "
                f"GFLOP/s {share:6.1%} of a GEMM  sdpa is faster by {faster}"
            )
            rows[name] = {
                "median_s": median_s,
                "flop_per_s": flops / median_s,
                "share_of_gemm": share,
                "sdpa_is_faster_by": faster._asdict(),
                "peak_memory_bytes": memory_bytes,
            }
    return figures


def main() -> None:
    """Measure the ceiling, then every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=None, help="default: 5 on a CPU, 30 on a GPU")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the CPU pack's longest segment")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_a_gpu = torch.cuda.is_available()
    rounds = options.rounds or (30 if on_a_gpu else 5)
    ceiling = gemm_ceiling()
    print(f"{machine()}; a GEMM runs at {ceiling / 1e9:.1f} GFLOP/s")
    figures: dict[str, object] = {"rounds": rounds, "gemm_flop_per_s": ceiling}
    for case in gpu_cases() if on_a_gpu else cpu_cases(options.longest):
        ways = on_gpu(case) if on_a_gpu else on_cpu(case)
        lengths = {"q_lengths": case.segments.q_lengths, "k_lengths": case.segments.k_lengths}
        figures[case.name] = {**lengths, **figures_of(case, ways, rounds, ceiling)}
    print(f"wrote {write_result('attention', figures)}")


if __name__ == "__main__":
    main()
