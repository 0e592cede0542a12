// Products of a few rows of activations with matrices of weights, which are read where they lie: with AMX tiles, with the processor's
// dot products of bfloat16, or with vectors. Each output is summed in an order that depends on the number of inputs alone.
//
// Legend of shapes: N rows, I inputs, O outputs; weights (O, I).

#pragma once

#include "vectors.h"
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace {

template <class W> constexpr int STRIDE = LANES;  // channels of one multiplication
template <> constexpr int STRIDE<bf16> = 2 * LANES;

inline vec multiply(vec sum, const float* w, const float* x) { return sum + from<vec>(w) * from<vec>(x); }
inline vec multiply(vec sum, const bf16* w, const bf16* x) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)from<__m512i>(w), (__m512bh)from<__m512i>(x));
#else
    bits a = from<bits>(w), b = from<bits>(x);  // pairs; a bfloat16 is the upper half of a float
    sum += (vec)(a << 16) * (vec)(b << 16);
    return sum + (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
#endif
}

// y[r * y_stride + o] = row o of weights times row r of x, for R rows of x and LANES / R of weights: as many sums as a vector holds.
template <class W, int R> inline void dots(const W* const* w, const W* x, int64_t x_stride, int64_t I, float* y, int64_t y_stride) {
    constexpr int O = LANES / R;
    vec acc[LANES] = {};
    int64_t i = 0;
    for (; i + STRIDE<W> <= I; i += STRIDE<W>)
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++) acc[r * O + o] = multiply(acc[r * O + o], w[o] + i, x + r * x_stride + i);
    if (i < I) {
        W ends[R][STRIDE<W>] = {}, end[STRIDE<W>] = {};
        for (int r = 0; r < R; r++) memcpy(ends[r], x + r * x_stride + i, (I - i) * sizeof(W));
        for (int o = 0; o < O; o++) {
            memcpy(end, w[o] + i, (I - i) * sizeof(W));
            for (int r = 0; r < R; r++) acc[r * O + o] = multiply(acc[r * O + o], end, ends[r]);
        }
    }
    float found[LANES];
    narrow(found, sums(acc));
    for (int r = 0; r < R; r++) memcpy(y + r * y_stride, found + r * O, sizeof(float) * O);
}

constexpr int ROWS = 16, OUTS = 64;  // of a tile: what one thread makes at a time

// What products read: N rows of I channels. For AMX the rows of a block of 16 stand beside each other, pair by pair of channels.
template <class W> struct Rows {
    W* data;
    int64_t I;
    bool paired;
    void put(int64_t n, int64_t i, vec v, int64_t count) const {
        if (!paired) return store(data + n * I + i, v, count);
        W part[LANES];
        narrow(part, v);
        uint32_t pairs[LANES / 2];
        memcpy(pairs, part, sizeof pairs);
        uint32_t* to = (uint32_t*)(data + n / ROWS * ROWS * I) + i / 2 * ROWS + n % ROWS;
        for (int64_t j = 0; j < std::min<int64_t>(count, LANES) / 2; j++) to[j * ROWS] = pairs[j];
    }
};

