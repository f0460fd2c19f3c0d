// A host with the seeds that run in it: forward, backward and Adam on one tile of samples after the other, and what is
// measured of them. The structures are those of esper/growth/native/engine.py, field by field.

#pragma once

#include <algorithm>
#include <vector>

#include "seed.h"

namespace esper {

struct Population {
  int64_t inputs, classes, width, stages, tokens, per_token, causal, size;
  const int64_t* place;  // [2 * (stages + 2)], where weight and bias of each layer start
  const Table* tables;   // [0]: each token by itself; [1]: the stages'
  const Blueprint* blueprints;
  float *theta, *average, *square;                    // [hosts, size]
  const int64_t *widths, *depths, *steps, *seed_steps;  // [hosts], and [hosts, stages]
  const float *rate, *low, *high, *leak, *shift, *units, *gain;  // gain may be null
};

// What runs: rows of hosts, each [rows] or [rows, stages].
struct Rows {
  const int64_t *host, *kind;  // kind is negative where no seed runs
  const float* alpha;
  const uint8_t* isolated;
};

struct Training {
  const float* x;          // [samples, tokens, inputs]
  const int64_t *index, *labels;  // [hosts, steps, batch], and so the labels, for each token if they are per token
  int64_t steps, batch;
  double beta1, beta2, epsilon;
  float *loss;        // [hosts]
  float *squares;     // [hosts, 4, layers]: of parameters, gradients, the last update and mean gradients
  float *seed_rms, *backward_rms, *growth;  // [hosts, stages]
};

struct Evaluation {
  const float* x;  // [samples, tokens, inputs]
  const int64_t* labels;
  int64_t samples, measured;  // activations are measured on the first `measured` samples
  int64_t full, fewer;        // rows from `full` on see the first `fewer` samples and are not measured
  float *loss;                // [rows, labels]
  float *logits;              // [rows, labels, classes], or null
  float *activations;         // [rows, stages, 5], or null
};

// One row: a host with the seeds that run in it, and room for one tile.
class Host {
 public:
  // `measured` samples will be traced.
  Host(const Population& p, const Rows& rows, int64_t row, int64_t measured, Arena& arena)
      : p(p), traced_tiles_((measured + LANES - 1) / LANES), room_{p.tokens, p.width, p.causal, p.tables, {}, {}, {}} {
    host_ = rows.host[row];
    width_ = p.widths[host_];
    depth_ = p.depths[host_];
    tokens_ = p.tokens;
    arena.restart(false);
    lay_out(rows, row, arena);
    arena.restart(true);
    lay_out(rows, row, arena);
  }

  int64_t labels() const { return p.per_token ? tokens_ : 1; }

  // Takes the samples index[0 .. lanes) of x, or the first ones.
  void load(const float* x, const int64_t* index, int lanes) {
    transpose(x_, x, index, lanes, tokens_ * p.inputs);
    read(x_);
  }

  // Takes a tile of samples [tokens, inputs], which must stay where it is.
  void read(const Row* tile) {
    seen_ = tile;
    if (!p.gain) return;
    const float* gain = p.gain + host_ * p.inputs;
    for (int64_t f = 0; f < tokens_ * p.inputs; ++f)
      for (int c = 0; c < CHUNKS; ++c) x_[f].part[c] = tile[f].part[c] * gain[f % p.inputs];
    seen_ = x_;
  }

  void forward() {
    Row* h = stem_;
    layer(0).forward(seen_, h, tokens_);
    for (int64_t i = 0; i < tokens_ * width_; ++i)
      for (V& part : h[i].part) part = part < 0.0f ? spread(0.0f) : part;
    for (int64_t s = 0; s < depth_; ++s) {
      sources_[s] = h;
      layer(s + 1).forward(h, outputs_[s], tokens_);
      activate(s);
      h = outputs_[s];
      if (Seed* seed = seeds_[s]) {
        seed->run(seed->blueprint->reads_source ? sources_[s] : h);
        if (!seed->isolated) {
          copy(slots_[s], h, tokens_ * width_);
          add(slots_[s], seed->result(), tokens_ * width_, seed->alpha);
          h = slots_[s];
        }
      }
    }
    last_ = h;
    if (!p.per_token && tokens_ > 1) {
      fill(pooled_, width_, 0.0f);
      for (int64_t t = 0; t < tokens_; ++t) add(pooled_, h + t * width_, width_, 1.0f / tokens_);
      h = pooled_;
    }
    layer(p.stages + 1).forward(h, logits_, labels());
  }

