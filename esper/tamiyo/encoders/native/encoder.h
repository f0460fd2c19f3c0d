// The encoder on one tile of graphs after the other, forward and backward. What is computed is what
// esper/tamiyo/encoders/dense.py computes. The structures are those of __init__.py, field by field.

#pragma once

#include <algorithm>
#include <vector>

#include "tile.h"

namespace esper {

constexpr float SLOPE = 0.2f;  // of LeakyReLU, as in PyG's GATConv

}  // namespace esper

extern "C" {

struct Type {
  int64_t first, count, features;
};

// Relation `source` -> `target`: the cell of target i and source j in plane p is
// offset + i * columns + start + p * sources + j.
struct Relation {
  int64_t source, target, start, planes, offset, columns;
};

// A weight or another parameter, and where its gradient is added; null where it is missing or not asked for.
struct Parameter {
  const float* value;
  float* gradient;
};

struct Layer {
  int64_t in, out, attends;
  const int64_t* rows;      // [relations], place in the stacked parameters; -1: not part of the layer
  const int64_t* computed;  // [types], whether the layer computes a type
  Parameter weight;         // [R, in, out], of what is sent
  Parameter root;           // [types, in, out] for GraphSAGE
  Parameter bias;           // [types, out]
  Parameter by, to;         // [R, heads, in] for GAT, what scores a source and a target
  Parameter along;          // [R, heads, attributes]
  const Parameter *skip_weight, *skip_bias;  // of each type, [out, in] and [out]; null: identity
};

struct Graphs {
  int64_t types, relations, layers, heads, nodes, features, cells, attributes, batch;
  const Type* type;
  const Relation* relation;
  const Layer* layer;
  const Parameter *input_weight, *input_bias, *gain, *shift;  // of each type
  const float *x, *attr;     // [batch, nodes, features], [batch, cells, attributes]
  const uint8_t* mask;       // [batch, cells]
  float* out;                // [batch, nodes, out of the last layer]; types that are not computed stay as they are
  const float* out_gradient;
  float* kept;               // what the backward pass needs of all tiles (see esper_encoder_rows), or null
};
}

namespace esper {

// erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline V error_function(V x) {
  const V size = x < 0.0f ? -x : x;
  const V t = 1.0f / (1.0f + 0.3275911f * size);
  V p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const V y = 1.0f - p * t * exponential(-size * size);
  return x < 0.0f ? -y : y;
}

constexpr float ROOT_HALF = 0.70710678118654752f;

inline V gelu(V x) { return 0.5f * x * (1.0f + error_function(x * ROOT_HALF)); }

inline V gelu_slope(V x) {
  return 0.5f * (1.0f + error_function(x * ROOT_HALF)) + x * 0.3989422804014327f * exponential(-0.5f * x * x);
}

// One tile of up to LANES graphs. Rows are numbered [node][unit].
class Tile {
 public:
  explicit Tile(const Graphs& g) : g(g) {
    Arena count;
    hold(count);
    rows_ = count.used();
    for (const bool allocate : {false, true}) {
      arena_.restart(allocate);
      Row* own = g.kept ? nullptr : arena_.take(rows_);
      lay_out();
      if (!allocate || g.kept) continue;
      Arena held(own);
      hold(held);
    }
  }

  // Rows of a tile that the backward pass needs.
  int64_t rows() const { return rows_; }

  // Turns to the tile that starts at graph `first`.
  void open(int64_t first) {
    first_ = first;
    lanes_ = int(std::min<int64_t>(LANES, g.batch - first));
    if (g.kept) {
      Arena held(reinterpret_cast<Row*>(g.kept) + first / LANES * rows_);
      hold(held);
    }
    std::fill(active_.begin(), active_.end(), 0);
    for (int lane = 0; lane < lanes_; ++lane)
      for (int64_t c = 0; c < g.cells; ++c) active_[c] |= g.mask[(first + lane) * g.cells + c];
    cells_.clear();
    for (int64_t c = 0; c < g.cells; ++c)
      if (active_[c]) cells_.push_back(c);
  }

