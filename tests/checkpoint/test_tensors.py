"""The description of tensors as equations between boxes: every kind of view, in one format that uses them all."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.checkpoint.convert import Options, blocks, formats, open_checkpoint, safetensors_io
from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats.layout import CONFIG, Layout, documents_of, read_model
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.plan import make_recipe
from megatron_ext.checkpoint.convert.source import Reading
from megatron_ext.checkpoint.convert.tensors import (
    SIZES,
    Box,
    Entry,
    Part,
    Stored,
    View,
    box_shape,
    flat_range,
    intersect,
    reshaped,
    shift,
    transposed,
    whole,
)
from tests.checkpoint import tiny
from tests.checkpoint.tiny import convert, equal, load, make

Placed = tuple[str, tuple[int, ...], tuple[Part, ...], bool]


class Odd:
    """A format that fuses, stacks, transposes, permutes, pads, and cuts everything else as one flat buffer."""

    name = "odd"
    title = "a format of these tests"
    dtypes = frozenset({"BF16", "F32"})
    states: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()

    def detect(self, folder: Folder) -> bool:
        return folder.has("odd.safetensors")

    def read(self, folder: Folder, config: Mapping[str, Any] | None) -> Reading:
        model = read_model(folder, config)
        records = safetensors_io.read_header(folder, "odd.safetensors")[0]
        dtypes = {name.split("/")[0]: record.dtype for name, record in records.items() if name != "flat"}
        stored = []
        for name, shape, parts, padded in self.places(model, dtypes):
            record = records.pop(name)
            assert record.shape == shape
            stored.append(Stored(name, "odd.safetensors", record.offset, record.dtype, shape, parts, padded))
        assert not records
        aliases = [name for name, tensor in model.table.items() if tensor.row.alias and tensor.mtp is not None]
        return Reading(model, stored, aliases, "odd", documents_of(folder, []))

    def lay_out(self, model: Model, entries: Mapping[str, Entry], options: Options) -> Layout:
        dtype = entries["model.norm.weight"].dtype
        stored = [Stored(name, "", -1, "F32" if "F32" in name else dtype, shape, parts, padded)
                  for name, shape, parts, padded in self.places(model, {})]
        layout = Layout([safetensors_io.lay_out("odd.safetensors", stored, {})])
        implied = [name for name, tensor in model.table.items() if tensor.row.alias and tensor.mtp is not None]
        layout.aliases, layout.implied = [name for name in implied if name in entries], implied
        return layout

    def places(self, model: Model, dtypes: Mapping[str, str]) -> list[Placed]:
        table, c = model.table, model.config
        placed: list[Placed] = []
        flat: list[str] = []
        for name, tensor in table.items():
            shape = tensor.shape
            if tensor.row.optional or tensor.row.alias:
                continue
            if tensor.expert is not None:
                if tensor.expert or name.endswith(("up_proj.weight", "down_proj.weight")):
                    continue
                h, m = c.hidden_size, c.moe_intermediate_size
                base = name.removesuffix("0.gate_proj.weight")
                fused, down = [], []
                for e in range(c.n_routed_experts):  # [E, 2M, h], gate rows first, and [E, M, h] out of [h, M]
                    for i, which in enumerate(("gate", "up")):
                        fused.append(Part(f"{base}{e}.{which}_proj.weight", ((e, e + 1), (i * m, i * m + m), (0, h)),
                                          whole((1, m, h)), reshaped((m, h), (1, m, h))))
                    view = View((h, m), (1, 0), (1, m, h))
                    down.append(Part(f"{base}{e}.down_proj.weight", ((e, e + 1), (0, m), (0, h)), whole((1, m, h)),
                                     view))
                placed += [(base + "gate_up", (c.n_routed_experts, 2 * m, h), tuple(fused), False),
                           (base + "down", (c.n_routed_experts, m, h), tuple(down), False)]
            elif name.endswith("o_proj.weight"):  # transposed, and cut along the columns
                half = shape[1] // 2
                placed += [(f"{name}/{i}", (half, shape[0]),
                            (Part(name, whole((half, shape[0])), ((i * half, i * half + half), (0, shape[0])),
                                  transposed(shape)),), False) for i in range(2)]
            elif name.endswith(("q_b_proj.weight", "q_proj.weight")):  # pairs of the rotary part side by side
                d = shape[0] // c.num_attention_heads
                view = View((c.num_attention_heads, d // 2, 2, shape[1]), (0, 2, 1, 3), shape)
                placed.append((name, shape, (Part(name, whole(shape), whole(shape), view),), False))
            elif name in ("model.embed_tokens.weight", "lm_head.weight"):  # padded, in two halves
                rows = shape[0] // 2 + 5
                for i, (start, stop) in enumerate(((0, rows), (rows, shape[0]))):
                    part = Part(name, ((0, stop - start), (0, shape[1])), ((start, stop), (0, shape[1])))
                    placed.append((f"{name}/{i}", (rows, shape[1]), (part,), True))
            elif tensor.row.fp32:
                placed.append((f"{name}/F32", shape, (Part(name, whole(shape), whole(shape)),), False))
            else:
                flat.append(name)
        return placed + self.flat(model, flat)

    def flat(self, model: Model, names: list[str]) -> list[Placed]:
        """All other tensors one after the other, cut into three pieces wherever that falls."""
        sizes = [math.prod(model.table[name].shape) for name in names]
        total = sum(sizes)
        cuts = [0, total // 3 + 1, total * 2 // 3 + 7, total]
        placed: list[Placed] = []
        for i in range(3):
            parts, at = [], 0
            for name, size in zip(names, sizes, strict=True):
                low, high = max(at, cuts[i]), min(at + size, cuts[i + 1])
                if low < high:
                    parts.append(Part(name, ((low - cuts[i], high - cuts[i]),), ((low - at, high - at),),
                                      reshaped(model.table[name].shape, (size,))))
                at += size
            placed.append((f"flat/{i}", (cuts[i + 1] - cuts[i],), tuple(parts), False))
        return placed


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Odd()))


@pytest.mark.parametrize("block_bytes", [blocks.BLOCK_BYTES, 700])
@pytest.mark.parametrize("settings", [
    dict(mtp=2, dense=1, layers=3), dict(family="v2", q_lora=False, tied=True, mtp=1, dense=0)])
def test_every_view_there_and_back(tmp_path: Path, odd: None, monkeypatch: pytest.MonkeyPatch, block_bytes: int,
                                   settings: dict[str, Any]) -> None:
    """In blocks of any size: a block that begins in the middle of a row must not matter."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    source = make(tmp_path / "source", "bf16", shards=2, **settings)
    there = convert(source, tmp_path / "there", "odd")
    assert equal(load(source), load(convert(there, tmp_path / "back", "hf")))
    ranks = convert(there, tmp_path / "ranks", "deepseek", mp=2)
    again = convert(ranks, tmp_path / "again", "odd")
    assert equal(load(again), load(there))
    fp32 = convert(there, tmp_path / "fp32", "hf", "fp32")
    assert equal(load(source), load(convert(fp32, tmp_path / "narrow", "hf", "bf16")))


