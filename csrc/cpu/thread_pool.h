// A few persistent threads that work through the numbered pieces of one job.
//
// The caller works too and never waits for a thread that has not started: a sleeping or preempted thread costs nothing.
// Threads spin for some microseconds after a job, because the next layer comes soon, then sleep.
#pragma once

#include <cstdint>
#include <functional>

namespace wandapp {

// Calls piece(0) ... piece(pieces - 1), each once, on at most `threads` threads including the caller. A second job at
// the same time runs on its caller alone. After fork() the child starts with no threads. The first exception of a piece
// is thrown again in the caller; the remaining pieces may then be left out.
void parallel_for(int64_t pieces, int threads, const std::function<void(int64_t)>& piece);

}  // namespace wandapp