  void load(int64_t first) {
    open(first);
    transpose(x_, g.x + first * g.nodes * g.features, nullptr, lanes_, g.nodes * g.features);
    for (const int64_t c : cells_) {
      fill(mask_ + c, 1, 0.0f);
      fill(attr_ + c * g.attributes, g.attributes, 0.0f);
    }
    float *masks = reinterpret_cast<float*>(mask_), *attrs = reinterpret_cast<float*>(attr_);
    for (int lane = 0; lane < lanes_; ++lane) {
      const uint8_t* mask = g.mask + (first + lane) * g.cells;
      const float* attr = g.attr + (first + lane) * g.cells * g.attributes;
      for (const int64_t c : cells_) {
        masks[c * LANES + lane] = float(mask[c]);
        for (int64_t a = 0; a < g.attributes; ++a)
          attrs[(c * g.attributes + a) * LANES + lane] = attr[c * g.attributes + a];
      }
    }
    // Means: over the edges of each relation, then over the relations that end in a type.
    for (int64_t r = 0; r < g.relations; ++r) {
      const Relation& e = g.relation[r];
      const float among = 1.0f / ends_[e.target];
      for (int64_t i = 0; i < g.type[e.target].count; ++i) {
        Row degree;
        fill(&degree, 1, 0.0f);
        each(e, i, [&](int64_t, int64_t cell) { add(&degree, mask_ + cell, 1); });
        for (V& part : degree.part) part = among / (part < 1.0f ? spread(1.0f) : part);
        each(e, i, [&](int64_t, int64_t cell) {
          for (int c = 0; c < CHUNKS; ++c) mean_[cell].part[c] = mask_[cell].part[c] * degree.part[c];
        });
      }
    }
  }

  void forward() {
    for (int64_t t = 0; t < g.types; ++t) input(t);
    for (int64_t l = 0; l < g.layers; ++l) {
      const Layer& layer = g.layer[l];
      for (int64_t t = 0; t < g.types; ++t)
        if (layer.computed[t])
          for (int64_t i = 0; i < g.type[t].count; ++i)
            for (int64_t u = 0; u < layer.out; ++u)
              fill(pre(l, t, i) + u, 1, layer.bias.value[t * layer.out + u]);
      for (int64_t r = 0; r < g.relations; ++r) {
        if (layer.rows[r] < 0) continue;
        if (layer.attends)
          attend(l, r);
        else
          average(l, r);
      }
      for (int64_t t = 0; t < g.types; ++t) {
        if (!layer.computed[t]) continue;
        for (int64_t i = 0; i < g.type[t].count; ++i) {
          const Row* own = h(l, t, i);
          Row *before = pre(l, t, i), *after = h(l + 1, t, i);
          if (!layer.attends)
            accumulate(before, layer.out, own, layer.in, layer.root.value + t * layer.in * layer.out, layer.out, 1);
          if (const float* weight = layer.skip_weight[t].value) {
            for (int64_t u = 0; u < layer.out; ++u) fill(after + u, 1, layer.skip_bias[t].value[u]);
            accumulate(after, layer.out, own, layer.in, weight, 1, layer.in);
          } else {
            copy(after, own, layer.out);
          }
          for (int64_t u = 0; u < layer.out; ++u)
            for (int c = 0; c < CHUNKS; ++c) after[u].part[c] += gelu(before[u].part[c]);
        }
      }
    }
  }

  void store() const {
    const Layer& last = g.layer[g.layers - 1];
    for (int64_t t = 0; t < g.types; ++t) {
      if (!last.computed[t]) continue;
      for (int64_t i = 0; i < g.type[t].count; ++i) {
        const float* from = reinterpret_cast<const float*>(h(g.layers, t, i));
        for (int lane = 0; lane < lanes_; ++lane) {
          float* to = g.out + ((first_ + lane) * g.nodes + g.type[t].first + i) * last.out;
          for (int64_t u = 0; u < last.out; ++u) to[u] = from[u * LANES + lane];
        }
      }
    }
  }

