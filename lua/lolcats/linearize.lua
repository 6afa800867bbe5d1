-- linearize.lua: turns a softmax decoder into a student with linear attention (lc.linearize), teaches its feature
-- maps layer by layer (student:transfer), switches to the second stage (student:use_linear), and saves and loads what
-- was trained.
local lc = require "lolcats"
local files = require "lolcats.files"
local maps = require "lolcats.feature_map"
local replay = require "lolcats.replay"
local attention = require "lolcats.attention"
local tiles = require "lolcats.attention_tiles"
local lora = require "lolcats.lora"
local llama = require "lolcats.models.llama"
local rope = require "lolcats.models.rope"
local whole = require "lolcats.transfer_whole"

local M = {}

local START_FACTOR = -2.1972245773362196 -- -ln 9: sigmoid = 0.1
local KINDS = { terrace = true, sliding = true, linear = true, scale = true }
local FORMAT, VERSION = "lolcats-student", 1
local FIRST = "first_stage." -- before the names of adapters that were merged after the first stage

-- A student is a model with more methods.
local Student = setmetatable({}, { __index = llama.Model })
Student.__index = Student
Student.__tostring = llama.Model.__tostring

-- ---- making a student -----------------------------------------------------------------------------------------------
local KNOWN = { map = true, window = true, kind = true, feature_dim = true, window_factor = true, affine = true,
                skip = true, bias = true, full = true, init = true, softmax_layers = true, train_window_factor = true,
                map_options = true, compat = true, attention = true, kernel = true, hidden_dim = true, tie_qk = true,
                precision = true, sinks = true, rotary = true, feature_eps = true, eps = true }

