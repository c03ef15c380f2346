"""What `megatron-ext doctor` says of the FP8 kernels, and that its check notices a kernel that is wrong."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from megatron_ext.cli import app, kernels
from megatron_ext.kernels.cpu import quantize as cpu
from megatron_ext.kernels.registry import OPERATORS

CPU = torch.device("cpu")


def test_every_operator_has_a_sample() -> None:
    assert set(kernels.samples(CPU)) == set(OPERATORS.operators)


def test_every_backend_and_operator_is_named() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=2)[1:] for line in result.output.splitlines() if line.startswith("FP8 "))
    assert set(OPERATORS.backends) <= set(lines) and lines["reference"] == lines["cpu"] == "ready"
    if not torch.cuda.is_available():
        assert all(lines[backend] != "ready" for backend in ("cuda", "deep_gemm", "torch", "triton"))
        assert lines["operators"].startswith("cpu: ") and "quantize_both" in lines["operators"]


def test_the_check_runs_them_and_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["doctor", "--kernels"])
    assert result.exit_code == 0, result.output
    checked = [line.split()[:2] for line in result.output.splitlines() if line.endswith("as the reference")]
    runnable = {operator: backends for operator, backends in kernels.choices(CPU) if operator != "weight_operands"}
    assert checked == [[operator, backend] for operator, backends in runnable.items() for backend in backends]

    real = cpu.quantize

    def rounding_down(*args: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        data, scale = real(*args, **options)
        data.view(torch.uint8)[0, 0] -= 1
        return data, scale

    implementation = OPERATORS.select("quantize", torch.ones(1, 1), backend="cpu")
    monkeypatch.setitem(implementation.__dict__, "function", rounding_down)
    result = CliRunner().invoke(app, ["doctor", "--kernels"])
    assert result.exit_code == 1
    assert "1 bytes of result 0 differ from the reference's" in result.output
