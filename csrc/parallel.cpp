// torch's own OpenMP threads are used through the process's GOMP_parallel, looked up at run time: linking
// to an OpenMP library would load a second one beside torch's, and two pools that spin on the same cores
// cost more than all threads bring. Where there is none (macOS, Windows), plain threads do.
#include "parallel.h"

#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace expface {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNum = int (*)();

struct OpenMP {
  Parallel parallel = nullptr;
  ThreadNum thread_num = nullptr;
  ThreadNum num_threads = nullptr;

  OpenMP() {
#ifndef _WIN32
    parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_num = reinterpret_cast<ThreadNum>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    num_threads = reinterpret_cast<ThreadNum>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
  }
  bool usable() const { return parallel && thread_num && num_threads; }
};

const OpenMP& openmp() {
  static const OpenMP found;
  return found;
}

struct Work {
  int64_t count;
  const std::function<void(int64_t, int64_t, int)>* body;

  void share(int thread, int threads) const {
    const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
    if (begin < end) (*body)(begin, end, thread);
  }
};

void openmp_entry(void* data) {
  // The runtime may give fewer threads than were asked for.
  static_cast<const Work*>(data)->share(openmp().thread_num(), openmp().num_threads());
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t, int)>& body) {
  Work work{count, &body};
  if (threads <= 1 || count <= 1) {
    work.share(0, 1);
  } else if (openmp().usable()) {
    openmp().parallel(openmp_entry, &work, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([&work, t, threads] { work.share(t, threads); });
    work.share(0, threads);
    for (auto& other : others) other.join();
  }
}

std::string thread_runtime() { return openmp().usable() ? "GOMP_parallel" : "std::thread"; }

}  // namespace expface
