// The parts of a training step on a CPU that are not matrix products, each in as few passes over memory as it can be.
//
// Tensors are contiguous unless strides are given, in fp32 or bf16 (T); arithmetic is in fp32 and each result is rounded once. No result
// depends on the number of threads: each is made by one thread, and a sum over rows is of parts that follow from the rows alone. NaN and
// infinity spread as they do in PyTorch. kernels/cpu.py holds the signatures again: the two must be changed together.
//
// N rows (tokens), C width of a row, G batch times heads, t queries, s keys, V vocabulary, B batch, H heads, D head dim, R pairs rotated

#include "vectors.h"

namespace {

constexpr int64_t ENOUGH = 1 << 14;  // elements from which on a second thread pays

// body(i, left) for each vector of n elements; `left` are those from i on
template <class Body> inline void each(int64_t n, Body body) {
#pragma omp parallel for schedule(static) if (n >= ENOUGH)
    for (int64_t i = 0; i < n; i += LANES) body(i, n - i);
}

// body(n) for each of N rows of C elements
template <class Body> inline void rows(int64_t N, int64_t C, Body body) {
#pragma omp parallel for schedule(static) if (N * C >= ENOUGH)
    for (int64_t n = 0; n < N; n++) body(n);
}

// v with `rest` in the lanes from n on
inline vec within(vec v, int64_t n, float rest) {
    if (n >= LANES) return v;
    bits lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return pick((bits)(lane < uint32_t(n < 0 ? 0 : n)), v, all(rest));
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { uint32_t u = uint32_t(x.bits) << 16; return from<float>(&u); }

// Gates g(x) = x * sigmoid(w(x)), and w'(x): silu has w(x) = x; gelu in its tanh form has twice the tanh's argument.
struct Silu {
    static vec w(vec x) { return x; }
    static vec slope(vec) { return all(1.0f); }
};
struct Gelu {
    static constexpr float TWICE = 1.5957691216f, CUBIC = 0.044715f;  // 2 sqrt(2 / pi)
    static vec w(vec x) { return TWICE * (x + CUBIC * x * x * x); }
    static vec slope(vec x) { return TWICE * (1.0f + 3 * CUBIC * x * x); }
};

// out = g(gate) * up
template <class Gate, class T> void gated(const T* gate, const T* up, T* out, int64_t n) {
    each(n, [=](int64_t i, int64_t left) {
        vec x = load(gate + i, left);
        store(out + i, x / (1.0f + exp(-Gate::w(x))) * load(up + i, left), left);
    });
}

template <class Gate, class T> void gated_back(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t n) {
    each(n, [=](int64_t i, int64_t left) {
        vec x = load(gate + i, left), d = load(grad + i, left), w = Gate::w(x);
        bits negative = (bits)(w < 0);
        vec e = exp(pick(negative, w, -w)), more = 1.0f / (1.0f + e), less = e * more;  // both without a difference of near equals
        vec s = pick(negative, less, more), rest = pick(negative, more, less);
        store(grad_gate + i, d * load(up + i, left) * s * (1.0f + x * rest * Gate::slope(x)), left);
        store(grad_up + i, d * x * s, left);
    });
}

// y = x * inverse * (weight + offset), inverse = 1 / sqrt(mean(x^2) + eps); with a residual, x is first total = x + residual, rounded
template <class T> void norm(const T* x, const T* residual, const T* weight, T* total, T* y, float* inverse, int64_t N, int64_t C, float eps,
                             float offset) {
    rows(N, C, [=](int64_t n) {
        const T* row = x + n * C;
        if (residual) {
            for (int64_t c = 0; c < C; c += LANES) store(total + n * C + c, load(row + c, C - c) + load(residual + n * C + c, C - c), C - c);
            row = total + n * C;
        }
        vec squares = {};
        for (int64_t c = 0; c < C; c += LANES) { vec v = load(row + c, C - c); squares += v * v; }
        float scale = inverse[n] = 1.0f / std::sqrt(sum(squares) / C + eps);
        for (int64_t c = 0; c < C; c += LANES) store(y + n * C + c, load(row + c, C - c) * scale * (load(weight + c, C - c) + offset), C - c);
    });
}

// `through`, where there is one, is the gradient that reaches x past the norm. `sums` (parts, C) is work space for the weight's gradient.
template <class T> void norm_back(const T* grad, const T* through, const T* x, const T* weight, const float* inverse, T* grad_x, T* grad_weight,
                                  float* sums, int64_t parts, int64_t N, int64_t C, float offset) {
    rows(parts, N * C / parts, [=](int64_t part) {
        float* own = sums + part * C;
        std::fill(own, own + C, 0.0f);
        for (int64_t n = N * part / parts; n < N * (part + 1) / parts; n++) {
            const T *g = grad + n * C, *row = x + n * C;
            vec products = {};
            for (int64_t c = 0; c < C; c += LANES) {
                vec d = load(g + c, C - c) * (load(row + c, C - c) * inverse[n]);
                store(own + c, load(own + c, C - c) + d, C - c);
                products += d * (load(weight + c, C - c) + offset);
            }
            float mean = sum(products) / C;
            for (int64_t c = 0; c < C; c += LANES) {
                vec d = load(g + c, C - c) * (load(weight + c, C - c) + offset) - load(row + c, C - c) * inverse[n] * mean;
                d *= inverse[n];
                store(grad_x + n * C + c, through ? d + load(through + n * C + c, C - c) : d, C - c);
            }
        }
    });
    each(C, [=](int64_t c, int64_t left) {
        vec total = {};
        for (int64_t part = 0; part < parts; part++) total += load(sums + part * C + c, left);
        store(grad_weight + c, total, left);
    });
}

// x (B, L, H, D) by strides of its first three dimensions, turned by the angles of each token's row of cos and sin (P, R), the other way
// round for sign = -1. Without positions token t has row t. Returns false, nothing written, where a position is outside of the tables.
template <class T> bool rope(const T* x, int64_t x_b, int64_t x_t, int64_t x_h, T* out, int64_t out_b, int64_t out_t, int64_t out_h, const float* cos,
                             const float* sin, const int64_t* positions, int64_t B, int64_t L, int64_t H, int64_t D, int64_t P, int64_t R, float sign) {
    for (int64_t n = 0; positions && n < B * L; n++)
        if (positions[n] < -P || positions[n] >= P) return false;
    rows(B * L, H * D, [=](int64_t n) {
        int64_t b = n / L, t = n % L, place = positions ? positions[n] : t;
        const float *c = cos + (place < 0 ? place + P : place) * R, *s = sin + (place < 0 ? place + P : place) * R;
        for (int64_t h = 0; h < H; h++) {
            const T* from = x + b * x_b + t * x_t + h * x_h;
            T* to = out + b * out_b + t * out_t + h * out_h;
            for (int64_t r = 0; r < R; r += LANES) {
                vec first = load(from + r, R - r), second = load(from + R + r, R - r), sine = sign * load(s + r, R - r), cosine = load(c + r, R - r);
                store(to + r, first * cosine - second * sine, R - r);
                store(to + R + r, second * cosine + first * sine, R - r);
            }
            std::copy(from + 2 * R, from + D, to + 2 * R);
        }
    });
    return true;
}

// The largest of n values; NaN is passed over.
template <class T> inline float peak_of(const T* z, int64_t n) {
    vec peaks = all(-INFINITY);
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = within(load(z + i, n - i), n - i, -INFINITY);
        peaks = pick((bits)(v > peaks), v, peaks);
    }
    return largest(peaks);
}

// p = softmax(scale * z) of z (G, t, s), where query i sees keys up to first + i, or all keys where first < 0; scale > 0. z is overwritten,
// and may be p.
template <class T> void softmax(float* z, T* p, int64_t G, int64_t t, int64_t s, int64_t first, float scale) {
    rows(G * t, s, [=](int64_t r) {
        float* row = z + r * s;
        int64_t seen = first < 0 ? s : first + r % t + 1;
        float peak = peak_of(row, seen);
        vec total = {};
        int64_t j = 0;
        for (; j < seen; j += LANES) {
            vec e = within(exp((load(row + j, s - j) - peak) * scale), std::min(seen, s) - j, 0);
            store(row + j, e, s - j);
            total += e;
        }
        float inverse = 1.0f / sum(total);
        for (int64_t i = 0; i < j; i += LANES) store(p + r * s + i, load(row + i, s - i) * inverse, s - i);
        T rest;
        store(&rest, all(0 * inverse), 1);  // 0, or NaN in a row of NaN
        std::fill(p + r * s + std::min(j, s), p + r * s + s, rest);
    });
}

// grad_z = scale * p * (grad_p - sum(grad_p * p)) of N rows of s keys; may be grad_p.
template <class T> void softmax_back(const float* grad_p, const T* p, T* grad_z, int64_t N, int64_t s, float scale) {
    rows(N, s, [=](int64_t n) {
        vec products = {};
        for (int64_t j = 0; j < s; j += LANES) products += load(grad_p + n * s + j, s - j) * load(p + n * s + j, s - j);
        float dot = sum(products);
        for (int64_t j = 0; j < s; j += LANES)
            store(grad_z + n * s + j, load(p + n * s + j, s - j) * (load(grad_p + n * s + j, s - j) - dot) * scale, s - j);
    });
}

// Log-probabilities (N,) of labels by logits z (N, V), 0 where the label is `ignored`. With factors (N,) z becomes the gradient of
// sum(factor * -logprob): of an ignored row 0, unless it is not finite. Exponentials are computed twice, so that none are held.
template <class T> void cross_entropy(T* z, const int64_t* labels, const float* factors, float* logprobs, int64_t ignored, int64_t N, int64_t V) {
    rows(N, V, [=](int64_t n) {
        T* row = z + n * V;
        bool counts = labels[n] != ignored;
        if (!counts) logprobs[n] = 0;
        if (!counts && !factors) return;
        float peak = peak_of(row, V), own = counts ? widen(row[labels[n]]) - peak : 0;
        vec total = {};
        for (int64_t v = 0; v < V; v += LANES) total += within(exp(load(row + v, V - v) - peak), V - v, 0);
        if (counts) logprobs[n] = own - std::log(sum(total));
        if (!factors) return;
        float factor = counts ? factors[n] : factors[n] * 0, share = factor / sum(total);
        for (int64_t v = 0; v < V; v += LANES) store(row + v, exp(load(row + v, V - v) - peak) * share, V - v);
        if (counts) store(row + labels[n], exp(all(own)) * share - factor, 1);
    });
}

// AdamW on fp32 weights `w`, of which the parameters p are copies, or which they are; kernels/optimizers.py has the formula.
template <class T, class G> void adamw(T* p, float* w, const G* grad, float* m, float* v, int64_t n, float scale, float beta1, float rest1, float beta2,
                                       float rest2, float eps, float kept, float rate, float unbias) {
    each(n, [=](int64_t i, int64_t left) {
        vec g = load(grad + i, left) * scale;
        vec first = beta1 * load(m + i, left) + rest1 * g, second = beta2 * load(v + i, left) + rest2 * g * g, spread;
        for (int lane = 0; lane < LANES; lane++) spread[lane] = std::sqrt(second[lane]);
        vec weight = kept * load(w + i, left) - rate * first / (spread * unbias + eps);
        store(m + i, first, left);
        store(v + i, second, left);
        store(w + i, weight, left);
        store(p + i, weight, left);
    });
}

}  // namespace

