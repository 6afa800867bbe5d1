-- session.lua: a model with its memory of a text. Feeding keeps a key/value cache or a state of constant size;
-- generating streams text in whole UTF-8 characters; a prompt that continues what was fed is not read again. Chat
-- keeps a conversation on top.
local lc = require "lolcats"
local bit = require "bit"
local text = require "lolcats.core.text"

local M = {}

local Session = {}
Session.__index = Session

local PREFILL_CHUNK = 512

-- ---- random numbers of one generation -------------------------------------------------------------------------------
-- A generator of its own per session, so that sampling never disturbs (nor depends on) the training stream.
local function uniform_source(seed)
    local s = bit.tobit(seed or os.time())
    local function mix(x, m) -- 32-bit product without losing bits
        local lo = bit.band(x, 0xffff) * m
        local hi = bit.band(bit.rshift(x, 16) * m, 0xffff)
        return bit.tobit(lo + hi * 65536)
    end
    local function draw()
        s = bit.tobit(s + 0x9e3779b9)
        local z = s
        z = mix(bit.bxor(z, bit.rshift(z, 16)), 0x21f0aaad)
        z = mix(bit.bxor(z, bit.rshift(z, 15)), 0x735a2d97)
        z = bit.bxor(z, bit.rshift(z, 15))
        return (z % 4294967296) / 4294967296
    end
    return draw
end

-- ---- feeding --------------------------------------------------------------------------------------------------------
--- A session on a model. opts: teacher = true (a student's session with its teacher's softmax attention), state_dtype
--- (see new_state).
function M.new(model, opts)
    local how = { teacher = opts and opts.teacher, state_dtype = opts and opts.state_dtype }
    return setmetatable({ model = model, ids = {}, how = how, teacher = how.teacher, state = model:new_state(1, how) }, Session)
end

--- Forgets everything.
function Session:reset()
    self.model:drop_state(self.state)
    self.state = self.model:new_state(1, self.how)
    self.ids, self.pending, self.broken = {}, nil, nil
end

