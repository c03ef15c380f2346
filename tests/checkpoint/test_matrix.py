"""Every ordered pair of formats, there and back, bit for bit; and the table that says so in docs/conversion.md."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.convert import FORMATS, make_plan, named, open_checkpoint, run
from megatron_ext.checkpoint.convert.verify import verify
from tests.checkpoint import matrix
from tests.checkpoint.test_round_trips import MODELS
from tests.checkpoint.tiny import FP8, config, equal, load, make, save, tensors_of
from tests.thinned import thinned

NAMES = [format.name for format in FORMATS]
PAIRS = list(itertools.product(NAMES, NAMES))


def test_the_published_table_is_what_plans_say(tmp_path: Path) -> None:
    assert matrix.published() == matrix.markdown(matrix.table(tmp_path))


def chain(folder: Path, source: Path, formats: tuple[str, ...], dtype: str, cut: bool = True) -> Path:
    """Converts through formats, each step verified; back to Hugging Face's in the end, into FP8 again if it was FP8."""
    for number, name in enumerate((*formats, "hf")):
        wanted = "fp8" if dtype == "fp8" and number == len(formats) else None
        plan = make_plan(open_checkpoint(source), named(name), matrix.options(name) if cut else None, wanted)
        run(plan, folder / f"{number}-{name}")
        verify(plan, folder / f"{number}-{name}")
        source = folder / f"{number}-{name}"
    return source


@pytest.mark.parametrize("number", range(len(MODELS)), ids=lambda n: "-".join(map(str, MODELS[n].values())))
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_every_pair_and_back(tmp_path: Path, number: int, dtype: str) -> None:
    """All pairs are shared out over the models; with `-m slow` every model goes through every pair."""
    source = make(tmp_path / "source", dtype, shards=2, layers=4, **MODELS[number])
    original = load(source)
    for pair in PAIRS[number::len(MODELS)]:
        back = chain(tmp_path / "-".join(pair), source, pair, dtype, dtype != "fp8")  # blocks of 128 are not cut
        assert equal(original, load(back)), pair
        assert (source / "config.json").read_bytes() == (back / "config.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("settings", MODELS, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_model_through_every_pair(tmp_path: Path, settings: dict[str, Any], pair: tuple[str, str]) -> None:
    for dtype in ("bf16", "fp32", "fp8"):
        source = make(tmp_path / dtype, dtype, layers=4, **settings)
        back = chain(tmp_path / f"{dtype}-through", source, pair, dtype, dtype != "fp8")
        assert equal(load(source), load(back))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_that_counts_a_layer_which_nobody_saved(tmp_path: Path, name: str) -> None:
    """As transformers saves every DeepSeek-V3."""
    source = make(tmp_path / "source", mtp=0)
    values = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(values))
    assert open_checkpoint(source).notes
    back = chain(tmp_path, source, (name,), "bf16")
    assert equal(load(source), load(back))
    assert (source / "config.json").read_bytes() == (back / "config.json").read_bytes()


@pytest.mark.parametrize("pair", thinned((pytest.param(pair, id="-".join(pair)) for pair in PAIRS), 5))
def test_partial_blocks_through_every_pair(tmp_path: Path, pair: tuple[str, str]) -> None:
    """FP8 with 576 rows and 200 columns, so that the last blocks are partial; and norms in FP32."""
    values = config(mtp=1, wide=True, quantization_config=FP8)
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors_of(values, "fp8").items()}
    source = save(tmp_path / "source", values, tensors, shards=2)
    assert equal(load(source), load(chain(tmp_path, source, pair, "fp8")))