  // Adds to the gradients of all parameters; the tile that starts at `first` has been run forward.
  void backward(int64_t first) {
    open(first);
    const Layer& last = g.layer[g.layers - 1];
    const int64_t widest = widest_;
    fill(slope(0, 0, last.out), g.nodes * last.out, 0.0f);
    for (int64_t t = 0; t < g.types; ++t) {
      if (!last.computed[t]) continue;
      for (int64_t i = 0; i < g.type[t].count; ++i)
        transpose_one(slope(t, i, last.out),
                      g.out_gradient + (first_ * g.nodes + g.type[t].first + i) * last.out, g.nodes * last.out, last.out);
    }
    for (int64_t l = g.layers - 1; l >= 0; --l) {
      const Layer& layer = g.layer[l];
      // slope_: of what the layer gives; next_: of what it is given.
      fill(next_, g.nodes * widest, 0.0f);
      for (int64_t t = 0; t < g.types; ++t) {
        if (!layer.computed[t]) continue;
        for (int64_t i = 0; i < g.type[t].count; ++i) {
          Row *back = slope(t, i, layer.out), *down = next(t, i, layer.in);
          if (const float* weight = layer.skip_weight[t].value)
            accumulate(down, layer.in, back, layer.out, weight, layer.in, 1);
          else
            add(down, back, layer.in);
        }
        const int64_t count = g.type[t].count, at = t * layer.in * layer.out;
        Row* back = slope(t, 0, layer.out);
        if (layer.skip_weight[t].value) {
          outers(layer.skip_weight[t].gradient, h(l, t, 0), layer.in, layer.in, back, layer.out, count, true);
          total(layer.skip_bias[t].gradient, back, layer.out, count);
        }
        const Row* before = pre(l, t, 0);
        for (int64_t u = 0; u < count * layer.out; ++u)
          for (int c = 0; c < CHUNKS; ++c) back[u].part[c] *= gelu_slope(before[u].part[c]);
        total(layer.bias.gradient + t * layer.out, back, layer.out, count);
        if (layer.attends) continue;
        outers(layer.root.gradient + at, h(l, t, 0), layer.in, layer.in, back, layer.out, count, false);
        for (int64_t i = 0; i < count; ++i)
          accumulate(next(t, i, layer.in), layer.in, slope(t, i, layer.out), layer.out, layer.root.value + at, 1,
                     layer.out);
      }
      for (int64_t r = 0; r < g.relations; ++r) {
        if (layer.rows[r] < 0) continue;
        if (layer.attends)
          unattend(l, r);
        else
          unaverage(l, r);
      }
      std::swap(slope_, next_);
    }
    for (int64_t t = 0; t < g.types; ++t) uninput(t);
  }

 private:
  // Where what the backward pass needs lies.
  void hold(Arena& arena) {
    x_ = arena.take(g.nodes * g.features);
    attr_ = arena.take(g.cells * g.attributes);
    mask_ = arena.take(g.cells);
    mean_ = arena.take(g.cells);
    embeddings_.resize(g.layers + 1);
    pre_.resize(g.layers);
    embeddings_[0] = arena.take(g.nodes * g.layer[0].in);
    for (int64_t l = 0; l < g.layers; ++l) {
      embeddings_[l + 1] = arena.take(g.nodes * g.layer[l].out);
      pre_[l] = arena.take(g.nodes * g.layer[l].out);
    }
    mixed_ = arena.take(g.nodes * g.layer[0].in);
    scale_ = arena.take(g.nodes);
    share_.resize(g.layers);
    score_.resize(g.layers);
    for (int64_t l = 0; l < g.layers; ++l) {
      const bool attends = g.layer[l].attends;
      share_[l] = arena.take(attends ? g.cells * g.heads : 0);
      score_[l] = arena.take(attends ? g.cells * g.heads : 0);
    }
  }

