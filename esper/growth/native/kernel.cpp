// One host after the other: epochs and evaluations, each wholly in a core's cache. What is computed is what
// esper/growth/host.py, graft.py and epoch.py compute for stacked hosts.

#include "host.h"

using namespace esper;

extern "C" {

// Trains the rows [first, last), which must be hosts in order, for one epoch.
void esper_train(const Population* p, const Rows* rows, const Training* t, int64_t first, int64_t last) {
  Flush flush;
  Arena arena;
  for (int64_t row = first; row < last; ++row) {
    Host host(*p, *rows, row, 0, arena);
    const int64_t labels = host.labels(), all = t->batch * labels;
    std::vector<float> losses(all);
    double mean = 0;
    for (int64_t step = 0; step < t->steps; ++step) {
      const int64_t* index = t->index + (row * t->steps + step) * t->batch;
      const int64_t* y = t->labels + (row * t->steps + step) * all;
      const bool measure = step == t->steps - 1;
      host.zero_gradients();
      if (measure) host.forget_signals();
      for (int64_t at = 0; at < t->batch; at += LANES) {
        const int lanes = int(std::min<int64_t>(LANES, t->batch - at));
        host.load(t->x, index + at, lanes);
        host.forward();
        host.cross_entropy(y + at * labels, lanes, losses.data() + at * labels, nullptr);
        host.backward(y + at * labels, lanes, 1.0f / all, measure);
      }
      double loss = 0;
      for (float value : losses) loss += value;
      mean += loss / all;
      host.update(*t, step);
    }
    t->loss[row] = float(mean / t->steps);
    host.measure(*t);
  }
}

// Evaluates the rows [first, last).
void esper_evaluate(const Population* p, const Rows* rows, const Evaluation* e, int64_t first, int64_t last) {
  Flush flush;
  Arena arena, shared;
  const int64_t features = p->tokens * p->inputs, tiles = (e->samples + LANES - 1) / LANES;
  shared.take(tiles * features);
  shared.restart(true);
  Row* x = shared.take(tiles * features);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int lanes = int(std::min<int64_t>(LANES, e->samples - tile * LANES));
    transpose(x + tile * features, e->x + tile * LANES * features, nullptr, lanes, features);
  }
  for (int64_t row = first; row < last; ++row) {
    const int64_t samples = row < e->full ? e->samples : e->fewer, measured = row < e->full ? e->measured : 0;
    Host host(*p, *rows, row, measured, arena);
    const int64_t labels = host.labels(), all = e->samples * labels;
    host.forget_trace();
    for (int64_t at = 0; at < samples; at += LANES) {
      const int lanes = int(std::min<int64_t>(LANES, samples - at));
      host.read(x + at / LANES * features);
      host.forward();
      float* logits = e->logits ? e->logits + (row * all + at * labels) * p->classes : nullptr;
      host.cross_entropy(e->labels + at * labels, lanes, e->loss + row * all + at * labels, logits);
      if (at < measured) host.trace(at / LANES, int(std::min<int64_t>(lanes, measured - at)));
    }
    if (measured) host.activations(e->activations + row * p->stages * 5, measured);
  }
}
}
