// The values that an atomic variable had before, for relaxed loads, which may give them.
//
// A relaxed load gives any value that the variable has had in this launch, but none that is older than one which the
// thread has written or been given before, nor than one that a thread which a barrier orders before it has. What
// earlier launches wrote is the oldest value.
#pragma once

#include "memory.h"

// Forgets all histories. Of the loads that could give an older value one in ``every`` does; 0: none.
void history_reset(uint32_t every);

// The running thread is about to write an atomic variable: keeps the value that it has now.
void history_keep(Cell& cell, uint64_t address, uint32_t size, const Access& now);

// The running thread loads an atomic variable: the older value that it is given, or null for the newest.
const void* history_load(const Cell& cell, const Access& now, uint32_t simdgroup);