  // Where everything else lies.
  void lay_out() {
    int64_t widest = 0, most = 0;
    for (int64_t l = 0; l < g.layers; ++l) widest = std::max({widest, g.layer[l].in, g.layer[l].out});
    ends_.assign(g.types, 0);
    for (int64_t r = 0; r < g.relations; ++r) {
      ends_[g.relation[r].target] += 1;
      most = std::max({most, g.type[g.relation[r].source].count, g.type[g.relation[r].target].count});
    }
    active_.resize(g.cells);
    widest_ = widest;
    slope_ = arena_.take(g.nodes * widest);
    next_ = arena_.take(g.nodes * widest);
    sent_ = arena_.take(most * widest);
    resent_ = arena_.take(most * widest);
    by_ = arena_.take(most * g.heads);
    to_ = arena_.take(most * g.heads);
    along_ = arena_.take(g.heads * g.attributes);
  }

  Row* h(int64_t l, int64_t t, int64_t i) const {
    return embeddings_[l] + (g.type[t].first + i) * (l ? g.layer[l - 1].out : g.layer[0].in);
  }
  Row* pre(int64_t l, int64_t t, int64_t i) const { return pre_[l] + (g.type[t].first + i) * g.layer[l].out; }
  Row* slope(int64_t t, int64_t i, int64_t width) const { return slope_ + (g.type[t].first + i) * width; }
  Row* next(int64_t t, int64_t i, int64_t width) const { return next_ + (g.type[t].first + i) * width; }

  // The sources j and cells of a relation's edges into target i that some graph of the tile has.
  template <typename F>
  void each(const Relation& e, int64_t i, F f) const {
    const int64_t sources = g.type[e.source].count, row = e.offset + i * e.columns + e.start;
    for (int64_t k = 0; k < e.planes * sources; ++k)
      if (active_[row + k]) f(k % sources, row + k);
  }

  static void multiply(Row* out, const Row& weight, const Row* x, int64_t units) {
    for (int64_t u = 0; u < units; ++u)
      for (int c = 0; c < CHUNKS; ++c) out[u].part[c] += weight.part[c] * x[u].part[c];
  }

  static Row inner(const Row* a, const Row* b, int64_t units) {
    Row out;
    fill(&out, 1, 0.0f);
    for (int64_t u = 0; u < units; ++u)
      for (int c = 0; c < CHUNKS; ++c) out.part[c] += a[u].part[c] * b[u].part[c];
    return out;
  }

