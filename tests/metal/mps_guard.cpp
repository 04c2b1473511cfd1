// What PyTorch asks of a type of device before its dispatcher: which is current. Builds for Linux have no answer for MPS,
// and refuse to index a tensor there.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS> {
  c10::Device getDevice() const override {
    return c10::Device(c10::DeviceType::MPS, 0);
  }
  // None, so that autograd starts no thread for it.
  c10::DeviceIndex deviceCount() const noexcept override {
    return 0;
  }
};

const Guard guard;
const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::MPS, &guard);

}  // namespace
