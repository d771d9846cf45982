// What the host does for a kernel in tile registers, for tests that call one by themselves.
#include "cpu/tile_registers.h"

// This thread has them from now on.
extern "C" void ShapeTileRegisters() {
  pa::CheckTileRegisters();
  thread_local const pa::TileRegisters registers(16, 16);
}
