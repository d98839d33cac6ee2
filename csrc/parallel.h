// parallel_for over the threads that torch already has.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace expface {

// Calls body(begin, end, thread) for `threads` or fewer disjoint ranges that cover [0, count).
void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t, int)>& body);


// "GOMP_parallel" where the process has an OpenMP runtime loaded, whose threads are shared, else "std::thread".
std::string thread_runtime();

}  // namespace expface
