-- decode_cpu.lua: tokens/s of decoding one row, the weights' GB/s that this means, its share of the read rate measured in the same
-- run, and whether a late token costs what an early one does.
--   lolcats tests/bench/decode_cpu.lua [--model M] [--tokens 128] [--json]
local lc = require "lolcats"
local log = require "lolcats.log"

local args = lc.args {
    "Time greedy decoding of one row.",
    { "model", "smollm2", "folder, file, Hub id in the cache, or smollm2" },
    { "prompt", 128, "tokens of the prompt", min = 1 },
    { "tokens", 128, "tokens to decode", min = 8 },
    { "runs", 3, "repetitions; the median counts", min = 1 },
    { "positions", { 400, 4000 }, "token positions whose cost is compared (student); empty: none" },
    { "dtype", "f32", "dtype of the weights" },
    { "threads", 0, "threads; 0: as the program chooses" },
    { "json", false, "one JSON object on stdout" },
}
if args.threads > 0 then lc.threads(args.threads) end

local model = lc.load(args.model, { dtype = args.dtype }):freeze()
local student = lc.linearize(model, {})
local vocab = model.config.vocab_size
lc.manual_seed(1)

local function random_ids(n)
    local ids = lc.rand(n):totable()
    for i = 1, n do ids[i] = math.floor(ids[i] * vocab) % vocab end
    return ids
end
local function median(list)
    table.sort(list)
    return list[math.floor((#list + 1) / 2)]
end

-- Bytes of weights that a token must read: all matrices, the embedding only when it is the head too.
local function weight_bytes()
    local seen, bytes = {}, 0
    for _, p in ipairs(model:params()) do
        if p.name ~= "model.embed_tokens.weight" or model.head:storage_id() == p.tensor:storage_id() then
            local key = p.tensor:storage_id() .. ":" .. p.name
            if not seen[key] then
                seen[key] = true
                bytes = bytes + p.tensor:nbytes()
            end
        end
    end
    return bytes
end

-- The rate at which all threads together read memory: the best of sums and of one-row products over 256 MiB.
local function read_rate()
    return lc.no_grad(lc.scope, function()
        local n, best = 2 ^ 26, math.huge
        local x = lc.empty(n):fill_(1)
        local w, one = x:reshape(2 ^ 14, 2 ^ 12), lc.ones(1, 2 ^ 12)
        for i = 1, 8 do
            local t0 = lc.now()
            local y = i % 2 == 0 and x:sum() or lc.linear(one, w)
            best = math.min(best, lc.now() - t0)
            y:drop()
        end
        return 4 * n / best
    end)
end

-- Greedy tokens without the sampler's text side: seconds for each step after the prompt.
local function decode(m, prompt, n)
    local session = m:session()
    local _, ids, info = session:generate(prompt, { max_new = n, temperature = 0, on_token = function() end })
    m:drop_state(session.state)
    return #ids > 1 and (#ids - 1) / info.seconds or nil, #prompt / info.prompt_seconds
end

-- A stop token would end a run early; random text decoded greedily may hit one.
model.special, student.special = { stop = {} }, { stop = {} }
model.tokenizer, student.tokenizer = nil, nil

local function time(m)
    local rates, prefill = {}, {}
    for i = 0, args.runs do
        local r, p = decode(m, random_ids(args.prompt), args.tokens)
        if i > 0 then rates[#rates + 1], prefill[#prefill + 1] = r, p end
    end
    return median(rates), median(prefill)
end

-- Seconds a token at given positions, in turns so that a slow moment of the machine meets both.
local function at_positions(m, positions)
    local sessions, seconds = {}, {}
    for i, n in ipairs(positions) do
        local s = m:session()
        s:feed(random_ids(n), function(logits) return logits:argmax(-1):item() end)
        sessions[i], seconds[i] = s, {}
    end
    for _ = 1, 24 do
        for i, s in ipairs(sessions) do
            local t0 = lc.now()
            s:feed({ 5 }, function(logits) return logits:argmax(-1):item() end)
            table.insert(seconds[i], lc.now() - t0)
        end
    end
    local out = {}
    for i, s in ipairs(sessions) do
        out[i] = { position = positions[i], ms = median(seconds[i]) * 1e3 }
        m:drop_state(s.state)
    end
    return out
end

local rate = read_rate()
local result = { model = args.model, dtype = args.dtype, threads = lc.threads(), isa = lc.cpu_isa(), prompt = args.prompt, tokens = args.tokens,
                 weight_mb = weight_bytes() / 1e6, read_gb_s = rate / 1e9 }
for _, which in ipairs { { "softmax", model }, { "linear", student } } do
    local tok_s, prefill = time(which[2])
    local gb = tok_s * weight_bytes() / 1e9
    result[which[1]] = { tok_s = tok_s, prefill_tok_s = prefill, gb_s = gb, read_share = gb / (rate / 1e9) }
end
if #args.positions > 0 then result.positions = at_positions(student, args.positions) end
result.peak_rss_mb = lc.peak_rss() / 2 ^ 20

if args.json then
    print(lc.files.to_json(result))
else
    print(("%s, %s, %d threads, %s; weights %.0f MB, read at %.1f GB/s"):format(args.model, args.dtype, result.threads, result.isa,
        result.weight_mb, result.read_gb_s))
    local rows = {}
    for _, name in ipairs { "softmax", "linear" } do
        local r = result[name]
        rows[#rows + 1] = { name, ("%.1f"):format(r.tok_s), ("%.1f"):format(r.gb_s), ("%.0f %%"):format(100 * r.read_share), ("%.0f"):format(r.prefill_tok_s) }
    end
    print(log.table(rows, { "attention", "tokens/s", "GB/s", "of the read rate", "prompt tokens/s" }))
    for _, p in ipairs(result.positions or {}) do print(("token %d: %.3f ms"):format(p.position, p.ms)) end
end
