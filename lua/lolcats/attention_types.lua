-- attention_types.lua: the attentions by the reference's names (`attention_type` of its model files): what each means
-- as options of lc.linearize. Several names are one attention here, since they differ only in how they compute; where
-- the numbers differ, the options do.
local lc = require "lolcats"
local bridge = require "lolcats.core.ffi"

local M = {}

-- options: what lc.linearize is given. long: trained in chunks with a carried state (student:transfer_long,
-- student:loss_long). note: what a person who knows the name should hear.
local TYPES = {
    softmax = { options = { softmax = true } },
    lolcats_llama = { options = { kind = "linear" } },
    lolcats_llama_window_tk = { options = { kind = "terrace" } },
    lolcats_llama_window_sw = { options = { kind = "sliding" } },
    lolcats_llama_window_sw_linear = {
        options = { kind = "sliding", train_window_factor = false },
        note = "the reference lets no gradient through its window part, so the window factors stay as they " ..
            "start; here the rest of the " ..
               "gradient is whole",
    },
    lolcats_llama_window_sw_scale = { options = { kind = "scale" } },
    lolcats_llama_window_tk_bf16 = {
        options = { kind = "terrace", precision = "bf16" },
        note = "scores, weights and sums are rounded to bf16; the form is quadratic in length",
    },
    lolcats_llama_window_tk_fa2 = {
        options = { kind = "terrace" }, flows = true,
        note = "in the reference the student's outputs go on to the next layer while it learns: compat = \"flow\"",
    },
    lolcats_llama_window_tk_sdpa = { options = { kind = "terrace" },
                                     note = "broken in the reference; here it is the terrace" },
    lolcats_llama_window_tk_gen = { options = { kind = "terrace", window = 64 }, note = "its window is always 64" },
    lolcats_long_llama_window_tk = { options = { kind = "terrace" }, long = true },
    lolcats_long_llama_window_sw = { options = { kind = "sliding" }, long = true },
}

--- All names, sorted.
function M.names()
    local out = {}
    for k in pairs(TYPES) do out[#out + 1] = k end
    table.sort(out)
    return out
end

--- What a name means: {name, options, long, flows, note}. flows: see compat = "flow" of lc.linearize.
function M.find(name)
    local t = TYPES[name]
    if not t then
        local near = type(name) == "string" and bridge.nearest(name, TYPES)
        lc.fail("there is no attention '%s'%s; there are %s", tostring(name),
                near and (" (did you mean '%s'?)"):format(near) or "",
                table.concat(M.names(), ", "))
    end
    local options = {}
    for k, v in pairs(t.options) do options[k] = v end
    return { name = name, options = options, long = t.long or false, flows = t.flows or false, note = t.note }
end

return M
