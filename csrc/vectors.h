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
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, bits{__VA_ARGS__})
#endif

// The sums of LANES vectors side by side. Each is summed in the same order: halves onto each other, and again.
inline vec sums(vec v[LANES]) {
#ifdef __AVX512F__
    for (int i = 0; i < 8; i++)
        v[i] = MIX(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               MIX(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        v[i] = MIX(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               MIX(v[2 * i], v[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        v[i] = MIX(v[2 * i], v[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               MIX(v[2 * i], v[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return MIX(v[0], v[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           MIX(v[0], v[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    for (int i = 0; i < 4; i++)
        v[i] = MIX(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11) + MIX(v[2 * i], v[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; i++)
        v[i] = MIX(v[2 * i], v[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13) + MIX(v[2 * i], v[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15);
    return MIX(v[0], v[1], 0, 2, 4, 6, 8, 10, 12, 14) + MIX(v[0], v[1], 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}
inline float sum(vec v) {
    float part[LANES];
    narrow(part, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}
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
