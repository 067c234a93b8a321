// Makes a CPU build of PyTorch believe that there is one CUDA device, which has no memory and computes nothing.
//
// Loaded before PyTorch, this replaces what the CUDA library of PyTorch registers: the guard that tells the current
// device, the hooks that say whether CUDA is there, and the choice of an attention kernel. Tensors on the device must
// then be fake ones, which have a shape, a type and a device and nothing else: see emulated_cuda.py.

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/SDPBackend.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return {CUDA, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return getStream(stream.device()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
at::RegistererCUDAHooksRegistry hooks(
    "CUDAHooks", at::CUDAHooksRegistry(), at::RegistererCUDAHooksRegistry::DefaultCreator<Hooks>);

// Flash attention takes 16-bit numbers and no mask, the memory-efficient kernel the rest.
int64_t choose_attention(const at::Tensor& query, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>& mask, double, bool, std::optional<double>, bool) {
  const bool flash = query.element_size() == 2 && !mask.has_value();
  auto& context = at::globalContext();
  if (flash && context.userEnabledFlashSDP()) return static_cast<int64_t>(at::SDPBackend::flash_attention);
  if (context.userEnabledMemEfficientSDP()) return static_cast<int64_t>(at::SDPBackend::efficient_attention);
  return static_cast<int64_t>(at::SDPBackend::math);
}
at::native::RegisterCUDADispatch<decltype(at::native::_fused_sdp_choice_stub)> attention(
    at::native::_fused_sdp_choice_stub, &choose_attention);

}  // namespace
