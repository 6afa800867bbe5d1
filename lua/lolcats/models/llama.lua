-- models/llama.lua: the forward of a decoder of the Llama kind over the ops: RMSNorm, rotary embedding, grouped heads,
-- SwiGLU, tied or own head; biases, norms of q and k and windows where its config has them (models/config.lua). A
-- layer's attention is softmax, or the student's when the model has been linearized.
-- Hidden states are [b, t, d]; positions and rotary tables are made once a forward; the head runs only where its
-- result is asked for.
local lc = require "lolcats"
local nn = require "lolcats.nn"
local attention = require "lolcats.attention"
local rope = require "lolcats.models.rope"
local weights = require "lolcats.models.weights"

local Model = {}
Model.__index = Model

local M = { Model = Model }

local ATTN = { "q_proj", "k_proj", "v_proj", "o_proj" }
local MLP = { "gate_proj", "up_proj", "down_proj" }
local QKV, GATE_UP = { "q_proj", "k_proj", "v_proj" }, { "gate_proj", "up_proj" }
M.PROJECTIONS = { "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj" }

-- Up to this many rows a product is bound by reading the weights, and one call on the fused storage beats several; a
-- GPU likes fewer, larger products at any size.
local FEW_ROWS = 8

-- Layer records over a table of weights; used anew when weights get copied.
local function make_layers(model)
    local w, layers = model.weights, {}
    for i = 1, model.config.num_hidden_layers do
        local name = "model.layers." .. (i - 1 + (model.config.part and model.config.part.first - 1 or 0))
        local attn, mlp = name .. ".self_attn.", name .. ".mlp."
        local layer = { index = i, name = name, proj = {} }
        layer.input_norm = w[name .. ".input_layernorm.weight"]
        layer.post_norm = w[name .. ".post_attention_layernorm.weight"]
        layer.q_norm, layer.k_norm = w[attn .. "q_norm.weight"], w[attn .. "k_norm.weight"]
        layer.window = model.config.windows and model.config.windows[i] -- keys of the softmax attention; nil: all
        local function record(pre, p)
            local full = pre .. p
            layer.proj[p] = { name = full, layer = i, weight = w[full .. ".weight"], bias = w[full .. ".bias"] }
        end
        for _, p in ipairs(ATTN) do record(attn, p) end
        for _, p in ipairs(MLP) do record(mlp, p) end
        layer.qkv, layer.gate_up = w[attn .. "qkv"], w[mlp .. "gate_up"]
        layer.qkv_bias, layer.gate_up_bias = w[attn .. "qkv_bias"], w[mlp .. "gate_up_bias"]
        layers[i] = layer
    end
    return layers
end

--- A model over weights by checkpoint name. opts: dtype (of activations), device, tokenizer, chat_template, source.
--- What is trained, states and rotary tables are in model.fine: f32, or f64 beside f64.
function M.new(c, w, opts)
    local model = setmetatable({
        config = c, weights = w, dtype = opts.dtype, device = opts.device, tokenizer = opts.tokenizer,
        chat_template = opts.chat_template, source = opts.source, special = opts.special,
    }, Model)
    model.fine = opts.dtype == "f64" and "f64" or "f32"
    model.layers = make_layers(model)
    model.embed_proj, model.head_proj = { name = "model.embed_tokens", is_embedding = true }, { name = "lm_head" }
    model:set_ends()
    model:set_rotary(0)
    return model
end

--- Looks up anew what stands before and behind the layers, after weights got copied.
function Model:set_ends()
    local w = self.weights
    self.embed, self.norm = w["model.embed_tokens.weight"], w["model.norm.weight"]
    self.head = w["lm_head.weight"] or self.embed
    self.embed_proj.weight, self.head_proj.weight = self.embed, self.head
end

--- Rotary frequencies for texts of up to `length` positions; only some scalings look at it.
function Model:set_rotary(length)
    local list, scale = rope.inv_freq(self.config, length)
    if self.rope_bf16 then list = rope.round_bf16(list) end
    local old = self.inv_freq
    self.inv_freq = lc.keep(lc.tensor(list, { dtype = self.fine, device = self.device }))
    self.rotary_scale, self.rotary_length = scale, length
    if old then old:drop() end
