"""RMSNorm: its formula, its dtypes, and whose apex it uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from megatron_ext.layers.norm import RMSNorm, fused_rms_norm


@pytest.fixture(autouse=True)
def _fresh_detection() -> Iterator[None]:
    fused_rms_norm.cache_clear()
    yield
    fused_rms_norm.cache_clear()


def test_formula_and_eps() -> None:
    norm = RMSNorm(6, eps=0.5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(norm(x), norm.weight * (x / (x.pow(2).sum(-1, keepdim=True) / 6 + 0.5).sqrt()))


def test_half_precision_is_normalised_in_fp32() -> None:
    """A mean of squares of BF16 numbers near 300 would lose its last terms in BF16; and the dtype of x comes back."""
    x = (torch.arange(4096.0) % 7 + 300).bfloat16()[None]
    y = RMSNorm(4096).bfloat16()(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.nn.functional.rms_norm(x.float(), (4096,), eps=1e-6).bfloat16())


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    module = ModuleType(name)
    module.__path__ = []
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_another_project_called_apex_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "apex")  # PyPI's: a web framework
    assert fused_rms_norm() is None


def test_apex_without_its_compiled_extension_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "apex")
    _install(monkeypatch, "apex.normalization")
    _install(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=lambda *_: None)
    assert fused_rms_norm() is None


def test_nvidia_apex_is_used_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(*_: object) -> None:
        raise AssertionError("on a CPU")

    _install(monkeypatch, "fused_layer_norm_cuda")
    _install(monkeypatch, "apex")
    _install(monkeypatch, "apex.normalization")
    _install(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused)
    assert fused_rms_norm() is fused
    assert RMSNorm(4)(torch.ones(1, 4)).shape == (1, 4)
