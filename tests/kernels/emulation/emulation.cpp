// A stand-in for libcuda.so.1 that runs our kernels on the CPU, so that a machine without a GPU checks all of them but
// the hardware: launcher, tensor maps, schedule, phases of barriers, swizzle, descriptors, registers to rows and columns.
//
// Every CUDA thread is a coroutine. What hardware leaves open is drawn at random (EMULATION_SEED): the order of threads
// and when a TMA copy lands. What is not there yet is NaN: the target of a copy under way, accumulators of a product in
// flight. Products read shared memory as late as they may, when they are waited for. A stage handed back too early, a
// barrier that counts wrongly or a missing wait so shows as NaN, as a deadlock or as an error.
#include <dlfcn.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dense.cu"
#include "grouped.cu"
#include "wgrad.cu"

namespace {

constexpr uint32_t kBase = 1024;  // shared address where dynamic memory begins
constexpr int kLaunchFailed = 719, kInvalidValue = 1;

struct Failure : std::string {
    using std::string::string;
};

struct Map {  // what a TensorMap holds here
    const uint8_t* data;
    uint64_t stride[2];
    uint32_t size[3], box[3];
    int element, rank, swizzle;
};
static_assert(sizeof(Map) <= 128, "");

struct Barrier {
    int expected = 0, pending = 0;
    long bytes = 0;
    uint32_t phase = 0;
    void settle() {
        if (pending < 0) throw Failure("more arrivals at a barrier than it expects");
        if (pending == 0 && bytes == 0) phase ^= 1, pending = expected;
    }
};

struct Product {
    float* d;
    int registers;
    uint64_t a, b;
    bool add;
};

struct Meeting {  // of all threads of a block or cluster
    int size = 0, here = 0, round = 0;
};

struct Block {
    int index, rank, alive = mext::kThreads;
    std::vector<uint8_t> shared;
    std::map<uint32_t, Barrier> barriers;
    Meeting meeting, warps[mext::kThreads / 32];
    uint8_t* at(uint32_t address, int bytes) {
        if (address < kBase || address + bytes > kBase + shared.size()) throw Failure("outside shared memory");
        return shared.data() + (address - kBase);
    }
    Barrier& barrier(uint32_t address) {
        at(address, 8);
        if (!barriers.count(address)) throw Failure("barrier used before it was initialised");
        return barriers[address];
    }
};

struct Thread {
    int index;
    Block* block;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = false;
    std::vector<std::vector<Product>> in_flight;  // the last is not yet committed
    int shuffles = 0;
    float shuffled[2];
    static constexpr size_t kStack = 1 << 17;
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<std::function<void()>> landing;  // TMA copies under way
    Meeting meeting;
};

Cluster* cluster;
Thread* self;
ucontext_t scheduler;
bool progress;
std::string error;
std::mt19937 random_source;
int blocks_in_grid;
std::function<void()> kernel;

void require(bool condition, const char* text) {
    if (!condition) throw Failure(text);
}

void pause() { swapcontext(&self->context, &scheduler); }

template <class Condition>
void wait_for(Condition condition) {
    while (!condition()) pause();
    progress = true;
}

void meet(Meeting& meeting) {
    const int round = meeting.round;
    if (++meeting.here == meeting.size) meeting.here = 0, ++meeting.round;
    progress = true;
    wait_for([&] { return meeting.round != round; });
}

float e4m3(uint8_t byte) {
    const int exponent = (byte >> 3) & 15, mantissa = byte & 7;
    if ((byte & 0x7F) == 0x7F) return NAN;
    const float v = exponent ? std::ldexp(1 + mantissa / 8.f, exponent - 7) : std::ldexp(mantissa / 8.f, -6);
    return byte & 0x80 ? -v : v;
}

// 128-byte swizzle as hardware does it: bits 4 to 6 of an address are exclusive-ored with its bits 7 to 9.
uint32_t swizzle(uint32_t address) { return address ^ (((address >> 7) & 7) << 4); }

// 32 numbers of row `row` of an operand, found through its descriptor.
void operand_row(uint64_t descriptor, int row, float* numbers) {
    require(descriptor >> 62 == 1, "descriptor does not say 128-byte swizzle");
    require(((descriptor >> 49) & 7) == 0, "descriptor has a base offset");
    const uint32_t start = (descriptor & 0x3FFF) << 4, group = ((descriptor >> 32) & 0x3FFF) << 4;
    static float table[256];
    if (table[0x38] != 1) for (int i = 0; i < 256; ++i) table[i] = e4m3(uint8_t(i));
    for (int c = 0; c < 32; ++c)
        numbers[c] = table[*self->block->at(swizzle(start + (row / 8) * group + (row % 8) * 128 + c), 1)];
}

// This thread's part of a product. Rows and columns as in the PTX ISA's figure of the m64nNk32 accumulator fragment.
void compute(const Product& p) {
    const int lane = self->index % 32, warp = self->index / 32 % 4;
    float a[2][32], b[32];
    for (int half = 0; half < 2; ++half) operand_row(p.a, warp * 16 + half * 8 + lane / 4, a[half]);
    for (int eight = 0; eight < p.registers / 4; ++eight) {
        for (int odd = 0; odd < 2; ++odd) {
            operand_row(p.b, eight * 8 + lane % 4 * 2 + odd, b);
            for (int half = 0; half < 2; ++half) {
                float& d = p.d[eight * 4 + half * 2 + odd];
                float sum = p.add ? d : 0;
                for (int k = 0; k < 32; ++k) sum += a[half][k] * b[k];
                d = sum;
            }
        }
    }
}

// One box, to block `block`: poisoned now, there at a time drawn at random.
void copy(Block& block, uint32_t target, const Map& map, uint32_t barrier, const int (&at)[3]) {
    require(block.alive > 0, "copy into a block that has ended");
    const int row = map.box[0] * map.element, rows = map.box[1] * (map.rank > 2 ? map.box[2] : 1), bytes = row * rows;
    require(target % (map.swizzle ? 1024 : 128) == 0, "target of a copy is not aligned");
    require(map.rank == 2 || map.box[2] == 1, "boxes of one matrix only");
    std::memset(block.at(target, bytes), 0x7F, bytes);
    block.barrier(barrier);
    cluster->landing.push_back([=, &block] {
        for (int y = 0; y < rows; ++y) {
            for (int x = 0; x < row; x += map.element) {
                const int64_t c = at[0] + x / map.element, r = at[1] + y, m = map.rank > 2 ? at[2] : 0;
                const bool inside = c >= 0 && r >= 0 && m >= 0 && c < map.size[0] && r < map.size[1] &&
                                    (map.rank == 2 || m < map.size[2]);
                const uint32_t address = target + y * row + x;
                uint8_t* to = block.at(map.swizzle ? swizzle(address) : address, map.element);
                if (inside) std::memcpy(to, map.data + c * map.element + r * map.stride[0] + m * map.stride[1], map.element);
                else std::memset(to, 0, map.element);
            }
        }
        Barrier& b = block.barrier(barrier);
        b.bytes -= bytes;
        b.settle();
    });
    progress = true;
}

const Map& map_of(const mext::TensorMap& map) { return reinterpret_cast<const Map&>(map); }

void entry() {
    try {
        kernel();
        if (!self->in_flight.empty()) throw Failure("ended with products in flight");
    } catch (const Failure& failure) {
        error = failure;
    }
    self->done = true;
    --self->block->alive;
    progress = true;
    pause();
}

void run_cluster(int first, int size, unsigned shared_bytes) {
    Cluster all;
    cluster = &all;
    all.meeting.size = size * mext::kThreads;
    for (int rank = 0; rank < size; ++rank) {
        all.blocks.push_back(std::make_unique<Block>());
        Block& block = *all.blocks.back();
        block.index = first + rank, block.rank = rank, block.meeting.size = mext::kThreads;
        for (Meeting& warp : block.warps) warp.size = 32;
        block.shared.assign(shared_bytes, 0x7F);
        for (int i = 0; i < mext::kThreads; ++i) {
            all.threads.push_back(std::make_unique<Thread>());
            Thread& thread = *all.threads.back();
            thread.index = i, thread.block = &block;
            getcontext(&thread.context);
            thread.context.uc_stack = {thread.stack.get(), 0, Thread::kStack};
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, entry, 0);
        }
    }
    std::vector<Thread*> order;
    for (auto& thread : all.threads) order.push_back(thread.get());
    // Some are slow: a block of a pair or one warpgroup of a block, for the whole run.
    const int slow_block = int(random_source() % size), slow_group = int(random_source() % 4);
    auto slow = [&](const Thread& thread) {
        return thread.block->rank == slow_block && (slow_group == 3 ? size > 1 : thread.index / 128 == slow_group);
    };
    while (!order.empty() && error.empty()) {
        progress = false;
        const size_t turn = random_source() % order.size();  // whoever begins, the others follow in their order
        bool skipping = random_source() % 8 != 0, skipped = false;
        for (size_t i = 0; i < order.size() && error.empty(); ++i) {
            self = order[(turn + i) % order.size()];
            if (skipping && slow(*self)) {
                skipped = true;
                continue;
            }
            swapcontext(&scheduler, &self->context);
        }
        std::erase_if(order, [](Thread* thread) { return thread->done; });
        const bool idle = !progress && !skipped;
        for (size_t i = all.landing.size(); i-- > 0;) {
            if (!idle && random_source() % 3) continue;
            auto land = all.landing[i];
            all.landing.erase(all.landing.begin() + long(i));
            try { land(); } catch (const Failure& failure) { error = failure; }
            progress = true;
        }
        if (!progress && !skipped && !order.empty()) error = "deadlock";
    }
    if (error.empty() && !all.landing.empty()) error = "ended with copies under way";
}

