-- eval.lua: perplexity of a text, and multiple-choice tasks (PIQA, ARC easy and challenge, WinoGrande) by the rules of
-- lm-evaluation-harness: how a context and its continuation are cut into tokens, scored, and counted.
local lc = require "lolcats"
local files = require "lolcats.files"

local M = {}

-- ---- perplexity -----------------------------------------------------------------------------------------------------
--- Perplexity of a list of token ids. opts: seq (window, 1024), stride (seq: windows side by side; less: each window
--- counts only its new tokens, with the rest as context), limit (windows), bos (an id put before each window),
--- forward (options of model:forward), progress(done, all). Returns {ppl =, loss =, tokens =, windows =,
--- ppl_window_mean =, losses =}: ppl is exp of the mean over all counted tokens.
function M.perplexity(model, ids, opts)
    opts = opts or {}
    local seq = opts.seq or 1024
    local stride = opts.stride or seq
    if stride < 1 or stride > seq then
        lc.fail("stride must lie between 1 and seq (%d), got %s", seq, tostring(stride))
    end
    if #ids < 2 then lc.fail("the text has %d tokens; perplexity needs at least 2", #ids) end
    local total, count, each, windows = 0, 0, {}, {}
    local last = 0 -- tokens counted so far end here
    for first = 1, #ids, stride do
        local stop = math.min(first + seq - 1, #ids)
        local row, labels = {}, {}
        if opts.bos then row[1], labels[1] = opts.bos, -100 end
        for i = first, stop do
            row[#row + 1] = ids[i]
            labels[#labels + 1] = i > last and ids[i] or -100
        end
        if #row >= 2 and stop > last then windows[#windows + 1] = { row, labels } end
        last = stop
        if stop == #ids then break end
    end
    local n = math.min(#windows, opts.limit or math.huge)
    for w = 1, n do
        local sum, tokens = model:nll(windows[w][1], windows[w][2], opts.forward)
        total, count = total + sum, count + tokens
        each[#each + 1] = sum / tokens
        if opts.progress then opts.progress(w, n) end
    end
    local mean = 0
    for _, v in ipairs(each) do mean = mean + math.exp(v) / #each end
    return { ppl = math.exp(total / count), loss = total / count, tokens = count, windows = n, ppl_window_mean = mean,
             losses = each }
end

--- Perplexity over packed rows {ids, labels}: token-weighted over what has a label, and the mean over rows.
function M.perplexity_rows(model, rows, opts)
    local total, count, mean = 0, 0, 0
    for _, r in ipairs(rows) do
        local sum, n = model:nll(r[1] or r.ids, r[2] or r.labels, opts and opts.forward)
        total, count = total + sum, count + n
        mean = mean + math.exp(sum / n) / #rows
    end
    return { ppl = math.exp(total / count), ppl_chunk_mean = mean, tokens = count, loss = total / count }
end

-- ---- scoring a continuation -----------------------------------------------------------------------------------------
local function encode(model, s, bos)
    local ids = model.tokenizer:encode(s, { special = bos or false, parse = true })
    local id = model.config.bos_token_id
    if bos and id and ids[1] ~= id then table.insert(ids, 1, id) end
    return ids
end

--- Token ids of a context and its continuation: cut apart after encoding them together; spaces at the context's end
--- go over.
function M.encode_pair(model, context, continuation, bos)
    local tail = context:match "%s+$"
    if tail then
        context, continuation = context:sub(1, #context - #tail), tail .. continuation
    end
    if context == "" then
        local ids = encode(model, continuation, false)
        local prefix = model.config.bos_token_id or model.config.eos_token_id
        if type(prefix) == "table" then prefix = prefix[1] end
        if ids[1] == prefix then
            return { table.remove(ids, 1) }, ids
        end
        return { prefix }, ids
    end
    local whole, head = encode(model, context .. continuation, bos), encode(model, context, bos)
    local rest = {}
    for i = #head + 1, #whole do rest[#rest + 1] = whole[i] end
    return head, rest
end

--- Log-likelihoods of several requests {context ids, continuation ids} in one forward. Rows are filled up on the
--- right, which a causal model does not see. Returns a list of {ll =, greedy =, cut =}.
function M.loglikelihoods(model, requests, opts)
    opts = opts or {}
    local limit = opts.max_length or model.config.max_position_embeddings
    local rows, longest = {}, 0
    local out = {}
    for r, req in ipairs(requests) do
        local all = {}
        for _, id in ipairs(req[1]) do all[#all + 1] = id end
        for _, id in ipairs(req[2]) do all[#all + 1] = id end
        local cut = #all > limit + 1
        while #all > limit + 1 do table.remove(all, 1) end
        if #req[2] == 0 then lc.fail("a continuation without tokens cannot be scored") end
        out[r] = { ll = 0, greedy = true, cut = cut }
        local n = #all - 1
        rows[r] = { ids = all, n = n }
        longest = math.max(longest, n)
    end
    lc.no_grad(lc.scope, function()
        local batch, at, wanted, owner = {}, {}, {}, {}
        for r, row in ipairs(rows) do
            local ids, count = {}, math.min(#requests[r][2], row.n)
            for i = 1, longest do ids[i] = row.ids[math.min(i, row.n)] end
            batch[r] = ids
            for i = row.n - count + 1, row.n do
                at[#at + 1], wanted[#wanted + 1], owner[#owner + 1] = (r - 1) * longest + i - 1, row.ids[i + 1], r
            end
        end
        local x = model:forward(batch, opts.forward)
        local _, each, best = model:loss_at(x, at, wanted)
        local losses, top = each:totable(), best:totable()
        for i, r in ipairs(owner) do
            out[r].ll = out[r].ll - losses[i]
            out[r].greedy = out[r].greedy and top[i] == wanted[i]
        end
    end)
    return out
end

-- ---- tasks ----------------------------------------------------------------------------------------------------------
local function question(text) return "Question: " .. text .. "\nAnswer:" end

-- Each gives the requests of an item as {context, continuation} texts, the choices whose length norms, and the right
-- one from 1.
local TASKS = {}

TASKS.piqa = { file = "piqa.validation.jsonl", norm = true, item = function(d)
    local context = question(d.goal)
    return { { context, " " .. d.sol1 }, { context, " " .. d.sol2 } }, { d.sol1, d.sol2 }, d.label + 1
end }

local function arc(d)
    local out = {}
    for i, choice in ipairs(d.choices) do out[i] = { question(d.question), " " .. choice } end
    return out, d.choices, d.gold + 1
end
TASKS.arc_easy = { file = "arc_easy.validation.jsonl", norm = true, item = arc }
TASKS.arc_challenge = { file = "arc_challenge.validation.jsonl", norm = true, item = arc }

TASKS.winogrande = { file = "winogrande_xl.validation.jsonl", item = function(d)
    local at = d.sentence:find("_", 1, true)
    local ending = " " .. d.sentence:sub(at + 1):match "^%s*(.-)%s*$"
    local before = d.sentence:sub(1, at - 1)
    local requests = { { before .. d.option1, ending }, { before .. d.option2, ending } }
    return requests, { d.option1, d.option2 }, tonumber(d.answer)
end }

M.TASKS = TASKS
M.TASK_NAMES = { "piqa", "arc_easy", "arc_challenge", "winogrande" }

--- Items of a task from its file in `folder`, in file order.
function M.read_task(name, folder, limit)
    local task = TASKS[name]
    if not task then
        lc.fail("there is no task '%s'; there are %s", tostring(name), table.concat(M.TASK_NAMES, ", "))
    end
    local path = folder .. "/" .. task.file
    if not files.exists(path) then lc.fail("task %s needs the file %s", name, path) end
    local docs, line_no = {}, 0
    for line in files.read(path):gmatch "[^\n]+" do
        line_no = line_no + 1
        docs[#docs + 1] = files.parse_json(line, path .. ":" .. line_no)
        if limit and #docs >= limit then break end
    end
    return docs
end

local function characters(s)
    local _, n = s:gsub("[^\128-\191]", "")
    return n
end

local function best_of(values)
    local best = 1
    for i = 2, #values do
        if values[i] > values[best] then best = i end
    end
    return best
end

--- One item: {requests = {{ll, greedy, n_context, n_continuation, ...}}, acc =, acc_norm =}.
function M.score_item(model, name, doc, opts)
    opts = opts or {}
    local task = TASKS[name]
    local texts, choices, right = task.item(doc)
    local pairs_ = {}
    for i, t in ipairs(texts) do pairs_[i] = { M.encode_pair(model, t[1], t[2], opts.bos) } end
    local scored = M.loglikelihoods(model, pairs_, opts)
    local item, plain, normed = { requests = {} }, {}, {}
    for i, s in ipairs(scored) do
        item.requests[i] = {
            ll = s.ll, greedy = s.greedy, cut = s.cut, n_context = #pairs_[i][1], n_continuation = #pairs_[i][2],
            context = texts[i][1], continuation = texts[i][2], context_ids = pairs_[i][1],
            continuation_ids = pairs_[i][2],
        }
        plain[i] = s.ll
        normed[i] = s.ll / characters(choices[i])
    end
    item.acc = best_of(plain) == right and 1 or 0
    if task.norm then item.acc_norm = best_of(normed) == right and 1 or 0 end
    return item
end

--- Accuracy of a model on a task. opts: folder, limit, bos (a BOS token before every context), max_length, forward,
--- progress.
function M.task(model, name, opts)
    opts = opts or {}
    local docs = M.read_task(name, opts.folder, opts.limit)
    local acc, norm, items = 0, 0, {}
    for i, doc in ipairs(docs) do
        local item = M.score_item(model, name, doc, opts)
        acc, norm = acc + item.acc, norm + (item.acc_norm or 0)
        if opts.keep_items then items[i] = item end
        if opts.progress then opts.progress(i, #docs) end
    end
    local n = #docs
    local a = acc / n
    return { task = name, items = n, acc = a, acc_norm = TASKS[name].norm and norm / n or nil,
             acc_stderr = n > 1 and math.sqrt(a * (1 - a) / (n - 1)) or nil,
             details = opts.keep_items and items or nil }
end

return M
