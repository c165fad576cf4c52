// How a Launcher does it: included by the file of each format.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

#include "contrast_kernel.h"
#include "launch.h"
#include "sign_step_kernel.h"

namespace clae_fast {
namespace gpu {

// How many blocks of a kernel a device holds at once, and on how many multiprocessors.
struct Room {
  int blocks, processors;
};

// Asked once for each device; a failure, which may pass, is asked about again.
template <typename Format, int BN>
Room room_of(int device) {
  constexpr int kDevices = 64;
  static std::atomic<std::uint64_t> known[kDevices];
  if (device < 0 || device >= kDevices) return {0, 0};
  if (const std::uint64_t found = known[device]) return {int(found >> 32), int(found & 0x7fffffff)};
  constexpr int bytes = Layout<Format, BN>::bytes;
  const auto kernel = contrast_kernel<Format, BN>;
  int cooperative = 0, optin = 0, processors = 0, blocks = 0;
  const bool asked =
      cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
          cudaSuccess &&
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  const bool small = asked && (!cooperative || bytes > optin);
  if (asked && !small &&
      (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
           cudaSuccess ||
       cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, bytes) !=
           cudaSuccess)) {
    cudaGetLastError();  // not to be found by whoever asks next
    return {0, 0};
  }
  if (!asked) {
    cudaGetLastError();
    return {0, 0};
  }
  const int resident = blocks * processors;
  known[device] = std::uint64_t(resident) << 32 | 1ull << 31 | std::uint64_t(processors);
  return {resident, processors};
}

template <typename Format, int BN>
bool serves(const Call& call, int device, bool apart) {
  const Room room = room_of<Format, BN>(device);
  const int most = !apart                          ? room.blocks
                   : room.blocks < room.processors ? room.blocks
                                                   : room.processors;
  return extents_of(call, BN).blocks() <= most;
}

template <typename Format, int BN>
cudaError_t launch_contrast(const Call& call, cudaStream_t stream) {
  Params params = params_of(call, BN);
  void* arguments[] = {&params};
  return cudaLaunchCooperativeKernel(contrast_kernel<Format, BN>,
                                     unsigned(extents_of(call, BN).blocks()), kThreads, arguments,
                                     Layout<Format, BN>::bytes, stream);
}

inline const char* said(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Of bfloat16 rows the weights take half the space: there a tile may have 512 columns.
template <typename Format>
inline constexpr bool kWide = kWeightBytes<Format> == 2;

template <typename Format>
const char* Launcher<Format>::unusable(int device) {
  int before = 0;
  cudaFuncAttributes attributes;
  const bool moved = cudaGetDevice(&before) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
  const char* error =
      moved ? said(cudaFuncGetAttributes(&attributes, sign_step_kernel<Format>)) : nullptr;
  if (moved) cudaSetDevice(before);
  return moved ? error : "its device cannot be set";
}

template <typename Format>
int Launcher<Format>::columns(const Call& call, int device) {
  for (const bool apart : {true, false}) {
    if (serves<Format, 64>(call, device, apart)) return 64;
    if (serves<Format, 128>(call, device, apart)) return 128;
    if (serves<Format, 256>(call, device, apart)) return 256;
    if constexpr (kWide<Format>) {
      if (serves<Format, 512>(call, device, apart)) return 512;
    }
  }
  return 0;
}

template <typename Format>
const char* Launcher<Format>::contrast(const Call& call, int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (columns(call, device)) {
    case 64:
      return said(launch_contrast<Format, 64>(call, on));
    case 128:
      return said(launch_contrast<Format, 128>(call, on));
    case 256:
      return said(launch_contrast<Format, 256>(call, on));
    case 512:
      if constexpr (kWide<Format>) return said(launch_contrast<Format, 512>(call, on));
      [[fallthrough]];
    default:
      return "no tile of contrast fits this GPU";
  }
}

template <typename Format>
const char* Launcher<Format>::sign_step(const SignStepParams& params, void* stream) {
  if (params.n == 0) return nullptr;
  constexpr std::uint64_t per_block = std::uint64_t(kSignStepThreads) * kVector<Format>;
  const std::uint64_t blocks = (params.n + per_block - 1) / per_block;
  if (blocks > 0x7fffffffu) return "sign_step: more elements than a grid has threads for";
  sign_step_kernel<Format>
      <<<unsigned(blocks), kSignStepThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return said(cudaGetLastError());
}

}  // namespace gpu
}  // namespace clae_fast
