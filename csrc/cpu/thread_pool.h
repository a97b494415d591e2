// A few persistent threads, for processes without an OpenMP runtime.
//
// The caller works too and never waits for a thread that has not started: a sleeping or preempted thread costs nothing.
// Threads spin for some microseconds after a job, because the next layer comes soon, then sleep.
#pragma once

namespace wandapp {

class Job;

// Works through the job on at most `threads` threads including the caller. A second job at the same time runs on its
// caller alone, and so does one for which the system gives no thread. After fork() the child starts with no threads.
void work_in_pool(Job& job, int threads);

}  // namespace wandapp