#define FUNCTIONS(T)                                                                                                                              \
    void swiglu_##T(const T* gate, const T* up, T* out, int64_t n) { gated<Silu>(gate, up, out, n); }                                             \
    void geglu_##T(const T* gate, const T* up, T* out, int64_t n) { gated<Gelu>(gate, up, out, n); }                                              \
    void swiglu_back_##T(const T* d, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n) { gated_back<Silu>(d, gate, up, d_gate, d_up, n); } \
    void geglu_back_##T(const T* d, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n) { gated_back<Gelu>(d, gate, up, d_gate, d_up, n); } \
    void norm_##T(const T* x, const T* residual, const T* weight, T* total, T* y, float* inverse, int64_t N, int64_t C, float eps, float offset) { \
        norm(x, residual, weight, total, y, inverse, N, C, eps, offset);                                                                          \
    }                                                                                                                                             \
    void norm_back_##T(const T* grad, const T* through, const T* x, const T* weight, const float* inverse, T* grad_x, T* grad_weight, float* sums, \
                       int64_t parts, int64_t N, int64_t C, float offset) {                                                                       \
        norm_back(grad, through, x, weight, inverse, grad_x, grad_weight, sums, parts, N, C, offset);                                             \
    }                                                                                                                                             \
    bool rope_##T(const T* x, int64_t x_b, int64_t x_t, int64_t x_h, T* out, int64_t out_b, int64_t out_t, int64_t out_h, const float* cos,        \
                  const float* sin, const int64_t* positions, int64_t B, int64_t L, int64_t H, int64_t D, int64_t P, int64_t R, float sign) {      \
        return rope(x, x_b, x_t, x_h, out, out_b, out_t, out_h, cos, sin, positions, B, L, H, D, P, R, sign);                                     \
    }                                                                                                                                             \
    void softmax_##T(float* z, T* p, int64_t G, int64_t t, int64_t s, int64_t first, float scale) { softmax(z, p, G, t, s, first, scale); }       \
    void softmax_back_##T(const float* grad_p, const T* p, T* grad_z, int64_t N, int64_t s, float scale) {                                        \
        softmax_back(grad_p, p, grad_z, N, s, scale);                                                                                             \
    }                                                                                                                                             \
    void cross_entropy_##T(T* z, const int64_t* labels, const float* factors, float* logprobs, int64_t ignored, int64_t N, int64_t V) {           \
        cross_entropy(z, labels, factors, logprobs, ignored, N, V);                                                                               \
    }                                                                                                                                             \
    void adamw_##T(T* p, float* w, const T* grad, float* m, float* v, int64_t n, float scale, float beta1, float rest1, float beta2, float rest2, \
                   float eps, float kept, float rate, float unbias) {                                                                               \
        adamw(p, w, grad, m, v, n, scale, beta1, rest1, beta2, rest2, eps, kept, rate, unbias);                                                     \
    }                                                                                                                                             \
    void adamw_wide_##T(T* p, float* w, const float* grad, float* m, float* v, int64_t n, float scale, float beta1, float rest1, float beta2,     \
                        float rest2, float eps, float kept, float rate, float unbias) {                                                             \
        adamw(p, w, grad, m, v, n, scale, beta1, rest1, beta2, rest2, eps, kept, rate, unbias);                                                     \
    }

extern "C" {
FUNCTIONS(float)
FUNCTIONS(bf16)
}
