-- paper_tables.lua: tables of the LoLCATs paper as sweeps of recipes/ablate.lua: which runs each has, and what the
-- paper found in their place, to compare shapes with; its models, data and lengths are others. And a table of what goes
-- beyond it. Lengths follow from N, the updates of a stage.
local M = {}

local MAPS = { { "T2R", "t2r" }, { "Hedgehog", "hedgehog" } }

local function both(N, t) -- N updates a stage
    t.transfer_steps, t.lora_steps = t.transfer_steps or N, t.lora_steps or N
    return t
end

local function untaught(N, t) -- no first stage: the second trains everything, twice as long
    t.transfer, t.train_maps, t.lora_steps = false, true, 2 * N
    return t
end

M["1"] = { title = "attention transfer or not, pure linear attention", paper = "perplexity, Llama 3 8B" }
M["1"].cells = function(N)
    local out, paper = {}, { 16.05, 4.11, 9.02, 3.90 }
    for _, m in ipairs(MAPS) do
        for _, how in ipairs { { ", no transfer", untaught }, { ", transfer", both } } do
            out[#out + 1] = { label = m[1] .. how[1], args = how[2](N, { map = m[2], window = 0 }),
                              paper = paper[#out + 1] }
        end
    end
    return out
end

-- Attention transfer jointly or block by block, then LoRA on the whole. On true hidden states no layer's loss depends
-- on another layer's maps, so only what is shared in a block (clipping) can make a difference.
local KEEP = {} -- what both recipes take
for word in ("base data seq records hold_out eval_rows dtype device accumulate clip"):gmatch "%S+" do
    KEEP[word] = true
end
M["3"] = { title = "attention transfer of all layers at once or in blocks", paper = "perplexity, Llama 3.1 405B" }
M["3"].cells = function(N)
    local out, paper = {}, { [1000] = 4.23, [9] = 3.21 }
    for i, layers in ipairs { 1000, 9, 5, 2, 1 } do
        out[i] = { label = layers == 1000 and "joint" or "blocks of " .. layers, paper = paper[layers],
                   recipe = "distill_blocks", args = { layers = layers, transfer_steps = N, lora = false },
                   next = { { recipe = "finetune", args = { steps = N }, keep = KEEP, takes = "student" } } }
    end
    return out
end

M["6"] = { title = "what each component brings", paper = "mean of six tasks, Llama 3 8B" }
M["6"].cells = function(N)
    local out, paper = {}, { 44.20, 55.32, 70.66, 68.78, 38.84, 54.83, 68.28, 39.52 }
    for _, m in ipairs { MAPS[2], MAPS[1] } do
        for _, how in ipairs { { "swap, LoRA", untaught, 0 }, { "+ transfer", both, 0 }, { "+ window, transfer", both },
                               { "+ window, no transfer", untaught } } do
            out[#out + 1] = { label = m[1] .. ": " .. how[1], args = how[2](N, { map = m[2], window = how[3] }),
                              paper = paper[#out + 1] }
        end
    end
    return out
end

M["11"] = { title = "rank of LoRA", xlabel = "rank", paper = "mean of five tasks, Llama 3 8B" }
M["11"].cells = function(N)
    local out, paper = {}, { 74.5, 74.2, 74.1, 73.9, 73.8, 73.0, 72.7 }
    for i, r in ipairs { 4, 8, 16, 32, 64, 128, 256 } do
        out[i] = { label = "rank " .. r, args = both(N, { rank = r, alpha = 2 * r }), x = r, paper = paper[i] }
    end
    return out
end

M["12"] = { title = "projections that LoRA adapts", paper = "mean of five tasks, Llama 3 8B" }
M["12"].cells = function(N)
    local out, paper = {}, { 72.68, 72.29, 74.19, 74.09, 72.70, 73.70, 74.17, 74.28, 74.17, 74.10, 74.53, 73.80, 74.00,
                             74.24 }
    for i, set in ipairs { "q", "k", "v", "o", "qk", "qv", "qo", "kv", "ko", "vo", "qkv", "qko", "kvo", "qkvo" } do
        local targets = {}
        for c in set:gmatch "." do targets[#targets + 1] = c .. "_proj" end
        out[i] = { label = set, args = both(N, { targets = targets }), paper = paper[i] }
    end
    return out
end

M["13"] = { title = "size and kind of the window", xlabel = "window", paper = "mean of five tasks, Llama 3 8B" }
M["13"].cells = function(N)
    local out, paper = {}, { 73.3, 74.1, 74.3, 73.6 }
    for i, w in ipairs { 4, 16, 64, 256 } do
        out[i] = { label = "sliding " .. w, args = both(N, { window = w, kind = "sliding" }), x = w, series = "sliding",
                   paper = paper[i] }
    end
    out[5] = { label = "terrace 64", args = both(N, { window = 64, kind = "terrace" }), x = 64, series = "terrace",
               paper = 74.2 }
    return out
end

M["16"] = { title = "length of attention transfer; then 10 times N updates of LoRA",
            xlabel = "updates of attention transfer", paper = "perplexity, Llama 3 8B" }
M["16"].cells = function(N)
    local out, paper = {}, { 3.211, 2.802, 2.792, 2.782, 2.782, 2.776, 2.778, 2.775, 2.782, 2.776 }
    for k = 0, 9 do
        local t = { transfer_steps = k * N, lora_steps = 10 * N }
        if k == 0 then t = { transfer = false, lora_steps = 10 * N } end
        out[k + 1] = { label = ("%d updates"):format(k * N), args = t, x = k * N, paper = paper[k + 1] }
    end
    return out
end

-- The reference's recipe, distill_smollm2's default, and the default with one thing changed.
local BEYOND = {
    { "the reference's", { schedule = "constant", transfer_lr = 1e-2, lora_lr = 1e-4, train_maps = false, fade = 0 } },
    { "default", {} },
    { "maps trained in stage 1 alone", { train_maps = false } },
    { "KL on logits, a fifth", { kl = 0.2 } },
    { "window dropped 1 in 5", { window_drop = 0.2 } },
    { "4 layers kept by search", { keep_search = 4 } },
    { "norm-preserving map", { map = "hedgehog_norm" } },
    { "gated map", { map = "hedgehog_gated" } },
    { "1 sink", { sinks = 1 } },
    { "no transfer", { transfer = false } },
    { "no transfer, no fade", { transfer = false, fade = 0 } },
}
M.beyond = { title = "what goes beyond the reference" }
function M.beyond.cells(N)
    local out = {}
    for i, row in ipairs(BEYOND) do
        local t = {}
        for k, v in pairs(row[2]) do t[k] = v end
        out[i] = { label = row[1], recipe = "distill_smollm2", args = both(N, t) }
    end
    return out
end

--- Names of the tables, in order.
function M.names() return { "1", "3", "6", "11", "12", "13", "16", "beyond" } end

return M