int setting(const char* name, int otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atoi(value) : otherwise;
}

}  // namespace

namespace mext {

int thread_index() { return self->index; }
int block_index() { return self->block->index; }
int block_count() { return blocks_in_grid; }
int cluster_rank() { return self->block->rank; }
uint32_t dynamic_shared() { return kBase; }
void block_sync() { meet(self->block->meeting); }
void warp_sync() { meet(self->block->warps[self->index / 32]); }
void cluster_sync() {
    warp_sync();
    meet(cluster->meeting);
}

float from_neighbour(float value) {
    Thread& me = *self;
    Thread* other = cluster->threads[me.block->rank * mext::kThreads + (me.index ^ 1)].get();
    me.shuffled[me.shuffles++ & 1] = value;
    progress = true;
    const int turn = me.shuffles;
    wait_for([&] { return other->shuffles >= turn; });
    return other->shuffled[(turn - 1) & 1];
}

void barrier_init(uint32_t address, int arrivals) {
    self->block->at(address, 8);
    require(address % 8 == 0, "barrier is not aligned");
    self->block->barriers[address] = {arrivals, arrivals, 0, 0};
}

void barrier_expect(uint32_t address, uint32_t bytes) {
    Barrier& barrier = self->block->barrier(address);
    barrier.bytes += bytes, --barrier.pending;
    barrier.settle();
    progress = true;
}

void barrier_arrive(uint32_t address) { barrier_arrive_at(address, self->block->rank); }

void barrier_arrive_at(uint32_t address, int rank) {
    Block& block = *cluster->blocks.at(rank);
    require(block.alive > 0, "arrival at a block that has ended");
    --block.barrier(address).pending;
    block.barrier(address).settle();
    progress = true;
}

void barrier_wait(uint32_t address, uint32_t parity) {
    Barrier& barrier = self->block->barrier(address);
    wait_for([&] { return barrier.phase != parity; });
}

void copy_2d(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y) {
    require(map_of(map).rank == 2, "copy_2d of a tensor that has not two dimensions");
    copy(*self->block, target, map_of(map), barrier, {x, y, 0});
}

void copy_3d(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
    require(map_of(map).rank == 3, "copy_3d of a tensor that has not three dimensions");
    copy(*self->block, target, map_of(map), barrier, {x, y, z});
}

void copy_2d_to_pair(uint32_t target, const TensorMap& map, uint32_t barrier, int x, int y) {
    require(cluster->blocks.size() == 2, "no pair");
    require(map_of(map).rank == 2, "copy_2d of a tensor that has not two dimensions");
    for (auto& block : cluster->blocks) copy(*block, target, map_of(map), barrier, {x, y, 0});
}

void multiply_begin() { self->in_flight.emplace_back(); }

void multiply(float* d, int registers, uint64_t a, uint64_t b, bool add) {
    require(!self->in_flight.empty(), "product without a beginning");
    if (!add) for (int i = 0; i < registers; ++i) d[i] = NAN;
    self->in_flight.back().push_back({d, registers, a, b, add});
}

void multiply_commit() {}

void multiply_wait(int in_flight) {
    while (int(self->in_flight.size()) > in_flight) {
        for (const Product& product : self->in_flight.front()) compute(product);
        self->in_flight.erase(self->in_flight.begin());
    }
}

float load_shared(uint32_t address) {
    float value;
    require(address % 4 == 0, "load is not aligned");
    std::memcpy(&value, self->block->at(address, 4), 4);
    return value;
}

void aligned(const void* p, int bytes) { require(reinterpret_cast<uintptr_t>(p) % bytes == 0, "store is not aligned"); }

}  // namespace mext

