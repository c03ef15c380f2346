// Dense products: out [M, N] = A [M, K] B [N, K]^T, written or added.
// 1d2d: B in 128x128 blocks (forward, input gradient). 1d1d: B in 1x128 tiles (weight gradient: K counts tokens).
#include "gemm.cuh"

using namespace mext;

MEXT_KERNEL(dense_1d2d_large)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Large, false, DenseWalk<Large>>(a, b, a_scale, b_scale, p);
}
MEXT_PAIR_KERNEL(dense_1d2d_large_pair)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<LargePair, false, DenseWalk<LargePair>>(a, b, a_scale, b_scale, p);
}
MEXT_KERNEL(dense_1d2d_medium)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Medium, false, DenseWalk<Medium>>(a, b, a_scale, b_scale, p);
}
MEXT_PAIR_KERNEL(dense_1d2d_medium_pair)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<MediumPair, false, DenseWalk<MediumPair>>(a, b, a_scale, b_scale, p);
}
MEXT_KERNEL(dense_1d2d_small)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Small, false, DenseWalk<Small>>(a, b, a_scale, b_scale, p);
}
MEXT_KERNEL(dense_1d1d_large)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Large, true, DenseWalk<Large>>(a, b, a_scale, b_scale, p);
}
MEXT_PAIR_KERNEL(dense_1d1d_large_pair)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<LargePair, true, DenseWalk<LargePair>>(a, b, a_scale, b_scale, p);
}
MEXT_KERNEL(dense_1d1d_medium)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Medium, true, DenseWalk<Medium>>(a, b, a_scale, b_scale, p);
}
MEXT_PAIR_KERNEL(dense_1d1d_medium_pair)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<MediumPair, true, DenseWalk<MediumPair>>(a, b, a_scale, b_scale, p);
}
MEXT_KERNEL(dense_1d1d_small)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Small, true, DenseWalk<Small>>(a, b, a_scale, b_scale, p);
}
