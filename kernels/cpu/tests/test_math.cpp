// exp (of what is not above 0) and the normal distribution of every instruction set, against long double, in units in the last place.
#include <cstdlib>

#include "check.h"

using namespace fastslots;

// Error in units of the spacing of floats at the exact value; `floor` keeps tiny values from counting.
static double ulps(float found, long double exact, long double floor) {
  const float magnitude = float(std::max(std::abs(exact), floor));
  return double(std::abs(found - exact) / (std::nextafter(magnitude, INFINITY) - magnitude));
}

static void test_isa(Isa isa) {
  const Kernels<float>& kernels = float_kernels(isa);
  const std::string name = isa_name(isa);
  std::vector<float> x;
  for (double v = -110; v < 13; v += 0.00037) x.push_back(float(v));
  for (double v = -1; v < 1; v += 0.000013) x.push_back(float(v));
  std::vector<float> out(x.size()), cdf(x.size()), density(x.size()), negative;
  for (float v : x) negative.push_back(-std::abs(v));  // what exp serves
  kernels.exponential(negative.data(), out.data(), int64_t(x.size()));
  kernels.normal_cdf(x.data(), cdf.data(), density.data(), int64_t(x.size()));
  double exp_error = 0, cdf_error = 0, tail_error = 0, density_error = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const long double v = x[i], n = negative[i];
    if (n > -87.3L) exp_error = std::max(exp_error, ulps(out[i], std::exp(n), 1.2e-38L));
    if (n < -87.4L) check(out[i] == 0, name + " exp underflows to 0");
    if (std::abs(v) > 12) continue;
    const long double exact = std::erfc(-v / std::sqrt(2.0L)) / 2;
    const long double exact_density = std::exp(-v * v / 2) / std::sqrt(2 * std::acos(-1.0L));
    (v > -1 ? cdf_error : tail_error) = std::max(v > -1 ? cdf_error : tail_error, ulps(cdf[i], exact, 1.2e-38L));
    density_error = std::max(density_error, ulps(density[i], exact_density, 1.0L));
  }
  std::printf("%s: exp %.2f ulp, normal cdf %.2f ulp from -1 on, %.1f ulp to -12, density %.2f ulp of 1\n",
              name.c_str(), exp_error, cdf_error, tail_error, density_error);
  check(exp_error < 2, name + " exp");
  check(cdf_error < 8, name + " cdf");
  check(tail_error < 80, name + " cdf tail, where the rounding of x²/2 shows");
  check(density_error < 2, name + " density");

  const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f};
  float e[4], c[5], d[5];
  const float at_most_zero[] = {NAN, -INFINITY, 0.0f, -0.0f};
  kernels.exponential(at_most_zero, e, 4);
  kernels.normal_cdf(special, c, d, 5);
  check(std::isnan(e[0]) && e[1] == 0 && e[2] == 1 && e[3] == 1, name + " exp of special values");
  check(std::isnan(c[0]) && c[1] == 1 && c[2] == 0 && std::abs(c[3] - 0.5f) < 1e-7f, name + " cdf of special values");
  check(std::isnan(d[0]) && d[1] == 0 && d[2] == 0, name + " density of special values");
}

int main() {
  for (Isa isa : supported_isas()) test_isa(isa);
  return report("math");
}