def test_fp8_where_the_format_cannot_hold_it(tmp_path: Path, odd: None) -> None:
    """Weights in BF16, scales carried beside, and FP8 again at the end."""
    source = make(tmp_path / "source", "fp8", mtp=1, wide=True)
    there = convert(source, tmp_path / "there", "odd")
    assert all(tensor.element_size() > 1 for tensor in load(there).values())
    assert equal(load(source), load(convert(there, tmp_path / "back", "hf", "fp8")))


def test_views_hold_what_they_say(tmp_path: Path, odd: None) -> None:
    """Against torch, so that an error made on both ways is seen."""
    source = make(tmp_path / "source")
    there, original = load(convert(source, tmp_path / "there", "odd")), load(source)
    o = original["model.layers.0.self_attn.o_proj.weight"]
    assert there["model.layers.0.self_attn.o_proj.weight/1"].equal(o.T[o.shape[1] // 2:])
    prefix = "model.layers.1.mlp.experts."
    assert there[prefix + "gate_up"][2, 12:].equal(original[prefix + "2.up_proj.weight"])
    assert there[prefix + "down"][3].equal(original[prefix + "3.down_proj.weight"].T)
    q = original["model.layers.0.self_attn.q_b_proj.weight"]
    assert there["model.layers.0.self_attn.q_b_proj.weight"].equal(
        q.view(4, 6, 2, 20).transpose(1, 2).reshape(48, 20))
    assert not there["lm_head.weight/1"][-10:].any()


def test_an_alias_that_differs_is_not_dropped_silently(tmp_path: Path, odd: None) -> None:
    source = make(tmp_path / "source", mtp=1)
    tensors = load(source)
    tensors["model.layers.2.embed_tokens.weight"][3, 4] += 1
    changed = tiny.save(tmp_path / "changed", tiny.config(mtp=1), tensors)
    with pytest.raises(ValueError, match=r"layers.2.embed_tokens.weight differs from model.embed_tokens.weight"):
        convert(changed, tmp_path / "there", "odd")
    assert not (tmp_path / "there").exists() and not (tmp_path / "there.converting").exists()


def random_box(draw: random.Random, shape: tuple[int, ...]) -> Box:
    box = []
    for size in shape:
        start = draw.randrange(size)
        box.append((start, draw.randint(start + 1, size)))
    return tuple(box)


def test_boxes_by_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(500):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 4)))
        array = np.arange(math.prod(shape)).reshape(shape)
        a, b = random_box(draw, shape), random_box(draw, shape)
        inside = array[tuple(slice(*pair) for pair in a)]
        flat = flat_range(a, shape)
        consecutive = np.array_equal(inside.reshape(-1), np.arange(inside.size) + inside.reshape(-1)[0])
        assert (flat is not None) == consecutive
        assert flat is None or flat == (inside.reshape(-1)[0], inside.reshape(-1)[-1] + 1)
        shared = intersect(a, b)
        both = np.intersect1d(inside, array[tuple(slice(*pair) for pair in b)])
        assert (0 if shared is None else math.prod(box_shape(shared))) == both.size
        if shared is not None:
            assert np.array_equal(inside[tuple(slice(*p) for p in shift(shared, a, whole(box_shape(a))))],
                                  array[tuple(slice(*p) for p in shared)])


