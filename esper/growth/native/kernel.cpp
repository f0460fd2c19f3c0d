// One host after the other: forward, backward and Adam of an epoch, and evaluations, each wholly in a core's cache.
// What is computed is what esper/growth/host.py, graft.py and epoch.py compute for stacked hosts; the structures below
// are those of esper/growth/native/engine.py, field by field.

#include <algorithm>
#include <vector>

#include "tile.h"

using namespace esper;

extern "C" {

// Which tokens a kernel joins: at [token * taps + tap] the neighbour, or -1 beyond the edge; and the other way round.
struct Table {
  int64_t taps;
  const int32_t *from, *to;
};

enum Code { LINEAR, RELU, GATE, NORMALISE, ATTEND };

// One operation of a blueprint on registers; register 0 is what the seed reads, and operation i writes register i + 1.
struct Operation {
  int64_t code, inputs[3];
  int64_t weight, bias;  // places in the seed's parameters; -1: none
  int64_t row;           // entries between two rows of the weight
  int64_t tap;           // entries between two of its taps
  int64_t table;
};

struct Blueprint {
  int64_t size, operations, reads_source;
  const Operation* operation;
  const int64_t* units;  // [registers, width + 1]
  const float* count;    // [width + 1], parameters that a host of some width owns
  float *theta, *average, *square;  // [hosts, slots, size]
};

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
  float *loss;                // [rows, labels]
  float *logits;              // [rows, labels, classes], or null
  float *activations;         // [rows, stages, 5], or null
};
}

namespace {

// Hands out rows of one block of memory; without a block it only counts them.
class Arena {
 public:
  Row* take(int64_t count) {
    used_ += count;
    return base_ ? base_ + used_ - count : nullptr;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(take((count + LANES - 1) / LANES)); }
  int64_t used() const { return used_; }
  void restart(bool allocate) {
    if (allocate && used_ > size_) {
      memory_.resize(used_ * sizeof(Row) + 64);
      size_ = used_;
    }
    base_ = allocate ? reinterpret_cast<Row*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64) : nullptr;
    used_ = 0;
  }

 private:
  std::vector<char> memory_;
  Row* base_ = nullptr;
  int64_t used_ = 0, size_ = 0;
};

struct Layer {
  const float *weight, *bias;  // bias may be null
  float *weight_gradient, *bias_gradient;
  int64_t inputs, outputs, row, tap;
  const Table* table;

  void forward(const Row* x, Row* y, int64_t tokens) const {
    for (int64_t t = 0; t < tokens; ++t) {
      Row* out = y + t * outputs;
      for (int64_t o = 0; o < outputs; ++o) fill(out + o, 1, bias ? bias[o] : 0.0f);
      for (int64_t i = 0; i < table->taps; ++i) {
        const int64_t n = table->from[t * table->taps + i];
        if (n >= 0) accumulate(out, outputs, x + n * inputs, inputs, weight + i * tap, row, 1);
      }
    }
  }

  // Adds to the gradients of parameters, and to that of x unless it is null.
  void backward(const Row* x, const Row* gy, Row* gx, int64_t tokens) const {
    int32_t from[tokens], to[tokens];
    for (int64_t i = 0; i < table->taps; ++i) {
      int64_t pairs = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        const int32_t n = table->from[t * table->taps + i];
        if (n < 0) continue;
        from[pairs] = n;
        to[pairs++] = t;
      }
      outer(weight_gradient + i * tap, row, x, inputs, gy, outputs, from, to, pairs);
    }
    if (bias_gradient) total(bias_gradient, gy, outputs, tokens);
    if (!gx) return;
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t i = 0; i < table->taps; ++i) {
        const int64_t t = table->to[n * table->taps + i];
        if (t >= 0) accumulate(gx + n * inputs, inputs, gy + t * outputs, outputs, weight + i * tap, 1, row);
      }
  }
};

// The batched attention of one tile: each lane is a sample of its own.
struct Attention {
  const float* position;
  float* position_gradient;
  float scale;
  int64_t units, tokens, causal;
  Row* share;  // [tokens, tokens]

  int64_t last(int64_t query) const { return causal ? query + 1 : tokens; }

