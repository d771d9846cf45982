// The tile registers of AMX: permission to use them, and their shape while kernels run.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "shared/errors.h"

namespace pa {

// Linux saves the tile registers of a process that asks for them, since they take 8 KB of every thread's state.
inline void CheckTileRegisters() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const int error = syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno;
  if (error != 0) {
    Raise("RuntimeError", "target: expected leave to use the tile registers of AMX, and Linux refused: %s",
          std::strerror(error));
  }
}

// While it lives this thread has eight tile registers of 16 rows of 64 bytes. A caller's shapes come back after it,
// with zeros in the registers, which no function has to keep.
class TileRegisters {
 public:
  TileRegisters() {
    asm volatile("sttilecfg %0" : "=m"(callers_));
    asm volatile("ldtilecfg %0" : : "m"(kSixteenRows));
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() {
    if (callers_.palette == 0) {
      asm volatile("tilerelease");
    } else {
      asm volatile("ldtilecfg %0" : : "m"(callers_));
    }
  }

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Shapes) == 64);
  static constexpr Shapes kSixteenRows = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

  Shapes callers_;
};

}  // namespace pa
