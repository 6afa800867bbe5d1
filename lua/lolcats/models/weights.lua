-- models/weights.lua: a decoder's weights from safetensors, GGUF, or nothing (random), straight into the storages
-- that the model computes with: q, k and v are row views of one storage, gate and up of another, each under its
-- checkpoint name.
local lc = require "lolcats"
local files = require "lolcats.files"

local M = {}

-- Hugging Face's name -> GGUF's
local GGUF_LAYER = {
    ["input_layernorm.weight"] = "attn_norm.weight", ["post_attention_layernorm.weight"] = "ffn_norm.weight",
    ["self_attn.q_proj.weight"] = "attn_q.weight", ["self_attn.k_proj.weight"] = "attn_k.weight",
    ["self_attn.v_proj.weight"] = "attn_v.weight", ["self_attn.o_proj.weight"] = "attn_output.weight",
    ["mlp.gate_proj.weight"] = "ffn_gate.weight", ["mlp.up_proj.weight"] = "ffn_up.weight",
    ["mlp.down_proj.weight"] = "ffn_down.weight", ["self_attn.q_norm.weight"] = "attn_q_norm.weight",
    ["self_attn.k_norm.weight"] = "attn_k_norm.weight",
}
for hf, gguf in pairs { q_proj = "attn_q", k_proj = "attn_k", v_proj = "attn_v", o_proj = "attn_output" } do
    GGUF_LAYER["self_attn." .. hf .. ".bias"] = gguf .. ".bias"
end
for hf, gguf in pairs { gate_proj = "ffn_gate", up_proj = "ffn_up", down_proj = "ffn_down" } do
    GGUF_LAYER["mlp." .. hf .. ".bias"] = gguf .. ".bias"
end
local GGUF_TOP = {
    ["model.embed_tokens.weight"] = "token_embd.weight", ["model.norm.weight"] = "output_norm.weight",
    ["lm_head.weight"] = "output.weight",
}

function M.gguf_name(name)
    local i, rest = name:match "^model%.layers%.(%d+)%.(.+)$"
    if i then return "blk." .. i .. "." .. GGUF_LAYER[rest] end
    return GGUF_TOP[name]
end

