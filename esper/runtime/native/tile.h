// Arithmetic on tiles: the values of LANES samples for one unit lie side by side, so that every operation is over whole
// vectors whatever the width of a host, and a host's numbers never depend on how many units or hosts stand beside them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace esper {

// While it lives, this thread takes numbers below the smallest normal one for 0. Each of them would cost many times what
// others do, and networks that train for long, or are saturated, are full of them.
class Flush {
#if defined(__SSE__)
  static constexpr unsigned BITS = 0x8040;  // flush to zero, denormals are zero
  unsigned before = _mm_getcsr();

 public:
  Flush() { _mm_setcsr(before | BITS); }
  ~Flush() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  static constexpr uint64_t BITS = 1 << 24;
  uint64_t before;

 public:
  Flush() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" ::"r"(before | BITS));
  }
  ~Flush() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
 public:
  Flush() {}
  ~Flush() {}
#endif
  Flush(const Flush&) = delete;
};

constexpr int WIDE = 16, CHUNKS = 2, LANES = WIDE * CHUNKS;

typedef float V __attribute__((vector_size(WIDE * sizeof(float))));
typedef float Quarter __attribute__((vector_size(4 * sizeof(float)), may_alias));
typedef int32_t I __attribute__((vector_size(WIDE * sizeof(int32_t))));

// One unit, LANES samples.
struct Row {
  V part[CHUNKS];
};

inline V spread(float value) { return V{} + value; }

// 1 for the first `count` samples of a tile, 0 for the others.
inline Row first(int count) {
  Row row;
  for (int lane = 0; lane < LANES; ++lane) row.part[lane / WIDE][lane % WIDE] = lane < count ? 1.0f : 0.0f;
  return row;
}

// A tile of `lanes` samples of x [samples, features]: those that index names, or the first ones; 0 behind them.
inline void transpose(Row* tile, const float* x, const int64_t* index, int lanes, int64_t features) {
  float* to = reinterpret_cast<float*>(tile);
  if (lanes < LANES) std::memset(tile, 0, features * sizeof(Row));
  for (int lane = 0; lane < lanes; ++lane) {
    const float* from = x + (index ? index[lane] : lane) * features;
    for (int64_t f = 0; f < features; ++f) to[f * LANES + lane] = from[f];
  }
}

inline void fill(Row* x, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i)
    for (V& part : x[i].part) part = spread(value);
}

inline void copy(Row* to, const Row* from, int64_t count) { std::memcpy(to, from, count * sizeof(Row)); }

inline void add(Row* to, const Row* from, int64_t count, float factor = 1.0f) {
  for (int64_t i = 0; i < count; ++i)
    for (int c = 0; c < CHUNKS; ++c) to[i].part[c] += factor * from[i].part[c];
}

// Hands out rows of one block of memory, its own or at `base`; without a block it only counts them.
class Arena {
 public:
  explicit Arena(Row* base = nullptr) : base_(base) {}
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
  Row* base_;
  int64_t used_ = 0, size_ = 0;
};

// ---- sums over lanes -------------------------------------------------------------------------------------------------

