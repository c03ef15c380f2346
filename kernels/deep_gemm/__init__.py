"""The `deep_gemm` backend: DeepGEMM's FP8 products where that package is installed (it compiles them on first use).

This folder is megatron_ext.kernels.deep_gemm; the package is the top-level `deep_gemm`, imported by that absolute name
when it is first asked for. Not yet run on a GPU.
"""