  // The loss of each label of the tile, [lanes, labels] to `loss`; leaves probabilities in the place of logits.
  void cross_entropy(const int64_t* y, int lanes, float* loss, float* logits) {
    const int64_t classes = p.classes;
    const float* values = reinterpret_cast<const float*>(logits_);
    for (int64_t t = 0; t < labels(); ++t) {
      Row* row = logits_ + t * classes;
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t at = lane * labels() + t;
        loss[at] = -values[(t * classes + y[at]) * LANES + lane];
        if (logits)
          for (int64_t k = 0; k < classes; ++k) logits[at * classes + k] = values[(t * classes + k) * LANES + lane];
      }
      Row top = row[0], whole;
      fill(&whole, 1, 0.0f);
      for (int c = 0; c < CHUNKS; ++c) {
        for (int64_t k = 1; k < classes; ++k) top.part[c] = larger(row[k].part[c], top.part[c]);
        for (int64_t k = 0; k < classes; ++k)
          whole.part[c] += row[k].part[c] = exponential(row[k].part[c] - top.part[c]);
        for (int64_t k = 0; k < classes; ++k) row[k].part[c] /= whole.part[c];
      }
      for (int lane = 0; lane < lanes; ++lane)
        loss[lane * labels() + t] += reinterpret_cast<float*>(&top)[lane] +
                                     std::log(reinterpret_cast<float*>(&whole)[lane]);
    }
  }

  // From probabilities to gradients of all parameters, which are added; `weight` is that of one label in the mean.
  void backward(const int64_t* y, int lanes, float weight, bool measure) {
    const int64_t classes = p.classes, all = tokens_ * width_;
    float* values = reinterpret_cast<float*>(logits_);
    for (int64_t i = 0; i < labels() * classes; ++i)
      for (int lane = 0; lane < LANES; ++lane) values[i * LANES + lane] *= lane < lanes ? weight : 0.0f;
    for (int lane = 0; lane < lanes; ++lane)
      for (int64_t t = 0; t < labels(); ++t) values[(t * classes + y[lane * labels() + t]) * LANES + lane] -= weight;
    Row *g = g_[0], *next = g_[1];
    if (!p.per_token && tokens_ > 1) {
      fill(pooled_gradient_, width_, 0.0f);
      layer(p.stages + 1).backward(pooled_, logits_, pooled_gradient_, 1);
      fill(g, all, 0.0f);
      for (int64_t t = 0; t < tokens_; ++t) add(g + t * width_, pooled_gradient_, width_, 1.0f / tokens_);
    } else {
      fill(g, all, 0.0f);
      layer(p.stages + 1).backward(last_, logits_, g, labels());
    }
    for (int64_t s = depth_ - 1; s >= 0; --s) {
      fill(next, all, 0.0f);
      if (Seed* seed = seeds_[s]) {
        Row* fed = seed->blueprint->reads_source ? next : g;
        seed->unwind(seed->blueprint->reads_source ? sources_[s] : outputs_[s], g, seed->isolated ? nullptr : fed);
      }
      if (measure) {
        V squares = spread(0.0f);
        for (int64_t i = 0; i < all; ++i)
          for (const V& part : g[i].part) squares += part * part;
        signal_[s] += sum(squares);
        int32_t same[tokens_];
        for (int64_t t = 0; t < tokens_; ++t) same[t] = int32_t(t * width_);
        outer(growth_ + s * p.width * p.width, width_, sources_[s], width_, g, width_, same, same, tokens_);
      }
      for (int64_t i = 0; i < all; ++i)
        for (int c = 0; c < CHUNKS; ++c) g[i].part[c] *= slopes_[s][i].part[c];
      layer(s + 1).backward(sources_[s], g, next, tokens_);
      std::swap(g, next);
    }
    for (int64_t i = 0; i < all; ++i)
      for (int c = 0; c < CHUNKS; ++c) g[i].part[c] = stem_[i].part[c] > 0.0f ? g[i].part[c] : spread(0.0f);
    layer(0).backward(seen_, g, nullptr, tokens_);
  }

