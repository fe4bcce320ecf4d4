// e^x by one polynomial for every kernel of plain loops: the library's is a call per element.
//
// With n = round(x / ln 2) it is 2^n e^r, r in [-ln 2 / 2, ln 2 / 2]. The polynomial's relative error is
// 1e-7, or 5e-6 where T, which results are rounded to, is bfloat16. The rounding of r adds 2e-9 |x| with
// a fused multiply-add, 6e-8 |x| without. Bounds are kept in integers, since a comparison of floats can
// split a vector loop's body into masked parts.
#pragma once

#include "common.h"

namespace mfmjt {

// e^x for x in [-88, 89], at the ends of which it is zero and infinity.
template <class T>
MFMJT_BODY float exponential_within(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const float shifted = x * 0x1.715476p+0f + shift;
  const float n = shifted - shift;
  const float r = x - n * 0x1.62e430p-1f;
  float p;
  if (std::is_same_v<T, float>) {
    p = 0x1.1062500p-7f;
    p = p * r + 0x1.572a64p-5f;
    p = p * r + 0x1.5557b0p-3f;
    p = p * r + 0x1.fffdfcp-2f;
  } else {
    p = 0x1.5224eap-5f;
    p = p * r + 0x1.571d1ep-3f;
    p = p * r + 0x1.0006b8p-1f;
  }
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * float_of((bits_of(shifted) << 23) + 0x3f800000u);  // 2^n: the low bits are n
}

// e^x for x up to 88, above which it is e^88; NaN where x is.
template <class T>
MFMJT_BODY float exponential(float x) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu;
  const uint32_t nan = size > 0x7f800000u ? 0x7fc00000u : 0u;
  const uint32_t bounded = size < 0x42b00000u ? size : 0x42b00000u;  // 88
  const float value = exponential_within<T>(float_of(bounded | (bits & 0x80000000u)));
  return float_of(bits_of(value) | nan);
}

// 1 / (1 + e^-x) for any x; a NaN counts as a large number.
template <class T>
MFMJT_BODY float sigmoid(float x) {
  const auto below = std::min<int32_t>(static_cast<int32_t>(bits_of(x)), 0x42b00000);  // 88
  const uint32_t bits = std::min<uint32_t>(static_cast<uint32_t>(below), 0xc2b20000u);  // -89
  return 1.0f / (1.0f + exponential_within<T>(-float_of(bits)));
}

}  // namespace mfmjt
