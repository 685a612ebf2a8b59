// The one function of the CUDA driver that is used: cuTensorMapEncodeTiled.
#pragma once

namespace ptx::runtime {

void* driver_function(const char* name);  // null: there is none

}  // namespace ptx::runtime
