// The tile registers of AMX: permission to use them, and their shape while kernels run.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "shared/errors.h"

namespace pa {

// Linux saves the tile registers of a process that asks for them, since they take 8 KB of every thread's state. 0, or
// the errno with which it refuses.
inline int AskForTileRegisters() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const int error = syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno;
  return error;
}

inline void CheckTileRegisters() {
  if (const int error = AskForTileRegisters()) {
    Raise("RuntimeError", "target: expected leave to use the tile registers of AMX, and Linux refused: %s",
          std::strerror(error));
  }
}

// While it lives this thread has eight tile registers of rows of 64 bytes: 0 to 3 for sums of so many rows, 4 and 5 for
// a left and a right operand of 16 pairs, 6 and 7 for those of so many pairs. With 16 of both all are of 16 rows. A
// caller's shapes come back after it, with zeros in the registers, which no function has to keep.
class TileRegisters {
 public:
  TileRegisters(int rows, int pairs) {
    const auto m = static_cast<uint8_t>(rows), k = static_cast<uint8_t>(pairs);
    const Shapes shapes = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, static_cast<uint16_t>(4 * k), 64}, {m, m, m, m, m, 16, m, k}};
    asm volatile("sttilecfg %0" : "=m"(callers_));
    asm volatile("ldtilecfg %0" : : "m"(shapes));
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

  Shapes callers_;
};

}  // namespace pa
