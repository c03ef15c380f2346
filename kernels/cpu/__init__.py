"""CPU backend: C++ kernels behind a plain C ABI (AVX-512, AVX2 and a portable fallback), loaded with ctypes."""
