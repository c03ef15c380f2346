"""What others make of our files: Hugging Face's models give equal logits, torch's reader gives equal tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

from megatron_ext.models import DeepSeekV3
from tests.checkpoint import tiny
from tests.checkpoint.test_round_trips import MODELS
from tests.checkpoint.tiny import convert, equal, load, make

transformers = pytest.importorskip("transformers")


def dequantised(tensors: tiny.Tensors) -> tiny.Tensors:
    """FP8 weights in FP32, block by block, in plain torch."""
    found = {}
    for name, tensor in tensors.items():
        if name + "_scale_inv" in tensors:
            spread = tensors[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            found[name] = tensor.float() * spread[:tensor.shape[0], :tensor.shape[1]]
        elif not name.endswith("_scale_inv"):
            found[name] = tensor
    return found


def theirs(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    model.config._experts_implementation = "eager"
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 48, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("settings", MODELS, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_hugging_face_gives_equal_logits(tmp_path: Path, settings: dict[str, Any], dtype: str) -> None:
    """For what came out of FP8 or BF16 through DeepSeek's layout, and for the source without us."""
    values = tiny.config(layers=4, **settings)
    tensors = tiny.tensors_of(values, dtype)
    source = make(tmp_path / "source", dtype, layers=4, shards=2, **settings)
    there = convert(source, tmp_path / "there", "deepseek")
    ours = convert(there, tmp_path / "ours", "hf", "bf16", shard_bytes=50_000)
    plain = {name: tensor if name.endswith("bias") else tensor.bfloat16() for name, tensor in
             dequantised(tensors).items()}
    without = tiny.save(tmp_path / "without", values, plain)
    expected, found = logits(theirs(without)), logits(theirs(ours))
    assert expected.std() > 0.1 and torch.equal(found, expected)


def test_our_own_model_loads_the_export(tmp_path: Path) -> None:
    ours = convert(make(tmp_path / "source", "fp8"), tmp_path / "ours", "hf", "fp32")
    tokens = torch.randint(0, 48, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = DeepSeekV3.load_hf(ours)(tokens)
    torch.testing.assert_close(found, logits(theirs(ours, torch.float32)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("origin", ["fp8", "bf16"])
def test_torchs_reader_of_fp8_gives_equal_tensors(tmp_path: Path, origin: str) -> None:
    """For scales that were carried through BF16 and DeepSeek's layout, and for scales chosen anew."""
    source = make(tmp_path / "source", origin, wide=True, mtp=1, shards=2)
    bf16 = convert(source, tmp_path / "bf16", "deepseek", "bf16", mp=2) if origin == "fp8" else source
    fp8 = convert(bf16, tmp_path / "fp8", "hf", "fp8", shard_bytes=700_000)
    expected = dequantised(load(fp8))
    state = {name: torch.zeros(tensor.shape, dtype=torch.float32 if tensor.dtype == torch.float32 else tensor.dtype)
             for name, tensor in expected.items()}
    dcp.load(state, storage_reader=QuantizedHuggingFaceStorageReader(str(fp8)), no_dist=True)
    assert equal(state, expected)
    if origin == "fp8":
        assert equal(state, dequantised(load(source)))


def test_hugging_faces_own_save_is_read(tmp_path: Path) -> None:
    """Names as transformers writes them are the names of our table, in both families."""
    for family in ("V3", "V2"):
        values = {key: value for key, value in tiny.config(family.lower(), dense=1).items()
                  if key not in ("architectures", "model_type", "torch_dtype")}
        torch.manual_seed(0)
        model = getattr(transformers, f"Deepseek{family}ForCausalLM")(
            getattr(transformers, f"Deepseek{family}Config")(**values))
        model.bfloat16().save_pretrained(tmp_path / family)
        back = convert(convert(tmp_path / family, tmp_path / f"{family}-there", "deepseek", mp=2),
                       tmp_path / f"{family}-back", "hf")
        assert equal(load(tmp_path / family), load(back))
        assert torch.equal(logits(theirs(back)), logits(theirs(tmp_path / family)))
        assert json.loads((back / "config.json").read_text())["model_type"] == f"deepseek_{family.lower()}"
