/* sampler.c: picks the next token from logits in host memory. The order is that of Hugging Face and llama.cpp:
 * repetition penalty, temperature, top-k, top-p, min-p, then one draw. Equal logits are ordered by id, so that a seed
 * gives the same text everywhere. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../core/base.h"

typedef struct candidate {
    float logit;
    int32_t id;
    double p;
} candidate;

/* NaN counts as impossible: a broken logit must not win. */
static float plain(float x) { return isnan(x) ? -INFINITY : x; }

static int better(const candidate *a, const candidate *b) {
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static int by_logit(const void *a, const void *b) { return better(a, b) ? -1 : better(b, a) ? 1 : 0; }

static int32_t greedy(const candidate *c, int32_t n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (better(&c[i], &c[best])) best = i;
    return c[best].id;
}

/* Each id once, however often it was seen. */
static void penalize(candidate *c, int32_t n, double penalty, const int32_t *recent, int32_t n_recent) {
    for (int32_t i = 0; i < n_recent; i++) {
        int32_t id = recent[i];
        if (id < 0 || id >= n || c[id].p != 0) continue; /* p marks those done */
        c[id].logit = (float)(c[id].logit > 0 ? c[id].logit / penalty : c[id].logit * penalty);
        c[id].p = 1;
    }
}

/* Brings the `keep` best to the front, unordered: quickselect. */
static void select_best(candidate *c, int32_t n, int32_t keep) {
    int32_t low = 0, high = n - 1;
    while (low < high) {
        candidate pivot = c[low + (high - low) / 2], swap;
        int32_t i = low, j = high;
        while (i <= j) {
            while (better(&c[i], &pivot)) i++;
            while (better(&pivot, &c[j])) j--;
            if (i <= j) swap = c[i], c[i++] = c[j], c[j--] = swap;
        }
        if (keep - 1 <= j)
            high = j;
        else if (keep - 1 >= i)
            low = i;
        else
            return;
    }
}

/* Weights relative to the best, whose weight is 1; their sum. */
static double weigh(candidate *c, int32_t n, double temperature) {
    double sum = 0;
    float top = c[0].logit;
    for (int32_t i = 1; i < n; i++)
        if (c[i].logit > top) top = c[i].logit;
    for (int32_t i = 0; i < n; i++) sum += c[i].p = exp(((double)c[i].logit - top) / temperature);
    return sum;
}

/* The fewest of the best that together reach top_p. Only as many are sorted as turn out to be needed: sorting a whole
 * vocabulary costs more than a small model's step. */
static int32_t nucleus(candidate *c, int32_t n, double top_p, double sum) {
    for (int32_t sorted = 256;; sorted *= 8) {
        if (sorted > n) sorted = n;
        select_best(c, n, sorted);
        qsort(c, (size_t)sorted, sizeof *c, by_logit);
        double reached = 0;
        for (int32_t i = 0; i < sorted; i++)
            if ((reached += c[i].p) >= top_p * sum) return i + 1;
        if (sorted == n) return n;
    }
}

static int32_t drop_unlikely(candidate *c, int32_t n, double min_p) {
    int32_t keep = 0;
    for (int32_t i = 0; i < n; i++)
        if (c[i].p >= min_p) c[keep++] = c[i];
    return keep;
}

static int32_t draw(const candidate *c, int32_t n, double uniform) {
    double sum = 0, at = 0;
    int32_t last = 0;
    for (int32_t i = 0; i < n; i++) sum += c[i].p;
    for (int32_t i = 0; i < n; i++) {
        if (c[i].p > 0) last = i; /* rounding must not end on an impossible token */
        if ((at += c[i].p) > uniform * sum) return c[i].id;
    }
    return c[last].id;
}

static int32_t sample(candidate *c, int32_t n, const lc_sampling *how, double uniform) {
    int32_t best = greedy(c, n);
    if (!(how->temperature > 0) || isinf(c[best].logit))
        return best; /* at infinity: nothing possible, or one thing certain */
    if (how->top_k > 0 && how->top_k < n) {
        select_best(c, n, how->top_k);
        n = how->top_k;
        qsort(c, (size_t)n, sizeof *c, by_logit); /* so that a draw does not depend on how the selection went */
    }
    double sum = weigh(c, n, how->temperature);
    if (how->top_p > 0 && how->top_p < 1) n = nucleus(c, n, how->top_p, sum);
    if (how->min_p > 0) n = drop_unlikely(c, n, how->min_p < 1 ? how->min_p : 1);
    return draw(c, n, uniform);
}

int32_t lc_sample(const float *logits, int32_t n, const lc_sampling *how, const int32_t *recent, int32_t n_recent,
                  double uniform) {
    if (!logits || n <= 0 || !how) return lc_fail(LC_EARG, "sample: no logits"), -1;
    candidate *c = lc_alloc((size_t)n, sizeof *c);
    if (!c) return -1;
    for (int32_t i = 0; i < n; i++) c[i] = (candidate){plain(logits[i]), i, 0};
    if (how->repetition > 0 && how->repetition != 1 && recent) penalize(c, n, how->repetition, recent, n_recent);
    int32_t id = sample(c, n, how, uniform);
    lc_free(c);
    return id;
}