@pytest.mark.parametrize("shape", [(3,), (1, 4096), (5, 7, 11), (2, 1, 300, 3), (1000, 3), (1, 1, 5000), (0, 4), ()])
def test_blocks_cover_a_tensor_in_order(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    at = 0
    for box in blocks.blocks_of(shape, 2):
        flat = flat_range(box, shape)
        assert flat is not None and flat[0] == at and 2 * (flat[1] - flat[0]) <= 4000
        at = flat[1]
    assert at == math.prod(shape)


def test_boxes_are_read_from_files(tmp_path: Path) -> None:
    """Runs of any length, in place, row by row, or cut from whole rows."""
    draw = random.Random(1)
    for shape in ((40, 50), (3, 4, 5, 6), (70_000,), (6, 20_000)):
        for dtype, size in SIZES.items():
            array = np.arange(math.prod(shape)).astype(f"u{size}").reshape(shape)
            (tmp_path / "file").write_bytes(b"abc" + array.tobytes())
            stored = Stored("x", "file", 3, dtype, shape, ())
            with blocks.Files(Folder(tmp_path)) as files:
                for _ in range(20):
                    box = random_box(draw, shape)
                    assert np.array_equal(files.box(stored, box), array[tuple(slice(*pair) for pair in box)])


@pytest.mark.parametrize(("source", "target"), [("fp8", "BF16"), ("fp8", "F32"), ("bf16", "F8_E4M3")])
def test_any_box_is_a_piece_of_the_whole(tmp_path: Path, source: str, target: str) -> None:
    """Boxes that begin and end inside blocks of 128x128, quantised and dequantised; boxes of new scales."""
    name, draw = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", random.Random(2)
    opened = open_checkpoint(make(tmp_path / source, source, wide=True))
    recipes = {name: make_recipe(opened, name, target)}
    if source == "bf16":
        recipes[name + "_scale_inv"] = make_recipe(opened, name + "_scale_inv", "F32")
    with blocks.Files(opened.folder) as files:
        for each, recipe in recipes.items():
            shape = (5, 2) if recipe.new_scale else (576, 256)
            expected = blocks.Producer(files, recipes).canonical(each, whole(shape))
            for _ in range(30):
                box = random_box(draw, shape)
                found = blocks.Producer(files, recipes).canonical(each, box)
                assert np.array_equal(found, expected[tuple(slice(*pair) for pair in box)])


def test_every_tensor_of_a_file_is_aligned(tmp_path: Path) -> None:
    """FP8 tensors of odd sizes between others; read by the safetensors library."""
    sizes = [("a", "F8_E4M3", (3, 5)), ("b", "F32", (3,)), ("c", "F8_E4M3", (1,)), ("d", "BF16", (7,)),
             ("e", "F32", ())]
    file = safetensors_io.lay_out("x", [Stored(n, "", -1, dtype, shape, ()) for n, dtype, shape in sizes], {})
    assert all(stored.offset % SIZES[stored.dtype] == 0 for stored in file.tensors)
    (tmp_path / "x").write_bytes(file.literals[0][1].ljust(file.size, b"\0"))
    assert {name: tuple(t.shape) for name, t in tiny.load_file(tmp_path / "x").items()} == {n: s for n, _, s in sizes}
    records = safetensors_io.read_header(Folder(tmp_path), "x")[0]
    assert {name: record.offset for name, record in records.items()} == {t.name: t.offset for t in file.tensors}


def test_a_read_config_names_its_file(tmp_path: Path) -> None:
    assert CONFIG == "config.json"
    with pytest.raises(ValueError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
