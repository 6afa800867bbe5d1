-- quality.lua: the reference recipe on the real 135M model, whole: packed Alpaca records in the given order, transfer
-- steps, then LoRA steps from the given start, with perplexity on held-out rows at each mark. Every perplexity within
-- 0.5 %.
local lc = require "lolcats"
local files = require "lolcats.files"
local nn = require "lolcats.nn"
local eval = require "lolcats.eval"

local HEAD = "Below is an instruction that describes a task"
local WITH = HEAD .. ", paired with an input that provides further context. Write a response that appropriately completes " ..
             "the request.\n\n### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:\n"
local WITHOUT = HEAD .. ". Write a response that appropriately completes the request.\n\n### Instruction:\n%s\n\n### Response:\n"

-- Rows of `length` ids and labels; a row goes out when the buffer holds strictly more. Labels cover the answers.
local function pack(records, first, last, tok, eos, length)
    local ids, labels, out = {}, {}, {}
    local at = 0 -- start of what is not yet packed
    for r = first, last do
        local rec = records[r]
        local prompt = rec.input ~= "" and rec.input and WITH:format(rec.instruction, rec.input) or WITHOUT:format(rec.instruction)
        local how = { special = false, parse = true }
        for _, id in ipairs(tok:encode(prompt, how)) do ids[#ids + 1] = id; labels[#labels + 1] = -100 end
        for _, id in ipairs(tok:encode(rec.output .. eos, how)) do ids[#ids + 1] = id; labels[#labels + 1] = id end
        while #ids - at > length do
            local row, lab, any = {}, {}, false
            for i = 1, length do
                row[i], lab[i] = ids[at + i], labels[at + i]
                any = any or lab[i] ~= -100
            end
            at = at + length
            if any then out[#out + 1] = { row, lab } end
        end
        if at > 100000 then
            local rest, rest_labels = {}, {}
            for i = at + 1, #ids do rest[#rest + 1] = ids[i]; rest_labels[#rest_labels + 1] = labels[i] end
            ids, labels, at = rest, rest_labels, 0
        end
    end
    return out
end

local function adamw(flat, lr)
    flat.step = flat.step + 1
    lc.adamw_(flat.data, flat.grad, flat.m, flat.v, lr, flat.step, { weight_decay = 0 })
    flat:zero_grad()
end

local function say(...) io.stderr:write((...):format(select(2, ...)), "\n") end

return function(dir, T)
    local json = files.read_json(dir .. "/index.json")
    local data = T.data "shared/assets/datasets/alpaca-cleaned/alpaca_data_cleaned.first5000.json"
    if not data then return T.skip("quality", "the Alpaca records are not here") end
    local teacher = lc.load "smollm2"
    local records = files.read_json(data)
    local length = 512
    local tok = teacher.tokenizer
    local held = pack(records, 1, 200, tok, json.eos_text, length)
    local train = pack(records, 201, #records, tok, json.eos_text, length)
    T.case("quality/data", function(c)
        c.check("training rows", #train == json.train_chunks, #train .. ", expected " .. json.train_chunks)
        c.check("held-out rows", #held == json.held_chunks, #held .. ", expected " .. json.held_chunks)
    end)
    local held_rows = {}
    for i = 1, 16 do held_rows[i] = held[i] end
    local student = lc.linearize(teacher, { map = "hedgehog", window = 64, kind = "terrace" })

    local function measure(kind)
        if kind == "window_only" then return student:window_only(eval.perplexity_rows, student, held_rows) end
        return eval.perplexity_rows(student, held_rows, { forward = { teacher = kind == "teacher" } })
    end
    local function point(stage, step, kind)
        for _, p in ipairs(json.points) do
            if p.stage == stage and p.step == step and p.attention == kind and (p.branch == "-" or p.branch == "with_at") then
                T.case(("quality/%s %d %s"):format(stage, step, kind), function(c)
                    local got = measure(kind)
                    say("%s %d %s: ppl %.4f (expected %.4f), over rows %.4f (%.4f)", stage, step, kind, got.ppl, p.ppl,
                        got.ppl_chunk_mean, p.ppl_chunk_mean)
                    c.near("ppl", got.ppl, p.ppl, 5e-3 * p.ppl)
                    c.near("ppl over rows", got.ppl_chunk_mean, p.ppl_chunk_mean, 5e-3 * p.ppl_chunk_mean)
                    c.check("tokens", got.tokens == p.tokens, got.tokens .. ", expected " .. p.tokens)
                end)
            end
        end
    end
    -- Curves from one start stay together for long; later the rounding of 400 updates shows in single rows.
    local function trajectory(name, got, want, together)
        T.case("quality/" .. name, function(c)
            local worst, at = 0, 0
            for i = 1, #got do
                c.near("step " .. i, got[i], want[i], (i <= together and 5e-3 or 0.03) * want[i])
                local d = math.abs(got[i] - want[i]) / want[i]
                if d > worst then worst, at = d, i end
            end
            say("%s: at most %.2g from the recorded ones, at step %d", name, worst, at)
        end)
    end
    local function all_points(stage, step)
        for _, kind in ipairs { "teacher", "hybrid", "window_only" } do point(stage, step, kind) end
    end

    all_points("start", 0)
    local flat, losses = nn.flatten(student:trainable()), {}
    local t0 = lc.now()
    for step = 1, #json.transfer_train_loss do
        losses[step] = student:transfer({ train[json.order[step] + 1][1] })
        adamw(flat, 1e-2)
        if step % 10 == 0 then say("transfer %d: %.3f (%.3f), %.2f s a step", step, losses[step], json.transfer_train_loss[step],
                                   (lc.now() - t0) / step) end
        all_points("at", step)
    end
    trajectory("transfer losses", losses, json.transfer_train_loss, 50)

    student:use_linear():add_lora { rank = 8, alpha = 16 }
    local start = T.tensors(dir .. "/lora_start.safetensors")
    lc.no_grad(function()
        for _, p in ipairs(student:trainable()) do
            if start[p.name] then p.tensor:detach():copy_(start[p.name]) end
        end
    end)
    start = nil
    flat, losses = nn.flatten(student:trainable()), {}
    t0 = lc.now()
    for step = 1, #json.lora_train_loss do
        local row = train[json.order[step] + 1]
        losses[step] = lc.scope(function()
            local loss = student:loss({ row[1] }, { row[2] })
            loss:backward()
            return loss:item()
        end)
        adamw(flat, 1e-4)
        if step % 10 == 0 then say("lora %d: %.4f (%.4f), %.2f s a step", step, losses[step], json.lora_train_loss[step],
                                   (lc.now() - t0) / step) end
        all_points("lora", step)
    end
    trajectory("lora losses", losses, json.lora_train_loss, 0)
end