// ---- the driver API, as far as kernels/cuda/driver.py uses it. EMULATION_* variables say what it should report.

using Kernel = void(const mext::TensorMap&, const mext::TensorMap&, const mext::TensorMap&, const mext::TensorMap&,
                    const mext::Problem&);
struct Function {
    Kernel* body;
    bool pair;
    int shared = 48 * 1024;
};

extern "C" {

int cuInit(unsigned) { return setting("EMULATION_INIT", 0); }
int cuDriverGetVersion(int* version) { *version = setting("EMULATION_DRIVER", 13000); return 0; }
int cuDeviceGetCount(int* count) { *count = setting("EMULATION_DEVICES", 1); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    if (attribute == 75) *value = setting("EMULATION_CAPABILITY", 90) / 10;
    else if (attribute == 76) *value = setting("EMULATION_CAPABILITY", 90) % 10;
    else if (attribute == 16) *value = setting("EMULATION_SMS", 4);
    else return kInvalidValue;
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &blocks_in_grid; return 0; }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuModuleLoadData(void** module, const void* image) {
    if (std::memcmp(image, "\x7F" "ELF", 4) != 0) return 200;
    *module = &kernel;
    return setting("EMULATION_LOAD", 0);
}
int cuModuleGetFunction(void** function, void*, const char* name) {
    Dl_info here;
    dladdr(reinterpret_cast<void*>(&cuInit), &here);
    void* body = dlsym(dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD), name);
    if (!body) return 500;
    *function = new Function{reinterpret_cast<Kernel*>(body), std::string(name).ends_with("_pair")};
    return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value > 227 * 1024) return kInvalidValue;
    static_cast<Function*>(function)->shared = value;
    return 0;
}
int cuGetErrorString(int code, const char** text) {
    static std::string kept;
    kept = code == kLaunchFailed && !error.empty() ? error : "emulated error " + std::to_string(code);
    *text = kept.c_str();
    return 0;
}

