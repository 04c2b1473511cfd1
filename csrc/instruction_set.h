// The widest instruction set that this processor has and this build has kernels for.
#pragma once

namespace omniops {

enum class InstructionSet { baseline, avx2, avx512 };

// Chosen once. OMNIOPS_CPU_CAPABILITY=baseline, avx2 or avx512 in the environment asks for no more than that.
InstructionSet instruction_set();

const char* name(InstructionSet set);

}  // namespace omniops
