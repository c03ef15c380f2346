"""CUDA backend: our own wgmma and TMA kernels for Hopper (sm_90a), loaded through the driver API.

`available` says whether they can run here, `gemm` has the operators, `cubins` finds or compiles the machine code,
`driver` loads and launches it. The kernels are `gemm.cuh` over `sm90.cuh` (instructions), `schedule.h` (which tile is
next) and `layout.h` (where every number lies). Not yet run on a GPU.
"""