  void forward(const Row* q, const Row* k, const Row* v, Row* y) const {
    fill(y, tokens * units, 0.0f);
    for (int64_t i = 0; i < tokens; ++i)
      for (int c = 0; c < CHUNKS; ++c) {
        Row* row = share + i * tokens;
        V top = spread(-INFINITY), whole = spread(0.0f);
        for (int64_t j = 0; j < last(i); ++j) {
          V score = spread(0.0f);
          for (int64_t u = 0; u < units; ++u) score += q[i * units + u].part[c] * k[j * units + u].part[c];
          row[j].part[c] = score * scale + position[j - i + tokens - 1];
          top = larger(row[j].part[c], top);
        }
        for (int64_t j = 0; j < last(i); ++j) whole += row[j].part[c] = exponential(row[j].part[c] - top);
        for (int64_t j = 0; j < last(i); ++j) {
          row[j].part[c] /= whole;
          for (int64_t u = 0; u < units; ++u) y[i * units + u].part[c] += row[j].part[c] * v[j * units + u].part[c];
        }
      }
  }

  void backward(const Row* q, const Row* k, const Row* v, const Row* gy, Row* gq, Row* gk, Row* gv, Row* spare) const {
    for (int64_t i = 0; i < tokens; ++i) {
      const Row* row = share + i * tokens;
      for (int c = 0; c < CHUNKS; ++c) {
        V inner = spread(0.0f);
        for (int64_t j = 0; j < last(i); ++j) {
          V slope = spread(0.0f);
          for (int64_t u = 0; u < units; ++u) {
            const V g = gy[i * units + u].part[c];
            slope += g * v[j * units + u].part[c];
            gv[j * units + u].part[c] += row[j].part[c] * g;
          }
          spare[j].part[c] = slope;
          inner += slope * row[j].part[c];
        }
        for (int64_t j = 0; j < last(i); ++j) {
          const V slope = row[j].part[c] * (spare[j].part[c] - inner);
          spare[j].part[c] = slope;
          for (int64_t u = 0; u < units; ++u) {
            gq[i * units + u].part[c] += scale * slope * k[j * units + u].part[c];
            gk[j * units + u].part[c] += scale * slope * q[i * units + u].part[c];
          }
        }
      }
      for (int64_t j = 0; j < last(i); ++j) position_gradient[j - i + tokens - 1] += sum(spare[j]);
    }
  }
};

// A seed that runs in a row.
struct Seed {
  const Blueprint* blueprint;
  int64_t width;
  float alpha;
  bool isolated;
  float *theta, *average, *square, *gradient;
  Row* registers[16];
  Row* share;
  Row* scale;  // of a normalisation, per token

  int64_t units(int64_t at, int64_t widest) const { return blueprint->units[at * (widest + 1) + width]; }
};