end

--- Do the rotary frequencies change with the length of the text? Then a recorded step would turn by old ones.
function Model:rotary_varies() return rope.varies(self.config) end

--- cos and sin of positions pos of a text that reaches `length` positions in all. A cached key keeps the rotation of
--- the length at which it was read, as with Hugging Face.
function Model:rotary(pos, length)
    if rope.varies(self.config) and length ~= self.rotary_length then self:set_rotary(length) end
    local cos, sin = lc.rope_table(pos, self.inv_freq)
    if self.rotary_scale ~= 1 then return cos * self.rotary_scale, sin * self.rotary_scale end
    return cos, sin
end

--- A model that shares this one's weights and tokenizer but has layer records of its own (the student of a teacher).
function Model:share()
    return M.new(self.config, self.weights, self)
end

--- Looks up anew all records of weights, after self.weights got another table; adapters and the student's attention
--- stay.
function Model:refresh()
    local model = self
    for i, fresh in ipairs(make_layers(model)) do
        local layer = model.layers[i]
        for p, record in pairs(fresh.proj) do
            layer.proj[p].weight, layer.proj[p].bias = record.weight, record.bias
        end
        for _, key in ipairs { "qkv", "gate_up", "qkv_bias", "gate_up_bias", "input_norm", "post_norm", "q_norm",
                               "k_norm" } do
            layer[key] = fresh[key]
        end
    end
    model:set_ends()
end

local function shallow(t)
    local out = {}
    for k, v in pairs(t) do out[k] = v end
    return out
end

--- Copies the weights of all attention and MLP projections, so that writing them leaves models that share them alone.
function Model:own_weights()
    if self.owns_weights then return self end
    local own = shallow(self.weights)
    lc.no_grad(function()
        for _, group in ipairs(weights.plan(self.config)) do
            local name = #group.parts > 1 and weights.fused_name(group) or group.parts[1][1]
            if name:match "^model%.layers" and group.cols then
                lc.scope(function() weights.place(own, group, lc.keep(self.weights[name]:clone())) end)
            end
        end
    end)
    for _, name in ipairs(self.trained_weights or {}) do own[name] = self.weights[name] end
    self.weights, self.owns_weights = own, true
    self:refresh()
    return self
end

--- A copy of one weight that is this model's alone, in the dtype of what is trained; returns it.
function Model:own_weight(name)
    local old = self.weights[name]
    local dtype = old:dim() > 1 and self.fine or old.dtype
    local copy = lc.keep(lc.no_grad(lc.scope, function() return old:detach():to(dtype):clone() end))
    self.weights = shallow(self.weights)
    self.weights[name] = copy:set_name(name)
    self:refresh()
    return copy
end

--- Weights of this model's own in another dtype, to be saved: it computes no more with them as they are.
function Model:cast_weights(dtype)
    self.weights = shallow(self.weights)
    for _, name in ipairs(self:weight_names()) do
        local w = self.weights[name]
        if w.dtype ~= dtype then self.weights[name] = lc.keep(w:detach():to(dtype)) end
    end
    self:set_ends()
end

--- Parts a tied head from the embedding: still one tensor, but each can be replaced alone.
function Model:untie()
    if not self.config.tie_word_embeddings then return end
    self.config, self.weights = shallow(self.config), shallow(self.weights)
    self.config.tie_word_embeddings = false
    self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]
    self:set_ends()
end

