// The next token of a row from its logits: nanotrain/model/sampling.py says what each setting means.

#pragma once

#include <numeric>
#include <vector>

#include "vectors.h"

// What nanotrain/model/native_decode.py fills in; the two must be changed together.
extern "C" struct Choice {
    const double* uniforms;  // (N,) in [0, 1); not read where temperature is 0
    int64_t* tokens;         // (N,), chosen
    double* logprobs;        // (N,), of those by the logits themselves
    double temperature, top_p, min_p;
    int64_t top_k;
};

namespace {

constexpr int64_t BLOCK = 64;  // terms of a sum in fp32; sums of blocks are in double precision

// Zero all but the largest of p: at most `count` of them, and none that comes after those before it have reached `mass`. Equals stand in
// the order of their places. Values lie in [0, 1]: their upper bits sort them into steps, and only the step that is cut is sorted.
inline void keep_largest(std::vector<float>& p, int64_t count, double mass) {
    constexpr int STEPS = 0x3f8 + 1;
    auto step = [](float x) { return std::min<int64_t>(from<uint32_t>(&x) >> 20, STEPS - 1); };
    std::vector<int64_t> counts(STEPS);
    std::vector<double> masses(STEPS);
    for (float x : p) counts[step(x)]++, masses[step(x)] += x;
    int64_t cut = STEPS - 1;
    while (cut > 0 && counts[cut] < count && masses[cut] < mass) count -= counts[cut], mass -= masses[cut], cut--;
    std::vector<int64_t> here;
    for (size_t v = 0; v < p.size(); v++) {
        if (step(p[v]) == cut) here.push_back(v);
        else if (step(p[v]) < cut) p[v] = 0;
    }
    std::sort(here.begin(), here.end(), [&](int64_t a, int64_t b) { return p[a] != p[b] ? p[a] > p[b] : a < b; });
    for (int64_t v : here) {
        bool kept = count-- > 0 && mass > 0;
        mass -= p[v];
        if (!kept) p[v] = 0;
    }
}

// The first place whose running sum passes a share `uniform` of the whole; never one of weight 0. p is whole blocks long.
inline int64_t invert(const std::vector<float>& p, double uniform) {
    std::vector<double> ends;  // running sums of blocks, and then within the one that is hit
    double total = 0;
    for (size_t v = 0; v < p.size(); v += BLOCK) {
        vec part = {};
        for (size_t i = v; i < v + BLOCK; i += LANES) part += wide(&p[i]);
        ends.push_back(total += sum(part));
    }
    if (!(total > 0)) return 0;  // logits that are no numbers
    double target = std::min(uniform * total, std::nextafter(total, 0.0));
    int64_t block = std::upper_bound(ends.begin(), ends.end(), target) - ends.begin(), last = -1;
    double reached = block ? ends[block - 1] : 0;
    for (int64_t v = block * BLOCK; v < (block + 1) * BLOCK && reached <= target; v++)
        if (p[v] > 0) last = v, reached += p[v];
    return last;
}

// p = exp((z - peak) * by), and its sum.
inline double powers(const float* z, int64_t V, float peak, float by, float* p) {
    double total = 0;
    for (int64_t v = 0; v < V; v += BLOCK) {
        vec part = {};
        for (int64_t i = v; i < std::min(v + BLOCK, V); i += LANES) {
            vec e = exp((load(z + i, V - i) - peak) * by);
            for (int64_t j = V - i; j < LANES; j++) e[j] = 0;
            if (p) narrow(p + i, e);
            part += e;
        }
        total += sum(part);
    }
    return total;
}

// Token n from its logits z (V,).
inline void choose(const Choice& c, const float* z, int64_t V, int64_t n) {
    vec peaks = all(-INFINITY);
    int64_t v = 0;
    for (; v + LANES <= V; v += LANES) peaks = pick((bits)(wide(z + v) > peaks), wide(z + v), peaks);
    float peak = largest(peaks);
    for (; v < V; v++) peak = std::max(peak, z[v]);
    int64_t token = std::min<int64_t>(std::find(z, z + V, peak) - z, V - 1);
    if (c.temperature > 0) {
        std::vector<float> p((V + BLOCK - 1) / BLOCK * BLOCK);
        double total = powers(z, V, peak, 1 / c.temperature, p.data());
        if (0 < c.top_k && c.top_k < V) keep_largest(p, c.top_k, INFINITY);
        if (c.top_p < 1) {
            if (0 < c.top_k && c.top_k < V) total = std::accumulate(p.begin(), p.end(), 0.0);
            keep_largest(p, V, c.top_p * total);
        }
        if (c.min_p > 0)
            for (float& x : p) x = x >= c.min_p ? x : 0;  // the largest is 1
        token = invert(p, c.uniforms[n]);
    }
    c.tokens[n] = token;
    c.logprobs[n] = (double)(z[token] - peak) - std::log(powers(z, V, peak, 1, nullptr));
}

}  // namespace
