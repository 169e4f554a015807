// Vectors of the instruction set being compiled, and the two functions the decoder needs of them: exp and the normal
// distribution. Written with the compiler's vector types, so that one source serves every width.
//
// Included once per instruction set, inside its own namespace (FASTSLOTS_ISA): no function that was compiled for
// AVX-512 can stand in for its namesake in another file. Code in here instantiates no std:: function template: the
// linker keeps one copy of those, perhaps the AVX-512 one, for every build.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define FASTSLOTS_INLINE inline __attribute__((always_inline))

namespace fastslots::FASTSLOTS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kBlockRows = 12;  // 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kBlockRows = 6;  // 6 x 2 accumulators of 16 registers
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kBlockRows = 12;  // 32 registers, as in AVX-512
#else
constexpr int kBlockRows = 6;
#endif
#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t ints __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using Ints = typename VectorOf<T>::ints;

template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// Pixels of a panel, and columns of a block of weight gradients: two vectors.
template <typename T>
constexpr int kPanel = 2 * kLanes<T>;

template <typename T>
FASTSLOTS_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename T>
FASTSLOTS_INLINE void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof(v));
}

template <typename T>
FASTSLOTS_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // folds to a plain broadcast, which 0 + value (it changes -0) does not
}

// The larger of each pair; a NaN in `a` stays.
template <typename T>
FASTSLOTS_INLINE Vec<T> max_of(Vec<T> a, Vec<T> b) {
  return a < b ? b : a;
}

template <typename T>
FASTSLOTS_INLINE T sum_of(Vec<T> v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

template <typename T>
FASTSLOTS_INLINE Vec<T> magnitude(Vec<T> v) {
  return v < Vec<T>{} ? -v : v;
}

template <typename T>
FASTSLOTS_INLINE Vec<T> square_root(Vec<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// exp(x) for x <= 0 (a softmax's scores below their maximum, a Gaussian's exponent).
//
// fp32: range reduction by ln 2 in two parts, polynomial of degree 7 (2e-10): within 1 ulp of the exact value
// (tests/test_math.cpp), 0 below -87.3 where results would be subnormal, NaN for NaN. Double: the library's, by lane.
template <typename T>
FASTSLOTS_INLINE Vec<T> exponential(Vec<T> x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    // Adding 1.5 · 2^23 rounds to an integer n, which then stands in the low bits; 127 is the bias of exponents.
    const Vec<T> magic = broadcast<T>(12582912.0f + 127.0f);
    const Vec<T> low = broadcast<T>(-87.3f), zero = {};
    const Vec<T> clamped = x < low ? low : x;
    const Vec<T> shifted = clamped * 1.44269504f + magic;
    const Vec<T> n = shifted - magic;
    const Vec<T> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec<T> p = 0.00019891981314f * r + 0.00139345419283f;
    p = p * r + 0.00833331002423f;
    p = p * r + 0.0416664568097f;
    p = p * r + 0.166666666825f;
    p = p * r + 0.500000001429f;
    const Vec<T> value = (p * r) * r + r + 1.0f;
    Ints<T> bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = bits << 23;  // n + 127 in the exponent's place
    Vec<T> power;
    std::memcpy(&power, &bits, sizeof(power));
    const Vec<T> result = value * power;
    return x < low ? zero : result;
  } else {
    for (int i = 0; i < kLanes<T>; ++i) x[i] = std::exp(x[i]);
    return x;
  }
}

// Φ(x) = ½(1 + erf(x/√2)) and φ(x) = exp(−x²/2)/√(2π).
//
// fp32: with a = |x|, Φ(−a) = exp(−a²/2)·R(a), where R(a)/t is a polynomial of degree 9 in t = 1/(1 + 0.3a), fitted to
// 4e-9 relative on [0, 14]. One exponential serves both, and the tail keeps its relative accuracy, unlike 1 + erf:
// within 8 ulp for x > -1 and 64 ulp down to -12 (where the rounding of x²/2 shows), tests/test_math.cpp.
template <typename T>
FASTSLOTS_INLINE void normal_distribution(Vec<T> x, Vec<T>& cdf, Vec<T>& density) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const Vec<T> zero = {};
    const Vec<T> a = x < zero ? -x : x;
    const Vec<T> e = exponential<T>(-0.5f * (a * a));
    const Vec<T> t = 1.0f / (1.0f + 0.3f * a);
    Vec<T> p = -0.02091435973f * t + 0.1140402721f;
    p = p * t - 0.2320384829f;
    p = p * t + 0.196940677f;
    p = p * t - 0.08374254902f;
    p = p * t + 0.09848074018f;
    p = p * t + 0.07758906438f;
    p = p * t + 0.1104051798f;
    p = p * t + 0.1195517632f;
    p = p * t + 0.1196876931f;
    const Vec<T> tail = e * (p * t);
    cdf = x < zero ? tail : 1.0f - tail;
    density = e * 0.39894228f;
  } else {
    for (int i = 0; i < kLanes<T>; ++i) {
      cdf[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
      density[i] = 0.39894228040143267794 * std::exp(-0.5 * x[i] * x[i]);
    }
  }
}

// The first (or second) halves of a and b, taken in turns: a0 b0 a1 b1 ...
template <typename T, bool kSecondHalf>
FASTSLOTS_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  constexpr int n = kLanes<T>, from = kSecondHalf ? n / 2 : 0;
  static_assert(n == 2 || n == 4 || n == 8 || n == 16);
  // Indices must be literal for both compilers; lane i of b is n + i.
#define FASTSLOTS_PAIR(i) from + i, from + i + n
  if constexpr (n == 2) {
    return __builtin_shufflevector(a, b, FASTSLOTS_PAIR(0));
  } else if constexpr (n == 4) {
    return __builtin_shufflevector(a, b, FASTSLOTS_PAIR(0), FASTSLOTS_PAIR(1));
  } else if constexpr (n == 8) {
    return __builtin_shufflevector(a, b, FASTSLOTS_PAIR(0), FASTSLOTS_PAIR(1), FASTSLOTS_PAIR(2), FASTSLOTS_PAIR(3));
  } else {
    return __builtin_shufflevector(a, b, FASTSLOTS_PAIR(0), FASTSLOTS_PAIR(1), FASTSLOTS_PAIR(2), FASTSLOTS_PAIR(3),
                                   FASTSLOTS_PAIR(4), FASTSLOTS_PAIR(5), FASTSLOTS_PAIR(6), FASTSLOTS_PAIR(7));
  }
#undef FASTSLOTS_PAIR
}

// In place: rows[i][j] <-> rows[j][i] of a square of vectors, by log2(lanes) rounds of perfect shuffles.
template <typename T>
FASTSLOTS_INLINE void transpose_square(Vec<T>* rows) {
  constexpr int n = kLanes<T>;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<T, false>(rows[i], rows[i + n / 2]);
      next[2 * i + 1] = interleave<T, true>(rows[i], rows[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

}  // namespace fastslots::FASTSLOTS_ISA
