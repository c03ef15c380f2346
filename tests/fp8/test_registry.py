"""Choosing a backend: by arguments, by name, and refusing clearly."""

from __future__ import annotations

import pytest
import torch

from megatron_ext import fp8
from megatron_ext.config.errors import ConfigError
from megatron_ext.kernels import registry
from megatron_ext.kernels.registry import OPERATORS, BackendError, Implementation, Registry

X = torch.ones(2, 3)


def implementation(operator: str, backend: str, usable: bool = True, module: str = "torch") -> Implementation:
    return Implementation(operator, backend, module, lambda *args: usable)


def test_every_operator_has_both_backends() -> None:
    for operator in OPERATORS.operators:
        assert OPERATORS.available(operator, X)[-2:] == ("cpu", "reference")
        for backend in ("cpu", "reference"):
            assert callable(OPERATORS.select(operator, X, backend=backend).function)


def test_prefers_the_first_usable_one() -> None:
    registry = Registry(
        [
            Implementation("abs", "wide", "a.module.that.is.not.there", lambda x: x.shape[-1] % 128 == 0),
            implementation("abs", "any"),
        ]
    )
    assert registry.select("abs", X).backend == "any"
    assert registry.select("abs", torch.ones(2, 128)).backend == "wide"
    assert torch.equal(registry.select("abs", X).function(-X), X)  # and the other module was never imported


def test_chooses_by_device() -> None:
    meta = torch.ones(2, 3, device="meta")
    assert OPERATORS.select("quantize", meta).backend == "reference"
    assert OPERATORS.select("quantize", X).backend == "cpu"


def test_unknown_backend_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match=r"kernels\.backend = 'cudnn'.*available here: auto, cpu, reference"):
        fp8.quantize(X, backend="cudnn")


def test_unavailable_backend_is_refused_with_the_names() -> None:
    with pytest.raises(BackendError, match=r"'cpu'.*cannot run quantize on .*meta; available here: auto, reference$"):
        OPERATORS.select("quantize", torch.ones(2, 3, device="meta"), backend="cpu")


def test_a_backend_that_is_forced_is_checked_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from megatron_ext.kernels.cpu import library

    known = "auto, cuda, deep_gemm, torch, triton, cpu, reference"
    with pytest.raises(ConfigError, match=rf"'cudnn': there is no backend of that name; known: {known}$"):
        fp8.Precision(backend="cudnn")
    for backend in ("auto", "cpu", "reference"):
        fp8.Precision(backend=backend)
        fp8.check_backend(backend, torch.device("cpu"))
    fp8.check_backend("auto", torch.device("meta"))
    with pytest.raises(ConfigError, match=r"'cpu': it is for cpu devices, not for meta; .* here: auto, reference$"):
        fp8.check_backend("cpu", torch.device("meta"))
    for backend in ("cuda", "deep_gemm", "torch", "triton"):
        fp8.Precision(backend=backend)  # there is such a backend, if not here
        with pytest.raises(ConfigError, match=f"'{backend}': it is for cuda devices, not for cpu; .* here: auto, cpu"):
            fp8.check_backend(backend, torch.device("cpu"))
        reason = registry.why_not(backend)
        assert torch.cuda.is_available() or (reason is not None and "\n" not in reason)
    library.load.cache_clear()
    try:
        monkeypatch.setattr(library, "PATH", tmp_path / "absent.so")
        with pytest.raises(ConfigError, match=r"'cpu'.*available here: auto, reference$"):
            fp8.check_backend("cpu", torch.device("cpu"))
    finally:
        library.load.cache_clear()


def test_an_operator_that_the_named_backend_lacks_is_chosen_automatically() -> None:
    registry = Registry([implementation("abs", "library"), implementation("neg", "reference")])
    assert registry.select("neg", X, backend="library").backend == "reference"


def test_missing_library_falls_back_to_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path, caplog) -> None:
    from megatron_ext.kernels.cpu import library

    library.load.cache_clear()
    try:
        monkeypatch.setattr(library, "PATH", tmp_path / "absent.so")
        assert OPERATORS.select("quantize", X).backend == "reference"
        assert OPERATORS.select("quantize", X).backend == "reference"
        assert len([r for r in caplog.records if "compiled CPU kernels" in r.getMessage()]) == 1
        with pytest.raises(ConfigError, match="available here: auto, reference"):
            fp8.quantize(X, backend="cpu")
    finally:
        library.load.cache_clear()
