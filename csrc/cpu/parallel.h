// Numbered pieces of one job, shared out over threads.
#pragma once

#include <cstdint>
#include <functional>

namespace wandapp {

// Calls piece(0) ... piece(pieces - 1), each once, on at most `threads` threads including the caller. The first
// exception of a piece is thrown again in the caller; the remaining pieces may then be left out.
//
// The threads are those of the OpenMP runtime in the process, torch's, where there is one: its threads spin for a while
// after their own work, and a second set of threads would wait for them to give up the cores. Elsewhere they are a pool
// of this module's (thread_pool.h).
void parallel_for(int64_t pieces, int threads, const std::function<void(int64_t)>& piece);

// From now on the threads are this module's own: for a module that is loaded in a forked child, where it cannot know
// whether the parent used OpenMP.
void leave_openmp();

// Which threads those are: "openmp" or "own". For tests.
const char* parallel_backend();

}  // namespace wandapp
