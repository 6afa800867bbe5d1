/* optim.c: optimizer steps, in place on parameter, gradient and moments of one size. */
#include "op.h"

static lc_status step_shape(lc_frame *c) {
    const lc_tensor *p = c->x[0];
    for (int i = 1; i < 4 && i < c->row->n_x; i++) {
        const lc_tensor *t = c->x[i];
        bool state = c->row->kind[i] == 'T' && strcmp(c->row->x_name[i], "lr") != 0;
        if (!t || !state) continue;
        if (lc_tensor_numel(t) != lc_tensor_numel(p)) return lc_op_error(c, LC_ESHAPE, "%s has another size than p", c->row->x_name[i]);
        if (t->dtype != p->dtype) return lc_op_error(c, LC_EDTYPE, "%s has another dtype than p", c->row->x_name[i]);
        if (!lc_tensor_contiguous(t)) return lc_op_error(c, LC_EARG, "%s must be contiguous", c->row->x_name[i]);
    }
    if (p->dtype != LC_F32 && p->dtype != LC_F64) return lc_op_error(c, LC_EDTYPE, "trained parameters are f32 or f64");
    return LC_OK;
}

const lc_rule lc_rule_adamw_ = {.shape = step_shape};
const lc_rule lc_rule_sgd_ = {.shape = step_shape};
