-- trainers.lua: the losses by the names that the reference's configurations give them (trainer.name). A trainer has a
-- stage ("transfer": maps learn to copy softmax attention; "language": next tokens; "evaluation": generation), step,
-- which makes the gradients of one micro-batch and logs its values, and evaluate, which measures held-out rows.
local lc = require "lolcats"
local nn = require "lolcats.nn"
local attention = require "lolcats.attention"
local cli = require "lolcats.cli"

local M = {}

local function mean(rows, f)
    local sums, n = {}, 0
    for _, row in ipairs(rows) do
        n = n + 1
        for k, v in pairs(lc.scope(f, row)) do sums[k] = (sums[k] or 0) + v end
    end
    for k, v in pairs(sums) do sums[k] = v / n end
    return sums
end

-- ---- attention transfer ---------------------------------------------------------------------------------------------
-- name: the student's method; its options and results are those of student:transfer.
local function transfer(name)
    local function call(student, o, ids, more)
        if not student[name] then lc.fail("this program has no %s: the trainer cannot run", name) end
        local opts = { mse = o.mse_factor or 1000, xent = o.xent_factor or 0, chunk = o.chunk }
        for k, v in pairs(more) do opts[k] = v end
        return (student[name](student, ids, opts))
    end
    return {
        stage = "transfer",
        step = function(student, batch, run, o)
            local loss = call(student, o, batch.ids, { scale = 1 / run.accumulate })
            run:log { loss = loss * run.accumulate }
        end,
        evaluate = function(student, rows, o)
            return mean(rows, function(row) return { loss = call(student, o, row.ids, { backward = false }) } end)
        end,
    }
end

-- ---- next tokens ----------------------------------------------------------------------------------------------------
local function evaluate_language(student, rows, o)
    local total, count, loss, ppl, length = 0, 0, 0, 0, 0
    for _, row in ipairs(rows) do
        local sum, n = student:nll(row.ids, row.labels)
        total, count = total + sum, count + n
        loss, ppl = loss + sum / math.max(n, 1) / #rows, ppl + math.exp(sum / math.max(n, 1)) / #rows
        length = length + (row.ids:size(1) * (row.ids:size(2) - 1) + 1) / #rows
    end
    -- the reference takes the mean of chunks, whatever they hold, and of their perplexities; a token counts as a token
    -- here
    if not o.reference then loss, ppl = total / count, math.exp(total / count) end
    return { loss = loss, ppl = ppl, seq_len = length }
end

local function language(name)
    return {
        stage = "language",
        step = function(student, batch, run, o)
            if not name then return run:backward((student:loss(batch.ids, batch.labels))) end
            if not student[name] then lc.fail("this program has no %s: the trainer cannot run", name) end
            local loss = student[name](student, batch.ids, batch.labels,
                                       { scale = 1 / run.accumulate, chunk = o.chunk })
            run:log { loss = loss * run.accumulate }
        end,
        evaluate = evaluate_language,
    }
end

-- ---- adapters taught by attention -----------------------------------------------------------------------------------
local function adapters(student, on)
    for _, p in ipairs(student:projections()) do
        if p.lora then p.lora.on = on end
    end
end

-- Both attention weights and their cross entropy, quadratic in length.
local function weights_xent(a, q, k, q2, k2, v, call)
    local _, a_true = lc.no_grad(attention.quadratic_softmax, q, k, v, call.window)
    local fq, fk = attention.features(a, q2, k2, call)
    local _, a_pred = attention.quadratic(a, q2, k2, v, fq, fk)
    local log_p = a_pred:clamp({ min = 1e-12 }):log():log_softmax(-1)
    return (log_p * a_true):sum() * (-1 / (a_true:numel() / a_true:size(-1)))
end

-- One layer's loss: its linear attention with adapters against its softmax attention without them. projected: after
-- o_proj.
local function adapter_loss(student, layer, normed, ctx, y, q, k, o, factor)
    local c = student.config
    local call = { start = ctx.start, pos = ctx.pos, layer = layer.index, hidden = normed, window = layer.window,
                   seen = 0 }
    local q2, k2, v2 = student:qkv(layer, normed, ctx)
    local pred, target = attention.hybrid(layer.student, q2, k2, v2, call), y
    local function flat(x) return x:permute(1, 3, 2, 4):reshape(ctx.b, ctx.t, c.num_attention_heads * c.head_dim) end
    if o.projected then
        adapters(student, false)
        target = lc.no_grad(nn.project, flat(y), layer.proj.o_proj)
        adapters(student, true)
        pred = nn.project(flat(pred), layer.proj.o_proj)
    end
    local loss = lc.mse_loss(pred, target) * (o.mse * factor)
    if o.xent ~= 0 then loss = loss + weights_xent(layer.student, q, k, q2, k2, v2, call) * (o.xent * factor) end
    return loss
