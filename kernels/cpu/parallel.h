// Units of work spread over the threads that torch has.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mext {

// work(data) on up to `threads` threads at once, this one among them. Fewer may come: `work` is to take of what is left
// until nothing is.
void on_threads(int threads, void (*work)(void*), void* data);

constexpr int kChunksAThread = 4;  // a thread that comes late leaves some of its share to the others

// body(first, last) over ranges that together are [0, count).
template <class Body>
void in_parallel(int64_t count, int threads, const Body& body) {
  if (count <= 0) return;
  if (threads <= 1 || count == 1) return body(0, count);
  struct Work {
    const Body& body;
    int64_t count, chunks;
    std::atomic<int64_t> taken{0};
  } work{body, count, std::min<int64_t>(count, int64_t{kChunksAThread} * threads)};
  on_threads(
      threads,
      [](void* data) {
        Work& all = *static_cast<Work*>(data);
        for (int64_t i; (i = all.taken.fetch_add(1, std::memory_order_relaxed)) < all.chunks;)
          all.body(all.count * i / all.chunks, all.count * (i + 1) / all.chunks);
      },
      &work);
}

}  // namespace mext
