#pragma once

namespace omniops {

enum class Dtype { float64, float32, float16, bfloat16 };

}  // namespace omniops
