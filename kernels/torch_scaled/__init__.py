"""The `torch` backend: cuBLAS's block-scaled FP8 products on Hopper, through torch.nn.functional.scaled_mm.

Not yet run on a GPU.
"""
