// tvm-ffi's C interface: what an entry point is given, and how its errors and results leave it.
#pragma once

#include <tvm/ffi/c_api.h>

#include <cstdint>
#include <new>

#include "shared/errors.h"

namespace pa {

// What an entry point takes in one place.
struct Parameter {
  int position;
  const char* name;
};

// The arguments of one call.
class Inputs {
 public:
  Inputs(const TVMFFIAny* args, int32_t num_args, int32_t expected) : args_(args) {
    if (num_args != expected) Raise("TypeError", "expected %d arguments, got %d", expected, num_args);
  }
  bool IsNone(const Parameter& of) const { return args_[of.position].type_index == kTVMFFINone; }
  const DLTensor& Tensor(const Parameter& of) const {
    const TVMFFIAny& given = args_[of.position];
    if (given.type_index == kTVMFFIDLTensorPtr) return *static_cast<const DLTensor*>(given.v_ptr);
    if (given.type_index == kTVMFFITensor) return *TVMFFITensorGetDLTensorPtr(given.v_obj);
    if (given.type_index == kTVMFFINone) Raise("TypeError", "%s: expected an array, got none", of.name);
    Raise("TypeError", "%s: expected an array, got tvm-ffi type index %d", of.name, given.type_index);
  }
  // The tensor object of an argument, which owns its memory.
  TVMFFIObjectHandle Object(const Parameter& of) const {
    const TVMFFIAny& given = args_[of.position];
    if (given.type_index == kTVMFFITensor) return given.v_obj;
    Raise("TypeError", "%s: expected a tvm-ffi Tensor, got tvm-ffi type index %d", of.name, given.type_index);
  }
  int64_t Int(const Parameter& of) const {
    const TVMFFIAny& given = args_[of.position];
    if (given.type_index == kTVMFFIInt) return given.v_int64;
    Raise("TypeError", "%s: expected an integer of 64 bits, got tvm-ffi type index %d", of.name, given.type_index);
  }
  double Float(const Parameter& of) const {
    const TVMFFIAny& given = args_[of.position];
    return given.type_index == kTVMFFIFloat ? given.v_float64 : static_cast<double>(Int(of));
  }

 private:
  const TVMFFIAny* args_;
};

// Run an entry point; what it throws becomes tvm-ffi's raised error.
template <typename Body>
int Guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const Error& error) {
    TVMFFIErrorSetRaisedFromCStr(error.kind, error.message);
  } catch (const std::bad_alloc&) {
    TVMFFIErrorSetRaisedFromCStr("MemoryError", "no memory for decode's workspace");
  }
  return -1;
}

inline void ReturnText(const char* text, size_t size, TVMFFIAny* result) {
  const TVMFFIByteArray bytes{text, size};
  if (TVMFFIStringFromByteArray(&bytes, result) != 0) throw std::bad_alloc();
}

}  // namespace pa

// Export function(inputs, result) as the entry point of a name, which takes these parameters.
#define PA_EXPORT(name, parameters, function)                                                                         \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_##name(void*, const TVMFFIAny* args, int32_t count, \
                                                                         TVMFFIAny* result) {                         \
    return pa::Guarded([&] { function(pa::Inputs(args, count, parameters::kCount), result); });                       \
  }