  void zero_gradients() {
    std::fill_n(gradient_, p.size, 0.0f);
    for (int64_t s = 0; s < depth_; ++s)
      if (seeds_[s]) std::fill_n(seeds_[s]->gradient, seeds_[s]->blueprint->size, 0.0f);
  }

  void forget_signals() {
    std::fill_n(signal_, p.stages, 0.0f);
    std::fill_n(growth_, p.stages * p.width * p.width, 0.0f);
  }

  // One step of Adam, in the efficient order of its section 2; `step` counts from 0 in this epoch.
  void update(const Training& training, int64_t step) {
    auto adam = [&](float* __restrict theta, float* __restrict m, float* __restrict v, const float* __restrict g,
                    int64_t size, int64_t before) {
      const float rate = size_of(training, before + step + 1), epsilon = training.epsilon;
      const float slow = 1 - training.beta1, fast = 1 - training.beta2, keep = training.beta2;
      for (int64_t i = 0; i < size; ++i) {
        m[i] += (g[i] - m[i]) * slow;
        v[i] = v[i] * keep + g[i] * g[i] * fast;
        theta[i] -= rate * m[i] / (__builtin_sqrtf(v[i]) + epsilon);
      }
    };
    const int64_t at = host_ * p.size;
    // Layers that the host lacks are 0 and stay so: what lies between its stages and the head is passed over.
    const int64_t own = p.place[2 * (depth_ + 1)], head = p.place[2 * (p.stages + 1)];
    for (auto [from, to] : {std::pair(int64_t(0), own), std::pair(head, p.size)})
      adam(p.theta + at + from, p.average + at + from, p.square + at + from, gradient_ + from, to - from,
           p.steps[host_]);
    for (int64_t s = 0; s < depth_; ++s)
      if (Seed* seed = seeds_[s])
        adam(seed->theta, seed->average, seed->square, seed->gradient, seed->blueprint->size,
             p.seed_steps[host_ * p.stages + s]);
  }

  // What the moments tell after the last step, and the signals of its backward pass.
  void measure(const Training& training) const {
    const int64_t layers = p.stages + 2, taken = p.steps[host_] + training.steps;
    const double slow = 1 - std::pow(training.beta1, taken), fast = 1 - std::pow(training.beta2, taken);
    const float rate = size_of(training, taken), epsilon = training.epsilon;
    float* out = training.squares + host_ * 4 * layers;
    std::fill_n(out, 4 * layers, 0.0f);
    for (int64_t l = 0; l < layers; ++l) {
      if (l > depth_ && l <= p.stages) continue;
      const int64_t first = host_ * p.size + p.place[2 * l];
      const int64_t last = host_ * p.size + (l + 1 < layers ? p.place[2 * l + 2] : p.size);
      double values = 0, squares = 0, updates = 0, means = 0;
      for (int64_t i = first; i < last; ++i) {
        const float update = rate * p.average[i] / (__builtin_sqrtf(p.square[i]) + epsilon);
        values += p.theta[i] * p.theta[i];
        squares += p.square[i];
        updates += update * update;
        means += p.average[i] * p.average[i];
      }
      out[l] = values;
      out[layers + l] = squares / fast;
      out[2 * layers + l] = updates;
      out[3 * layers + l] = means / (slow * slow);
    }
    for (int64_t s = 0; s < p.stages; ++s) {
      const int64_t at = host_ * p.stages + s;
      const Seed* seed = s < depth_ ? seeds_[s] : nullptr;
      training.seed_rms[at] = training.backward_rms[at] = training.growth[at] = 0.0f;
      if (seed) {
        double squares = 0;
        for (int64_t i = 0; i < seed->blueprint->size; ++i) squares += seed->square[i];
        const double debias = 1 - std::pow(training.beta2, p.seed_steps[at] + training.steps);
        training.seed_rms[at] = std::sqrt(squares / seed->blueprint->count[width_] / debias);
      }
      if (s >= depth_) continue;
      double norm = 0;
      const float* growth = growth_ + s * p.width * p.width;
      for (int64_t i = 0; i < width_ * width_; ++i) norm += growth[i] * growth[i];
      training.growth[at] = std::sqrt(norm);
      training.backward_rms[at] = std::sqrt(signal_[s] / (width_ * training.batch * tokens_));
    }
  }

