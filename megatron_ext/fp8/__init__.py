"""FP8 training: quantised tensors and matrix products whose three GEMMs run in FP8 (DeepSeek-V3, section 3.3)."""

from megatron_ext.fp8.grouped_linear import grouped_linear
from megatron_ext.fp8.linear import QuantizedInput, linear, quantize_input
from megatron_ext.fp8.operators import check_backend
from megatron_ext.fp8.precision import Precision, WeightCache
from megatron_ext.fp8.rms_norm import rms_norm_backward, rms_norm_input
from megatron_ext.fp8.swiglu import swiglu
from megatron_ext.fp8.tensor import QuantizedTensor, quantize

__all__ = [
    "Precision", "QuantizedInput", "QuantizedTensor", "WeightCache", "check_backend", "grouped_linear", "linear",
    "quantize", "quantize_input", "rms_norm_backward", "rms_norm_input", "swiglu",
]
