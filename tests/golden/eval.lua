-- eval.lua: multiple-choice items as lm-evaluation-harness scores them: token counts, log-likelihoods, greedy flags,
-- accuracies.
local lc = require "lolcats"
local files = require "lolcats.files"
local eval = require "lolcats.eval"

local models = {}
local function model_for(T, json)
    local name = json.model
    if not models[name] then
        local path = name:match "GGUF" or name:match "gguf" and "smollm2"
        if path then path = require("lolcats.hub").smollm2() else path = T.data(name) end
        models[name] = path and lc.load(path) or false
    end
    return models[name]
end

local function same_ids(c, label, got, want)
    if want then c.check(label, table.concat(got, " ") == table.concat(want, " "), table.concat(got, " ")) end
end

-- Two scores this close may change places. lengths: what the score is divided by.
local function tight(requests, lengths)
    local values = {}
    for i, r in ipairs(requests) do values[i] = { r.ll / lengths[i], (2e-3 + 1e-5 * math.abs(r.ll)) / lengths[i] } end
    table.sort(values, function(a, b) return a[1] > b[1] end)
    return values[1][1] - values[2][1] < values[1][2] + values[2][2]
end

local function item_case(c, model, json, doc, want, opts)
    local got = eval.score_item(model, json.task, doc, opts)
    for i, w in ipairs(want.requests) do
        local g = got.requests[i]
        local label = ("item %d request %d "):format(want.doc, i)
        c.check(label .. "context tokens", g.n_context == w.n_context, g.n_context .. ", expected " .. w.n_context)
        c.check(label .. "continuation tokens", g.n_continuation == w.n_continuation, g.n_continuation .. ", expected " .. w.n_continuation)
        c.near(label .. "log-likelihood", g.ll, w.ll, 2e-3 + 1e-5 * math.abs(w.ll))
        c.check(label .. "greedy", g.greedy == w.greedy)
        if w.context then c.check(label .. "context", g.context == w.context, g.context) end
        if w.continuation then c.check(label .. "continuation", g.continuation == w.continuation, g.continuation) end
        same_ids(c, label .. "context ids", g.context_ids, w.context_ids)
        same_ids(c, label .. "continuation ids", g.continuation_ids, w.continuation_ids)
    end
    local lengths = { acc = {}, acc_norm = {} }
    for i, r in ipairs(got.requests) do lengths.acc[i], lengths.acc_norm[i] = 1, #r.continuation - 1 end
    for _, key in ipairs { "acc", "acc_norm" } do
        if want[key] ~= nil and not tight(got.requests, lengths[key]) then
            c.check(("item %d %s"):format(want.doc, key), got[key] == want[key])
        end
    end
    return got
end

return function(dir, T)
    for _, file in ipairs(files.list(dir)) do
        if file:match "%.json$" and file ~= "index.json" then
            T.case("eval/" .. file, function(c)
                local json = files.read_json(dir .. "/" .. file)
                local data = T.data(json.data:match "^([^,]+),")
                if not data then c.skip("its data file is not here") end
                local model = model_for(T, json)
                if not model then c.skip("its model is not here") end
                local opts = { bos = json.how:match "add_bos_token" ~= nil, max_length = tonumber(json.how:match "max_length (%d+)") }
                local lines = {}
                for line in files.read(data):gmatch "[^\n]+" do lines[#lines + 1] = line end
                local sums = { acc = 0, acc_norm = 0 }
                for _, want in ipairs(json.items) do
                    local doc = files.parse_json(lines[want.doc + 1], data)
                    local got = item_case(c, model, json, doc, want, opts)
                    for k in pairs(sums) do sums[k] = sums[k] + (got[k] or 0) / #json.items end
                end
                for k, v in pairs(json.result) do c.near(k, sums[k], v, 1.5 / #json.items) end
            end)
        end
    end
    models = {}
end
