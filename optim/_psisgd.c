/* PSISGD (see psi.py) in one pass: each scale group is read from memory once and worked on in cache.
 *
 * The file compiles itself twice, for float and for double. No fast-math: sums are reordered only where a pragma
 * says so, in an order that does not depend on the number of threads.
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

enum { PARALLEL, PROJECTION, HORIZONTAL, PAPER };
enum { OK, NO_MEMORY, NOT_FINITE };
enum { CHUNK = 1 << 14 }; /* entries a thread takes at a time */

typedef struct {
    double lr, momentum, dampening;
    int nesterov, transport, check_finite;
} options;

#define root_float sqrtf
#define root_double sqrt
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define REAL float
#include "_psisgd.c"
#undef REAL
#define REAL double
#include "_psisgd.c"

#else

/* One scale group: weight w, gradient g, momentum b (may be NULL) and its carry factor; scratch has room for one more; n entries each. */
CLONES static int JOIN(turn_, REAL)(REAL *restrict w, const REAL *restrict g, REAL *restrict b, REAL *carry,
                                    REAL *restrict scratch, int64_t n, options o)
{
    const REAL keep = b ? *carry * (REAL)o.momentum : 0, gain = (REAL)(1 - o.dampening);
    const REAL momentum = (REAL)o.momentum, lr = (REAL)o.lr;
    const int tangent = o.transport != PAPER;
    REAL *const d = b && !o.nesterov ? b : scratch; /* the direction of the step */
    REAL ww = 0, wb = 0, wd = 0, dd = 0, bd = 0;

    if (b) {
#pragma omp simd reduction(+ : ww, wb)
        for (int64_t i = 0; i < n; i++) {
            b[i] = keep * b[i] + gain * g[i];
            ww += w[i] * w[i];
            wb += w[i] * b[i];
        }
    } else {
#pragma omp simd reduction(+ : ww)
        for (int64_t i = 0; i < n; i++)
            ww += w[i] * w[i];
    }
    const REAL inverse = ww > 0 ? 1 / ww : 0;

    if (b && !o.nesterov) {
        const REAL part = tangent ? wb * inverse : 0;
#pragma omp simd reduction(+ : dd)
        for (int64_t i = 0; i < n; i++) {
            b[i] -= part * w[i];
            dd += b[i] * b[i];
        }
        wd = wb;
    } else {
        const REAL part = tangent && b ? wb * inverse : 0;
#pragma omp simd reduction(+ : wd)
        for (int64_t i = 0; i < n; i++) {
            if (b)
                b[i] -= part * w[i];
            d[i] = b ? g[i] + momentum * b[i] : g[i];
            wd += w[i] * d[i];
        }
        const REAL along = tangent ? wd * inverse : 0;
#pragma omp simd reduction(+ : dd, bd)
        for (int64_t i = 0; i < n; i++) {
            d[i] -= along * w[i];
            dd += d[i] * d[i];
            bd += b ? b[i] * d[i] : 0;
        }
    }

    const REAL angle = lr * (JOIN(root_, REAL)(ww) * JOIN(root_, REAL)(dd)); /* its tangent, to be exact */
    const REAL square = tangent ? 1 + angle * angle : 1 - 2 * lr * wd + angle * angle;
    const REAL stretch = square > 0 ? JOIN(root_, REAL)(square) : 1;
    if (o.check_finite && !isfinite(square))
        return NOT_FINITE;

    if (b) {
        *carry = o.transport == PROJECTION ? 1 : o.transport == PARALLEL ? stretch : 1 / stretch;
        if (o.nesterov && o.transport == PARALLEL) {
            const REAL longer = dd > 0 ? bd / dd * (stretch - 1) : 0;
            *carry = 1;
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                b[i] += longer * d[i];
        }
    }
    const REAL shrink = 1 / stretch, advance = lr * ww / stretch;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        w[i] = shrink * w[i] - advance * d[i];
    return OK;
}

/* All weights of a step: `count` matrices of rows[t] scale groups of columns[t] entries; momentum and carry may be NULL. */
int JOIN(psisgd_, REAL)(int64_t count, REAL **weight, REAL **grad, REAL **momentum, REAL **carry, const int64_t *rows,
                        const int64_t *columns, double lr, double mu, double dampening, int nesterov, int transport,
                        int check_finite, int threads)
{
    const options o = {lr, mu, dampening, nesterov, transport, check_finite};
    int64_t tasks = 0, widest = 0, total = 0;
    for (int64_t t = 0; t < count; t++) {
        const int64_t step = CHUNK / columns[t] + 1;
        tasks += (rows[t] + step - 1) / step;
        widest = columns[t] > widest ? columns[t] : widest;
        total += rows[t] * columns[t];
    }
    int64_t *owner = malloc((size_t)(tasks + 1) * 2 * sizeof *owner), *first = owner + tasks + 1, k = 0;
    if (!owner)
        return NO_MEMORY;
    for (int64_t t = 0; t < count; t++)
        for (int64_t row = 0; row < rows[t]; row += CHUNK / columns[t] + 1, k++)
            owner[k] = t, first[k] = row;

    int status = OK;
#pragma omp parallel num_threads(threads) reduction(max : status) if (total > CHUNK)
    {
        REAL *scratch = malloc((size_t)(widest + 1) * sizeof *scratch);
        if (!scratch)
            status = NO_MEMORY;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            const int64_t t = owner[i], n = columns[t], end = first[i] + CHUNK / n + 1;
            for (int64_t row = first[i]; scratch && row < end && row < rows[t]; row++) {
                REAL *b = momentum[t] ? momentum[t] + row * n : NULL;
                const int here = JOIN(turn_, REAL)(weight[t] + row * n, grad[t] + row * n, b,
                                                   carry[t] ? carry[t] + row : NULL, scratch, n, o);
                status = here > status ? here : status;
            }
        }
        free(scratch);
    }
    free(owner);
    return status;
}
#endif