int cuTensorMapEncodeTiled(Map* map, int type, unsigned rank, void* data, const uint64_t* size, const uint64_t* stride,
                           const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int, int) {
    const int element = type == 0 ? 1 : type == 7 ? 4 : 0;
    bool good = element && (rank == 2 || rank == 3) && interleave == 0 && (swizzle == 0 || swizzle == 3);
    good = good && reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && data;
    for (unsigned i = 0; good && i < rank; ++i) {
        good = size[i] > 0 && size[i] <= (1ull << 32) && box[i] > 0 && box[i] <= 256 && step[i] == 1;
        if (i + 1 < rank) good = good && stride[i] % 16 == 0 && stride[i] < (1ull << 40) && stride[i] >= size[0] * element;
    }
    good = good && box[0] * element % 16 == 0 && (swizzle == 0 || box[0] * element <= 128);
    if (!good) return kInvalidValue;
    std::memset(map, 0, 128);
    map->data = static_cast<uint8_t*>(data), map->element = element, map->rank = int(rank), map->swizzle = swizzle;
    for (unsigned i = 0; i < rank; ++i) {
        map->size[i] = uint32_t(size[i]), map->box[i] = box[i];
        if (i + 1 < rank) map->stride[i] = stride[i];
    }
    return 0;
}

