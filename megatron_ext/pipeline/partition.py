"""Which layers make up a stage: the partition methods of DeepSpeed's PipelineModule.

Letters: L layers, P stages. A partition is a list of P + 1 bounds; stage s has the layers bounds[s] .. bounds[s+1]-1,
at least one each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from megatron_ext.config.errors import ConfigError


def balanced(weights: Sequence[float], stages: int) -> list[int]:
    """Bounds whose heaviest stage is as light as can be, and among those the most even; every stage gets a layer.

    Args:
        weights: of the L layers, not negative.
        stages: P <= L.
    """
    assert 1 <= stages <= len(weights)
    prefix = [0.0, *accumulate(weights)]
    heaviest = _cut(prefix, stages, max)
    limit = max(prefix[b] - prefix[a] for a, b in pairwise(heaviest))
    # Least sum of squares. A stage within the limit may exceed it by rounding where the weights are not whole numbers.
    return _cut(prefix, stages, lambda cost, stage: cost + stage * stage if stage <= limit * (1 + 1e-12) else math.inf)


def _cut(prefix: Sequence[float], stages: int, add: Callable[[float, float], float]) -> list[int]:
    """The bounds of least cost, by dynamic programming in O(P L^2): 0.2 s for 64 stages of 128 layers.

    Args:
        prefix: weight of the first i layers, L + 1 numbers.
        add: cost of some stages and one more of the given weight; never less than with a lighter one.
    """
    layers = len(prefix) - 1
    # best[i]: least cost of the first i layers in k stages; cuts[k][i]: where the last of those begins.
    best = [0.0] + [math.inf] * layers
    cuts: list[list[int]] = []
    for k in range(1, stages + 1):
        row, cut = [math.inf] * (layers + 1), [k - 1] * (layers + 1)
        for i in range(k, layers + 1):
            for j in range(i - 1, k - 2, -1):
                if add(0.0, prefix[i] - prefix[j]) > row[i]:
                    break  # the last stage only grows as j falls
                cost = add(best[j], prefix[i] - prefix[j])
                if cost < row[i]:
                    row[i], cut[i] = cost, j
        best = row
        cuts.append(cut)
    bounds = [layers]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return bounds[::-1]


def partition(method: str, names: Sequence[str], parameters: Sequence[int], stages: int,
              chunks: int = 1) -> list[int]:
    """Bounds by `uniform`, `parameters` or `type:<regex>` (matched against class names, case ignored).

    Args:
        names: of each layer's class, or of the function.
        parameters: trainable parameters of each layer.
        chunks: of a direction on each rank, which is why there are so many stages.

    Raises:
        ConfigError: unknown method, more stages than layers, or a regex that is none or matches no layer.
    """
    layers = len(names)
    if stages > layers:
        key, value = ("stages", stages) if chunks == 1 else ("chunks", chunks)
        subject = "" if chunks == 1 else f"make {stages} stages, which "
        raise ConfigError(f"megatron_ext.pipeline.{key}", value,
                          f"{subject}must not exceed the {layers} layers of the model: a stage would be empty")
    kind = method.lower()
    if kind == "uniform":
        return balanced([1.0] * layers, stages)
    if kind == "parameters":
        return balanced([float(n) for n in parameters], stages)
    if kind.startswith("type:"):
        try:
            pattern = re.compile(method.split(":", 1)[1], re.IGNORECASE)
        except re.error as error:
            raise ConfigError("partition_method", method, f"is not a regular expression: {error}") from None
        matches = [1.0 if pattern.search(name) else 0.0 for name in names]
        if not any(matches):
            raise ConfigError("partition_method", method, f"matches none of the layers' types {sorted(set(names))}")
        return balanced(matches, stages)
    raise ConfigError("partition_method", method, "must be 'uniform', 'parameters' or 'type:<regex>'")