--- Names of all weights in checkpoint order.
function Model:weight_names()
    local out = {}
    for _, group in ipairs(weights.plan(self.config)) do
        for _, part in ipairs(group.parts) do out[#out + 1] = part[1] end
    end
    return out
end

--- All projections in checkpoint order.
function Model:projections()
    local out = {}
    for _, layer in ipairs(self.layers) do
        for _, p in ipairs(M.PROJECTIONS) do out[#out + 1] = layer.proj[p] end
    end
    return out
end

-- ---- pieces of a forward --------------------------------------------------------------------------------------------
-- Where the sequences of one row lie, {first, length}, from offsets 0, ..., t as flash attention takes them.
local function sequences_of(offsets, t)
    if lc.is_tensor(offsets) then offsets = offsets:totable() end
    local out, n = {}, type(offsets) == "table" and #offsets or 0
    for i = 1, n - 1 do
        local a, b = offsets[i], offsets[i + 1]
        if b > a then out[#out + 1] = { a + 1, b - a } elseif b < a then n = 0 end
    end
    if n < 2 or offsets[1] ~= 0 or offsets[n] ~= t then
        lc.fail("cu_seqlens: offsets that rise from 0 to %d, the row's length, are wanted; got {%s}", t,
                type(offsets) == "table" and table.concat(offsets, ", ") or tostring(offsets))
    end
    return out
end

local function positions_in(sequences)
    local pos = {}
    for _, s in ipairs(sequences) do
        for i = 0, s[2] - 1 do pos[#pos + 1] = i end
    end
    return pos
end

--- What all layers of one forward share. opts: start (left padding, int32 [b]), state (a session's).
function Model:context(ids, opts)
    opts = opts or {}
    local b, t = ids:size(1), ids:size(2)
    local seen = opts.state and opts.state.seen or 0
    if opts.start and opts.state then self:note_padding(opts.state, opts.start) end
    local padding = opts.state and opts.state.start
    local pos = opts.fixed and (padding and opts.state.pos:reshape(b, 1) or opts.state.pos:narrow(1, 1, 1))
        or lc.arange(seen, seen + t, 1, { dtype = "i32", device = self.device })
    local ctx = { b = b, t = t, seen = seen, state = opts.state, teacher = opts.teacher }
    if opts.cu_seqlens then
        if opts.start or opts.state then lc.fail("cu_seqlens goes with neither left padding (start) nor a state") end
        ctx.sequences = sequences_of(opts.cu_seqlens, t)
        pos = lc.tensor(positions_in(ctx.sequences), { dtype = "i32", device = self.device })
    end
    if padding then
        ctx.key_start = padding
        if not opts.fixed then pos = (pos:to("f32"):reshape(1, t):expand(b, t) - padding:to("f32"):reshape(b, 1)):clamp({ min = 0 }):to("i32") end
        -- what of it lies in this chunk
        if seen < opts.state.padding then ctx.start = (padding:to "f32" - seen):clamp({ min = 0, max = t }):to "i32" end
    elseif opts.start then
        ctx.start = opts.start
        if not lc.is_tensor(ctx.start) then ctx.start = lc.tensor(ctx.start, { dtype = "i32", device = self.device }) end
        local shift = ctx.start:to("f32"):reshape(b, 1)
        pos = (pos:to("f32"):reshape(1, t):expand(b, t) - shift):clamp({ min = 0 }):to("i32")
    end
    ctx.pos = pos
    local reach = seen + t
    if ctx.sequences then
        reach = 0
        for _, s in ipairs(ctx.sequences) do reach = math.max(reach, s[2]) end
    end
    ctx.cos, ctx.sin = self:rotary(pos, reach)
    return ctx
end

--- Keeps what padding stands before each row of a state; it is named with the row's first tokens.
function Model:note_padding(state, start)
    if state.start then return end
    if state.seen > 0 then lc.fail("start (left padding) comes with the first tokens of a state, not after %d", state.seen) end
    if not lc.is_tensor(start) then start = lc.tensor(start, { dtype = "i32", device = self.device }) end
    if start:numel() ~= state.batch then
        lc.fail("start has %d values; the state has %d rows", start:numel(), state.batch)
    end
    state.padding = 0
    for _, n in ipairs(start:totable()) do state.padding = math.max(state.padding, n) end
    if state.padding > 0 then state.start = lc.keep(start:clone()) end
end

local function heads_view(x, b, t, n, d)
    return x:reshape(b, t, n, d):permute(1, 3, 2, 4)
end

local function has_lora(layer, names)
    for _, p in ipairs(names) do
        local l = layer.proj[p].lora
        if l and l.on then return true end
    end
    return false
end

local function part_of(x, whole)
    return x == nil and whole == nil or x and whole and not x.requires_grad and x:storage_id() == whole:storage_id()
end

-- One product may stand for several projections while they are views of one storage: an optimizer that trains one moves
-- it away.
local function fused(layer, whole, bias, names)
    if not whole or has_lora(layer, names) then return false end
    for _, p in ipairs(names) do
        local r = layer.proj[p]
        if not part_of(r.weight, whole) or not part_of(r.bias, bias) then return false end
    end
    return true
end

--- q, k, v of a layer from its normed input n [b, t, H]: q [b, h, t, d], k, v [b, g, t, d], q and k rotated (and
--- normed head by head before it, where the config has it so).
function Model:qkv(layer, n, ctx)
    local c = self.config
    local h, g, d, b, t = c.num_attention_heads, c.num_key_value_heads, c.head_dim, ctx.b, ctx.t
    local q, k, v
    -- the fused product saves calls; where gradients flow through it, its slices would cost zero-filled buffers
    if not (lc.grad_enabled() and n.requires_grad) and fused(layer, layer.qkv, layer.qkv_bias, QKV) then
        local all = lc.linear(n, layer.qkv, layer.qkv_bias)
        v = all:narrow(-1, (h + g) * d + 1, g * d)
        if not layer.q_norm then
            local both = lc.rope(heads_view(all:narrow(-1, 1, (h + g) * d), b, t, h + g, d), ctx.cos, ctx.sin)
            return both:narrow(2, 1, h), both:narrow(2, h + 1, g), heads_view(v, b, t, g, d)
        end
        q, k = all:narrow(-1, 1, h * d), all:narrow(-1, h * d + 1, g * d)
    else
        q, k, v = nn.project_all(n, layer.proj.q_proj, layer.proj.k_proj, layer.proj.v_proj)
    end
    q, k = q:reshape(b, t, h, d), k:reshape(b, t, g, d)
    if layer.q_norm then
        q, k = lc.rms_norm(q, layer.q_norm, c.rms_norm_eps), lc.rms_norm(k, layer.k_norm, c.rms_norm_eps)
    end
    q, k = lc.rope_pair(q:permute(1, 3, 2, 4), k:permute(1, 3, 2, 4), ctx.cos, ctx.sin)
    return q, k, heads_view(v, b, t, g, d)
end

function Model:norm_in(layer, x) return lc.rms_norm(x, layer.input_norm, self.config.rms_norm_eps) end

--- The layer's attention: [b, h, t, d].
function Model:attend(layer, q, k, v, n, ctx)
    local state = ctx.state and ctx.state.layers[layer.index]
    local call = { start = ctx.start, key_start = ctx.key_start, sequences = ctx.sequences, state = state, seen = ctx.seen, pos = ctx.pos, layer = layer.index, hidden = n,
                   pos_tensor = ctx.state and ctx.state.pos, window = layer.window }
    if layer.student and not ctx.teacher then return attention.hybrid(layer.student, q, k, v, call) end
    return attention.softmax(q, k, v, call)
end

--- x plus the output projection of an attention's result y.
function Model:attended(layer, x, y, ctx)
    local c = self.config
    return nn.project(y:permute(1, 3, 2, 4):reshape(ctx.b, ctx.t, c.num_attention_heads * c.head_dim), layer.proj.o_proj, x)
end

-- The MLP's inner values of x.
local function inner(self, layer, x, ctx)
    local c = self.config
    local n = lc.rms_norm(x, layer.post_norm, c.rms_norm_eps)
    local recorded = lc.grad_enabled() and n.requires_grad
    if (ctx.b * ctx.t <= FEW_ROWS or self.device ~= "cpu") and not recorded and
       fused(layer, layer.gate_up, layer.gate_up_bias, GATE_UP) then
        local both = lc.linear(n, layer.gate_up, layer.gate_up_bias)
        return lc.swiglu(both:narrow(-1, 1, c.intermediate_size), both:narrow(-1, c.intermediate_size + 1, c.intermediate_size))
    end
    local gate, up = nn.project_all(n, layer.proj.gate_proj, layer.proj.up_proj)
    return lc.swiglu(gate, up)
end

--- x plus the MLP of it.
function Model:mlp(layer, x, ctx)
    -- of many rows a scope of its own: gate and up are the largest tensors of a layer
    local y = ctx.b * ctx.t <= FEW_ROWS and inner(self, layer, x, ctx) or lc.scope(inner, self, layer, x, ctx)
    return nn.project(y, layer.proj.down_proj, x)
end

--- What follows the attention: output projection, residual, MLP, residual.
function Model:finish(layer, x, y, ctx) return self:mlp(layer, self:attended(layer, x, y, ctx), ctx) end

--- Gradient checkpointing: while gradients are recorded a layer keeps its input alone, and its backward computes it once
--- more. Losses and gradients stay what they are; memory is that of one layer, time a third more.
function Model:recompute_layers(on)
    self.recomputes = on ~= false or nil
    return self
end

function Model:layer_forward(layer, x, ctx)
    local n = self:norm_in(layer, x)
    local q, k, v = self:qkv(layer, n, ctx)
    return self:finish(layer, x, self:attend(layer, q, k, v, n, ctx), ctx)
end

-- ---- what callers use -----------------------------------------------------------------------------------------------
--- Final hidden states [b, t, H], after the last norm, of token ids. opts: start, state, hidden (a table to fill with
--- each layer's output), teacher = true (a student computes with its teacher's softmax attention), tokens_at_once (with a
--- state: rows are read in slices of about so many tokens), cu_seqlens (offsets 0, .., t of several sequences that stand
--- in each row one after the other and do not see each other), fixed = true (for a step that is recorded: one token a row, its position
--- as state.pos says, where it stays).
function Model:forward(ids, opts)
    opts = opts or {}
    if opts.state and lc.grad_enabled() then -- a state has no gradient
        return lc.no_grad(self.forward, self, ids, opts)
    end
    ids = self:check_ids(ids)
    local many = opts.state and self:rows_at_once(ids, opts)
    if many then return self:forward_slices(ids, opts, many) end
    local ctx = self:context(ids, opts)
    local x = self:embed_ids(ids)
    local again = self.recomputes and lc.grad_enabled()
    if again then lc.keep { ctx.cos, ctx.sin, ctx.pos, ctx.start, ctx.own and { ctx.own.cos, ctx.own.sin } } end
    for _, layer in ipairs(self.layers) do
        -- a scope each: with gradients on, the tape alone holds what the backward needs
        local before = x
        if again then
            x = lc.checkpoint(function(at) return self:layer_forward(layer, at, ctx) end, x)
        else
            x = lc.scope(self.layer_forward, self, layer, x, ctx)
        end
        if opts.hidden then opts.hidden[layer.index] = x else before:drop() end
    end
    if opts.state and not opts.fixed then self:advance(opts.state, ctx.t) end
    return lc.rms_norm(x, self.norm, self.config.rms_norm_eps)
end

-- Many rows are read a few at a time: what lies between a layer's products is far larger than its result, and more
-- tokens than these make no product faster. Returns how many rows; nil: all.
local TOKENS_AT_ONCE = 16384
function Model:rows_at_once(ids, opts)
    local b, t = ids:size(1), ids:size(2)
    local rows = math.max(1, math.floor((opts.tokens_at_once or TOKENS_AT_ONCE) / t))
    if t == 1 or rows >= b or opts.hidden or not attention.has_rows(self.layers, opts) then return nil end
    return rows
end

function Model:forward_slices(ids, opts, rows)
    local c, state, b, t = self.config, opts.state, ids:size(1), ids:size(2)
    local like = { shape = { b, c.num_key_value_heads, t, c.head_dim }, dtype = self.dtype, device = self.device }
    local out = lc.empty({ b, t, c.hidden_size }, { dtype = self.dtype, device = self.device })
    if opts.start then self:note_padding(state, opts.start) end
    for first = 1, b, rows do
        local n = math.min(rows, b - first + 1)
        lc.scope(function()
            local part = attention.rows_of(state, first, n, like)
            local x = self:forward(ids:narrow(1, first, n), { state = part, teacher = opts.teacher })
            out:narrow(1, first, n):copy_(x)
        end)
    end
    self:advance(state, t)
    return out
end

--- Ids as a tensor, checked against the vocabulary where they can be looked at without waiting for a device.
function Model:check_ids(ids)
    ids = nn.ids(ids, self.device)
    if self.device == "cpu" then
        local row = ids:contiguous()
        local p, top = row:data(), self.config.vocab_size
        for i = 0, row:numel() - 1 do
            if p[i] < 0 or p[i] >= top then
                lc.fail("token id %d at position %d is outside the vocabulary (0 to %d)", p[i],
                        i % ids:size(2) + 1, top - 1)
            end
        end
    end
    return ids
end

--- Logits [b, t, vocab], or [b, vocab] of the last position with {last = true}.
function Model:logits(ids, opts)
    opts = opts or {}
    local function run()
        local x = self:forward(ids, opts)
        if opts.last then x = x:select(2, -1) end
        return self:lm_head(x)
    end
    if lc.grad_enabled() then return run() end
    return lc.scope(run)
end

function Model:lm_head(x) return nn.project(x, self.head_proj) end

--- Rows of the embedding, with its adapter: [b, t, H] of ids [b, t].
function Model:embed_ids(ids)
    local x, l = lc.embedding(self.embed, ids), self.embed_proj.lora
    if x.dtype ~= self.dtype then x = x:to(self.dtype) end
    if not l or not l.on then return x end
    local low = lc.embedding(l.a:transpose(1, 2):contiguous(), ids)
    return x + (lc.linear(low, l.b) * l.scale):to(x.dtype)
end

-- Rows that have a label: a table of flat row numbers from 0 and of labels; nil when the labels cannot be read cheaply.
-- The first token of a sequence is nobody's to predict.
local function labelled_rows(labels, ids, offsets)
    local b, t = ids:size(1), ids:size(2)
    local first = {}
    for _, s in ipairs(offsets and sequences_of(offsets, t) or {}) do first[s[1]] = true end
    local rows, out = {}, {}
    local list = lc.is_tensor(labels) and labels:totable() or labels
    if type(list[1]) ~= "table" then list = { list } end
    if #list ~= b or #list[1] ~= t then
        lc.fail("labels: expected [%d, %d] as the ids, got [%d, %d]", b, t, #list, #list[1])
    end
    for i = 1, b do
        for j = 2, t do
            local label = list[i][j]
            if label ~= -100 and not first[j] then
                rows[#rows + 1] = (i - 1) * t + j - 2
                out[#out + 1] = label
            end
        end
    end
    return rows, out
end

--- Next-token loss: position i predicts labels[i + 1]; labels of -100 do not count. labels default to ids. Also
--- returns each counted row's loss, its argmax and the number of rows. The head is computed on counted rows only and
--- never whole.
function Model:loss(ids, labels, opts)
    ids = self:check_ids(ids)
    local rows, wanted = labelled_rows(labels or ids, ids, opts and opts.cu_seqlens)
    if #rows == 0 then lc.fail("no label to learn from: every label is -100, or the row has a single token") end
    local x = self:forward(ids, opts)
    return self:loss_at(x, rows, wanted)
end

--- The same with its backward, as a step that a device may record: gradients of scale (1) times the loss add up in what is trained.
--- Returns the loss, a number; with wait = false as a tensor, which on a device nothing waits for, and which the next step may
--- write anew.
function Model:learn(ids, labels, scale, wait)
    ids, scale = self:check_ids(ids), scale or 1
    local rows, wanted = labelled_rows(labels or ids, ids)
    if #rows == 0 then lc.fail("no label to learn from: every label is -100, or the row has a single token") end
    local first, whole = rows[1], rows[#rows] - rows[1] + 1 == #rows
    local as_i32 = { dtype = "i32" }
    local inputs = { ids = ids, wanted = lc.tensor(wanted, as_i32), rows = not whole and lc.tensor(rows, as_i32) or nil }
    local key = ("%.17g,%d,%s"):format(scale, whole and first or 0, tostring(whole))
    local loss = require("lolcats.replay").step(self, "learn", key, inputs, function(at)
        return lc.enable_grad(lc.scope, function()
            local loss = self:loss_at(self:forward(at.ids), at.rows or rows, at.wanted)
            if scale == 1 then loss:backward() else (loss * scale):backward() end
            return loss:detach()
        end)
    end)
    if wait == false then return loss end
    return loss:item()
end

--- Cross entropy of hidden states x [b, t, H] at flat rows (from 0) against labels, both tables or tensors. A head that is trained itself
--- needs the logits whole, and then there are no losses of single rows.
function Model:loss_at(x, rows, wanted)
    local where = { dtype = "i32", device = self.device }
    local flat = x:reshape(-1, x:size(-1))
    local n = lc.is_tensor(wanted) and wanted:numel() or #wanted
    if not lc.is_tensor(wanted) then wanted = lc.tensor(wanted, where) end
    if lc.is_tensor(rows) then
        flat = flat:index_select(1, rows:to(self.device))
    elseif rows[#rows] - rows[1] + 1 == #rows then -- in one piece, as without padding and masks: no copy
        flat = flat:narrow(1, rows[1] + 1, #rows)
    else
        flat = flat:index_select(1, lc.tensor(rows, where))
    end
    wanted = wanted:to(self.device)
    local l = self.head_proj.lora
    if lc.grad_enabled() and self.head.requires_grad or l and l.on then
        return lc.cross_entropy(self:lm_head(flat), wanted), nil, nil, n
    end
    local loss, each, best = lc.linear_cross_entropy(flat, self.head, wanted,
                                                     { grad = lc.grad_enabled() and flat.requires_grad })
    return loss, each, best, n
end

--- Sum of the losses and number of tokens of one row of ids, without gradient.
function Model:nll(ids, labels, opts)
    return lc.no_grad(lc.scope, function()
        local loss, _, _, n = self:loss(ids, labels, opts)
        return loss:item() * n, n
    end)
end

-- ---- state ----------------------------------------------------------------------------------------------------------
--- State for prefill in chunks and decoding: a key/value cache for softmax layers, a state of constant size for
--- hybrid ones. opts: teacher, state_dtype ("f32"; on a device also the model's, which halves what a step reads of it).
--- On a device bf16 keys and values are cached as they are; the CPU's kernels keep them in f32.
function Model:new_state(batch, opts)
    batch = batch or 1
    local c = self.config
    local state = { seen = 0, batch = batch, layers = {}, as_teacher = opts and opts.teacher }
    local how = { dtype = self.fine, device = self.device, state = opts and opts.state_dtype or self.fine }
    if how.state ~= self.fine and (how.state ~= self.dtype or self.device == "cpu") then
        lc.fail("a state in %s: this model on %s keeps it in %s", how.state, self.device,
                self.device == "cpu" and self.fine or table.concat({ self.fine, self.dtype }, " or "))
    end
    how.cache = self.device ~= "cpu" and self.dtype == "bf16" and "bf16" or self.fine
    state.pos = lc.keep(lc.zeros({ batch }, { dtype = "i32", device = self.device }))
    for i, layer in ipairs(self.layers) do
        if layer.student and not state.as_teacher then
            state.layers[i] = attention.hybrid_state(layer, batch, c.num_attention_heads, c.num_key_value_heads,
                                                     c.head_dim, how)
        else
            state.layers[i] = {}
        end
    end
    return state
end

function Model:advance(state, t)
    state.seen = state.seen + t
    state.pos:fill_(state.seen)
    if state.start then lc.no_grad(lc.scope, function()
        state.pos:copy_((state.pos:to "f32" - state.start:to "f32"):clamp({ min = 0 }):to "i32")
    end) end
end

--- Frees a state's tensors at once.
function Model:drop_state(state)
    state.pos:drop()
    if state.start then
        state.start:drop()
        state.start = nil
    end
    for _, s in ipairs(state.layers) do
        for key, v in pairs(s) do
            if lc.is_tensor(v) then v:drop(); s[key] = nil end
        end
    end
end

-- ---- parameters -----------------------------------------------------------------------------------------------------
--- Every parameter as {name=, tensor=} in a fixed order: weights, feature maps, adapters. pattern: a Lua pattern on
--- the name; trainable = true: only those that require a gradient.
function Model:params(pattern, trainable)
    local out = {}
    local function add(name, t)
        if (not pattern or name:match(pattern)) and (not trainable or t.requires_grad) then
            out[#out + 1] = { name = name, tensor = t }
        end
    end
    for _, group in ipairs(weights.plan(self.config)) do
        for _, part in ipairs(group.parts) do add(part[1], self.weights[part[1]]) end
    end
    for _, p in ipairs(self:map_params()) do add(p.name, p.tensor) end
    for _, p in ipairs(require("lolcats.lora").parameters(self)) do add(p.name, p.tensor) end
    return out
end

function Model:trainable() return self:params(nil, true) end

--- Parameters of the student's attention, in the reference's order.
function Model:map_params()
    local out = {}
    for _, layer in ipairs(self.layers) do
        local a = layer.student
        if a then
            local pre = layer.name .. ".self_attn."
            if a.factors then out[#out + 1] = { name = pre .. "window_factors", tensor = a.factors } end
            for _, side in ipairs(a.fk == a.fq and { "q" } or { "q", "k" }) do -- one map for both stands under q's name
                for _, p in ipairs(a["f" .. side]:parameters()) do
                    local sub = a.map.custom and p.name or ("mlp." .. p.name)
                    out[#out + 1] = { name = pre .. "feature_map_" .. side .. "." .. sub, tensor = p.tensor }
                end
            end
        end
    end
    return out
end

--- No parameter requires a gradient any more.
function Model:freeze()
    for _, p in ipairs(self:params()) do p.tensor:requires_grad_(false) end
    return self
end

--- Marks parameters whose name matches as trained. Those that share a storage with a teacher are refused.
function Model:unfreeze(pattern)
    for _, p in ipairs(self:params(pattern)) do p.tensor:requires_grad_(true) end
    return self
end

function Model:add_lora(opts) return require("lolcats.lora").add(self, opts) end
function Model:merge_lora() return require("lolcats.lora").merge(self) end
function Model:unmerge_lora() return require("lolcats.lora").unmerge(self) end

--- Parameters in all, shared ones counted once.
function Model:size()
    local n = 0
    for _, p in ipairs(self:params()) do n = n + p.tensor:numel() end
    return n
end

--- PEFT's adapter folders: see peft.lua.
function Model:load_adapter(dir) return require("lolcats.peft").load(self, dir) end
function Model:save_adapter(dir) return require("lolcats.peft").save(self, dir) end

function Model:save_weights(dir, opts) return weights.save(self, dir, opts) end
function Model:generate(prompt, opts) return require("lolcats.session").generate(self, prompt, opts) end
function Model:session(opts) return require("lolcats.session").new(self, opts) end

function Model:__tostring()
    local c = self.config
    return ("%s: %d layers, hidden %d, heads %d/%d of %d, vocabulary %d, %s on %s%s"):format(
        self.is_student and "linearized " .. c.model_type or c.model_type, c.num_hidden_layers, c.hidden_size,
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.vocab_size, self.embed and self.embed.dtype or self.dtype, self.device,
        self.source and " (" .. self.source .. ")" or "")
end

return M