  // gradient[in, out] += x (outer) back over `count` nodes, or its transpose [out, in]; a node's x are `stride` apart.
  void outers(float* gradient, const Row* x, int64_t in, int64_t stride, const Row* back, int64_t out, int64_t count,
              bool transposed) {
    from_.resize(count);
    at_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      from_[i] = int32_t(i * stride);
      at_[i] = int32_t(i * out);
    }
    if (transposed)
      outer(gradient, in, back, out, x, in, at_.data(), from_.data(), count);
    else
      outer(gradient, out, x, in, back, out, from_.data(), at_.data(), count);
  }

  void transpose_one(Row* to, const float* from, int64_t stride, int64_t units) const {
    float* values = reinterpret_cast<float*>(to);
    std::memset(to, 0, units * sizeof(Row));
    for (int lane = 0; lane < lanes_; ++lane)
      for (int64_t u = 0; u < units; ++u) values[u * LANES + lane] = from[lane * stride + u];
  }

  // ---- typed inputs: layer normalisation of gelu(W x + b) ----

  void input(int64_t t) {
    const int64_t width = g.layer[0].in, features = g.type[t].features;
    for (int64_t i = 0; i < g.type[t].count; ++i) {
      const int64_t node = g.type[t].first + i;
      Row *mixed = mixed_ + node * width, *out = h(0, t, i);
      for (int64_t u = 0; u < width; ++u) fill(mixed + u, 1, g.input_bias[t].value[u]);
      accumulate(mixed, width, x_ + node * g.features, features, g.input_weight[t].value, 1, features);
      for (int c = 0; c < CHUNKS; ++c) {
        V mean = spread(0.0f), variance = spread(0.0f);
        for (int64_t u = 0; u < width; ++u) mean += out[u].part[c] = gelu(mixed[u].part[c]);
        mean /= float(width);
        for (int64_t u = 0; u < width; ++u) {
          out[u].part[c] -= mean;
          variance += out[u].part[c] * out[u].part[c];
        }
        const V scale = 1.0f / root(variance / float(width) + 1e-5f);
        scale_[node].part[c] = scale;
        for (int64_t u = 0; u < width; ++u)
          out[u].part[c] = out[u].part[c] * scale * g.gain[t].value[u] + g.shift[t].value[u];
      }
    }
  }

  void uninput(int64_t t) {
    const int64_t width = g.layer[0].in, features = g.type[t].features;
    for (int64_t i = 0; i < g.type[t].count; ++i) {
      const int64_t node = g.type[t].first + i;
      Row *back = slope(t, i, width), *unit = sent_;
      const Row* mixed = mixed_ + node * width;
      for (int c = 0; c < CHUNKS; ++c) {
        V mean = spread(0.0f);
        for (int64_t u = 0; u < width; ++u) mean += unit[u].part[c] = gelu(mixed[u].part[c]);
        mean /= float(width);
        for (int64_t u = 0; u < width; ++u) unit[u].part[c] = (unit[u].part[c] - mean) * scale_[node].part[c];
      }
      total(g.shift[t].gradient, back, width, 1);
      for (int64_t u = 0; u < width; ++u)
        for (int c = 0; c < CHUNKS; ++c) resent_[u].part[c] = back[u].part[c] * unit[u].part[c];
      total(g.gain[t].gradient, resent_, width, 1);
      for (int c = 0; c < CHUNKS; ++c) {
        V level = spread(0.0f), along = spread(0.0f);
        for (int64_t u = 0; u < width; ++u) {
          back[u].part[c] *= g.gain[t].value[u];
          level += back[u].part[c];
          along += back[u].part[c] * unit[u].part[c];
        }
        level /= float(width);
        along /= float(width);
        for (int64_t u = 0; u < width; ++u)
          back[u].part[c] = scale_[node].part[c] * (back[u].part[c] - level - unit[u].part[c] * along) *
                            gelu_slope(mixed[u].part[c]);
      }
    }
    const int64_t count = g.type[t].count, first = g.type[t].first * g.features;
    const Row* back = slope(t, 0, width);
    outers(g.input_weight[t].gradient, x_ + first, features, g.features, back, width, count, true);
    total(g.input_bias[t].gradient, back, width, count);
  }

  // ---- GraphSAGE ----

  // Projected is the side with fewer nodes: what is sent, or the mean of what has arrived.
  bool projects_sources(const Relation& e) const { return g.type[e.source].count <= g.type[e.target].count; }

  void average(int64_t l, int64_t r) {
    const Relation& e = g.relation[r];
    const Layer& layer = g.layer[l];
    const float* weight = layer.weight.value + layer.rows[r] * layer.in * layer.out;
    const int64_t sources = g.type[e.source].count, targets = g.type[e.target].count;
    if (projects_sources(e)) {
      fill(sent_, sources * layer.out, 0.0f);
      for (int64_t j = 0; j < sources; ++j)
        accumulate(sent_ + j * layer.out, layer.out, h(l, e.source, j), layer.in, weight, layer.out, 1);
      for (int64_t i = 0; i < targets; ++i)
        each(e, i, [&](int64_t j, int64_t cell) {
          multiply(pre(l, e.target, i), mean_[cell], sent_ + j * layer.out, layer.out);
        });
      return;
    }
    fill(sent_, targets * layer.in, 0.0f);
    for (int64_t i = 0; i < targets; ++i) {
      Row* arrived = sent_ + i * layer.in;
      each(e, i, [&](int64_t j, int64_t cell) { multiply(arrived, mean_[cell], h(l, e.source, j), layer.in); });
      accumulate(pre(l, e.target, i), layer.out, arrived, layer.in, weight, layer.out, 1);
    }
  }

  void unaverage(int64_t l, int64_t r) {
    const Relation& e = g.relation[r];
    const Layer& layer = g.layer[l];
    const int64_t at = layer.rows[r] * layer.in * layer.out;
    const int64_t sources = g.type[e.source].count, targets = g.type[e.target].count;
    if (projects_sources(e)) {
      fill(sent_, sources * layer.out, 0.0f);
      for (int64_t i = 0; i < targets; ++i)
        each(e, i, [&](int64_t j, int64_t cell) {
          multiply(sent_ + j * layer.out, mean_[cell], slope(e.target, i, layer.out), layer.out);
        });
      project_back(l, e, at, sent_);
      return;
    }
    fill(sent_, targets * layer.in, 0.0f);
    for (int64_t i = 0; i < targets; ++i) {
      fill(resent_, layer.in, 0.0f);
      each(e, i, [&](int64_t j, int64_t cell) {
        multiply(sent_ + i * layer.in, mean_[cell], h(l, e.source, j), layer.in);
      });
      accumulate(resent_, layer.in, slope(e.target, i, layer.out), layer.out, layer.weight.value + at, 1, layer.out);
      each(e, i, [&](int64_t j, int64_t cell) {
        multiply(next(e.source, j, layer.in), mean_[cell], resent_, layer.in);
      });
    }
    outers(layer.weight.gradient + at, sent_, layer.in, layer.in, slope(e.target, 0, layer.out), layer.out, targets,
           false);
  }

  // From the gradient of what all sources of a relation send.
  void project_back(int64_t l, const Relation& e, int64_t at, const Row* sent) {
    const Layer& layer = g.layer[l];
    const int64_t sources = g.type[e.source].count;
    for (int64_t j = 0; j < sources; ++j)
      accumulate(next(e.source, j, layer.in), layer.in, sent + j * layer.out, layer.out, layer.weight.value + at, 1,
                 layer.out);
    outers(layer.weight.gradient + at, h(l, e.source, 0), layer.in, layer.in, sent, layer.out, sources, false);
  }

  // ---- GAT ----

  void scores(Row* out, int64_t l, int64_t t, const float* weight) const {
    const int64_t in = g.layer[l].in;
    fill(out, g.type[t].count * g.heads, 0.0f);
    for (int64_t i = 0; i < g.type[t].count; ++i) accumulate(out + i * g.heads, g.heads, h(l, t, i), in, weight, 1, in);
  }

  void send(int64_t l, const Relation& e, const float* weight) {
    const Layer& layer = g.layer[l];
    fill(sent_, g.type[e.source].count * layer.out, 0.0f);
    for (int64_t j = 0; j < g.type[e.source].count; ++j)
      accumulate(sent_ + j * layer.out, layer.out, h(l, e.source, j), layer.in, weight, layer.out, 1);
  }

  void attend(int64_t l, int64_t r) {
    const Relation& e = g.relation[r];
    const Layer& layer = g.layer[l];
    const int64_t row = layer.rows[r], size = layer.out / g.heads;
    const float* along = layer.along.value + row * g.heads * g.attributes;
    scores(by_, l, e.source, layer.by.value + row * g.heads * layer.in);
    scores(to_, l, e.target, layer.to.value + row * g.heads * layer.in);
    send(l, e, layer.weight.value + row * layer.in * layer.out);
    const float among = 1.0f / ends_[e.target];
    for (int64_t i = 0; i < g.type[e.target].count; ++i)
      for (int64_t k = 0; k < g.heads; ++k)
        for (int c = 0; c < CHUNKS; ++c) {
          V top = spread(-1e30f), whole = spread(0.0f);
          each(e, i, [&](int64_t j, int64_t cell) {
            V score = by_[j * g.heads + k].part[c] + to_[i * g.heads + k].part[c];
            for (int64_t a = 0; a < g.attributes; ++a)
              score += along[k * g.attributes + a] * attr_[cell * g.attributes + a].part[c];
            score = score < 0.0f ? SLOPE * score : score;
            score_[l][cell * g.heads + k].part[c] = score;
            top = mask_[cell].part[c] > 0.0f ? larger(score, top) : top;
          });
          each(e, i, [&](int64_t, int64_t cell) {
            V& share = share_[l][cell * g.heads + k].part[c];
            share = mask_[cell].part[c] > 0.0f ? exponential(score_[l][cell * g.heads + k].part[c] - top) : spread(0.0f);
            whole += share;
          });
          const V scale = among / (whole > 0.0f ? whole : spread(1.0f));
          each(e, i, [&](int64_t j, int64_t cell) {
            V& share = share_[l][cell * g.heads + k].part[c];
            share *= scale;
            for (int64_t u = k * size; u < (k + 1) * size; ++u)
              pre(l, e.target, i)[u].part[c] += share * sent_[j * layer.out + u].part[c];
          });
        }
  }

  void unattend(int64_t l, int64_t r) {
    const Relation& e = g.relation[r];
    const Layer& layer = g.layer[l];
    const int64_t row = layer.rows[r], size = layer.out / g.heads, at = row * layer.in * layer.out;
    const int64_t sources = g.type[e.source].count, targets = g.type[e.target].count;
    const float among = float(ends_[e.target]);
    send(l, e, layer.weight.value + at);
    fill(resent_, sources * layer.out, 0.0f);
    fill(by_, sources * g.heads, 0.0f);
    fill(to_, targets * g.heads, 0.0f);
    fill(along_, g.heads * g.attributes, 0.0f);
    for (int64_t i = 0; i < targets; ++i) {
      const Row* back = slope(e.target, i, layer.out);
      for (int64_t k = 0; k < g.heads; ++k) {
        // share = softmax / among: its own gradient is shares' over that of their sum, times among.
        Row mean;
        fill(&mean, 1, 0.0f);
        each(e, i, [&](int64_t j, int64_t cell) {
          const Row& share = share_[l][cell * g.heads + k];
          const Row slope = inner(back + k * size, sent_ + j * layer.out + k * size, size);
          multiply(resent_ + j * layer.out + k * size, share, back + k * size, size);
          slopes_.push_back(slope);
          for (int c = 0; c < CHUNKS; ++c) mean.part[c] += among * share.part[c] * slope.part[c];
        });
        size_t number = 0;
        each(e, i, [&](int64_t j, int64_t cell) {
          const Row& share = share_[l][cell * g.heads + k];
          Row slope = slopes_[number++];
          for (int c = 0; c < CHUNKS; ++c) {
            slope.part[c] = share.part[c] * (slope.part[c] - mean.part[c]);
            slope.part[c] *= score_[l][cell * g.heads + k].part[c] < 0.0f ? spread(SLOPE) : spread(1.0f);
          }
          add(by_ + j * g.heads + k, &slope, 1);
          add(to_ + i * g.heads + k, &slope, 1);
          for (int64_t a = 0; a < g.attributes; ++a)
            multiply(along_ + k * g.attributes + a, slope, attr_ + cell * g.attributes + a, 1);
        });
        slopes_.clear();
      }
    }
    total(layer.along.gradient + row * g.heads * g.attributes, along_, g.heads * g.attributes, 1);
    project_back(l, e, at, resent_);
    unscore(by_, l, e.source, layer.by, row);
    unscore(to_, l, e.target, layer.to, row);
  }

  void unscore(const Row* back, int64_t l, int64_t t, const Parameter& weight, int64_t row) {
    const int64_t in = g.layer[l].in, at = row * g.heads * in;
    for (int64_t i = 0; i < g.type[t].count; ++i)
      accumulate(next(t, i, in), in, back + i * g.heads, g.heads, weight.value + at, in, 1);
    outers(weight.gradient + at, h(l, t, 0), in, in, back, g.heads, g.type[t].count, true);
  }

  const Graphs& g;
  Arena arena_;
  int64_t first_ = 0, widest_ = 0, rows_ = 0;
  int lanes_ = 0;
  std::vector<int64_t> ends_;
  std::vector<uint8_t> active_;
  std::vector<int64_t> cells_;
  std::vector<Row*> embeddings_, pre_, share_, score_;
  std::vector<Row> slopes_;
  std::vector<int32_t> from_, at_;  // of pairs
  Row *x_, *attr_, *mask_, *mean_, *mixed_, *scale_, *slope_, *next_, *sent_, *resent_, *by_, *to_, *along_;
};

}  // namespace esper