end

--- LoRA taught layer by layer: each layer gets the teacher's true hidden states and learns to give what its softmax
--- attention gives. o: mse, xent, projected (compare after the output projection), scale, backward. Returns the loss.
function M.adapter_transfer(student, ids, o)
    ids = student:check_ids(ids)
    local n, total = 0, 0
    for _, layer in ipairs(student.layers) do n = n + (layer.student and 1 or 0) end
    if n == 0 then lc.fail("every layer keeps its softmax attention; there is nothing to teach") end
    adapters(student, false)
    local ok, problem = pcall(lc.no_grad, lc.scope, function()
        local ctx = student:context(ids, {})
        local x = lc.embedding(student.embed, ids)
        if x.dtype ~= student.dtype then x = x:to(student.dtype) end
        for _, layer in ipairs(student.layers) do
            x = lc.scope(function()
                local normed = student:norm_in(layer, x)
                local q, k, v = student:qkv(layer, normed, ctx)
                local y = attention.softmax(q, k, v,
                                            { start = ctx.start, pos = ctx.pos, layer = layer.index, hidden = normed,
                                                       window = layer.window, seen = 0 })
                if layer.student then
                    adapters(student, true)
                    local function run()
                        local loss = adapter_loss(student, layer, normed, ctx, y, q, k, o, (o.scale or 1) / n)
                        if o.backward ~= false and loss.requires_grad then loss:backward() end
                        total = total + loss:item()
                    end
                    if o.backward == false then run() else lc.enable_grad(run) end
                    adapters(student, false)
                end
                return student:finish(layer, x, y, ctx)
            end)
        end
    end)
    adapters(student, true)
    if not ok then error(problem, 0) end
    return total
end

local function adapter_trainer(projected)
    local function options(o, more)
        more.mse, more.xent, more.projected = o.mse_factor or 1000, o.xent_factor or 0, projected
        return more
    end
    return {
        stage = "language", layerwise = true,
        step = function(student, batch, run, o)
            local loss = M.adapter_transfer(student, batch.ids, options(o, { scale = 1 / run.accumulate }))
            run:log { loss = loss * run.accumulate }
        end,
        evaluate = function(student, rows, o)
            return mean(rows, function(row) return { loss = M.adapter_transfer(student, row.ids,
                    options(o, { backward = false })) } end)
        end,
    }
end

-- ---- generation -----------------------------------------------------------------------------------------------------
--- Answers to the first prompts of a test set (11, as the reference takes) against theirs: {metrics, predictions}. o:
--- limit, max_new (1024), and those of generate; greedy without.
function M.score_answers(model, test, o)
    o = o or {}
    local predictions, references = {}, {}
    for i = 1, math.min(o.limit or 11, #test) do
        predictions[i] = model:generate(test[i].prompt,
                                        { max_new = o.max_new or 1024, temperature = o.temperature or 0,
                                          top_p = o.top_p,
                                                          seed = o.seed })
        references[i] = test[i].answer
    end
    return require("lolcats.rouge").summary(predictions, references), predictions
end

local TRAINERS = {
    distill_attention_xent_mse = transfer "transfer",
    distill_attention_mse_linear = transfer "transfer", -- with mse alone, which its configurations ask for
    layer_distill_xent_mse = transfer "transfer", -- every layer's loss is its own here anyway
    distill_attention_xent_mse_chunked = transfer "transfer_long",
    default_lm = language(),
    default_lm_chunked = language "loss_long",
    layer_finetune_xent_mse = adapter_trainer(true),
    mini_finetune_xent_mse = adapter_trainer(false),
    mini_finetune_xent_mse_mem_save = adapter_trainer(false),
    finetune_seq2seq = { stage = "evaluation" },
}

--- Names of all trainers, sorted.
function M.names()
    local out = {}
    for k in pairs(TRAINERS) do out[#out + 1] = k end
    table.sort(out)
    return out
end

function M.find(name)
    local t = TRAINERS[name]
    if not t then
        local near = cli.suggest(tostring(name), M.names())
        lc.fail("there is no trainer '%s'%s; there are %s", tostring(name),
                near and (" (did you mean %s?)"):format(near) or "",
                table.concat(M.names(), ", "))
    end
    return t
end

return M