--- Storages of a model in order of need: a list of {parts = {{name, rows}}, cols (nil: a vector)}.
function M.plan(c)
    local H, I, d = c.hidden_size, c.intermediate_size, c.head_dim
    local qd, kd = c.num_attention_heads * d, c.num_key_value_heads * d
    local only, plan = c.part, {} -- a part of a model: some layers, with or without what stands before and after them
    local function add(cols, ...)
        plan[#plan + 1] = { parts = { ... }, cols = cols }
    end
    -- a tied matrix is wanted at both ends
    if not only or only.embed or (only.head and c.tie_word_embeddings) then add(H, { "model.embed_tokens.weight", c.vocab_size }) end
    -- a matrix or several in one storage, and their biases, which all of them have or none
    local function product(cols, pre, ...)
        local matrices, biases = {}, {}
        for _, part in ipairs { ... } do
            matrices[#matrices + 1] = { pre .. part[1] .. ".weight", part[2] }
            if c.bias[part[1]] then biases[#biases + 1] = { pre .. part[1] .. ".bias", part[2] } end
        end
        plan[#plan + 1] = { parts = matrices, cols = cols }
        if #biases > 0 then plan[#plan + 1] = { parts = biases } end
    end
    local first = only and only.first - 1 or 0
    for i = first, first + c.num_hidden_layers - 1 do
        local pre = "model.layers." .. i .. "."
        local attn, mlp = pre .. "self_attn.", pre .. "mlp."
        add(nil, { pre .. "input_layernorm.weight", H })
        product(H, attn, { "q_proj", qd }, { "k_proj", kd }, { "v_proj", kd })
        if c.qk_norm then
            add(nil, { attn .. "q_norm.weight", d })
            add(nil, { attn .. "k_norm.weight", d })
        end
        product(qd, attn, { "o_proj", H })
        add(nil, { pre .. "post_attention_layernorm.weight", H })
        product(H, mlp, { "gate_proj", I }, { "up_proj", I })
        product(I, mlp, { "down_proj", H })
    end
    if only and not only.head then return plan end
    add(nil, { "model.norm.weight", H })
    if not c.tie_word_embeddings then add(H, { "lm_head.weight", c.vocab_size }) end
    return plan
end

-- The name under which a weight stands in the file. A tied matrix is stored once, and some writers keep the head's
-- name for it.
local function stored_name(src, c, name)
    if src.format == "gguf" then return M.gguf_name(name) end
    local tied = name == "model.embed_tokens.weight" and c.tie_word_embeddings
    if tied and not src.file:has(name) and src.file:has "lm_head.weight" then return "lm_head.weight" end
    return name
end

-- Rows of a head lie interleaved (0, d/2, 1, d/2 + 1, ..) in a Llama GGUF; brings them to the half-split order.
local function unpermute(into, from, heads)
    local rows, cols = into:size(1), into:dim() > 1 and into:size(2) or 1
    local half = rows / heads / 2
    into:reshape(heads, 2, half, cols):copy_(from:reshape(heads, half, 2, cols):permute(1, 3, 2, 4))
end

local function shape_text(s) return "[" .. table.concat(s, ", ") .. "]" end

-- Reads one tensor of the file into its place and looks for NaN and infinity.
local function read_part(src, c, name, into, opts)
    local stored, want = stored_name(src, c, name), into.shape
    local heads = src.format == "gguf" and c.gguf.interleaved and
                  (name:match "q_proj" and c.num_attention_heads or name:match "k_proj" and c.num_key_value_heads)
    if heads then
        lc.scope(function()
            local raw = lc.empty(want, { dtype = into.dtype, device = into.device })
            src.file:read_into(stored, raw)
            unpermute(into, raw, heads)
        end)
    else
        src.file:read_into(stored, into)
    end
    if opts.check ~= false then
        local bad = lc.scope(function() return lc.count_nonfinite(into):item() end)
        if bad > 0 then
            lc.fail("%s: tensor '%s' holds %d values that are NaN or infinite", src.path, stored, bad)
        end
    end
end

-- Before any memory is taken: every tensor is there, in the shape that the config makes it.
local function check(src, c, plan)
    local lost = {}
    for _, group in ipairs(plan) do
        for _, part in ipairs(group.parts) do
            local stored = stored_name(src, c, part[1])
            if not src.file:has(stored) then lost[#lost + 1] = stored end
        end
    end
    if #lost > 0 then
        local shown = table.concat(lost, ", ", 1, math.min(#lost, 6))
        lc.fail("%s: %d tensor%s missing: %s%s", src.path, #lost, #lost == 1 and " is" or "s are", shown,
                #lost > 6 and ", ..." or "")
    end
    for _, group in ipairs(plan) do
        for _, part in ipairs(group.parts) do
            local stored = stored_name(src, c, part[1])
            local have, want = src.file:info(stored).shape, { part[2], group.cols }
            if shape_text(have) ~= shape_text(want) then
                lc.fail("%s: tensor '%s' is %s; the config makes it %s", src.path, stored, shape_text(have),
                        shape_text(want))
            end
        end
    end
end

--- Loads all weights. src: {file = opened tensors, format =, path =}. opts: dtype (of matrices), compute (of norms),
--- device, check. Returns name -> tensor, and the fused storages under "model.layers.N.self_attn.qkv" and
--- "model.layers.N.mlp.gate_up".
function M.load(src, c, opts)
    local plan = M.plan(c)
    check(src, c, plan)
    return M.fill(c, plan, opts, function(name, into) read_part(src, c, name, into, opts) end)
end

--- Weights drawn at random, in the manner of a fresh checkpoint.
function M.random(c, opts)
    local std = c.initializer_range or 0.02
    local how = { dtype = opts.dtype, compute = opts.compute, device = opts.device, make = true }
    return M.fill(c, M.plan(c), how, function(name, into)
        if name:match "norm%.weight$" then into:fill_(1) else into:normal_(0, std) end
    end)
end

-- Bytes of all storages of a plan.
local function plan_bytes(plan, opts)
    local size, bytes = { f64 = 8, f32 = 4, bf16 = 2, f16 = 2 }, 0
    for _, group in ipairs(plan) do
        local rows = 0
        for _, part in ipairs(group.parts) do rows = rows + part[2] end
        bytes = bytes + rows * (group.cols and group.cols * size[opts.dtype] or size[opts.compute])
    end
    return bytes
end

-- Weights that cannot fit are refused before any is read.
local function refuse_what_cannot_fit(plan, opts)
    local free = opts.device ~= "cpu" and lc.memory("free", opts.device) or 0
    local wanted = plan_bytes(plan, opts)
    if free > 0 and wanted > free then
        lc.fail("the weights take %.2f GiB in %s, and %s has %.2f of its %.2f GiB free; a smaller dtype or model may fit, or the CPU",
                wanted / 2 ^ 30, opts.dtype, opts.device, free / 2 ^ 30, lc.memory("total", opts.device) / 2 ^ 30)
    end
end

function M.fill(c, plan, opts, put)
    refuse_what_cannot_fit(plan, opts)
    local weights = {}
    lc.no_grad(function()
        for _, group in ipairs(plan) do
            local rows = 0
            for _, part in ipairs(group.parts) do rows = rows + part[2] end
            local shape = group.cols and { rows, group.cols } or { rows }
            lc.scope(function()
                local where = opts.make and opts.device or "cpu" -- what is read is read here
                local whole = lc.empty(shape, { dtype = group.cols and opts.dtype or opts.compute, device = where })
                local at = 1
                for _, part in ipairs(group.parts) do
                    put(part[1], whole:narrow(1, at, part[2]))
                    at = at + part[2]
                end
                if opts.device ~= where then whole = whole:to { device = opts.device } end
                M.place(weights, group, lc.keep(whole))
            end)
        end
    end)
    return weights
end

--- Names the row views of one storage.
function M.place(weights, group, whole)
    if #group.parts == 1 then
        local name = group.parts[1][1]
        weights[name] = whole
        whole:set_name(name)
        return
    end
    local at = 1
    for _, part in ipairs(group.parts) do
        local view = lc.keep(whole:narrow(1, at, part[2]))
        view:set_name(part[1])
        weights[part[1]] = view
        at = at + part[2]
    end
    weights[M.fused_name(group)] = whole
end

function M.fused_name(group)
    local first = group.parts[1][1]
    return (first:gsub("q_proj%.weight$", "qkv"):gsub("gate_proj%.weight$", "gate_up")
        :gsub("q_proj%.bias$", "qkv_bias"):gsub("gate_proj%.bias$", "gate_up_bias"))
end

--- Writes a model's weights as safetensors, in shards where they exceed opts.max_shard bytes (5e9), and its config beside
--- them.
function M.save(model, dir, opts)
    local out = {}
    for _, group in ipairs(M.plan(model.config)) do
        for _, part in ipairs(group.parts) do out[#out + 1] = { name = part[1], tensor = model.weights[part[1]] } end
    end
    files.save_sharded(dir, out, { max_shard = opts and opts.max_shard })
    local json = require("lolcats.models.config").to_json(model.config)
    json.torch_dtype = ({ f32 = "float32", bf16 = "bfloat16", f16 = "float16", f64 = "float64" })[model.embed.dtype]
    files.write_json(dir .. "/config.json", json)
end

return M
