// Weight gradients of experts: out[e] += dy[:, tokens of e] x[:, tokens of e]^T, dy [N, 128 S], x [K, 128 S], both in
// 1x128 tiles along the tokens, where every group begins a tile. Group sizes are read on the device.
#include "gemm.cuh"

using namespace mext;

MEXT_KERNEL(wgrad_large)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Large, true, ContractedWalk<Large>>(a, b, a_scale, b_scale, p);
}
MEXT_PAIR_KERNEL(wgrad_large_pair)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<LargePair, true, ContractedWalk<LargePair>>(a, b, a_scale, b_scale, p);
}
MEXT_KERNEL(wgrad_medium)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<Medium, true, ContractedWalk<Medium>>(a, b, a_scale, b_scale, p);
}
MEXT_PAIR_KERNEL(wgrad_medium_pair)(MEXT_MAP a, MEXT_MAP b, MEXT_MAP a_scale, MEXT_MAP b_scale, MEXT_PROBLEM p) {
    gemm<MediumPair, true, ContractedWalk<MediumPair>>(a, b, a_scale, b_scale, p);
}