// One row: a host with the seeds that run in it, and room for one tile.
class Host {
 public:
  // `measured` samples will be traced.
  Host(const Population& p, const Rows& rows, int64_t row, int64_t measured, Arena& arena)
      : p(p), traced_tiles_((measured + LANES - 1) / LANES) {
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

  // Loads samples: `lanes` rows of x.
  void load(const float* x, const int64_t* index, int64_t first, int lanes) {
    const int64_t features = tokens_ * p.inputs;
    float* to = reinterpret_cast<float*>(x_);
    for (int lane = 0; lane < LANES; ++lane) {
      if (lane >= lanes) {
        for (int64_t f = 0; f < features; ++f) to[f * LANES + lane] = 0.0f;
        continue;
      }
      const float* from = x + (index ? index[first + lane] : first + lane) * features;
      for (int64_t f = 0; f < features; ++f) to[f * LANES + lane] = from[f];
    }
    if (!p.gain) return;
    const float* gain = p.gain + host_ * p.inputs;
    for (int64_t f = 0; f < features; ++f)
      for (V& part : x_[f].part) part *= gain[f % p.inputs];
  }

  void forward() {
    Row* h = stem_;
    layer(0).forward(x_, h, tokens_);
    for (int64_t i = 0; i < tokens_ * width_; ++i)
      for (V& part : h[i].part) part = part < 0.0f ? spread(0.0f) : part;
    for (int64_t s = 0; s < depth_; ++s) {
      sources_[s] = h;
      layer(s + 1).forward(h, outputs_[s], tokens_);
      activate(s);
      h = outputs_[s];
      if (Seed* seed = seeds_[s]) {
        run(*seed, seed->blueprint->reads_source ? sources_[s] : h);
        if (!seed->isolated) {
          copy(slots_[s], h, tokens_ * width_);
          add(slots_[s], seed->registers[seed->blueprint->operations], tokens_ * width_, seed->alpha);
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
        unwind(*seed, seed->blueprint->reads_source ? sources_[s] : outputs_[s], g, seed->isolated ? nullptr : fed);
      }
      if (measure) {
        V squares = spread(0.0f);
        for (int64_t i = 0; i < all; ++i)
          for (const V& part : g[i].part) squares += part * part;
        signal_[s] += sum(squares);
        int32_t same[tokens_];
        for (int64_t t = 0; t < tokens_; ++t) same[t] = t;
        outer(growth_ + s * p.width * p.width, width_, sources_[s], width_, g, width_, same, same, tokens_);
      }
      for (int64_t i = 0; i < all; ++i)
        for (int c = 0; c < CHUNKS; ++c) g[i].part[c] *= slopes_[s][i].part[c];
      layer(s + 1).backward(sources_[s], g, next, tokens_);
      std::swap(g, next);
    }
    for (int64_t i = 0; i < all; ++i)
      for (int c = 0; c < CHUNKS; ++c) g[i].part[c] = stem_[i].part[c] > 0.0f ? g[i].part[c] : spread(0.0f);
    layer(0).backward(x_, g, nullptr, tokens_);
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
      copy(traced_ + (s * traced_tiles_ + tile) * all, outputs_[s], all);
      for (int64_t i = 0; i < all; ++i)
        for (int c = 0; c < CHUNKS; ++c)
          steep[i].part[c] = slopes_[s][i].part[c] != 0.0f ? inside.part[c] : spread(0.0f);
      total(steep_ + s * p.width, steep, width_, tokens_);
    }
  }

  void forget_trace() { std::fill_n(steep_, p.stages * p.width, 0.0f); }

  // [stages, 5] as esper.growth.statistics.activation_statistics, from what `trace` noted.
  void activations(float* out, int64_t measured) {
    const int64_t tokens = traced_tiles_ * tokens_;  // of all tiles, which follow each other
    const double rows = measured * tokens_, units = width_;
    std::vector<int32_t> same(tokens);
    for (int64_t t = 0; t < tokens; ++t) same[t] = int32_t(t);
    for (int64_t s = 0; s < p.stages; ++s, out += 5) {
      out[0] = out[1] = 1.0f;
      out[2] = out[3] = out[4] = 0.0f;
      if (s >= depth_) continue;
      Row* h = traced_ + s * tokens * width_;
      std::vector<float> mean(width_), covariance(width_ * width_);
      for (int64_t t = 0; t < tokens; ++t) {
        const Row inside = first(int(std::min<int64_t>(LANES, measured - t / tokens_ * LANES)));
        for (int64_t u = 0; u < width_; ++u)
          for (int c = 0; c < CHUNKS; ++c)
            h[t * width_ + u].part[c] = inside.part[c] != 0.0f ? h[t * width_ + u].part[c] : spread(0.0f);
      }
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
    storage_.resize(p.stages);
    int64_t most = 0;
    for (int64_t s = 0; s < depth_; ++s) {
      outputs_[s] = arena.take(all);
      slopes_[s] = arena.take(all);
      slots_[s] = arena.take(all);
      const int64_t kind = rows.kind[row * p.stages + s];
      if (kind < 0) continue;
      const Blueprint& blueprint = p.blueprints[kind];
      const int64_t at = (host_ * p.stages + s) * blueprint.size;
      Seed& seed = *(seeds_[s] = &storage_[s]);
      seed = Seed{&blueprint, width_, rows.alpha[row * p.stages + s], rows.isolated && rows.isolated[row * p.stages + s],
                  blueprint.theta + at, blueprint.average + at, blueprint.square + at,
                  arena.floats(blueprint.size), {}, nullptr, nullptr};
      for (int64_t r = 1; r <= blueprint.operations; ++r) {
        seed.registers[r] = arena.take(tokens_ * seed.units(r, p.width));
        most = std::max(most, seed.units(r, p.width));
        if (blueprint.operation[r - 1].code == ATTEND) seed.share = arena.take(tokens_ * tokens_);
        if (blueprint.operation[r - 1].code == NORMALISE) seed.scale = arena.take(tokens_);
      }
    }
    spare_ = arena.take(tokens_);
    for (auto& spare : register_gradients_) spare = arena.take(tokens_ * most);
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

  Layer layer(const Seed& seed, const Operation& op, int64_t to) const {
    const bool biased = op.bias >= 0;
    return {seed.theta + op.weight,
            biased ? seed.theta + op.bias : nullptr,
            seed.gradient + op.weight,
            biased ? seed.gradient + op.bias : nullptr,
            seed.units(op.inputs[0], p.width),
            seed.units(to, p.width),
            op.row,
            op.tap,
            p.tables + op.table};
  }

  Attention attention(const Seed& seed, const Operation& op) const {
    return {seed.theta + op.weight, seed.gradient + op.weight, 1.0f / std::sqrt(float(width_)), width_, tokens_,
            p.causal, seed.share};
  }

  void run(Seed& seed, Row* x) {
    seed.registers[0] = x;
    for (int64_t i = 0; i < seed.blueprint->operations; ++i) {
      const Operation& op = seed.blueprint->operation[i];
      Row* in[3];
      for (int k = 0; k < 3; ++k) in[k] = seed.registers[op.inputs[k]];
      Row* y = seed.registers[i + 1];
      const int64_t count = tokens_ * seed.units(i + 1, p.width);
      switch (op.code) {
        case LINEAR:
          layer(seed, op, i + 1).forward(in[0], y, tokens_);
          break;
        case RELU:
          for (int64_t k = 0; k < count; ++k)
            for (int c = 0; c < CHUNKS; ++c) y[k].part[c] = in[0][k].part[c] < 0.0f ? spread(0.0f) : in[0][k].part[c];
          break;
        case GATE:
          for (int64_t k = 0; k < count; ++k)
            for (int c = 0; c < CHUNKS; ++c) y[k].part[c] = in[0][k].part[c] * sigmoid(in[1][k].part[c]);
          break;
        case NORMALISE:
          normalise(seed, op, in[0], y);
          break;
        case ATTEND:
          attention(seed, op).forward(in[0], in[1], in[2], y);
          break;
      }
    }
  }

  // gain * normalised(x) + bias - x over the units of each token.
  void normalise(Seed& seed, const Operation& op, const Row* x, Row* y) {
    const float *gain = seed.theta + op.weight, *bias = seed.theta + op.bias;
    for (int64_t t = 0; t < tokens_; ++t, x += width_, y += width_)
      for (int c = 0; c < CHUNKS; ++c) {
        V mean = spread(0.0f), variance = spread(0.0f);
        for (int64_t u = 0; u < width_; ++u) mean += x[u].part[c];
        mean /= float(width_);
        for (int64_t u = 0; u < width_; ++u) variance += (x[u].part[c] - mean) * (x[u].part[c] - mean);
        const V scale = 1.0f / root(variance / float(width_) + 1e-5f);
        seed.scale[t].part[c] = scale;
        for (int64_t u = 0; u < width_; ++u)
          y[u].part[c] = gain[u] * ((x[u].part[c] - mean) * scale) + bias[u] - x[u].part[c];
      }
  }

  void unwind_normalise(Seed& seed, const Operation& op, const Row* x, const Row* gy, Row* gx, Row* spare) {
    const float* gain = seed.theta + op.weight;
    for (int64_t t = 0; t < tokens_; ++t)
      for (int c = 0; c < CHUNKS; ++c) {
        const Row *in = x + t * width_, *g = gy + t * width_;
        const V scale = seed.scale[t].part[c];
        V mean = spread(0.0f), level = spread(0.0f), along = spread(0.0f);
        for (int64_t u = 0; u < width_; ++u) mean += in[u].part[c];
        mean /= float(width_);
        for (int64_t u = 0; u < width_; ++u) {
          const V unit = (in[u].part[c] - mean) * scale, slope = g[u].part[c] * gain[u];
          spare[t * width_ + u].part[c] = g[u].part[c] * unit;
          level += slope;
          along += slope * unit;
        }
        level /= float(width_);
        along /= float(width_);
        for (int64_t u = 0; u < width_; ++u) {
          const V unit = (in[u].part[c] - mean) * scale;
          gx[t * width_ + u].part[c] += scale * (g[u].part[c] * gain[u] - level - unit * along) - g[u].part[c];
        }
      }
    total(seed.gradient + op.weight, spare, width_, tokens_);
    total(seed.gradient + op.bias, gy, width_, tokens_);
  }

  // Back through a seed from the gradient g of what its slot passes on; adds to the gradient of what it read.
  void unwind(Seed& seed, const Row* x, const Row* g, Row* fed) {
    const Blueprint& blueprint = *seed.blueprint;
    const int64_t last = blueprint.operations;
    Row* gradients[16];
    gradients[0] = fed;
    for (int64_t r = 1; r <= last; ++r) {
      gradients[r] = register_gradients_[r];
      fill(gradients[r], tokens_ * seed.units(r, p.width), 0.0f);
    }
    add(gradients[last], g, tokens_ * width_, seed.isolated ? 1.0f : seed.alpha);
    for (int64_t i = last - 1; i >= 0; --i) {
      const Operation& op = blueprint.operation[i];
      const Row *in[3], *gy = gradients[i + 1], *y = seed.registers[i + 1];
      Row* gx[3];
      for (int k = 0; k < 3; ++k) {
        in[k] = op.inputs[k] ? seed.registers[op.inputs[k]] : x;
        gx[k] = gradients[op.inputs[k]];
        // What reads the slot without telling it: gradients go to a place that nobody looks at.
        if (!gx[k] && op.code != LINEAR) gx[k] = register_gradients_[0];
      }
      const int64_t count = tokens_ * seed.units(i + 1, p.width);
      switch (op.code) {
        case LINEAR:
          layer(seed, op, i + 1).backward(in[0], gy, gx[0], tokens_);
          break;
        case RELU:
          for (int64_t k = 0; k < count; ++k)
            for (int c = 0; c < CHUNKS; ++c)
              gx[0][k].part[c] += y[k].part[c] > 0.0f ? gy[k].part[c] : spread(0.0f);
          break;
        case GATE:
          for (int64_t k = 0; k < count; ++k)
            for (int c = 0; c < CHUNKS; ++c) {
              const V gate = sigmoid(in[1][k].part[c]);
              gx[0][k].part[c] += gy[k].part[c] * gate;
              gx[1][k].part[c] += gy[k].part[c] * in[0][k].part[c] * gate * (1.0f - gate);
            }
          break;
        case NORMALISE:
          unwind_normalise(seed, op, in[0], gy, gx[0], register_gradients_[15]);
          break;
        case ATTEND:
          attention(seed, op).backward(in[0], in[1], in[2], gy, gx[0], gx[1], gx[2], spare_);
          break;
      }
    }
  }

  float size_of(const Training& training, int64_t step) const {
    return p.rate[host_] * std::sqrt(1 - std::pow(training.beta2, step)) / (1 - std::pow(training.beta1, step));
  }

  const Population& p;
  int64_t traced_tiles_;
  int64_t host_, width_, depth_, tokens_;
  Row *x_, *stem_, *logits_, *pooled_, *pooled_gradient_, *g_[2], *last_ = nullptr, *spare_, *traced_;
  Row* register_gradients_[16];
  float *gradient_, *signal_, *growth_, *steep_;
  std::vector<Row*> sources_, outputs_, slopes_, slots_;
  std::vector<Seed*> seeds_;
  std::vector<Seed> storage_;
};

}  // namespace

extern "C" {

// Trains the rows [first, last), which must be hosts in order, for one epoch.
void esper_train(const Population* p, const Rows* rows, const Training* t, int64_t first, int64_t last) {
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
        host.load(t->x, index, at, lanes);
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
  Arena arena;
  for (int64_t row = first; row < last; ++row) {
    Host host(*p, *rows, row, e->measured, arena);
    const int64_t labels = host.labels(), all = e->samples * labels;
    host.forget_trace();
    for (int64_t at = 0; at < e->samples; at += LANES) {
      const int lanes = int(std::min<int64_t>(LANES, e->samples - at));
      host.load(e->x, nullptr, at, lanes);
      host.forward();
      float* logits = e->logits ? e->logits + (row * all + at * labels) * p->classes : nullptr;
      host.cross_entropy(e->labels + at * labels, lanes, e->loss + row * all + at * labels, logits);
      if (at < e->measured) host.trace(at / LANES, int(std::min<int64_t>(lanes, e->measured - at)));
    }
    if (e->activations) host.activations(e->activations + row * p->stages * 5, e->measured);
  }
}
}