local function settings(teacher, opts)
    for k in pairs(opts) do
        if not KNOWN[k] then
            local names = {}
            for name in pairs(KNOWN) do names[#names + 1] = name end
            table.sort(names)
            lc.fail("lc.linearize has no option '%s'; it has %s", tostring(k), table.concat(names, ", "))
        end
    end
    local kind = opts.kind or (opts.window == 0 and "linear") or "terrace"
    if not KINDS[kind] then lc.fail("kind: 'terrace', 'sliding', 'linear' or 'scale', not '%s'", tostring(kind)) end
    if opts.precision and opts.precision ~= "bf16" then
        lc.fail("precision: 'bf16' or nothing, not '%s'", tostring(opts.precision))
    end
    for _, k in ipairs { "eps", "feature_eps" } do
        local v = opts[k]
        if v ~= nil and (type(v) ~= "number" or not (v >= 0)) then
            lc.fail("%s: a number of at least 0, got %s", k, tostring(v))
        end
    end
    local s = opts.sinks
    if s and (type(s) ~= "number" or s < 0 or s % 1 ~= 0) then
        lc.fail("sinks: a number of tokens, got %s", tostring(s))
    end
    if s and s > 0 and (kind == "linear" or kind == "scale" or opts.compat) then
        lc.fail("sinks go with the windows 'terrace' and 'sliding', without compat")
    end
    local window = kind == "linear" and 0 or opts.window or 64
    if type(window) ~= "number" or window < 0 or window ~= math.floor(window) or (kind ~= "linear" and window == 0) then
        lc.fail("window: a whole number above 0 (or kind = 'linear'), got %s", tostring(opts.window))
    end
    local keep, n = {}, #teacher.layers
    for _, i in ipairs(opts.softmax_layers or {}) do
        local at = i < 0 and n + 1 + i or i
        if at < 1 or at > n then lc.fail("softmax_layers: there is no layer %d; the model has 1 to %d", i, n) end
        keep[at] = true
    end
    return kind, window, keep
end

-- What compat asks for: "reference" stands for all quirks, else their names with commas between.
local QUIRKS = {
    terrace = "terrace blocks counted from the end of a text, both parts on all keys up to one window, decoding " ..
        "by a " ..
              "sliding window",
    rope = "rotary frequencies rounded to bfloat16 as soon as LoRA is attached",
    window = "a model's own sliding window (Mistral's) is left out, in the teacher's attention too",
    flow = "in the first stage the student's outputs, not the teacher's, go on to the next layer",
}

local function quirks_of(compat)
    local out = {}
    if not compat then return out end
    for name in (compat == "reference" and "terrace,rope,window,flow" or tostring(compat)):gmatch "[^,%s]+" do
        if not QUIRKS[name] then
            lc.fail("compat: 'reference', or some of 'terrace,rope,window,flow', not '%s'", name)
        end
        out[name] = true
    end
    return out
end

local function say_quirk(name) io.stderr:write("compat: ", QUIRKS[name], ", as in the reference\n") end

-- Options under a name of the reference's: what the name says, which opts may not contradict, and the rest of opts.
local function by_name(opts)
    if not opts.attention then return opts end
    local found, out = require("lolcats.attention_types").find(opts.attention), {}
    for k, v in pairs(opts) do out[k] = v end
    for k, v in pairs(found.options) do
        if k ~= "softmax" then
            if opts[k] ~= nil and opts[k] ~= v and k ~= "train_window_factor" then
                lc.fail("attention '%s' means %s = %s; %s was given too", opts.attention, k, tostring(v),
                        tostring(opts[k]))
            end
            out[k] = v
        end
    end
    return out, found
end

-- The rotary settings of a `rotary` option, in a config's words. Its keys are those of the reference's rotary_config:
-- rope_scaling_type (none, "linear" or "dynamic"), rope_scaling_factor (1), rope_theta (10000),
-- max_position_embeddings (4096), head_dim (the model's).
local ROTARY = { rope_scaling_type = true, rope_scaling_factor = true, rope_theta = true,
                 max_position_embeddings = true,
                 head_dim = true, device = true }
local function own_rotary(r, c)
    if type(r) ~= "table" then lc.fail("rotary: a table of settings is wanted, got a %s", type(r)) end
    for k in pairs(r) do
        if not ROTARY[k] then lc.fail("rotary has no setting '%s'", tostring(k)) end
    end
    local kind = r.rope_scaling_type
    if kind ~= nil and kind ~= "linear" and kind ~= "dynamic" then
        lc.fail("rotary: rope_scaling_type is 'linear', 'dynamic' or nothing, not '%s'", tostring(kind))
    end
    if r.head_dim and r.head_dim ~= c.head_dim then
        lc.fail("rotary: head_dim is %s, the model's heads have %d", tostring(r.head_dim), c.head_dim)
    end
    for _, k in ipairs { "rope_theta", "max_position_embeddings", "rope_scaling_factor" } do
        if r[k] ~= nil and (type(r[k]) ~= "number" or r[k] <= 0) then
            lc.fail("rotary: %s must be a number above 0, got %s", k, tostring(r[k]))
        end
    end
    return { head_dim = c.head_dim, rope_theta = r.rope_theta or 10000,
             max_position_embeddings = r.max_position_embeddings or 4096,
             rope_scaling = kind and { rope_type = kind, factor = r.rope_scaling_factor or 1 } or nil }
end

-- Layers without a sliding window of the model's own.
local function leave_windows(student)
    local had = false
    for _, layer in ipairs(student.layers) do
        had = had or (layer.window or 0) > 0
        layer.window = nil
    end
    if had then say_quirk "window" end
end

--- A student that shares the teacher's frozen weights. opts: map (name, file or lc.feature_map), attention (one of the
--- reference's names: see attention_types.lua), window (64), kind ("terrace", "sliding", "linear", or "scale": window
--- and linear part with a normaliser each), sinks (first tokens that every query keeps in its window), kernel
--- ("untied", "tied", "adapter", "none"), hidden_dim, tie_qk (one map for q and k), feature_dim, full, bias, skip, init
--- ("identity", "kaiming", "normal"), window_factor, affine, softmax_layers (positions of layers that keep their
--- softmax attention), train_window_factor, precision, map_options (plain values that a map finds as self.options),
--- compat ("reference", or some of "terrace,rope,window,flow": quirks of the reference that published checkpoints and
--- figures have; see QUIRKS), rotary (frequencies of the linearized layers' own: see own_rotary), feature_eps (no
--- feature is smaller), eps (beside the sum of purely linear weights), both 1e-12.
function M.linearize(teacher, opts)
    opts = opts or {}
    if type(teacher) ~= "table" or not teacher.layers then
        lc.fail("lc.linearize wants a model, got a %s", type(teacher))
    end
    if teacher.is_student then lc.fail("this model is linearized already") end
    local named
    opts, named = by_name(opts)
    local kind, window, keep = settings(teacher, opts)
    if named and named.options.softmax then
        for i = 1, #teacher.layers do keep[i] = true end
    end
    local quirks = quirks_of(opts.compat)
    local map = maps.resolve(opts.map, { feature_dim = opts.feature_dim, full = opts.full, bias = opts.bias,
                                         skip = opts.skip, init = opts.init, kernel = opts.kernel,
                                         hidden_dim = opts.hidden_dim, feature_eps = opts.feature_eps })
    teacher:freeze()
    local student = setmetatable(teacher:share(), Student)
    student.is_student, student.teacher, student.map = true, teacher, map
    local c, where = teacher.config, { dtype = teacher.fine, device = teacher.device }
    local how = { dtype = teacher.fine, device = teacher.device, options = opts.map_options }
    local h, d = c.num_attention_heads, c.head_dim
    for i, layer in ipairs(student.layers) do
        if not keep[i] then
            local fq = map:instance(h, d, how)
            local a = { map = map, fq = fq, fk = opts.tie_qk and fq or map:instance(h, d, how, fq), kind = kind,
                        window = window,
                        affine = opts.affine or false, precision = opts.precision, eps = opts.eps,
                        sinks = opts.sinks and opts.sinks > 0 and opts.sinks or nil,
                        compat = quirks.terrace and kind == "terrace" or nil }
            if window > 0 then
                local value = opts.window_factor or START_FACTOR
                local factors = lc.full({ 1, h, 1, 1 }, value, where)
                a.factors = lc.param(factors)
                if opts.train_window_factor == false then a.factors:requires_grad_(false) end
            end
            layer.student = a
        end
    end
    student.settings = {
        kind = kind, window = window, map = map.name, feature_dim = opts.feature_dim, full = opts.full,
        bias = opts.bias, skip = opts.skip, init = opts.init, affine = opts.affine, window_factor = opts.window_factor,
        softmax_layers = opts.softmax_layers, train_window_factor = opts.train_window_factor,
        map_options = opts.map_options, compat = opts.compat, attention = opts.attention, kernel = opts.kernel,
        hidden_dim = opts.hidden_dim, tie_qk = opts.tie_qk, precision = opts.precision, sinks = opts.sinks,
        rotary = opts.rotary, feature_eps = opts.feature_eps, eps = opts.eps,
    }
    student.is_long = named and named.long or nil
    if named and named.note then require("lolcats.log").say("%s: %s", named.name, named.note) end
    if opts.rotary then student.own_rotary = own_rotary(opts.rotary, c) end
    if quirks.window then leave_windows(student) end
    -- of all names only this one has the student's outputs flow on; asked for by name, any student does it
    if quirks.flow and (opts.compat ~= "reference" or named and named.flows) then
        student.flows = true
        say_quirk "flow"
    end
    student.rounds_rope = quirks.rope
    if quirks.terrace and kind == "terrace" then say_quirk "terrace" end
    for _, p in ipairs(student:map_params()) do p.tensor:set_name(p.name) end
    return student
end

--- Adds adapters; see lora.lua. With compat the rotary frequencies are rounded from here on.
function Student:add_lora(opts)
    lora.add(self, opts)
    if self.rounds_rope and not self.rope_bf16 then
        self.rope_bf16 = true
        self:set_rotary(0)
        say_quirk "rope"
    end
    return self
end

--- Ends the part of adapters in the first stage: they are merged into the student's own copy of the weights, and kept
--- aside for its files.
function Student:merge_first_lora()
    if not self.lora then lc.fail("merge_first_lora: there are no adapters") end
    local kept = {}
    for _, p in ipairs(lora.parameters(self)) do
        kept[#kept + 1] = { name = FIRST .. p.name,
                            tensor = lc.keep(lc.no_grad(function() return p.tensor:detach():clone() end)) }
    end
    self.first_lora = { options = self.lora, tensors = kept }
    lora.merge(self)
    lora.drop(self)
    replay.forget(self)
    return self
end

-- ---- rotary frequencies of the student's own ------------------------------------------------------------------------
function Student:rotary_varies()
    return llama.Model.rotary_varies(self) or (self.own_rotary ~= nil and rope.varies(self.own_rotary))
end

-- The rotation of layers with frequencies of their own, for positions pos of a text of `length`.
local function own_turn(self, pos, length)
    local about = ("%s %d"):format(tostring(self.rope_bf16), rope.varies(self.own_rotary) and length or 0)
    if self.own_freq_of ~= about then
        local list = rope.inv_freq(self.own_rotary, length)
        if self.rope_bf16 then list = rope.round_bf16(list) end
        self.own_freq, self.own_freq_of = lc.keep(lc.tensor(list, { dtype = self.fine, device = self.device })), about
    end
    return lc.rope_table(pos, self.own_freq)
end

function Student:context(ids, opts)
    local ctx = llama.Model.context(self, ids, opts)
    if self.own_rotary and not ctx.teacher then
        local cos, sin = own_turn(self, ctx.pos, ctx.seen + ctx.t)
        ctx.own = setmetatable({ cos = cos, sin = sin }, { __index = ctx })
    end
    return ctx
end

--- q, k, v as the model's; linearized layers may turn by frequencies of their own.
function Student:qkv(layer, n, ctx)
    return llama.Model.qkv(self, layer, n, layer.student and ctx.own or ctx)
end

-- ---- attention transfer ---------------------------------------------------------------------------------------------
-- One layer's pair on the teacher's own q, k, v: the student's output against the teacher's. Gradients reach the maps
-- only.
local function pair_loss(a, q, k, v, y_true, ctx, mse, xent)
    if xent == 0 then
        return lc.mse_loss(attention.hybrid(a, q, k, v, ctx), y_true) * mse
    end
    local fq, fk = attention.features(a, q, k, ctx)
    local loss = tiles.xent(a, q, k, fq, fk, ctx) * xent
    if mse ~= 0 then loss = loss + lc.mse_loss(attention.hybrid(a, q, k, v, ctx), y_true) * mse end
    return loss
end

-- The same with its backward. The squared error alone gives loss and slope in one pass, with nothing recorded for it.
local function teach_pair(a, q, k, v, y_true, ctx, mse, xent)
    if xent == 0 then
        local y_pred = lc.enable_grad(attention.hybrid, a, q, k, v, ctx)
        local loss, slope = lc.mse_loss_slope(y_pred:detach(), y_true, mse)
        if y_pred.requires_grad then y_pred:backward(slope) end
        return loss
    end
    local loss = lc.enable_grad(pair_loss, a, q, k, v, y_true, ctx, mse, xent)
    if loss.requires_grad then loss:backward() end
    return loss:detach()
end

--- One micro-step of attention transfer: mse (1000) times the mean squared error between the student's and the
--- teacher's attention outputs, plus xent (0) times the cross entropy of their weights, averaged over layers; loss
--- and backward layer by layer, so memory is that of one layer. Gradients add up in the parameters. opts: scale (of
--- loss and gradient; 1 / accumulation), mse, xent, start (left padding), plain = true (maps computed in Lua),
--- backward = false (only the loss), wait = false (on a device the loss is a tensor of one element, for which nothing
--- waits; the next step may write it anew). Returns the loss and a table of each layer's.
function Student:transfer(ids, opts)
    ids, opts = self:check_ids(ids), opts or {}
    local function embedded(ids)
        local x = lc.embedding(self.embed, ids)
        return x.dtype ~= self.dtype and x:to(self.dtype) or x
    end
    local plain = self.device == "cpu" or opts.backward == false or opts.plain or (opts.xent or 0) ~= 0
    if plain or whole.needed(self) or opts.start or opts.cu_seqlens then
        return self:transfer_hidden(function() return embedded(ids) end, opts, ids)
    end
    local key = ("%.17g,%.17g"):format(opts.scale or 1, opts.mse or 1000)
    local losses, sum = replay.step(self, "transfer", key, { ids = ids }, function(inputs)
        local losses = self:transfer_losses(function() return embedded(inputs.ids) end, opts, inputs.ids)
        return losses, lc.no_grad(losses.sum, losses)
    end)
    if opts.wait == false then return sum end
    return self:sum_losses(losses)
end

--- The same from hidden states x [b, t, H] on, as the first of this model's layers gets them: a tensor, or a function
--- that makes it.
function Student:transfer_hidden(x, opts, ids)
    local losses = self:transfer_losses(x, opts, ids)
    if opts and opts.wait == false and self.device ~= "cpu" then return lc.no_grad(losses.sum, losses) end
    return self:sum_losses(losses)
end

-- Number of layers that learn, the last of them.
local function taught(self)
    local n, last = 0, 0
    for i, layer in ipairs(self.layers) do
        if layer.student then n, last = n + 1, i end
    end
    if n == 0 then lc.fail("transfer: every layer keeps its softmax attention; there is nothing to teach") end
    return n, last
end

-- The sum, and each layer's as if it were alone.
function Student:sum_losses(losses)
    local each, sum, n = losses:totable(), 0, taught(self)
    for i = 1, #each do sum, each[i] = sum + each[i], each[i] * n end
    return sum, each
end

-- The layers' parts of the loss, on the device.
function Student:transfer_losses(x, opts, ids)
    opts = opts or {}
    local scale, mse, xent = opts.scale or 1, opts.mse or 1000, opts.xent or 0
    if mse == 0 and xent == 0 then lc.fail("transfer: mse and xent are both 0; there is no loss") end
    local n, last = taught(self)
    if whole.needed(self) then
        return whole.losses(self, x, opts, ids, { mse = mse * scale / n, xent = xent * scale / n }, last)
    end
    return lc.no_grad(lc.scope, function()
        local ctx = self:context(ids or x, opts)
        local losses = lc.zeros({ #self.layers }, { dtype = self.fine, device = self.device })
        local x = type(x) == "function" and x() or x:alias()
        for i = 1, last do
            local layer = self.layers[i]
            local attended = lc.scope(self.transfer_layer, self, layer, x, ctx, losses, i == last,
                                      { mse = mse * scale / n, xent = xent * scale / n, opts = opts })
            x:drop() -- before the MLP, whose memory is the most
            if attended then
                x = lc.scope(self.mlp, self, layer, attended, ctx)
                attended:drop()
            end
        end
        return losses
    end)
end

-- Teacher's attention, the student's loss beside it, its backward; returns the residual stream after the attention.
function Student:transfer_layer(layer, x, ctx, losses, is_last, how)
    local opts = how.opts
    local normed = self:norm_in(layer, x)
    local q, k, v = self:qkv(layer, normed, ctx)
    local a = layer.student
    local call = { start = ctx.start, sequences = ctx.sequences, pos = ctx.pos, layer = layer.index,
                   window = layer.window, seen = 0 }
    if a and a.map.custom then call.hidden = normed else normed:drop() end
    local y = attention.softmax(q, k, v, call)
    if a then
        local generic = a.generic
        a.generic = opts.plain or generic
        lc.scope(function()
            local loss
            if opts.backward == false then
                loss = pair_loss(a, q, k, v, y, call, how.mse, how.xent)
            else
                loss = teach_pair(a, q, k, v, y, call, how.mse, how.xent)
            end
            losses:narrow(1, layer.index, 1):copy_(loss:reshape(1))
        end)
        a.generic = generic
    end
    if is_last then return nil end -- nothing reads what follows the last pair
    return self:attended(layer, x, y, ctx)
end

--- Both stages on texts longer than memory: long.lua. Backward runs inside; they return the loss as a number.
function Student:transfer_long(ids, opts) return require("lolcats.long").transfer(self, ids, opts) end
function Student:loss_long(ids, labels, opts) return require("lolcats.long").loss(self, ids, labels, opts) end

--- Beyond the reference's recipe: improve.lua.
function Student:distill_loss(ids, labels, opts)
    return require("lolcats.improve").distill_loss(self, ids, labels, opts)
end
function Student:draw_windows(p, sizes) return require("lolcats.improve").draw_windows(self, p, sizes) end
function Student:fade(share) return require("lolcats.improve").fade(self, share) end
function Student:keep_softmax(list) return require("lolcats.improve").keep_softmax(self, list) end
function Student:rank_layers(rows, opts) return require("lolcats.improve").rank_layers(self, rows, opts) end

--- Ends the first stage: the maps are frozen (but for parameters whose name matches a pattern in opts.keep_training).
function Student:use_linear(opts)
    local keep = opts and opts.keep_training or {}
    for _, p in ipairs(self:map_params()) do
        local wanted = false
        for _, pattern in ipairs(keep) do wanted = wanted or p.name:match(pattern) ~= nil end
        -- what a map does not train
        wanted = wanted and not (self.map.buffers and self.map.buffers[p.name:match "[^.]+$"])
        p.tensor:requires_grad_(wanted)
    end
    self.stage = "linear"
    replay.forget(self)
    return self
end

--- Runs f with the linear part of every hybrid layer off, to see what the window alone gives.
function Student:window_only(f, ...)
    local function set(on)
        for _, layer in ipairs(self.layers) do
            if layer.student then layer.student.window_only = on end
        end
    end
    set(true)
    local out = { pcall(f, ...) }
    set(nil)
    if not out[1] then error(out[2], 0) end
    return unpack(out, 2, table.maxn(out))
end

--- Runs f with every map computed in Lua (the plain twin of the fused maps).
function Student:plain(f, ...)
    for _, layer in ipairs(self.layers) do
        if layer.student then layer.student.generic = true end
    end
    local out = { pcall(f, ...) }
    for _, layer in ipairs(self.layers) do
        if layer.student then layer.student.generic = nil end
    end
    if not out[1] then error(out[2], 0) end
    return unpack(out, 2, table.maxn(out))
end

-- ---- files ----------------------------------------------------------------------------------------------------------
--- What was trained, by name: feature maps, window factors, adapters.
function Student:trained()
    local out = self:map_params()
    for _, p in ipairs(self.first_lora and self.first_lora.tensors or {}) do out[#out + 1] = p end
    for _, p in ipairs(lora.saved(self)) do out[#out + 1] = p end
    return out
end

--- Writes the trained parameters and what is needed to build the student again on its teacher. The base weights stay
--- where they are: the description names them.
function Student:save(dir)
    files.make_dirs(dir)
    local tensors = {}
    for _, p in ipairs(self:trained()) do tensors[p.name] = p.tensor:detach() end
    local about = { format = FORMAT, version = VERSION, base = self.source, linearize = self.settings, lora = self.lora,
                    first_lora = self.first_lora and self.first_lora.options,
                    shape = { layers = #self.layers, hidden_size = self.config.hidden_size } }
    if self.map.custom then
        local text, why = maps.source_of(self.map)
        about.custom_map = { name = self.map.name, doc = self.map.doc, source = text and "feature_map.lua" or nil,
                             no_source = why }
        if text then files.write(dir .. "/feature_map.lua", text) end
    end
    files.save_tensors(dir .. "/student.safetensors", tensors, { format = FORMAT })
    files.write_json(dir .. "/student.json", about)
    return self
end

--- Is this folder a saved student?
function M.is_saved(dir) return files.exists(dir .. "/student.json") end

-- The map of a saved student. Code that came with a checkpoint runs only when the caller trusts it.
local function saved_map(dir, about, opts)
    if opts.map then return opts.map end
    local custom = about.custom_map
    if not custom then return about.linearize.map end
    if not custom.source then
        lc.fail("%s: its feature map '%s' was not stored (%s); give it as map = when loading", dir,
                tostring(custom.name), tostring(custom.no_source))
    end
    local path = dir .. "/feature_map.lua"
    if not (opts.trust_code or rawget(lc, "trust_code")) then
        lc.fail("%s holds code: its feature map '%s' is the Lua file %s. Read that file; then pass --trust-code to " ..
                "run it, or give a map of your own as map = \"FILE.lua\"", dir, tostring(custom.name), path)
    end
    return maps.from_file(path)
end

-- The adapters of a first stage, under their own names in the file.
local function read_first(student, path)
    local f = files.open_tensors(path)
    lc.no_grad(lc.scope, function()
        for _, p in ipairs(lora.parameters(student)) do
            if not f:has(FIRST .. p.name) then f:close(); lc.fail("%s has no tensor '%s%s'", path, FIRST, p.name) end
            p.tensor:detach():copy_(f:tensor(FIRST .. p.name))
        end
    end)
    f:close()
end

--- Reads a saved student. opts: base (a loaded model, or its name or folder), map, trust_code, and those of lc.load.
function M.load(dir, opts)
    opts = opts or {}
    local about = files.read_json(dir .. "/student.json")
    if type(about) ~= "table" or about.format ~= FORMAT then lc.fail("%s/student.json is not a saved student", dir) end
    if about.version > VERSION then
        lc.fail("%s/student.json has version %s; this program reads up to %d", dir, tostring(about.version), VERSION)
    end
    local base = opts.base or about.base
    if not base then lc.fail("%s does not say what it was made from; give the base model as base =", dir) end
    if type(base) == "string" and not opts.base and not base:match "^/" and not files.exists(base) then
        local above = dir -- a path that counts from a folder in which the program is not now
        for _ = 1, 8 do
            above = above .. "/.."
            if files.exists(above .. "/" .. base) then
                base = above .. "/" .. base
                break
            end
        end
    end
    if type(base) == "string" then
        local ok, found = pcall(require("lolcats.hub").resolve, base)
        if not ok then
            lc.fail("%s was made from '%s', which cannot be loaded here (%s); give the base model as base =", dir, base,
                    tostring(type(found) == "table" and found.message or found))
        end
        base = require("lolcats.models").load(base, { dtype = opts.dtype, device = opts.device })
    end
    local set = {}
    for k, v in pairs(about.linearize) do
        if v ~= files.null and k ~= "map" then set[k] = v end
    end
    set.map = saved_map(dir, about, opts)
    local student = M.linearize(base, set)
    if about.first_lora and about.first_lora ~= files.null then
        lora.add(student, about.first_lora)
        read_first(student, dir .. "/student.safetensors")
        student:merge_first_lora()
    end
    if about.lora and about.lora ~= files.null then student:add_lora(about.lora) end
    M.read_trained(student, dir .. "/student.safetensors")
    student.saved_in = dir
    return student
end

--- Copies trained parameters from a safetensors file; each of the student's must be there, in its shape.
function M.read_trained(student, path)
    local f = files.open_tensors(path)
    lc.no_grad(lc.scope, function()
        for _, p in ipairs(student:trained()) do
            if not f:has(p.name) then f:close(); lc.fail("%s has no tensor '%s'", path, p.name) end
            local from = f:tensor(p.name)
            local a, b = table.concat(from.shape, ", "), table.concat(p.tensor.shape, ", ")
            if a ~= b then f:close(); lc.fail("%s: '%s' is [%s], the student's is [%s]", path, p.name, a, b) end
            p.tensor:detach():copy_(from)
        end
    end)
    f:close()
    return student
end

M.Student, M.START_FACTOR, M.FORMAT, M.VERSION = Student, START_FACTOR, FORMAT, VERSION
return M
