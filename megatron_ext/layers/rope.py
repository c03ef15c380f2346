"""Rotary position embedding with YaRN (arXiv 2104.09864, 2309.00071), as DeepSeek-V2/V3 and Hugging Face compute it.

Each pair of the rotary part turns by position * frequency. DeepSeek's pairs are neighbours (x0, x1), (x2, x3), ...
(`rope_interleave`); half-split models pair x_i with x_{i + D/2}. Confusing the two moves the logits without any error.

Letters: T positions, D rotary dimensions of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: slow frequencies are interpolated by `factor`, fast ones kept, a ramp between them.

    Attributes:
        factor: ratio of the new context length to the original.
        original_max_position_embeddings: context length of pre-training, from which the ramp is computed; never the
            length of the sequence at hand, nor the extended one.
        beta_fast, beta_slow: rotations over the original length at the two ends of the ramp.
        mscale, mscale_all_dim: temperature corrections; see `attention_factor` and `softmax_factor`.
        attention_factor: multiplier of cos and sin where given; else inferred from the two above.
        truncate: whether the ends of the ramp are rounded outward to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def rotation_factor(self) -> float:
        """Multiplier of cos and sin; 1 where mscale equals mscale_all_dim, as in DeepSeek's models."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def softmax_factor(self) -> float:
        """Multiplier of the softmax scale: the square of the temperature for `mscale_all_dim`, never for `mscale`."""
        return self._temperature(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def inverse_frequencies(dim: int, theta: float, scaling: YarnScaling | None) -> Tensor:
    """Radians per position of each pair: FP32 [D/2] on the CPU."""
    wavelength = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if scaling is None:
        return 1.0 / wavelength

    def dimension_of(rotations: float) -> float:
        """The (fractional) dimension that turns so often over the original context."""
        positions = scaling.original_max_position_embeddings
        return dim * math.log(positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return (1.0 / (scaling.factor * wavelength)) * interpolated + (1.0 / wavelength) * (1 - interpolated)


class RotaryEmbedding:
    """Rotates queries and keys; not a module, for its FP32 tables must not follow `model.to(bfloat16)`.

    The tables of the last length and device are kept.

    Args:
        dim: D, even.
        theta: base of the wavelengths.
        scaling: YaRN, or None.
        interleave: whether pairs are neighbours (DeepSeek) or half the dimensions apart.
    """

    def __init__(self, dim: int, theta: float, scaling: YarnScaling | None = None, interleave: bool = True):
        self.dim, self.theta, self.scaling, self.interleave = dim, theta, scaling, interleave
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0..T-1: two FP32 [T, D/2]."""
        if self._tables is None or self._tables[0].shape[0] != length or self._tables[0].device != device:
            # A table made while evaluating under inference_mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                frequencies = inverse_frequencies(self.dim, self.theta, self.scaling).to(device)
                angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
                factor = 1.0 if self.scaling is None else self.scaling.rotation_factor()
                self._tables = angles.cos() * factor, angles.sin() * factor
        return self._tables

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates [..., T, D], in FP32 like the tables; same shape, dtype and order of dimensions back."""
        cos, sin = self.tables(x.shape[-2], x.device)
        dimensions = "... (d two)" if self.interleave else "... (two d)"
        a, b = rearrange(x, f"{dimensions} -> two ... d", two=2)
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin))
        return rearrange(rotated, f"two ... d -> {dimensions}").to(x.dtype)