#ifdef __AMX_BF16__
// Sums of 16 rows of x with B blocks of 16 rows of weights, which are read where they lie. The last `missing` rows are not there.
template <int B> inline void amx(const bf16* x, const bf16* w, int64_t I, int64_t missing, float (*sums)[ROWS]) {
    alignas(64) bf16 end[16][32] = {};
    int64_t strides[B];
    for (int b = 0; b < B; b++) strides[b] = 2 * I;
    if (missing) strides[B - 1] = sizeof end[0];
    _tile_zero(0);
    if constexpr (B > 1) _tile_zero(1);
    if constexpr (B > 2) _tile_zero(2);
    if constexpr (B > 3) _tile_zero(3);
    for (int64_t i = 0; i < I; i += 32) {
        const bf16* from[B];
        for (int b = 0; b < B; b++) from[b] = w + b * 16 * I + i;
        if (missing) {
            for (int64_t o = 0; o < 16 - missing; o++) memcpy(end[o], from[B - 1] + o * I, sizeof end[0]);
            from[B - 1] = end[0];
            asm volatile("" ::: "memory");  // the tile instructions do not tell the compiler what they read
        }
        _tile_loadd(7, x + i * ROWS, 64);
        _tile_loadd(4, from[0], strides[0]);
        _tile_dpbf16ps(0, 4, 7);
        if constexpr (B > 1) { _tile_loadd(5, from[1], strides[1]); _tile_dpbf16ps(1, 5, 7); }
        if constexpr (B > 2) { _tile_loadd(6, from[2], strides[2]); _tile_dpbf16ps(2, 6, 7); }
        if constexpr (B > 3) { _tile_loadd(4, from[3], strides[3]); _tile_dpbf16ps(3, 4, 7); }
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (B > 1) _tile_stored(1, sums[16], 64);
    if constexpr (B > 2) _tile_stored(2, sums[32], 64);
    if constexpr (B > 3) _tile_stored(3, sums[48], 64);
}

// y (rows, 64) = the transpose of x (64, 16): a token's sums stand together again.
inline void turn(const float (*x)[ROWS], int64_t rows, int64_t outs, float (*y)[OUTS]) {
    if (rows <= 4) {
        for (int64_t n = 0; n < rows; n++)
            for (int64_t o = 0; o < outs; o++) y[n][o] = x[o][n];
        return;
    }
    for (int64_t o = 0; o < outs; o += 16) {
        __m512 a[16], b[16];
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(x[o + i]);
        for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; j++) {
                __m512d p = (__m512d)b[i + j], q = (__m512d)b[i + j + 2];
                a[i + 2 * j] = (__m512)_mm512_unpacklo_pd(p, q), a[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(p, q);
            }
        for (int i = 0; i < 4; i++) {  // a[4 g + i] holds, of rows 4 g to 4 g + 3, columns i, 4 + i, 8 + i and 12 + i
            __m512 p = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), q = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
            __m512 r = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88), s = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
            _mm512_storeu_ps(y[i] + o, _mm512_shuffle_f32x4(p, r, 0x88)), _mm512_storeu_ps(y[8 + i] + o, _mm512_shuffle_f32x4(p, r, 0xdd));
            _mm512_storeu_ps(y[4 + i] + o, _mm512_shuffle_f32x4(q, s, 0x88)), _mm512_storeu_ps(y[12 + i] + o, _mm512_shuffle_f32x4(q, s, 0xdd));
        }
    }
}
#endif

// y = rows n.. of x (at most 16) times weights w (at most 64), without bias.
template <class W> void tile(const Rows<W>& x, int64_t n, int64_t rows, const W* w, int64_t outs, float (*y)[OUTS]) {
#ifdef __AMX_BF16__
    if constexpr (sizeof(W) == sizeof(bf16))
        if (x.paired) {
            alignas(64) float sums[OUTS][ROWS];
            const W* block = x.data + n * x.I;
            int64_t missing = (16 - outs % 16) % 16;
            switch ((outs + 15) / 16) {
                case 1: amx<1>(block, w, x.I, missing, sums); break;
                case 2: amx<2>(block, w, x.I, missing, sums); break;
                case 3: amx<3>(block, w, x.I, missing, sums); break;
                case 4: amx<4>(block, w, x.I, missing, sums); break;
            }
            return turn(sums, rows, outs, y);
        }
#endif
    for (int64_t o = 0; o < outs; o += LANES) {
        const W* some[LANES];
        for (int64_t j = 0; j < LANES; j++) some[j] = w + std::min(o + j, outs - 1) * x.I;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)  // tokens that share each weight loaded
            for (int64_t j = 0; j < LANES; j += LANES / 4) dots<W, 4>(some + j, x.data + (n + r) * x.I, x.I, x.I, y[r] + o + j, OUTS);
        for (; r < rows; r++) dots<W, 1>(some, x.data + (n + r) * x.I, x.I, x.I, y[r] + o, OUTS);
    }
}

}  // namespace
