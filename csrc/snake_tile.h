// A stretch of snake.cpp in registers, for the instruction set that the including file names:
//   SNAKE_TARGET, SNAKE_LANES (16 or 8).
// Included once per instruction set, each time in a namespace of its own, hence no include guard:
// vectors wider than the baseline's exist only inside functions of that target.

#define SNAKE_INLINE static inline __attribute__((always_inline, target(SNAKE_TARGET)))
#define SNAKE_BOTH for (int i = 0; i < 2; ++i)

#if SNAKE_LANES == 16
typedef __m512 Vector;

SNAKE_INLINE __m512i halves(int first, int step) {  // two 16-bit numbers in each word
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i from = _mm512_set1_epi32(first), by = _mm512_set1_epi32(step);
  return _mm512_add_epi32(_mm512_mullo_epi32(lanes, by), from);
}
SNAKE_INLINE Vector fetch(const float* x) { return _mm512_loadu_ps(x); }
SNAKE_INLINE Vector fetch(const bf16* x) {  // one permutation puts each half in its place
  const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(
      0xaaaaaaaau, halves(0, 0x10000), _mm512_castsi256_si512(from)));
}
SNAKE_INLINE void put(float* y, Vector v) { _mm512_storeu_ps(y, v); }
SNAKE_INLINE void put(bf16* y, Vector v) {  // rounded as rounded_bits does
  __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i upper = _mm512_permutexvar_epi16(halves(0x00030001, 0x00040004), bits);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_castsi512_si256(upper));
}
SNAKE_INLINE Vector rounded(Vector v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <int n>
SNAKE_INLINE Vector shifted(Vector a, Vector b) {
  return _mm512_castsi512_ps(
      _mm512_alignr_epi32(_mm512_castps_si512(b), _mm512_castps_si512(a), n));
}
#else
typedef __m256 Vector;

SNAKE_INLINE Vector fetch(const float* x) { return _mm256_loadu_ps(x); }
SNAKE_INLINE Vector fetch(const bf16* x) {
  const __m128i from = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(from), 16));
}
SNAKE_INLINE void put(float* y, Vector v) { _mm256_storeu_ps(y, v); }
SNAKE_INLINE void put(bf16* y, Vector v) {  // rounded as rounded_bits does
  __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  bits = _mm256_srli_epi32(bits, 16);
  bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_castsi256_si128(bits));
}
SNAKE_INLINE Vector rounded(Vector v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <int n>
SNAKE_INLINE Vector shifted(Vector a, Vector b) {
  const __m256i from = _mm256_castps_si256(a), to = _mm256_castps_si256(b);
  const __m256i middle = _mm256_permute2x128_si256(from, to, 0x21);
  if (n == 4) return _mm256_castsi256_ps(middle);
  if (n < 4) return _mm256_castsi256_ps(_mm256_alignr_epi8(middle, from, 4 * n % 16));
  return _mm256_castsi256_ps(_mm256_alignr_epi8(to, middle, 4 * n % 16));
}
#endif

// The six neighbours that a filter joins: lane i of the k-th is element i + k.
struct Window {
  Vector of[6];
};
template <class T>
SNAKE_INLINE Window window(const T* x) {
  return {{fetch(x), fetch(x + 1), fetch(x + 2), fetch(x + 3), fetch(x + 4), fetch(x + 5)}};
}
template <class T>
SNAKE_INLINE Window read(const T* x, int64_t length, int64_t first) {
  constexpr int64_t count = SNAKE_LANES + 5;
  if (__builtin_expect(first >= 0 && first + count <= length, 1)) return window(x + first);
  float values[count];
  copy(x, length, first, count, values);
  return window(values);
}
template <class T>
SNAKE_INLINE void write(T* y, Vector v, int64_t count) {
  if (__builtin_expect(count >= SNAKE_LANES, 1)) return put(y, v);
  float values[SNAKE_LANES];
  put(values, v);
  for (int64_t i = 0; i < count; ++i) store(y + i, values[i]);
}

struct Pairs {  // even and odd
  Vector of[2];
};
SNAKE_INLINE Pairs upsample(const Window& x) {
  Vector sum = (x.of[0] + x.of[5]) * kSums[0], difference = (x.of[0] - x.of[5]) * kDifferences[0];
  sum += (x.of[1] + x.of[4]) * kSums[1], difference += (x.of[1] - x.of[4]) * kDifferences[1];
  sum += (x.of[2] + x.of[3]) * kSums[2], difference += (x.of[2] - x.of[3]) * kDifferences[2];
  return {{sum + difference, sum - difference}};
}
// `activate` of snake.cpp, step by step for both, since each step waits for the one before.
template <class T>
SNAKE_INLINE Pairs activated(const Pairs& u, const Channel& channel) {
  Vector r[2], whole[2], z[2], p[2];
  Pairs y;
  SNAKE_BOTH r[i] = u.of[i] * channel.turns;
  SNAKE_BOTH whole[i] = rounded(r[i]);
  SNAKE_BOTH r[i] = r[i] - whole[i];
  SNAKE_BOTH z[i] = r[i] * r[i];
  SNAKE_BOTH p[i] = z[i] * channel.sine[0] + channel.sine[1];
  SNAKE_BOTH p[i] = p[i] * z[i] + channel.sine[2];
  SNAKE_BOTH p[i] = p[i] * z[i] + channel.sine[3];
  if (kTerms<T> == 5) SNAKE_BOTH p[i] = p[i] * z[i] + channel.sine[4];
  SNAKE_BOTH p[i] = p[i] * p[i];
  SNAKE_BOTH y.of[i] = u.of[i] + z[i] * p[i];
  return y;
}
// even + odd and odd - even
struct SumAndDifference {
  Vector sum, difference;
};
SNAKE_INLINE SumAndDifference joined(const Pairs& y) {
  return {y.of[0] + y.of[1], y.of[1] - y.of[0]};
}

// What a pair gives to each of the six outputs around it, the last of them first. Shifting these
// takes half of the permutations that shifting both sums would.
struct Parts {
  Vector of[6];
};
SNAKE_INLINE Parts parts(const SumAndDifference& y) {
  Parts v;
  for (int k = 0; k < 3; ++k) {
    const Vector part = y.sum * kSums[k];
    v.of[k] = part + y.difference * kDifferences[k];
    v.of[5 - k] = part - y.difference * kDifferences[k];
  }
  return v;
}
SNAKE_INLINE Vector downsample(const Parts& a, const Parts& b) {
  const Vector first = a.of[0] + shifted<1>(a.of[1], b.of[1]);
  const Vector second = shifted<2>(a.of[2], b.of[2]) + shifted<3>(a.of[3], b.of[3]);
  const Vector third = shifted<4>(a.of[4], b.of[4]) + shifted<5>(a.of[5], b.of[5]);
  return first + second + third;
}

// A stretch goes by in one loop, and nothing between the filters is stored. The steps of a turn
// belong to three vectors, one behind the other, so that none of them waits for another.
template <class T>
static __attribute__((noinline, target(SNAKE_TARGET))) void stretch(
    const T* x, T* y, int64_t begin, int64_t end, int64_t length, Channel channel) {
  constexpr int64_t n = SNAKE_LANES;
  const int64_t past = end + 3;  // of the pairs that outputs are made of
  float last = 0;
  Parts before = {};
  SumAndDifference ready = {};
  Pairs pairs = upsample(read(x, length, begin - 5));
  for (int64_t q = begin - 2; q + 2 < end + 2 * n; q += n) {
    Pairs next = pairs;
    if (__builtin_expect(q + n < past, 1)) next = upsample(read(x, length, q + n - 3));

    const Pairs acted = activated<T>(pairs, channel);

    const Parts now = parts(ready);
    const int64_t i = q + 2 - 2 * n;
    if (__builtin_expect(i >= begin, 1)) write(y + i, downsample(before, now), end - i);

    before = now;
    ready = joined(acted);
    if (__builtin_expect(q < 0 || (q + n > length && q < past), 0)) {
      float sum[n], difference[n];
      put(sum, ready.sum);
      put(difference, ready.difference);
      repeat_ends(sum, difference, q, n, length, last);
      ready = {fetch(sum), fetch(difference)};
    }
    pairs = next;
  }
}

#undef SNAKE_BOTH
#undef SNAKE_INLINE
#undef SNAKE_TARGET
#undef SNAKE_LANES
