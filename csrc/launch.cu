#include <device/launch.h>

#include <cudaTypedefs.h>

#include <utility>

namespace bitune {

Error error_of(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return {};
  cudaGetLastError();
  return {int(status), std::string(doing) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")"};
}

Error limits_of(int device, DeviceLimits* limits) {
  int major = 0;
  int minor = 0;
  for (auto [value, attribute] : {std::pair{&major, cudaDevAttrComputeCapabilityMajor},
                                  std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
                                  std::pair{&limits->multiprocessors, cudaDevAttrMultiProcessorCount}}) {
    cudaError_t status = cudaDeviceGetAttribute(value, attribute, device);
    if (status != cudaSuccess) return error_of(status, "asking the device for its limits");
  }
  limits->capability = 10 * major + minor;
  return {};
}

// libcuda is found when it is first needed: machines that build wheels have none.
static PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return result == cudaDriverEntryPointSuccess ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found) : nullptr;
}

Error map_rows(const Rows& x, Element element, int num_heads, int dim, int box_rows, TensorMap* map) {
  static const auto encode = find_encode();
  if (!encode) return {-1, "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0"};
  cuuint64_t sizes[] = {cuuint64_t(dim), cuuint64_t(x.rows), cuuint64_t(num_heads)};
  cuuint64_t strides[] = {cuuint64_t(x.stride_row) * 2, cuuint64_t(x.stride_head) * 2};  // bytes, from dimension 1 on
  cuuint32_t box[] = {64, cuuint32_t(box_rows), 1};
  cuuint32_t steps[] = {1, 1, 1};
  CUresult result =
      encode(map, element == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
             x.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {int(result), "cuTensorMapEncodeTiled refused rows [" + std::to_string(x.rows) + ", " +
                           std::to_string(num_heads) + ", " + std::to_string(dim) + "] with strides " +
                           std::to_string(x.stride_row) + ", " + std::to_string(x.stride_head) + " (CUresult " +
                           std::to_string(int(result)) + ")"};
}

}  // namespace bitune
