// Entry points of the native encoder; see encoder.h.

#include "encoder.h"

using namespace esper;

extern "C" {

// The graphs [first, last), a multiple of LANES apart from the end of the batch.
void esper_encode(const Graphs* g, int64_t first, int64_t last) {
  Arena arena;
  Tile tile(*g, arena);
  for (int64_t at = first; at < last; at += LANES) {
    tile.load(at);
    tile.forward();
    tile.store();
  }
}

// Adds the gradients of all parameters for the graphs [first, last).
void esper_encode_backward(const Graphs* g, int64_t first, int64_t last) {
  Arena arena;
  Tile tile(*g, arena);
  for (int64_t at = first; at < last; at += LANES) {
    tile.load(at);
    tile.forward();
    tile.backward();
  }
}
}
