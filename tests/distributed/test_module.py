"""PipelineModule: what is built where, tied layers, and models that cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

import megatron_ext
from megatron_ext.config import ConfigError
from tests.distributed import generic
from tests.distributed.equality import compare
from tests.distributed.generic import SEED, H, Job, V, batches, build
from tests.distributed.pool import WorkerPool

# -- tied layers


def tied_names(folder: str) -> dict[str, Any]:
    engine = build(Job(generic.tied, 4, 0))
    engine.train_batch(batches(engine, Job(generic.tied, 4)))
    engine.save_checkpoint(folder, tag="tied")
    counted = sorted(n for n, p in engine.module.named_parameters() if not getattr(p, "ds_pipe_replicated", False))
    return {"all": sorted(engine.module.state_dict()), "counted": counted}


def test_a_tied_layer_has_one_name_and_one_owner(pool4: WorkerPool, tmp_path: Any) -> None:
    found = pool4.run(tied_names, str(tmp_path))
    assert found[0] == found[3] and found[1] == found[2]
    assert "layers.0.weight" in found[0]["all"] and "layers.0.weight" in found[1]["all"]
    names = found[0]["counted"] + found[1]["counted"]
    assert len(names) == len(set(names)), "a parameter counts once in the gradient norm"
    assert set(names) == set(generic.reference(Job(generic.tied, steps=1))["state"])
    saved = [torch.load(tmp_path / "tied" / f"mp_rank_0{pair}_model_states.pt", weights_only=False)["module"]
             for pair in range(2)]
    assert saved[0]["layers.0.weight"].equal(saved[1]["layers.0.weight"])


def other_start() -> Tensor:
    """A constructor that does not heed the seed, so that the holders of a tied layer start apart."""

    class Unseeded(nn.Embedding):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.weight, 1.0 + dist.get_rank())

    table = ("t", Unseeded, V, H)
    job = Job(lambda: [TiedLayerSpec(*table), nn.Tanh(), TiedLayerSpec(*table, forward_fn=_one),
                       LayerSpec(nn.Linear, H, V)], stages=4)
    engine = build(job)
    engine.train_batch(batches(engine, job))
    return engine.module.state_dict()["layers.0.weight"]


def _one(embedding: nn.Module, x: Tensor) -> Tensor:
    return x * embedding.weight[0]


def test_holders_of_a_tied_layer_start_from_the_owners_values_and_stay_equal(pool4: WorkerPool) -> None:
    found = pool4.run(other_start)
    assert all(value.equal(found[0]) for value in found)
    assert (found[0] - 1).abs().max() < 0.1, "of rank 0, and the optimizer starts from them too"


# -- building


class Sized(nn.Linear):
    """Its constructor looks at its weights, which a tensor without memory does not allow."""

    def __init__(self, size: int) -> None:
        super().__init__(H, size)
        self.largest = self.weight.abs().max().item()


def built(**options: Any) -> dict[str, Any]:
    layers = [LayerSpec(nn.Embedding, V, H), LayerSpec(nn.Linear, H, H), nn.Tanh(), LayerSpec(Sized, 4 * H), torch.relu,
              LayerSpec(nn.Linear, 4 * H, 4 * H)]
    module = megatron_ext.PipelineModule(layers, **options)
    return {"bounds": module.bounds, "stages": module.stages, "names": [n for n, _ in module.named_parameters()],
            "schedule": module.schedule, "first": module.layers._modules["1"].weight.detach().clone()}


def seed_twice(seed: int) -> None:
    torch.manual_seed(2 * seed)


def several_ways() -> dict[str, Any]:
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    section = {"pipeline": {"stages": 2, "schedule": "dualpipe"}}
    return {
        "parameters": built(num_stages=2),
        "uniform": built(num_stages=2, partition_method="uniform"),
        "type": built(num_stages=2, partition_method="type:^(embedding|relu)$"),
        "topology": built(topology=PipeDataParallelTopology(num_pp=2, num_dp=1)),
        "config": built(config={"train_batch_size": 4, "megatron_ext": section}),
        "seed": built(num_stages=2, base_seed=7, seed_layers=True),
        "seed_fn": built(num_stages=2, base_seed=7, seed_fn=seed_twice),
    }


def test_the_constructor_is_deepspeeds(pool2: WorkerPool) -> None:
    for found in pool2.run(several_ways):
        assert all(f["stages"] == [0, 1] and f["schedule"] == "dualpipe" for f in found.values())
        names = [f"layers.{n}.{p}" for n, ps in ((0, ["weight"]), *((n, ["weight", "bias"]) for n in (1, 3, 5)))
                 for p in ps]
        assert all(f["names"] == names for f in found.values())
        assert found["parameters"]["bounds"] == [0, 5, 6], "the last matrix is heavier than all the rest"
        assert found["uniform"]["bounds"] == [0, 3, 6]
        assert found["type"]["bounds"] == [0, 4, 6], "functions are matched by their name"
        assert found["topology"] | {"first": 0} == found["config"] | {"first": 0} == found["parameters"] | {"first": 0}
        torch.manual_seed(1234 + 1)
        assert found["config"]["first"].equal(nn.Linear(H, H).weight)
        torch.manual_seed(7 + 1)
        assert found["seed"]["first"].equal(nn.Linear(H, H).weight)
        torch.manual_seed(2 * (7 + 1))
        assert found["seed_fn"]["first"].equal(nn.Linear(H, H).weight)


def refusals() -> list[str]:
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology

    config = {"train_batch_size": 4, "megatron_ext": {"pipeline": {"stages": 2, "schedule": "dualpipe"}}}
    messages = []
    for options in ({"topology": PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1)},
                    {"topology": PipeDataParallelTopology(num_pp=2, num_dp=2)},
                    {"topology": PipeDataParallelTopology(num_pp=2, num_dp=1), "num_stages": 4},
                    {"num_stages": 4, "config": config}, {"schedule": "gpipe", "config": config}, {},
                    {"num_stages": 2, "partition_method": "best"}, {"num_stages": 2, "schedule": "1f1c"}):
        with pytest.raises(ConfigError) as found:
            built(**options)
        messages.append(str(found.value))
    return messages


def test_arguments_that_contradict_each_other(pool2: WorkerPool) -> None:
    starts = ["topology = 'model': has size 2; only pipe and data axes are supported",
              "topology = ", "num_stages = 4: disagrees with the 2 of `topology`",
              "megatron_ext.pipeline.stages = 2: PipelineModule was given 4; the placement is fixed",
              "megatron_ext.pipeline.schedule = 'dualpipe': PipelineModule was given 'gpipe'",
              "megatron_ext.pipeline.stages = None: the number of pipeline ranks is not given",
              "partition_method = 'best': must be", "megatron_ext.pipeline.schedule = '1f1c': no such schedule"]
    for found in pool2.run(refusals):
        assert all(message.startswith(start) for message, start in zip(found, starts, strict=True)), found
        assert "has 4 ranks, this job 2" in found[1]


def build_error(kind: str) -> str:
    linear = nn.Linear(H, H)
    layers: dict[str, list[Any]] = {
        "shared": [LayerSpec(nn.Embedding, V, H), linear, linear, LayerSpec(nn.Linear, H, V)],
        "nothing to train": [LayerSpec(nn.Embedding, V, H), torch.tanh, nn.Tanh(), LayerSpec(nn.Linear, H, V)],
        "fails on one rank": [LayerSpec(nn.Embedding, V, H), LayerSpec(nn.Linear, H, H), LayerSpec(Indivisible),
                              LayerSpec(nn.Linear, H, V)],
        "one name twice": [LayerSpec(Named), LayerSpec(nn.Linear, H, H), LayerSpec(nn.Linear, H, H), LayerSpec(Named)],
    }
    if kind == "shared":
        layers[kind].insert(1, LayerSpec(nn.Linear, H, H))
        layers[kind][3:3] = [nn.Tanh(), nn.Tanh(), nn.Tanh()]
    try:
        build(Job(lambda: layers[kind], 4))
    except ConfigError as error:
        return str(error)
    return "no error"


class Indivisible(nn.Linear):
    def __init__(self) -> None:
        super().__init__(H, H)

    def set_expert_parallel(self, experts: Any) -> None:
        experts.expert_range(3) if experts.size > 1 else _refuse()


def _refuse() -> None:
    raise ConfigError("layer", 3, "cannot be")


class Named(nn.Linear):
    canonical_name = "twins"

    def __init__(self) -> None:
        super().__init__(H, H)


@pytest.mark.parametrize("kind, text", [
    ("shared", "layers = [2, 6]: share a parameter and lie on different pipeline ranks; make both TiedLayerSpecs"),
    ("nothing to train", "layers = [0, 1, 2, 3, 4]: stages [1, 2] have no trainable parameters"),
    ("fails on one rank", "layer = 3: cannot be"),
    ("one name twice", "layers = 'twins': is the name of two layers"),
])
def test_models_that_cannot_be_built_end_on_every_rank(pool4: WorkerPool, kind: str, text: str) -> None:
    for found in pool4.run(build_error, kind):
        assert found.startswith(text)


class Attention(nn.Module):
    """A module given ready-made whose attributes look like those of a spec."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.build = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.build(self.key(x).tanh())


def ready_made() -> list[Any]:
    torch.manual_seed(SEED)
    layers = [nn.Embedding(V, H), Attention(), Attention(), nn.Linear(H, V)]
    return list(nn.Sequential(*layers))


def test_modules_given_ready_made(pool4: WorkerPool) -> None:
    job = Job(ready_made, 4)
    compare(pool4.run(generic.train, job)[0], generic.reference(job))
