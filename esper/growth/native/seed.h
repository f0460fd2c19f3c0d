// Seeds: the operations of a blueprint on one tile, forward and backward. The structures are those of
// esper/growth/native/engine.py, field by field.

#pragma once

#include "tile.h"

namespace esper {

constexpr int REGISTERS = 16;

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
        from[pairs] = int32_t(n * inputs);
        to[pairs++] = int32_t(t * outputs);
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

// What the seeds of a host share.
struct Room {
  int64_t tokens, widest, causal;
  const Table* tables;
  Row* gradients[REGISTERS];  // of registers; the first takes those that nobody asked for
  Row *products, *spare;
};

// A seed that runs in a row of hosts.
struct Seed {
  const Room& room;
  const Blueprint* blueprint;
  int64_t width;
  float alpha;
  bool isolated;
  float *theta, *average, *square, *gradient;
  Row* registers[REGISTERS];
  Row* kept[REGISTERS];  // shares of an attention, or scales of a normalisation for each token

  Seed(const Room& room, const Blueprint* blueprint, int64_t width, int64_t at, float alpha, bool isolated,
       Arena& arena)
      : room(room), blueprint(blueprint), width(width), alpha(alpha), isolated(isolated) {
    theta = blueprint->theta + at * blueprint->size;
    average = blueprint->average + at * blueprint->size;
    square = blueprint->square + at * blueprint->size;
    gradient = arena.floats(blueprint->size);
    for (int64_t r = 1; r <= blueprint->operations; ++r) {
      registers[r] = arena.take(room.tokens * units(r));
      if (blueprint->operation[r - 1].code == ATTEND) kept[r] = arena.take(room.tokens * room.tokens);
      if (blueprint->operation[r - 1].code == NORMALISE) kept[r] = arena.take(room.tokens);
    }
  }

  int64_t units(int64_t at) const { return blueprint->units[at * (room.widest + 1) + width]; }

  const Row* result() const { return registers[blueprint->operations]; }

  void run(Row* x) {
    registers[0] = x;
    for (int64_t i = 0; i < blueprint->operations; ++i) {
      const Operation& op = blueprint->operation[i];
      Row* in[3];
      for (int k = 0; k < 3; ++k) in[k] = registers[op.inputs[k]];
      Row* y = registers[i + 1];
      const int64_t count = room.tokens * units(i + 1);
      switch (op.code) {
        case LINEAR:
          layer(op, i + 1).forward(in[0], y, room.tokens);
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
          normalise(op, in[0], y, kept[i + 1]);
          break;
        case ATTEND:
          attention(op, kept[i + 1]).forward(in[0], in[1], in[2], y);
          break;
      }
    }
  }

  // Back through a seed from the gradient g of what its slot passes on; adds to the gradient of what it read.
  void unwind(const Row* x, const Row* g, Row* fed) {
    const int64_t last = blueprint->operations;
    Row* gradients[16];
    gradients[0] = fed;
    for (int64_t r = 1; r <= last; ++r) {
      gradients[r] = room.gradients[r];
      fill(gradients[r], room.tokens * units(r), 0.0f);
    }
    add(gradients[last], g, room.tokens * width, isolated ? 1.0f : alpha);
    for (int64_t i = last - 1; i >= 0; --i) {
      const Operation& op = blueprint->operation[i];
      const Row *in[3], *gy = gradients[i + 1], *y = registers[i + 1];
      Row* gx[3];
      for (int k = 0; k < 3; ++k) {
        in[k] = op.inputs[k] ? registers[op.inputs[k]] : x;
        gx[k] = gradients[op.inputs[k]];
        // What reads the slot without telling it: gradients go to a place that nobody looks at.
        if (!gx[k] && op.code != LINEAR) gx[k] = room.gradients[0];
      }
      const int64_t count = room.tokens * units(i + 1);
      switch (op.code) {
        case LINEAR:
          layer(op, i + 1).backward(in[0], gy, gx[0], room.tokens);
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
          unwind_normalise(op, in[0], gy, gx[0], room.products, kept[i + 1]);
          break;
        case ATTEND:
          attention(op, kept[i + 1]).backward(in[0], in[1], in[2], gy, gx[0], gx[1], gx[2], room.spare);
          break;
      }
    }
  }

 private:
  Layer layer(const Operation& op, int64_t to) const {
    const bool biased = op.bias >= 0;
    return {theta + op.weight,
            biased ? theta + op.bias : nullptr,
            gradient + op.weight,
            biased ? gradient + op.bias : nullptr,
            units(op.inputs[0]),
            units(to),
            op.row,
            op.tap,
            room.tables + op.table};
  }

  Attention attention(const Operation& op, Row* share) const {
    return {theta + op.weight, gradient + op.weight, 1.0f / std::sqrt(float(width)), width, room.tokens,
            room.causal, share};
  }

  // gain * normalised(x) + bias - x over the units of each token.
  void normalise(const Operation& op, const Row* x, Row* y, Row* scale) {
    const float *gain = theta + op.weight, *bias = theta + op.bias;
    for (int64_t t = 0; t < room.tokens; ++t, x += width, y += width)
      for (int c = 0; c < CHUNKS; ++c) {
        V mean = spread(0.0f), variance = spread(0.0f);
        for (int64_t u = 0; u < width; ++u) mean += x[u].part[c];
        mean /= float(width);
        for (int64_t u = 0; u < width; ++u) variance += (x[u].part[c] - mean) * (x[u].part[c] - mean);
        const V factor = 1.0f / root(variance / float(width) + 1e-5f);
        scale[t].part[c] = factor;
        for (int64_t u = 0; u < width; ++u)
          y[u].part[c] = gain[u] * ((x[u].part[c] - mean) * factor) + bias[u] - x[u].part[c];
      }
  }

  void unwind_normalise(const Operation& op, const Row* x, const Row* gy, Row* gx, Row* spare, const Row* scale) {
    const float* gain = theta + op.weight;
    for (int64_t t = 0; t < room.tokens; ++t)
      for (int c = 0; c < CHUNKS; ++c) {
        const Row *in = x + t * width, *g = gy + t * width;
        const V factor = scale[t].part[c];
        V mean = spread(0.0f), level = spread(0.0f), along = spread(0.0f);
        for (int64_t u = 0; u < width; ++u) mean += in[u].part[c];
        mean /= float(width);
        for (int64_t u = 0; u < width; ++u) {
          const V unit = (in[u].part[c] - mean) * factor, slope = g[u].part[c] * gain[u];
          spare[t * width + u].part[c] = g[u].part[c] * unit;
          level += slope;
          along += slope * unit;
        }
        level /= float(width);
        along /= float(width);
        for (int64_t u = 0; u < width; ++u) {
          const V unit = (in[u].part[c] - mean) * factor;
          gx[t * width + u].part[c] += factor * (g[u].part[c] * gain[u] - level - unit * along) - g[u].part[c];
        }
      }
    total(gradient + op.weight, spare, width, room.tokens);
    total(gradient + op.bias, gy, width, room.tokens);
  }

};

}  // namespace esper
