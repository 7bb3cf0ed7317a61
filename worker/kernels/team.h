// The process's compute threads: they spin briefly between runs, then sleep. Made at the first run that needs them, made
// anew in a child after fork, never joined at exit.
#pragma once

struct Team;

constexpr int kMaxThreads = 256;

void team_set_threads(int threads);
int team_threads();
// The team, for one run; other callers wait for their turn. `threads` is how many there are, the caller included.
Team* team_acquire(int* threads);
void team_release(Team* team);
// Runs `work(task, thread)` on every thread of an acquired team, the caller being thread 0.
void team_run(Team* team, void* task, void (*work)(void*, int));
