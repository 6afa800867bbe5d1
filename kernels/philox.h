/* philox.h: the random stream of the CPU and the GPU: Philox4x32-10 (Salmon et al., 2011), a function of key and
 * counter alone. Element i of an op takes lane i % 4 of counter offset + i / 4, with the seed as key; so values depend
 * neither on threads nor on vector width, and an op on n elements uses (n + 3) / 4 counters. The includer defines
 * LC_FN, real, and the m_* functions. */
#ifndef LC_PHILOX_H
#define LC_PHILOX_H

#include <stdint.h>

LC_FN void lc_philox_round(uint32_t *c0, uint32_t *c1, uint32_t *c2, uint32_t *c3, uint32_t key0, uint32_t key1) {
    uint64_t a = (uint64_t)0xD2511F53u * *c0, b = (uint64_t)0xCD9E8D57u * *c2;
    *c0 = (uint32_t)(b >> 32) ^ *c1 ^ key0;
    *c1 = (uint32_t)b;
    *c2 = (uint32_t)(a >> 32) ^ *c3 ^ key1;
    *c3 = (uint32_t)a;
}

LC_FN void lc_philox_rounds(uint32_t c[4], uint32_t key0, uint32_t key1) {
    for (uint32_t r = 0; r < 10; r++)
        lc_philox_round(&c[0], &c[1], &c[2], &c[3], key0 + r * 0x9E3779B9u, key1 + r * 0xBB67AE85u);
}

LC_FN void lc_philox(uint64_t seed, uint64_t counter, uint32_t out[4]) {
    out[0] = (uint32_t)counter;
    out[1] = (uint32_t)(counter >> 32);
    out[2] = 0;
    out[3] = 0;
    lc_philox_rounds(out, (uint32_t)seed, (uint32_t)(seed >> 32));
}

/* 24 bits, so that f32 and f64 get the same number: in [0, 1) */
LC_FN real lc_uniform(uint32_t r) { return (real)(int32_t)(r >> 8) * (real)5.9604644775390625e-8; }

/* Box-Muller. Lanes 0 and 1 make elements 0 and 1, lanes 2 and 3 elements 2 and 3. */
LC_FN void lc_normal_pair(uint32_t r0, uint32_t r1, real *z0, real *z1) {
    real u = (real)((int32_t)(r0 >> 8) + 1) * (real)5.9604644775390625e-8; /* in (0, 1] */
    real radius = m_sqrt(-2 * m_log(u)), turn = lc_uniform(r1);
    *z0 = radius * m_cos2pi(turn);
    *z1 = radius * m_sin2pi(turn);
}

#endif
