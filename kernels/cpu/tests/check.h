// The least that a test needs: named checks, a count of failures, and seeded numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "api.h"

inline int failures = 0;

inline void check(bool passed, const std::string& what) {
  if (passed) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

inline void check_close(double found, double expected, double tolerance, const std::string& what) {
  const bool passed = std::abs(found - expected) <= tolerance * (1 + std::abs(expected));  // false for NaN
  check(passed, what + ": " + std::to_string(found) + " for " + std::to_string(expected) + ", off by " +
                    std::to_string((found - expected) / (1 + std::abs(expected)) * 1e9) + "e-9");
}

// Largest difference over the largest magnitude of `expected`; infinite where either holds a NaN.
template <typename A, typename B>
double relative_error(const std::vector<A>& found, const std::vector<B>& expected) {
  double largest = 0, worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(double(found[i]) - double(expected[i]));
    if (!(difference < INFINITY)) return INFINITY;
    worst = std::max(worst, difference);
    largest = std::max(largest, std::abs(double(expected[i])));
  }
  return worst == 0 ? 0 : worst / std::max(largest, 1e-6);
}

inline std::vector<double> normal(std::mt19937& random, size_t count, double scale, double mean = 0) {
  std::normal_distribution<double> draw(mean, scale);
  std::vector<double> values(count);
  for (double& value : values) value = draw(random);
  return values;
}

template <typename To, typename From>
std::vector<To> as(const std::vector<From>& values) {
  return std::vector<To>(values.begin(), values.end());
}

inline std::vector<fastslots::Isa> supported_isas() {
  std::vector<fastslots::Isa> isas;
  for (auto isa : {fastslots::Isa::portable, fastslots::Isa::avx2, fastslots::Isa::avx512}) {
    if (fastslots::isa_supported(isa)) isas.push_back(isa);
  }
  return isas;
}

inline int report(const char* name) {
  std::printf("%s: %s\n", name, failures ? "failed" : "passed");
  return failures ? 1 : 0;
}
