// Grouped products of experts: out [T, N], rows of group e = A [T, K] B[e]^T, B [E, N, K] in 128x128 blocks. Group sizes
// are read on the device.
#include "gemm.cuh"

using namespace mext;

MEXT_KERNEL(grouped_large)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Large, false, GroupedWalk<Large>>(a, b, a_scale, b_scale, p);
}
MEXT_PAIR_KERNEL(grouped_large_pair)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<LargePair, false, GroupedWalk<LargePair>>(a, b, a_scale, b_scale, p);
}
MEXT_KERNEL(grouped_medium)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Medium, false, GroupedWalk<Medium>>(a, b, a_scale, b_scale, p);
}
MEXT_PAIR_KERNEL(grouped_medium_pair)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<MediumPair, false, GroupedWalk<MediumPair>>(a, b, a_scale, b_scale, p);
}
MEXT_KERNEL(grouped_small)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Small, false, GroupedWalk<Small>>(a, b, a_scale, b_scale, p);
}