  // Notes outputs and derivatives of the first `lanes` samples of a tile.
  void trace(int64_t tile, int lanes) {
    const int64_t all = tokens_ * width_;
    const Row inside = first(lanes);
    Row* steep = g_[0];
    for (int64_t s = 0; s < depth_; ++s) {
      Row* h = traced_ + (s * traced_tiles_ + tile) * all;
      for (int64_t i = 0; i < all; ++i)
        for (int c = 0; c < CHUNKS; ++c) {
          h[i].part[c] = inside.part[c] != 0.0f ? outputs_[s][i].part[c] : spread(0.0f);
          steep[i].part[c] = slopes_[s][i].part[c] != 0.0f ? inside.part[c] : spread(0.0f);
        }
      total(steep_ + s * p.width, steep, width_, tokens_);
    }
  }

  void forget_trace() { std::fill_n(steep_, p.stages * p.width, 0.0f); }

  // [stages, 5] as esper.growth.statistics.activation_statistics, from what `trace` noted.
  void activations(float* out, int64_t measured) {
    const int64_t tokens = traced_tiles_ * tokens_;  // of all tiles, which follow each other
    const double rows = measured * tokens_, units = width_;
    std::vector<int32_t> same(tokens);
    for (int64_t t = 0; t < tokens; ++t) same[t] = int32_t(t * width_);
    for (int64_t s = 0; s < p.stages; ++s, out += 5) {
      out[0] = out[1] = 1.0f;
      out[2] = out[3] = out[4] = 0.0f;
      if (s >= depth_) continue;
      Row* h = traced_ + s * tokens * width_;
      std::vector<float> mean(width_), covariance(width_ * width_);
      total(mean.data(), h, width_, tokens);
      for (float& value : mean) value /= rows;
      for (int64_t t = 0; t < tokens; ++t) {
        const Row inside = first(int(std::min<int64_t>(LANES, measured - t / tokens_ * LANES)));
        for (int64_t u = 0; u < width_; ++u)
          for (int c = 0; c < CHUNKS; ++c) h[t * width_ + u].part[c] -= mean[u] * inside.part[c];
      }
      outer(covariance.data(), width_, h, width_, h, width_, same.data(), same.data(), tokens);
      double dead = 0, steep = 0, level = 0, between = 0, variance = 0, squares = 0;
      for (int64_t u = 0; u < width_; ++u) {
        dead += !(steep_[s * p.width + u] > 0);
        steep += steep_[s * p.width + u] / rows;
        level += mean[u] / units;
        between += mean[u] * mean[u] / units;
        variance += covariance[u * width_ + u] / rows;
      }
      for (const float value : covariance) squares += value / rows * value / rows;
      const double apart = between - level * level;
      out[0] = float(dead / units);
      out[1] = float(1 - steep / units);
      out[2] = float(level);
      out[3] = float(std::sqrt(variance / units + (apart < 0 ? 0 : apart)));
      out[4] = float(variance * variance / (squares < 1e-12 ? 1e-12 : squares) / units);
    }
  }

