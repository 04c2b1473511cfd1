// What PyTorch asks of a type of device before its dispatcher: which is current. Builds for Linux have no answer for MPS,
// and refuse to index a tensor there.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device mps(c10::DeviceType::MPS, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return c10::DeviceType::MPS;
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return mps;
  }
  c10::Device getDevice() const override {
    return mps;
  }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, mps);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, mps);
  }
  // None, so that autograd starts no thread for it.
  c10::DeviceIndex deviceCount() const noexcept override {
    return 0;
  }
};

const Guard guard;
const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::MPS, &guard);

}  // namespace
