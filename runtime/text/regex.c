/* regex.c: whole-text matching of a regular expression that a file brings along (PEFT's target_modules and patterns), by
 * PCRE2, whose syntax covers what is used of Python's. A pattern that takes too many steps is refused. */
#include "../core/core.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <string.h>

enum { STEPS = 1000000, DEPTH = 1000 };

static lc_status run(const pcre2_code *code, const char *pattern, const char *text, int *matched) {
    pcre2_match_data *data = pcre2_match_data_create_from_pattern(code, NULL);
    pcre2_match_context *context = pcre2_match_context_create(NULL);
    lc_status status = LC_OK;
    if (!data || !context) {
        status = lc_fail(LC_ENOMEM, "regular expression: no memory");
    } else {
        pcre2_set_match_limit(context, STEPS);
        pcre2_set_depth_limit(context, DEPTH);
        int r = pcre2_match(code, (PCRE2_SPTR)text, strlen(text), 0, 0, data, context);
        *matched = r >= 0;
        if (r < 0 && r != PCRE2_ERROR_NOMATCH)
            status = lc_fail(LC_EPARSE, "regular expression '%.200s': matching '%.80s' failed (%d)", pattern, text, r);
    }
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
    return status;
}

int lc_regex_match(const char *pattern, const char *text, int *matched) {
    *matched = 0;
    int error = 0;
    PCRE2_SIZE where = 0;
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                     PCRE2_UTF | PCRE2_ANCHORED | PCRE2_ENDANCHORED | PCRE2_NEVER_BACKSLASH_C, &error, &where,
                                     NULL);
    if (!code) {
        PCRE2_UCHAR why[160];
        pcre2_get_error_message(error, why, sizeof why);
        return lc_fail(LC_EPARSE, "regular expression '%.200s', character %d: %s", pattern, (int)where, (const char *)why);
    }
    lc_status status = run(code, pattern, text, matched);
    pcre2_code_free(code);
    return status;
}
