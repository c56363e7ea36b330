/* What nvfp4_gptq/factor.py does to a Hessian: arranged by turns, the Cholesky factor in F64, couplings in F32.
 *
 * The factor goes by panels of rows; each element loses its products one by one, in the order of rows: the same bits on
 * every machine.
 */
#include "core.h"

#include <stdlib.h>

#define PANEL 64
#define STRIP 16 /* columns of a panel that lie together */
#define ROWS 4   /* of a tile, in registers with a strip's width */

typedef double v8d __attribute__((vector_size(64)));

/* Rows [k, end) of the panel, across the whole matrix; 0 where a pivot is too small. */
M27_INLINE int factor_panel(double *a, int64_t n, int64_t first, int64_t end, double least) {
    for (int64_t k = first; k < end; k++) {
        double *row = a + k * n;
        if (!(row[k] > least)) return 0;
        double root = sqrt(row[k]);
        for (int64_t i = k; i < n; i++) row[i] /= root;
        for (int64_t j = k + 1; j < end; j++) {
            double *later = a + j * n, factor = row[j];
            for (int64_t i = j; i < n; i++) later[i] -= factor * row[i];
        }
    }
    return 1;
}

/* ROWS rows of one strip: minus the products with all rows of the panel. */
M27_INLINE void subtract(double *a, int64_t n, const double *left, const double *right, int64_t depth) {
    v8d sum[ROWS][2];
    for (int r = 0; r < ROWS; r++) memcpy(sum[r], a + r * n, sizeof sum[r]);
    for (int64_t k = 0; k < depth; k++) {
        v8d row[2];
        memcpy(row, right + k * STRIP, sizeof row);
        for (int r = 0; r < ROWS; r++)
            for (int h = 0; h < 2; h++) sum[r][h] -= row[h] * left[k * STRIP + r];
    }
    for (int r = 0; r < ROWS; r++) memcpy(a + r * n, sum[r], sizeof sum[r]);
}

/* `strips` [n / STRIP][PANEL][STRIP]: room for a panel, arranged. */
M27_CLONES static int cholesky(double *a, int64_t n, double least, double *strips) {
    for (int64_t first = 0; first < n; first += PANEL) {
        int64_t end = first + PANEL < n ? first + PANEL : n, depth = end - first;
        if (!factor_panel(a, n, first, end, least)) return 0;
        for (int64_t i = end; i < n; i += STRIP)
            for (int64_t k = 0; k < depth; k++)
                memcpy(strips + (i * PANEL) + k * STRIP, a + (first + k) * n + i, STRIP * sizeof *a);
        for (int64_t j = end; j < n; j += STRIP)
            for (int64_t i = j; i < n; i += STRIP)
                for (int r = 0; r < STRIP; r += ROWS)
                    subtract(a + (j + r) * n + i, n, strips + j * PANEL + r, strips + i * PANEL, depth);
    }
    return 1;
}

/* ---- what the loader calls: n is a multiple of 16, only upper triangles count ------------------------------- */

/* a[i][j] = hessian[order[i]][order[j]], and `added` to the diagonal. */
M27_EXPORT void m27_arrange(const double *hessian, const int32_t *order, double added, double *a, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i; j < n; j++) {
            int64_t p = order[i], q = order[j];
            a[i * n + j] = p < q ? hessian[p * n + q] : hessian[q * n + p];
        }
    M27_IEEE({
        for (int64_t i = 0; i < n; i++) a[i * n + i] += added;
    });
}

/* In place; 0 where a pivot is not above `least`, -1 without memory. */
M27_EXPORT int m27_cholesky(double *a, int64_t n, double least) {
    int done = -1;
    double *strips = malloc((size_t)n * PANEL * sizeof *strips);
    if (strips) M27_IEEE({ done = cholesky(a, n, least, strips); });
    free(strips);
    return done;
}

/* coupling [n / 16][n][16] of the factor, whose first row belongs to the last turn. */
M27_EXPORT void m27_couplings(const double *upper, int64_t n, float *coupling) {
    M27_IEEE({
        for (int64_t j = 0; j < n; j++) {
            const double *row = upper + (n - 1 - j) * n;
            float *to = coupling + j / STRIP * n * STRIP + j % STRIP;
            for (int64_t i = 0; i < j; i++) to[i * STRIP] = (float)(row[n - 1 - i] / row[n - 1 - j]);
            for (int64_t i = j; i < n; i++) to[i * STRIP] = 0.0f;
        }
    });
}