int cuLaunchKernel(void* handle, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void*, void** parameters, void**) {
    const Function& function = *static_cast<Function*>(handle);
    const int size = function.pair ? 2 : 1;
    if (y * z * by * bz != 1 || bx != mext::kThreads || x == 0 || x % size || int(shared) > function.shared)
        return kInvalidValue;
    const auto maps = reinterpret_cast<mext::TensorMap**>(parameters);
    const auto problem = static_cast<const mext::Problem*>(parameters[4]);
    random_source.seed(unsigned(setting("EMULATION_SEED", 0)));
    blocks_in_grid = int(x);
    error.clear();
    kernel = [&] { function.body(*maps[0], *maps[1], *maps[2], *maps[3], *problem); };
    for (int first = 0; first < int(x) && error.empty(); first += size) run_cluster(first, size, shared);
    return error.empty() ? 0 : kLaunchFailed;
}

// ---- what the tests ask of the headers

int mext_swizzled(int row, int column) { return mext::swizzled(row, column); }
int mext_accumulator(int thread, int i) { return mext::accumulator_row(thread, i) * 1000 + mext::accumulator_column(thread, i); }
int mext_quad_column(int lane, int pair) { return mext::quad_column(lane, pair); }
int mext_problem_bytes() { return sizeof(mext::Problem); }

// rows, columns, blocks that share A, shared bytes with B in blocks, with B in tiles
void mext_tile(int which, int* facts) {
    auto of = [&](auto tile) {
        using T = decltype(tile);
        const int found[] = {T::kM, T::kN, T::kCluster, mext::Shared<T, false>::kBytes, mext::Shared<T, true>::kBytes};
        std::memcpy(facts, found, sizeof found);
    };
    switch (which) {
        case 0: return of(mext::Large());
        case 1: return of(mext::LargePair());
        case 2: return of(mext::Medium());
        case 3: return of(mext::MediumPair());
        case 4: return of(mext::Small());
    }
}

// All work of all blocks, six numbers each (row, row_end, column, group, step, steps); returns how many.
int mext_walk(int kind, int which, int blocks, const mext::Problem* problem, int* found, int limit) {
    int count = 0;
    auto walk_all = [&](auto walk_of) {
        for (int block = 0; block < blocks; ++block) {
            auto walk = walk_of(block);
            mext::Work work;
            while (count < limit && walk.next(*problem, work)) std::memcpy(found + 6 * count++, &work, sizeof work);
        }
    };
    auto with = [&](auto tile) {
        using T = decltype(tile);
        constexpr int c = T::kCluster;
        if (kind == 0) walk_all([&](int b) { return mext::DenseWalk<T>(b / c, blocks / c, b % c); });
        if (kind == 1) walk_all([&](int b) { return mext::GroupedWalk<T>(b / c, blocks / c, b % c); });
        if (kind == 2) walk_all([&](int b) { return mext::ContractedWalk<T>(b / c, blocks / c, b % c); });
    };
    switch (which) {
        case 0: with(mext::Large()); break;
        case 1: with(mext::LargePair()); break;
        case 2: with(mext::Medium()); break;
        case 3: with(mext::MediumPair()); break;
        case 4: with(mext::Small()); break;
    }
    return count;
}
}