// Of a and then of b, each half of every group of lanes added to the other half; `halve8` leaves groups of 8.
inline V halve8(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
inline V halve4(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
inline V halve2(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
inline V halve1(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// The 16 sums over lanes of v[0..15], in order: a binary tree of halvings.
inline V sums(const V v[WIDE]) {
  V a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) a[i] = halve8(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 4; ++i) b[i] = halve4(a[2 * i], a[2 * i + 1]);
  for (int i = 0; i < 2; ++i) c[i] = halve2(b[2 * i], b[2 * i + 1]);
  return halve1(c[0], c[1]);
}

inline float sum(const V& v) {
  float total = 0;
  for (int i = 0; i < WIDE; ++i) total += v[i];
  return total;
}

inline float sum(const Row& row) { return sum(row.part[0] + row.part[1]); }

// ---- functions -------------------------------------------------------------------------------------------------------

// e^x to 2 units in the last place for x in [-87, 88] and clamped beyond; NaN stays NaN (Cephes' expf).
inline V exponential(V x) {
  x = x < -87.0f ? spread(-87.0f) : x;
  x = x > 88.0f ? spread(88.0f) : x;
  const V magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  V n = x * 1.44269504088896341f + magic;
  const I whole = (I)n - (I)magic;
  n -= magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (V)((whole + 127) << 23);
}

inline V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }

inline V root(V x) {
  V y;
  for (int i = 0; i < WIDE; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}

inline V larger(V a, V b) { return a > b ? a : b; }

// ---- products --------------------------------------------------------------------------------------------------------

template <int OUT>
inline void accumulate_block(Row* out, const Row* in, int64_t inputs, const float* w, int64_t by_in, int64_t by_out) {
  V acc[OUT][CHUNKS];
  for (int o = 0; o < OUT; ++o)
    for (int c = 0; c < CHUNKS; ++c) acc[o][c] = out[o].part[c];
  for (int64_t k = 0; k < inputs; ++k)
    for (int o = 0; o < OUT; ++o) {
      const float value = w[k * by_in + o * by_out];
      for (int c = 0; c < CHUNKS; ++c) acc[o][c] += value * in[k].part[c];
    }
  for (int o = 0; o < OUT; ++o)
    for (int c = 0; c < CHUNKS; ++c) out[o].part[c] = acc[o][c];
}

// out[o] += sum over k of w[k * by_in + o * by_out] * in[k]
inline void accumulate(Row* out, int64_t outputs, const Row* in, int64_t inputs, const float* w, int64_t by_in,
                       int64_t by_out) {
  int64_t o = 0;
#ifdef __AVX512F__  // whose registers hold the sums of eight
  for (; o + 8 <= outputs; o += 8) accumulate_block<8>(out + o, in, inputs, w + o * by_out, by_in, by_out);
#endif
  for (; o + 4 <= outputs; o += 4) accumulate_block<4>(out + o, in, inputs, w + o * by_out, by_in, by_out);
  const float* rest = w + o * by_out;
  if (outputs - o == 3) accumulate_block<3>(out + o, in, inputs, rest, by_in, by_out);
  if (outputs - o == 2) accumulate_block<2>(out + o, in, inputs, rest, by_in, by_out);
  if (outputs - o == 1) accumulate_block<1>(out + o, in, inputs, rest, by_in, by_out);
}

// g[k * ld + o] += sum over pairs and lanes of x[k] * dy[o], where a pair is x + from[p], dy + to[p].
inline void outer(float* g, int64_t ld, const Row* x, int64_t inputs, const Row* dy, int64_t outputs,
                  const int32_t* from, const int32_t* to, int64_t pairs) {
  constexpr int BLOCK = 4;
  for (int64_t k = 0; k < inputs; k += BLOCK)
    for (int64_t o = 0; o < outputs; o += BLOCK) {
      // Beyond the edge the last row stands in; what it gives is not written.
      int64_t ks[BLOCK], os[BLOCK];
      for (int i = 0; i < BLOCK; ++i) {
        ks[i] = k + i < inputs ? k + i : inputs - 1;
        os[i] = o + i < outputs ? o + i : outputs - 1;
      }
      V acc[BLOCK * BLOCK] = {};
      for (int64_t p = 0; p < pairs; ++p) {
        const Row* a = x + from[p];
        const Row* b = dy + to[p];
        for (int c = 0; c < CHUNKS; ++c) {
          V right[BLOCK];
          for (int j = 0; j < BLOCK; ++j) right[j] = b[os[j]].part[c];
          for (int i = 0; i < BLOCK; ++i) {
            const V left = a[ks[i]].part[c];
            for (int j = 0; j < BLOCK; ++j) acc[i * BLOCK + j] += left * right[j];
          }
        }
      }
      alignas(64) float total[BLOCK * BLOCK];
      const V whole = sums(acc);
      std::memcpy(total, &whole, sizeof total);
      for (int i = 0; i < BLOCK && k + i < inputs; ++i) {
        float* row = g + (k + i) * ld + o;
        if (o + BLOCK <= outputs) {
          Quarter sum;  // four at once
          std::memcpy(&sum, row, sizeof sum);
          sum += *reinterpret_cast<const Quarter*>(total + i * BLOCK);
          std::memcpy(row, &sum, sizeof sum);
        } else {
          for (int j = 0; o + j < outputs; ++j) row[j] += total[i * BLOCK + j];
        }
      }
    }
}

// g[u] += sum over tokens and lanes of x[u]
inline void total(float* g, const Row* x, int64_t units, int64_t tokens) {
  for (int64_t first = 0; first < units; first += WIDE) {
    V acc[WIDE] = {};
    const int64_t count = units - first < WIDE ? units - first : WIDE;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t u = 0; u < count; ++u) {
        const Row& row = x[t * units + first + u];
        acc[u] += row.part[0] + row.part[1];
      }
    const V all = sums(acc);
    for (int64_t u = 0; u < count; ++u) g[first + u] += all[u];
  }
}

}  // namespace esper