 private:
  void lay_out(const Rows& rows, int64_t row, Arena& arena) {
    const int64_t all = tokens_ * width_;
    x_ = arena.take(tokens_ * p.inputs);
    stem_ = arena.take(all);
    logits_ = arena.take(labels() * p.classes);
    pooled_ = arena.take(width_);
    pooled_gradient_ = arena.take(width_);
    g_[0] = arena.take(all);
    g_[1] = arena.take(all);
    gradient_ = arena.floats(p.size);
    signal_ = arena.floats(p.stages);
    growth_ = arena.floats(p.stages * p.width * p.width);
    steep_ = arena.floats(p.stages * p.width);
    sources_.resize(p.stages);
    outputs_.resize(p.stages);
    slopes_.resize(p.stages);
    slots_.resize(p.stages);
    seeds_.assign(p.stages, nullptr);
    storage_.clear();
    storage_.reserve(p.stages);  // seeds_ points into it
    int64_t most = width_;
    for (int64_t s = 0; s < depth_; ++s) {
      outputs_[s] = arena.take(all);
      slopes_[s] = arena.take(all);
      slots_[s] = arena.take(all);
      const int64_t at = row * p.stages + s, kind = rows.kind[at];
      if (kind < 0) continue;
      const bool isolated = rows.isolated && rows.isolated[at];
      storage_.emplace_back(room_, p.blueprints + kind, width_, host_ * p.stages + s, rows.alpha[at], isolated, arena);
      seeds_[s] = &storage_.back();
      for (int64_t r = 1; r <= seeds_[s]->blueprint->operations; ++r) most = std::max(most, seeds_[s]->units(r));
    }
    for (Row*& gradient : room_.gradients) gradient = arena.take(tokens_ * most);
    room_.products = arena.take(tokens_ * width_);
    room_.spare = arena.take(tokens_);
    traced_ = arena.take(depth_ * traced_tiles_ * all);
  }

  Layer layer(int64_t number) const {
    const int64_t stage = number > 0 && number <= p.stages, inputs = number ? width_ : p.inputs;
    const int64_t outputs = number == p.stages + 1 ? p.classes : width_;
    const int64_t row = number == p.stages + 1 ? p.classes : p.width;
    const float* theta = p.theta + host_ * p.size;
    const int64_t weight = p.place[2 * number], bias = p.place[2 * number + 1];
    return {theta + weight,    theta + bias, gradient_ + weight, gradient_ + bias,  inputs,
            outputs,           row,          p.width * p.width,  p.tables + stage};
  }

  // outputs_[s] holds the stage's linear map; leaves its activation there and the derivative in slopes_[s].
  void activate(int64_t s) {
    const int64_t at = host_ * p.stages + s;
    const float low = p.low[at], high = p.high[at], leak = p.leak[at], shift = p.shift[at];
    const float* units = p.units + at * p.width;
    for (int64_t t = 0; t < tokens_; ++t)
      for (int64_t u = 0; u < width_; ++u)
        for (int c = 0; c < CHUNKS; ++c) {
          V& h = outputs_[s][t * width_ + u].part[c];
          const V z = h + shift;
          V cut = z > high ? spread(high) : z;  // so written, NaN stays NaN
          cut = cut < low ? spread(low) : cut;
          const V steep = cut == z ? spread(1.0f) : spread(leak);
          h = leak == 0.0f ? cut * units[u] : (cut + leak * (z - cut)) * units[u];
          slopes_[s][t * width_ + u].part[c] = steep * units[u];
        }
  }

  float size_of(const Training& training, int64_t step) const {
    return p.rate[host_] * std::sqrt(1 - std::pow(training.beta2, step)) / (1 - std::pow(training.beta1, step));
  }

  const Population& p;
  int64_t traced_tiles_;
  int64_t host_, width_, depth_, tokens_;
  Row *x_, *stem_, *logits_, *pooled_, *pooled_gradient_, *g_[2], *last_ = nullptr, *traced_;
  const Row* seen_ = nullptr;  // what the stem reads
  Room room_;
  float *gradient_, *signal_, *growth_, *steep_;
  std::vector<Row*> sources_, outputs_, slopes_, slots_;
  std::vector<Seed*> seeds_;
  std::vector<Seed> storage_;
};

}  // namespace esper
