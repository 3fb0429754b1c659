/* A model step in sums of one width: included by core_run.h with TOTAL, STEP(x) and WAITING defined. */

TARGET APART static void STEP(fire)(const PopulationPlan *plan, State *state, const Inflow *in, int32_t n_in, Emission *emission) {
    TOTAL total[BLOCK];
    const int32_t threshold = plan->threshold, reset = plan->reset, keep = plan->keep, kind = plan->kind;
    int64_t plus = 0, minus = 0;
    for (int64_t from = 0; from < plan->size; from += BLOCK) {
        const int64_t length = plan->size - from < BLOCK ? plan->size - from : BLOCK;
        int32_t *restrict potential = state->potential + from;
        const int32_t *restrict constant = state->constant + from;
        int8_t *restrict counts = state->counts8 + from, *restrict spikes = state->spikes + from;
        int32_t outside = 0;
        if (kind == RELAY)
            for (int64_t i = 0; i < length; i++) total[i] = constant[i];
        else if (kind == READOUT && keep != 4096)
            for (int64_t i = 0; i < length; i++) total[i] = (TOTAL)leaked(potential[i], keep) + constant[i];
        else
            for (int64_t i = 0; i < length; i++) total[i] = (TOTAL)potential[i] + constant[i];
        if (sizeof(TOTAL) == 8 && state->waits) {
            const TOTAL *restrict waiting = (const TOTAL *)state->WAITING + from;
            for (int64_t i = 0; i < length; i++) total[i] += waiting[i];
        }
        for (int32_t k = 0; k < n_in; k++) {
            const TOTAL factor = (TOTAL)1 << in[k].exponent;
            const int32_t *restrict sums = in[k].sums + from;
            for (int64_t i = 0; i < length; i++) total[i] += sums[i] * factor;
        }
#ifndef FAULT_NO_SATURATION
        for (int64_t i = 0; i < length; i++) outside |= (total[i] > LIMIT) | (total[i] < -LIMIT);
        if (outside) {
            int32_t *restrict saturations = state->saturations + from;
            for (int64_t i = 0; i < length; i++) {
                saturations[i] += (total[i] > LIMIT) | (total[i] < -LIMIT);
                total[i] = total[i] > LIMIT ? LIMIT : total[i] < -LIMIT ? -LIMIT : total[i];
            }
            state->saturated = 1;
        }
#endif
        if (kind == READOUT || kind == RELAY) {
            for (int64_t i = 0; i < length; i++) potential[i] = (int32_t)total[i];
            if (kind == READOUT) continue;
            for (int64_t i = 0; i < length; i++) {
                if (!total[i]) continue;
                emission->plus.position[plus] = (int32_t)(from + i);
                emission->values[plus++] = (int32_t)total[i];
                state->counts64[from + i] += total[i];
                state->activity8[from + i]++;
            }
            continue;
        }
        const int32_t both = kind == BOTH;
        int32_t any = 0;
        for (int64_t i = 0; i < length; i++) {
            const int32_t now = (int32_t)total[i], fired = (now >= threshold) - ((now <= -threshold) & both);
            potential[i] = now - reset * fired;
            spikes[i] = (int8_t)fired;
            counts[i] = (int8_t)(counts[i] + fired);
            any |= fired;
        }
        if (keep != 4096)
            for (int64_t i = 0; i < length; i++) potential[i] = leaked(potential[i], keep);
        if (!any) continue;
        if (both) {
            int8_t *restrict activity = state->activity8 + from;
            for (int64_t i = 0; i < length; i++) activity[i] = (int8_t)(activity[i] + (spikes[i] != 0));
        }
        for (int64_t i = 0; i < length; i += 8) {
            uint64_t eight;
            memcpy(&eight, spikes + i, 8);
            if (!eight) continue;
            for (int64_t j = i; j < i + 8; j++) {
                emission->plus.position[plus] = (int32_t)(from + j);
                plus += spikes[j] > 0;
                if (!both) continue;
                emission->minus.position[minus] = (int32_t)(from + j);
                minus += spikes[j] < 0;
            }
        }
    }
    if (!emission) return;
    emission->plus.length = plus;
    emission->minus.length = minus;
    if (kind != RELAY) divide(plan, &emission->plus);
    if (kind == BOTH) divide(plan, &emission->minus);
}
