-- report.lua: what a linearizing recipe measures and shows: at each stage the perplexity on held-out rows, with and
-- without the linear part, and a sample of text; in the end the table of stages, the samples, and summary.json. Each
-- value is measured once: it goes to OUT/results.json at once, where a resumed run finds it.
local lc = require "lolcats"
local files = require "lolcats.files"
local eval = require "lolcats.eval"
local log = require "lolcats.log"

local M = {}

local Report = {}
Report.__index = Report

-- Under which names a stage's values stand in results.json: perplexity, that of the window alone, sample.
local KEYS = { lora = { "lora_ppl", "window_only_ppl", "lora_sample" } }
local function keys_of(stage)
    local k = KEYS[stage] or { stage .. "_ppl", stage .. "_window_ppl", stage .. "_sample" }
    return k[1], k[2], k[3]
end

-- What samples continue: enough of a held-out row that keys have left the window, for within it a student is still its
-- teacher. Where the row is a chat, it ends where an answer begins.
local function context_of(row, args)
    local ids, labels = row.ids:totable()[1], row.labels:totable()[1]
    local cut = math.min(args.seq - 1, math.max(4 * args.window, 64))
    for i = cut, 2, -1 do
        if i > cut / 2 and labels[i] ~= -100 and labels[i - 1] == -100 then
            cut = i - 1
            break
        end
    end
    return { unpack(ids, 1, cut) }
end

--- A report. o: args (out, seq, window, eval_rows, sample, prompt, seed, model, data, map, device), teacher, student,
--- data, long (held-out rows of another length that the result is measured on too). .held are the rows that
--- perplexities are measured on, .watched the few to look at while training.
function M.new(o)
    local args = o.args
    if not o.data.held then lc.fail("hold_out is 0: there is nothing to measure perplexity on") end
    local self = setmetatable({ args = args, teacher = o.teacher, student = o.student, stages = {},
                                results = lc.train.results(args.out), held = o.data.held:list(args.eval_rows),
                                watched = o.data.held:list(math.min(4, args.eval_rows)), long = o.long }, Report)
    self.context = context_of(self.held[1], args)
    return self
end

--- A value by its name: measured by f, or what an earlier run measured.
function Report:once(name, f) return self.results:once(name, f) end

function Report:sample(model)
    local args = self.args
    local how = { max_new = args.sample, temperature = 0.7, top_p = 0.9, repetition = 1.1, seed = args.seed }
    if args.prompt == "" then return (model:generate(self.context, how)) end
    if model.chat_template then return (lc.chat(model, how):say(args.prompt)) end
    return (model:generate(args.prompt, how))
end

--- Measures a stage: "teacher", or "swapped", "transfer", "lora" on the student as it is. run: the stage's lc.run.
function Report:measure(stage, run)
    local whole, window, text = keys_of(stage)
    local model = stage == "teacher" and self.teacher or self.student
    if run then self.stages[stage] = self:once(stage, function() return run:summary() end) end
    self:once(whole, function()
        log.say("measuring the perplexity: %s", stage)
        return eval.perplexity_rows(model, self.held).ppl
    end)
    if self.student.settings.window > 0 and stage ~= "teacher" then
        self:once(window, function()
            log.say("measuring the perplexity: %s, window only", stage)
            return model:window_only(eval.perplexity_rows, model, self.held).ppl
        end)
    end
    if self.long and stage == "lora" then
        self:once("long_ppl", function() return eval.perplexity_rows(model, self.long).ppl end)
        if self.student.settings.window > 0 then
            self:once("long_window_only_ppl", function()
                return model:window_only(eval.perplexity_rows, model, self.long).ppl
            end)
        end
    end
    if self.args.sample > 0 and model.tokenizer then self:once(text, function() return self:sample(model) end) end
end

local TITLES = { teacher = "teacher (softmax)", swapped = "swapped, untrained", transfer = "attention transfer",
                 lora = "LoRA" }

local function number(v, form) return v and (form or "%.2f"):format(v) or "-" end

--- Prints the table of stages and the samples.
function Report:print()
    local r, rows, args = self.results.values, {}, self.args
    for _, stage in ipairs { "teacher", "swapped", "transfer", "lora" } do
        local whole, window = keys_of(stage)
        local s = self.stages[stage] or {}
        rows[#rows + 1] = { r[whole] and TITLES[stage] or "no " .. TITLES[stage], number(r[whole]), number(r[window]),
                            number(s.tok_s, "%.0f"), number(s.peak_device_mb or s.peak_rss_mb, "%.0f MB") }
    end
    print(log.table(rows, { "", "perplexity", "window only", "tokens/s", "peak memory" }))
    print(("\nPerplexity on %d held-out rows of %d tokens of %s. Window only: the linear part switched off.")
        :format(#self.held, args.seq, args.data))
    if r.long_ppl then
        print(("On %d held-out rows of %d tokens: %s, window only %s.")
            :format(#self.long, args.long_seq, number(r.long_ppl), number(r.long_window_only_ppl)))
    end
    if args.sample == 0 or not self.teacher.tokenizer then return end
    local prompt = args.prompt
    if prompt == "" then
        local c = self.context
        prompt = "..." .. self.teacher.tokenizer:decode({ unpack(c, math.max(1, #c - 39)) }, { skip_special = true })
    end
    print(("\n> %s"):format((prompt:gsub("%s+", " "))))
    for _, stage in ipairs { "teacher", "swapped", "transfer", "lora" } do
        local _, _, text = keys_of(stage)
        if r[text] then
            print(("  %-9s %s"):format(stage == "lora" and "LoRA" or stage, (r[text]:gsub("[%s%c]+", " "))))
        end
    end
end

--- Writes OUT/summary.json and returns its values.
function Report:write()
    local r, args = self.results.values, self.args
    local transfer, lora = self.stages.transfer or {}, self.stages.lora or {}
    local summary = {
        model = args.model, data = args.data, map = args.map, window = args.window, seq = args.seq,
        device = args.device, held_out_rows = #self.held, teacher_ppl = r.teacher_ppl, swapped_ppl = r.swapped_ppl,
        transfer_ppl = r.transfer_ppl, lora_ppl = r.lora_ppl, window_only_ppl = r.window_only_ppl,
        swapped_window_ppl = r.swapped_window_ppl, transfer_window_ppl = r.transfer_window_ppl,
        long_ppl = r.long_ppl, long_window_only_ppl = r.long_window_only_ppl,
        transfer_tok_s = transfer.tok_s, lora_tok_s = lora.tok_s, transfer_steps = transfer.updates,
        lora_steps = lora.updates, transfer_seconds = transfer.seconds, lora_seconds = lora.seconds,
        peak_rss_mb = math.max(transfer.peak_rss_mb or 0, lora.peak_rss_mb or 0),
        transfer_peak_rss_mb = transfer.peak_rss_mb, transfer_peak_device_mb = transfer.peak_device_mb,
        lora_peak_device_mb = lora.peak_device_mb,
        samples = { teacher = r.teacher_sample, swapped = r.swapped_sample, transfer = r.transfer_sample,
                    lora = r.lora_sample },
    }
    files.write_json(args.out .. "/summary.json", summary)
    return summary
end

return M
