"""One AdamW step: torch reference, C++ with AVX2 and C++ without agree bit for bit, and with torch's AdamW in FP32."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.kernels.cpu import adamw as cpu
from megatron_ext.kernels.cpu import library
from megatron_ext.kernels.reference import adamw as reference
from megatron_ext.kernels.reference.adamw import AdamWScalars
from megatron_ext.optimizer import AdamW

FP32, BF16 = torch.float32, torch.bfloat16
BETAS = (0.9, 0.95)
needs_library = pytest.mark.skipif(library.load() is None, reason="the compiled CPU kernels were not built")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, a NaN being equal to any other (payloads and signs of NaNs are nobody's business)."""
    integer = torch.int32 if a.dtype == FP32 else torch.int16
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def tensors(n: int, dtypes=(FP32, FP32, BF16)) -> list[torch.Tensor]:
    """[p, g, m, v] with magnitudes over 12 decades and, in longer ones, zeros, subnormals, infinities and NaNs."""
    p, g, m, v = (torch.randn(n) * 10.0 ** torch.randint(-6, 6, (n,)) for _ in range(4))
    for i, special in enumerate((0.0, -0.0, 1e-40, -1e-44, 3e38, math.inf, -math.inf, math.nan)):
        for k, x in enumerate((p, g, m)):
            if n >= 100:
                x[11 * i + 3 * k] = special
    param, grad, moment = dtypes
    return [p.to(param), g.to(grad), m.to(moment), v.abs().to(moment)]


def scalars(step=3, **changes) -> AdamWScalars:
    return AdamWScalars.at(step, **{"lr": 1e-2, "betas": BETAS, "eps": 1e-8, "weight_decay": 0.1, **changes})


def run(backend, given, steps=3, **options):
    p, g, m, v = (x.clone() for x in given)
    for step in range(1, steps + 1):
        backend([p], [g], [m], [v], scalars(step, **options.get("scalars", {})), **options.get("keywords", {}))
    return p, m, v


@needs_library
@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("moment", [FP32, BF16])
@pytest.mark.parametrize("grad", [FP32, BF16])
@pytest.mark.parametrize("param", [FP32, BF16])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1003])
def test_all_paths_agree_bit_for_bit(n, param, grad, moment, adam_w_mode):
    given, options = tensors(n, (param, grad, moment)), {"adam_w_mode": adam_w_mode}
    expected = run(reference.adamw, given, scalars=options)
    for lanes in (library.WIDEST, 1):
        actual = run(cpu.adamw, given, scalars=options, keywords={"lanes": lanes})
        assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True)), f"{lanes=}"
    assert n < 100 or expected[0].isfinite().sum() > n // 2


@needs_library
@pytest.mark.parametrize("lanes", [library.WIDEST, 1])
def test_moments_are_rounded_to_nearest_even(lanes):
    """With beta1 = 0 the new first moment is the gradient itself, here any bit pattern and many ties."""
    bits = torch.randint(-2**31, 2**31, (1 << 16,)).to(torch.int32)
    bits[::2] = (bits[::2] & -65536) | 0x8000
    g, zeros = bits.view(FP32), torch.zeros(1 << 16)
    m, v = zeros.to(BF16), zeros.to(BF16)
    cpu.adamw([zeros], [g], [m], [v], scalars(1, betas=(0.0, 0.95)), lanes=lanes)
    assert same_bits(m, g.to(BF16)) and g.isnan().any()


@needs_library
def test_the_number_of_threads_changes_nothing(monkeypatch):
    given = tensors(100_003)
    expected = run(cpu.adamw, given)
    monkeypatch.setattr(cpu, "_GRAIN", 1000)
    calls = []
    monkeypatch.setattr(cpu, "threads_for", lambda *args: calls.append(args) or library.threads_for(*args))
    torch.set_num_threads(3)
    try:
        actual = run(cpu.adamw, given)
    finally:
        torch.set_num_threads(1)
    assert calls[0] == (100_003, 1000)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


