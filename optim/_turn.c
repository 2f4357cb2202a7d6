/* Steps of PSISGD, PSIAngular and PSIAdam in one pass: each scale group is read from memory once and worked on in cache.
 * The formulas are those of psi.py, psi_angular.py and psi_adam.py.
 *
 * The file compiles itself twice, for float and for double. No fast-math: sums are reordered only where a pragma
 * says so, in an order that does not depend on the number of threads.
 */
#ifndef REAL

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

enum { SGD, ANGULAR, ADAM };
enum { PARALLEL, PROJECTION, HORIZONTAL, PAPER };
enum { OK, NO_MEMORY, NOT_FINITE };
enum { CHUNK = 1 << 16 }; /* entries a thread takes at a time: shorter runs break up the streams from memory */

typedef struct {
    double lr, momentum, dampening;           /* of ADAM: rate / (1 - beta1^age), beta 1, 0 */
    double second, eps, correction;           /* of ADAM: beta 2, epsilon, 1 - beta2^age */
    int rule, nesterov, transport, check_finite, threads;
} options;

#define root_float sqrtf
#define root_double sqrt
#define epsilon_float FLT_EPSILON
#define epsilon_double DBL_EPSILON
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define REAL float
#include "_turn.c"
#undef REAL
#define REAL double
#include "_turn.c"

#else

/* In all three: one scale group of n entries, weight w, gradient g, momentum b and its carry factor. */

/* b may be NULL; scratch has room for one more vector. */
CLONES static int JOIN(sgd_, REAL)(REAL *restrict w, const REAL *restrict g, REAL *restrict b, REAL *carry,
                                   REAL *restrict scratch, int64_t n, const options *o)
{
    const REAL keep = b ? *carry * (REAL)o->momentum : 0, gain = (REAL)(1 - o->dampening);
    const REAL momentum = (REAL)o->momentum, lr = (REAL)o->lr;
    const int tangent = o->transport != PAPER;
    REAL *const d = b && !o->nesterov ? b : scratch; /* the direction of the step */
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

    if (b && !o->nesterov) {
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
    if (o->check_finite && !isfinite(square))
        return NOT_FINITE;

    if (b) {
        *carry = o->transport == PROJECTION ? 1 : o->transport == PARALLEL ? stretch : 1 / stretch;
        if (o->nesterov && o->transport == PARALLEL) {
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

CLONES static int JOIN(angular_, REAL)(REAL *restrict w, const REAL *restrict g, REAL *restrict b, REAL *carry,
                                       int64_t n, const options *o)
{
    REAL ww = 0, gg = 0, wb = 0, bb = 0;
#pragma omp simd reduction(+ : ww, gg)
    for (int64_t i = 0; i < n; i++) {
        ww += w[i] * w[i];
        gg += g[i] * g[i];
    }
    if (o->check_finite && !isfinite(gg))
        return NOT_FINITE;

    const REAL keep = *carry * (REAL)o->momentum;
    const REAL gain = gg > 0 ? (REAL)(1 - o->momentum) / JOIN(root_, REAL)(gg) : 0;
#pragma omp simd reduction(+ : wb)
    for (int64_t i = 0; i < n; i++) {
        b[i] = keep * b[i] + gain * g[i];
        wb += w[i] * b[i];
    }
    const REAL part = ww > 0 ? wb / ww : 0;
#pragma omp simd reduction(+ : bb)
    for (int64_t i = 0; i < n; i++) {
        b[i] -= part * w[i];
        bb += b[i] * b[i];
    }

    const REAL length = JOIN(root_, REAL)(bb);
    const int turns = ww > 0 && gg > 0 && length > 16 * JOIN(epsilon_, REAL);
    const REAL cosine = turns ? (REAL)cos(o->lr) : 1;
    const REAL advance = turns ? (REAL)sin(o->lr) * JOIN(root_, REAL)(ww) / length : 0;
    *carry = 1 / cosine;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        w[i] = cosine * w[i] - advance * b[i];
    return OK;
}

/* square is the second moment. */
CLONES static int JOIN(adam_, REAL)(REAL *restrict w, const REAL *restrict g, REAL *restrict b, REAL *carry,
                                    REAL *square, int64_t n, const options *o)
{
    const REAL keep = *carry * (REAL)o->momentum, gain = (REAL)(1 - o->momentum);
    REAL ww = 0, gg = 0, wb = 0, bb = 0;
#pragma omp simd reduction(+ : ww, gg, wb)
    for (int64_t i = 0; i < n; i++) {
        b[i] = keep * b[i] + gain * g[i];
        ww += w[i] * w[i];
        gg += g[i] * g[i];
        wb += w[i] * b[i];
    }
    if (o->check_finite && !isfinite(gg))
        return NOT_FINITE;
    const REAL part = ww > 0 ? wb / ww : 0;
#pragma omp simd reduction(+ : bb)
    for (int64_t i = 0; i < n; i++) {
        b[i] -= part * w[i];
        bb += b[i] * b[i];
    }

    const REAL radius = JOIN(root_, REAL)(ww), gradient = radius * JOIN(root_, REAL)(gg);
    *square = (REAL)o->second * *square + (REAL)(1 - o->second) * gradient * gradient;
    const REAL root = JOIN(root_, REAL)(*square / (REAL)o->correction) + (REAL)o->eps;
    const REAL pace = root > 0 ? (REAL)o->lr / root : 0, angle = pace * radius * JOIN(root_, REAL)(bb);
    const REAL stretch = JOIN(root_, REAL)(1 + angle * angle);
    *carry = stretch;
    const REAL shrink = 1 / stretch, advance = ww * pace / stretch;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        w[i] = shrink * w[i] - advance * b[i];
    return OK;
}

/* All weights of a step: `count` matrices of rows[t] scale groups of columns[t] entries. Of the pointers in momentum,
 * carry and square those that the rule does not use are NULL. */
int JOIN(turn_, REAL)(int64_t count, REAL **weight, REAL **grad, REAL **momentum, REAL **carry, REAL **square,
                      const int64_t *rows, const int64_t *columns, const options *o)
{
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
#pragma omp parallel num_threads(o->threads) reduction(max : status) if (total > CHUNK)
    {
        REAL *scratch = malloc((size_t)(widest + 1) * sizeof *scratch);
        if (!scratch)
            status = NO_MEMORY;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            const int64_t t = owner[i], n = columns[t], end = first[i] + CHUNK / n + 1;
            for (int64_t row = first[i]; scratch && row < end && row < rows[t]; row++) {
                REAL *w = weight[t] + row * n, *b = momentum[t] ? momentum[t] + row * n : NULL;
                REAL *c = carry[t] ? carry[t] + row : NULL;
                const REAL *g = grad[t] + row * n;
                const int here = o->rule == SGD       ? JOIN(sgd_, REAL)(w, g, b, c, scratch, n, o)
                                 : o->rule == ANGULAR ? JOIN(angular_, REAL)(w, g, b, c, n, o)
                                                      : JOIN(adam_, REAL)(w, g, b, c, square[t] + row, n, o);
                status = here > status ? here : status;
            }
        }
        free(scratch);
    }
    free(owner);
    return status;
}
#endif
