// Vectors of fp32 for what is written without intrinsics: the compiler makes of them what the processor has. bfloat16 is widened and
// rounded at loads and stores.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bf16 { uint16_t bits; };

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float four __attribute__((vector_size(16)));

template <class T> inline T from(const void* p) { T v; memcpy(&v, p, sizeof v); return v; }
inline vec all(float x) { return x - vec{}; }
inline vec pick(bits mask, vec a, vec b) { return (vec)((mask & (bits)a) | (~mask & (bits)b)); }

inline vec wide(const float* p) { return from<vec>(p); }
inline vec wide(const bf16* p) { return (vec)(__builtin_convertvector(from<halves>(p), bits) << 16); }
inline void narrow(float* p, vec v) { memcpy(p, &v, sizeof v); }
inline void narrow(bf16* p, vec v) {  // to nearest, ties to even; NaN stays NaN
    bits u = (bits)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (bits)(v != v);
    halves h = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), halves);
    memcpy(p, &h, sizeof h);
}

// The first `n` of a vector that would reach beyond a row's end; the rest reads as 0 and is not written.
template <class W> inline vec load(const W* p, int64_t n) {
    if (n >= LANES) return wide(p);
    W part[LANES] = {};
    memcpy(part, p, n * sizeof(W));
    return wide(part);
}
template <class W> inline void store(W* p, vec v, int64_t n) {
    if (n >= LANES) return narrow(p, v);
    W part[LANES];
    narrow(part, v);
    memcpy(p, part, n * sizeof(W));
}
template <class W> inline vec rounded(vec v) { W part[LANES]; narrow(part, v); return wide(part); }

#if defined(__clang__) || __GNUC__ >= 12
template <int FIRST> inline four quarter(vec v) { return __builtin_shufflevector(v, v, FIRST, FIRST + 1, FIRST + 2, FIRST + 3); }
template <int A, int B, int C, int D> inline four mix(four a, four b) { return __builtin_shufflevector(a, b, A, B, C, D); }
#else
template <int FIRST> inline four quarter(vec v) { return four{v[FIRST], v[FIRST + 1], v[FIRST + 2], v[FIRST + 3]}; }
template <int A, int B, int C, int D> inline four mix(four a, four b) {
    auto at = [&](int i) { return i < 4 ? a[i] : b[i - 4]; };
    return four{at(A), at(B), at(C), at(D)};
}
#endif
inline four fold(vec v) {
    if constexpr (LANES == 16) return (quarter<0>(v) + quarter<8>(v)) + (quarter<4>(v) + quarter<12>(v));
    else return quarter<0>(v) + quarter<4>(v);
}
inline four sums(vec a, vec b, vec c, vec d) {  // of four vectors at once, each in the same order
    four p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    four pq = mix<0, 4, 1, 5>(p, q) + mix<2, 6, 3, 7>(p, q), rs = mix<0, 4, 1, 5>(r, s) + mix<2, 6, 3, 7>(r, s);
    return mix<0, 1, 4, 5>(pq, rs) + mix<2, 3, 6, 7>(pq, rs);
}
inline float sum(vec a) { return sums(a, a, a, a)[0]; }
inline float largest(vec a) { float m = a[0]; for (int i = 1; i < LANES; i++) m = std::max(m, a[i]); return m; }

inline vec exp(vec x) {  // to 1e-7 of its value; 0 below the smallest normal number
    vec whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // the shift by 1.5 * 2^23 rounds to a whole number
    vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec power = (vec)(((bits)(whole + 12582912.0f) - 0x4b400000 + 127) << 23);
    vec grown = pick((bits)(x > 88.3762f), all(INFINITY), p * power);
    return pick((bits)(x != x), x, pick((bits)(x < -87.3f), vec{}, grown));
}
inline vec tanh(vec x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }
inline vec silu(vec x) { return x / (1.0f + exp(-x)); }
inline vec gelu(vec x) { return 0.5f * x * (1.0f + tanh(0.7978845608f * (x + 0.044715f * x * x * x))); }

}  // namespace
