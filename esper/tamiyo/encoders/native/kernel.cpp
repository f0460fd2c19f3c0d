// Entry points of the native encoder; see encoder.h.

#include "encoder.h"

using namespace esper;

extern "C" {

// Rows of LANES floats that `kept` holds of each tile.
int64_t esper_encoder_rows(const Graphs* g) { return Tile(*g).rows(); }

// The graphs [first, last), a multiple of LANES apart from the end of the batch.
void esper_encode(const Graphs* g, int64_t first, int64_t last) {
  Flush flush;
  Tile tile(*g);
  for (int64_t at = first; at < last; at += LANES) {
    tile.load(at);
    tile.forward();
    tile.store();
  }
}

// Adds the gradients of all parameters for the graphs [first, last), which have been encoded into the same `kept`.
void esper_encode_backward(const Graphs* g, int64_t first, int64_t last) {
  Flush flush;
  Tile tile(*g);
  for (int64_t at = first; at < last; at += LANES) tile.backward(at);
}
}
