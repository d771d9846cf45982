// What the host does for a kernel in tile registers, for tests that call one by themselves.
#include "cpu/tile_registers.h"

#include <optional>

// This thread has them in these shapes from now on.
extern "C" void ShapeTileRegisters(int rows, int pairs) {
  pa::CheckTileRegisters();
  thread_local std::optional<pa::TileRegisters> registers;
  registers.emplace(rows, pairs);
}
