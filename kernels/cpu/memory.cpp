// Memory for results that is used again. Fresh memory is mapped page by page as it is first touched, at 2 GB/s with
// pages of 4 KiB and at 11 with huge ones (measured on a virtual machine): more than quantising costs. A training step
// makes tensors of the same sizes over and over, so what one leaves serves the next.
//
// A block goes to torch as a DLPack tensor, whose deleter brings it back: from whichever thread lets the last view go,
// and without Python.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t kHugePage = 1 << 21;
constexpr int64_t kMostKept = int64_t{256} << 20;  // bytes that wait for a user; what does not fit goes, oldest first

struct Block {
  void* data;
  int64_t size;
};

class Pool {
 public:
  Block take(int64_t bytes) {
    const int64_t size = size_of(bytes);
    // Never waits: a child forked while another thread was in here finds it locked for good, and goes without.
    if (const std::unique_lock<std::mutex> lock{mutex_, std::try_to_lock}; lock)
      for (size_t i = blocks_.size(); i-- > 0;)  // the newest first: more of it is in a cache
        if (blocks_[i].size == size) {
          const Block found = blocks_[i];
          blocks_.erase(blocks_.begin() + static_cast<int64_t>(i));
          kept_ -= size;
          return found;
        }
    void* data = nullptr;
    if (posix_memalign(&data, size < kHugePage ? 4096 : kHugePage, static_cast<size_t>(size)) != 0) return {nullptr, 0};
#if defined(__linux__)
    if (size >= kHugePage) madvise(data, static_cast<size_t>(size), MADV_HUGEPAGE);  // advice: refused, nothing is lost
#endif
    return {data, size};
  }

  void give(Block block) {
    const std::unique_lock<std::mutex> lock{mutex_, std::try_to_lock};
    if (!lock || block.size > kMostKept) return std::free(block.data);
    blocks_.push_back(block);
    kept_ += block.size;
    while (kept_ > kMostKept) {
      kept_ -= blocks_.front().size;
      std::free(blocks_.front().data);
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  // Rounded up to one of eight sizes between powers of two: groups of tokens vary from step to step.
  static int64_t size_of(int64_t bytes) {
    int64_t step = 4096;
    while (16 * step < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
  int64_t kept_ = 0;
};

Pool& pool() {
  static Pool& one = *new Pool;  // never destroyed: tensors die after static objects do
  return one;
}

constexpr int kMostDimensions = 8;

struct Managed {  // DLManagedTensor of dlpack.h: its layout is part of the protocol
  void* data;
  int32_t device_type, device;
  int32_t dimensions;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
  void* context;
  void (*deleter)(Managed*);

  Block block;  // ours from here on
  int64_t sizes[kMostDimensions];
};

}  // namespace

// A dense DLManagedTensor, not initialised, of numbers of a kind (as DLPack numbers kinds) and of so many bits; null
// where there is no memory.
extern "C" void* mext_take(const int64_t* shape, int dimensions, int kind, int bits) {
  constexpr int32_t kCpu = 1;
  if (dimensions > kMostDimensions) return nullptr;
  int64_t bytes = bits / 8;
  for (int i = 0; i < dimensions; ++i) bytes *= shape[i];
  const Block block = pool().take(bytes);
  auto* managed = block.data ? new (std::nothrow) Managed{} : nullptr;
  if (!managed) {
    std::free(block.data);
    return nullptr;
  }
  std::copy_n(shape, dimensions, managed->sizes);
  managed->data = block.data;
  managed->device_type = kCpu;
  managed->dimensions = dimensions;
  managed->kind = static_cast<uint8_t>(kind);
  managed->bits = static_cast<uint8_t>(bits);
  managed->lanes = 1;
  managed->shape = managed->sizes;
  managed->block = block;
  managed->deleter = [](Managed* self) {
    pool().give(self->block);
    delete self;
  };
  return managed;
}