local function feed_inner(self, ids, want)
    local model, n, x = self.model, #ids, nil
    for first = 1, n, PREFILL_CHUNK do
        local part = {}
        for i = first, math.min(n, first + PREFILL_CHUNK - 1) do part[#part + 1] = ids[i] end
        x = model:forward(part, { state = self.state, teacher = self.teacher })
    end
    if want then return want(model:lm_head(x:select(2, -1)):reshape(-1)) end
end

--- Reads ids (a table) after what was read before; want(logits [vocab]) is called on the last position and its result
--- returned.
function Session:feed(ids, want)
    if self.pending then
        local all = { self.pending }
        for _, id in ipairs(ids) do all[#all + 1] = id end
        ids, self.pending = all, nil
    end
    if #ids == 0 then lc.fail("there is nothing to read: the prompt has no tokens") end
    for _, id in ipairs(ids) do self.ids[#self.ids + 1] = id end
    if self.stepper and #ids == 1 and want then
        self.stepper.ids:fill_(ids[1])
        self.broken = true
        local result = want((lc.no_grad(self.stepper.step, self.stepper)))
        self.broken = nil
        return result
    end
    self.broken = true -- until it is read whole; an interruption leaves a state that fits no text
    local result = lc.no_grad(lc.scope, feed_inner, self, ids, want)
    self.broken = nil
    return result
end

--- Calls f(...), in which tokens are read one by one, with steps that a device may record.
function Session:stepping(f, ...)
    if self.model.device == "cpu" then return f(...) end
    local ids = lc.keep(lc.zeros({ 1, 1 }, { dtype = "i32", device = self.model.device }))
    self.stepper = require("lolcats.decode").new(self.model, self.state, ids, function(x)
        return self.model:lm_head(x):reshape(-1):to "f32"
    end)
    local function done(ok, ...)
        self.stepper = nil
        if not ok then error((...), 0) end
        return ...
    end
    return done(pcall(f, ...))
end

--- Makes the session stand right before the last of `ids` and returns the ids still to be read. What was read before
--- is kept when it is a prefix of ids.
function Session:rest_of(ids)
    local have = self.ids
    if self.pending then
        have = {}
        for i, id in ipairs(self.ids) do have[i] = id end
        have[#have + 1] = self.pending
    end
    local same = #have < #ids and not self.broken
    for i = 1, same and #have or 0 do
        if have[i] ~= ids[i] then same = false break end
    end
    if not same then self:reset() end
    local from = same and #have or 0
    local rest = {}
    for i = from + 1, #ids do rest[#rest + 1] = ids[i] end
    return rest
end

-- ---- text that streams ----------------------------------------------------------------------------------------------
local BROKEN = "\239\191\189" -- what a cut character decodes to

-- Bytes at the end of s that may be the start of a longer UTF-8 character.
local function open_tail(s)
    for back = 1, math.min(3, #s) do
        local b = s:byte(#s - back + 1)
        if b >= 0xc0 then
            local need = b >= 0xf0 and 4 or b >= 0xe0 and 3 or 2
            return back < need and back or 0
        end
        if b < 0x80 then return 0 end
    end
    return 0
end

-- Turns ids into text piece by piece: decodes from a little before the new ids, since a piece may depend on its
-- neighbour.
local function streamer(tok)
    local ids, prefix, read = {}, 0, 0
    local function slice(a, b)
        local out = {}
        for i = a, b do out[#out + 1] = ids[i] end
        return tok:decode(out, { skip_special = true })
    end
    -- behind what was said already; bytes that turn out to be no character may have changed that
    local function rest(old, new) return (new:sub(#old + 1):gsub("^[\128-\191]+", "")) end
    return {
        add = function(id)
            ids[#ids + 1] = id
            local old, new = slice(prefix + 1, read), slice(prefix + 1, #ids)
            if #new <= #old or new:sub(-3) == BROKEN or open_tail(new) > 0 then return "" end
            prefix, read = read, #ids
            return rest(old, new)
        end,
        finish = function()
            local old, new = slice(prefix + 1, read), slice(prefix + 1, #ids)
            prefix, read = read, #ids
            return rest(old, new)
        end,
    }
end

-- Holds back text that may turn out to be the start of a stop string.
local function stopper(stops)
    local held = ""
    return function(piece, final)
        held = held .. piece
        local at
        for _, s in ipairs(stops) do
            local i = held:find(s, 1, true)
            if i and (not at or i < at) then at = i end
        end
        if at then
            local out = held:sub(1, at - 1)
            held = ""
            return out, true
        end
        local keep = 0
        if not final then
            for _, s in ipairs(stops) do
                for n = math.min(#s - 1, #held), keep + 1, -1 do
                    if held:sub(-n) == s:sub(1, n) then keep = n break end
                end
            end
        end
        local out = held:sub(1, #held - keep)
        held = held:sub(#held - keep + 1)
        return out, false
    end
end

-- ---- generating -----------------------------------------------------------------------------------------------------
local function picker(self, opts)
    local how = { temperature = opts.temperature or 0, top_k = opts.top_k or 0, top_p = opts.top_p or 1,
                  min_p = opts.min_p or 0, repetition = opts.repetition or 1 }
    local draw = uniform_source(opts.seed)
    local recent = how.repetition ~= 1 and self.ids or nil
    return function(logits)
        if logits.dtype ~= "f32" then logits = logits:to("f32") end
        if logits.device ~= "cpu" then logits = logits:cpu() end
        local id = text.sample(logits, how, recent, draw())
        if opts.on_logits then opts.on_logits(logits, id) end
        return id
    end
end

local KNOWN = { max_new = true, temperature = true, top_k = true, top_p = true, min_p = true, repetition = true,
                seed = true, stop = true, stream = true, stop_ids = true, teacher = true, on_logits = true,
                on_token = true, state_dtype = true }

local function check_options(opts)
    for k in pairs(opts) do
        if not KNOWN[k] then lc.fail("generate has no option '%s'", tostring(k)) end
    end
end

--- Ids of a prompt: a table of ids as it is; a text by the model's tokenizer, with the special tokens it adds by
--- itself.
function Session:encode(prompt, opts)
    if type(prompt) == "table" then return prompt end
    local tok = self.model.tokenizer
    if not tok then
        lc.fail("the model%s has no tokenizer (tokenizer.json): give token ids instead of text",
                self.model.source and " " .. self.model.source or "")
    end
    return tok:encode(prompt, opts or { special = true, parse = true })
end

--- Continues a prompt (text or ids, the whole of it: a part that was read before is not read again). opts: max_new
--- (256), temperature (0: greedy), top_k, top_p, min_p, repetition, seed, stop (strings), stop_ids, stream(piece).
--- Returns the text, the new ids, and {reason =, prompt_tokens =, read_tokens =, prompt_seconds =, seconds =}.
function Session:generate(prompt, opts)
    opts = opts or {}
    check_options(opts)
    local ids = self:encode(prompt)
    local rest = self:rest_of(ids)
    if #rest == 0 then lc.fail("there is nothing to continue: the prompt has no tokens") end
    return self:continue(rest, opts, #ids)
end

local function stop_set(model, opts)
    local set = {}
    for id in pairs(model.special and model.special.stop or {}) do set[id] = true end
    for _, id in ipairs(opts.stop_ids or {}) do set[id] = true end
    return set
end

--- Reads `rest` and generates after it; see generate.
function Session:continue(rest, opts, prompt_tokens)
    local pick, stops = picker(self, opts), stop_set(self.model, opts)
    local out, parts, info = {}, {}, { prompt_tokens = prompt_tokens or #rest, read_tokens = #rest }
    local words = type(opts.stop) == "string" and { opts.stop } or opts.stop or {}
    local stream = self.model.tokenizer and streamer(self.model.tokenizer)
    local hold = stopper(words)
    local function emit(piece)
        if piece == "" then return end
        parts[#parts + 1] = piece
        if opts.stream then opts.stream(piece) end
    end
    local t0 = lc.now()
    local id = self:feed(rest, pick)
    info.prompt_seconds = lc.now() - t0
    t0 = lc.now()
    local limit = opts.max_new or 256
    info.reason = "length"
    self:stepping(function()
        while #out < limit do
            if stops[id] then info.reason, info.stop_id = "end", id break end
            out[#out + 1] = id
            if opts.on_token then opts.on_token(id) end
            self.pending = id
            if stream then
                local piece, hit = hold(stream.add(id))
                emit(piece)
                if hit then info.reason = "stop" break end
            end
            if #out < limit then id = self:feed({}, pick) end
        end
    end)
    if stream and info.reason ~= "stop" then
        local piece, hit = hold(stream.finish(), true)
        emit(piece)
        if hit then info.reason = "stop" end
    end
    info.seconds = lc.now() - t0
    return table.concat(parts), out, info
end

--- One-shot generation on a session of its own.
function M.generate(model, prompt, opts)
    opts = opts or {}
    local session = M.new(model, opts)
    local a, b, c = session:generate(prompt, opts)
    model:drop_state(session.state)
    return a, b, c
end

-- ---- chat -----------------------------------------------------------------------------------------------------------
local Chat = {}
Chat.__index = Chat

local function render(model, messages, generation)
    local template = require "lolcats.chat_template"
    if not model.compiled_template then model.compiled_template = template.compile(model.chat_template) end
    return model.compiled_template:render({
        messages = messages, add_generation_prompt = generation,
        bos_token = model.special and model.special.bos_token or "",
        eos_token = model.special and model.special.eos_token or "",
    })
end

--- A conversation on a model that has a chat template. opts: system (text), and those of generate as defaults.
function M.chat(model, opts)
    opts = opts or {}
    if not model.chat_template then
        lc.fail("this model has no chat template; use generate, or give an instruction-tuned model")
    end
    local chat = setmetatable({ model = model, session = M.new(model, opts), opts = opts }, Chat)
    chat:reset()
    return chat
end

function Chat:reset()
    self.messages, self.read_text = {}, nil
    if self.opts.system then self.messages[1] = { role = "system", content = self.opts.system } end
    self.session:reset()
end

--- One turn: the user's text in, the reply out (and streamed). The state goes on from the last turn; only what is new
--- is read.
function Chat:say(user, opts)
    local set = {}
    for k, v in pairs(self.opts) do if k ~= "system" then set[k] = v end end
    for k, v in pairs(opts or {}) do set[k] = v end
    self.messages[#self.messages + 1] = { role = "user", content = user }
    local prompt = render(self.model, self.messages, true)
    local tok = self.model.tokenizer
    local read, rest = self.read_text, nil
    if read and prompt:sub(1, #read) == read then
        rest = tok:encode(prompt:sub(#read + 1), { special = false, parse = true })
    else
        self.session:reset()
        rest = tok:encode(prompt, { special = false, parse = true })
    end
    local ok, reply, ids, info = pcall(self.session.continue, self.session, rest, set, #self.session.ids + #rest)
    if not ok then -- interrupted half-way: what stands in the state is unknown, so the next turn reads all again
        self.messages[#self.messages] = nil
        self.read_text = nil
        error(reply, 0)
    end
    self.messages[#self.messages + 1] = { role = "assistant", content = reply }
    -- a reply cut by a stop string left more in the state than the conversation shows
    self.read_text = info.reason ~= "stop" and prompt .. reply or nil
    return reply, ids, info
end

M.Session, M.Chat = Session, Chat
return M