def test_the_reference_cut_into_batches_is_the_same(monkeypatch):
    given = [tensors(n) for n in (50, 3, 0, 17)]
    expected = [run(reference.adamw, one, steps=1) for one in given]
    monkeypatch.setattr(reference, "_BATCH", 8)
    columns = [[x.clone() for x in column] for column in zip(*given, strict=True)]
    sizes = [sum(x.numel() for x in p) for p, *_ in reference._batches(*columns)]
    assert sum(sizes) == 70 and len(sizes) > 5 and max(sizes) < 16
    reference.adamw(*columns, scalars(1))
    for (p, m, v), after in zip(expected, zip(*columns, strict=True), strict=True):
        assert all(same_bits(a, b) for a, b in zip((p, m, v), (after[0], after[2], after[3]), strict=True))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"weight_decay": 0.1}, {"betas": (0.8, 0.999)}, {"eps": 1e-3, "lr": 3e-2, "weight_decay": 0.3}])
def test_fp32_moments_follow_torch(decoupled, options):
    options = {"lr": 1e-2, "weight_decay": 0.0, "betas": BETAS, **options}
    start = torch.randn(1000)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = AdamW([ours], moment_dtype="fp32", adam_w_mode=decoupled, **options)
    b = (torch.optim.AdamW if decoupled else torch.optim.Adam)([theirs], foreach=False, **options)
    for _ in range(50):
        ours.grad = torch.randn(1000) + 0.1 * start
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    pairs = [(ours, theirs), *((a.state[ours][key], b.state[theirs][key]) for key in ("exp_avg", "exp_avg_sq"))]
    for x, y in pairs:
        assert (x - y).abs().max() <= 1e-6 * y.abs().max()
    assert (ours - start).norm() > 1


def test_without_bias_correction():
    """Against the equations in double precision."""
    p = torch.nn.Parameter(torch.randn(100))
    x, m, v = p.detach().double(), torch.zeros(100).double(), torch.zeros(100).double()
    optimizer = AdamW([p], lr=1e-2, betas=BETAS, weight_decay=0.1, bias_correction=False, moment_dtype="fp32")
    for _ in range(10):
        p.grad = torch.randn(100)
        optimizer.step()
        g = p.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        x = x * (1 - 1e-3) - 1e-2 * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), x, rtol=1e-6, atol=1e-6)


def trajectory(moment_dtype: str, betas=BETAS, steps=200) -> torch.Tensor:
    """Least squares from noisy samples: the distance walked is what the optimizer makes of the gradients."""
    torch.manual_seed(7)
    target, p = torch.randn(64), torch.nn.Parameter(torch.zeros(64))
    optimizer = AdamW([p], lr=1e-2, betas=betas, moment_dtype=moment_dtype)
    for _ in range(steps):
        p.grad = p.detach() - target + 0.3 * torch.randn(64)
        optimizer.step()
    return p.detach()


def test_bf16_moments_track_fp32_moments():
    exact, rounded = trajectory("fp32"), trajectory("bf16")
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.005 * exact.norm()


def test_a_bf16_moment_cannot_decay_slowly_and_the_user_is_told():
    def decayed(beta2: float) -> float:
        p = torch.nn.Parameter(torch.zeros(1))
        optimizer = AdamW([p], betas=(0.9, beta2))
        p.grad = torch.ones(1)
        optimizer.step()
        first = optimizer.state[p]["exp_avg_sq"].item()
        p.grad = torch.zeros(1)
        for _ in range(100):
            optimizer.step()
        return optimizer.state[p]["exp_avg_sq"].item() / first

    with pytest.warns(UserWarning, match=r"betas = \(0.9, 0.999\): a moment in BF16 cannot decay"):
        assert decayed(0.999) == 1
    assert decayed(0.95) == pytest.approx(0.95**100, rel=0.1)
    assert decayed(0.99) == pytest.approx(0.99**100, rel=0.1)
