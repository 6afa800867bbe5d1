-- ablate.lua: a sweep over any arguments of a recipe, or one of the paper's tables, at any model size; a table and a
-- plot at the end. What stands after -- goes to every run. Several seeds give means and deviations; a killed sweep goes
-- on where it was.
--   lolcats ablate --table 13 --seeds 0,1,2 -- --model smollm2 --data chitchat --seq 512
--   lolcats ablate --sweep window=16,64 --sweep rank=4,8,16 -- --model DIR --data FILE.json
--   lolcats ablate --table 16 --tiny
--   lolcats ablate --table beyond -- --data alpaca.json --seq 512 --long_seq 2048     what each improvement brings
local lc = require "lolcats"
local files, plot, sweep, log = lc.files, lc.plot, require "lolcats.sweep", require "lolcats.log"

local args = lc.args {
    "Run a recipe many times with different arguments and compare: a sweep, or a table of the paper.",
    { "table", "none", "a table of the paper; beyond: what goes beyond it, one by one",
      { "none", "1", "3", "6", "11", "12", "13", "16", "beyond" } },
    { "sweep", {}, "NAME=VALUE,VALUE,..; several make a grid" },
    { "recipe", "distill", "what is run" },
    { "steps", 200, "updates a stage, from which a table's lengths follow", min = 1 },
    { "seeds", { 0 }, "seeds of the runs" },
    { "metric", "lora_ppl", "value that the plot shows" },
    { "out", "runs/ablate", "folder; every run has one below it" },
    { "tiny", false, "on a small random model with few updates: to see it run" },
    { "fresh", false, "start over instead of going on" },
    { "rest", {}, "arguments of every run, after --", positional = true },
}

local N = args.tiny and math.min(args.steps, 3) or args.steps
local function cell(label, given, x, series) return { label = label, args = given, x = x, series = series } end
local function both(t) -- N updates a stage
    t.transfer_steps, t.lora_steps = t.transfer_steps or N, t.lora_steps or N
    return t
end
local function untaught(t) -- no first stage: the second trains everything, twice as long
    t.transfer, t.train_maps, t.lora_steps = false, true, 2 * N
    return t
end
local MAPS = { { "T2R", "t2r" }, { "Hedgehog", "hedgehog" } }

local TABLES = {}
TABLES["1"] = function(cells) -- attention transfer or not, pure linear attention
    for _, m in ipairs(MAPS) do
        cells[#cells + 1] = cell(m[1] .. ", no transfer", untaught { map = m[2], window = 0 })
        cells[#cells + 1] = cell(m[1] .. ", transfer", both { map = m[2], window = 0 })
    end
end
local KEEP = {} -- what both recipes of table 3 take
for word in ("base data seq records hold_out eval_rows dtype device accumulate clip"):gmatch "%S+" do
    KEEP[word] = true
end
TABLES["3"] = function(cells) -- attention transfer of all layers at once or block by block, then LoRA on the whole
    for _, layers in ipairs { 1000, 9, 5, 2, 1 } do
        local c = cell(layers == 1000 and "joint" or "blocks of " .. layers,
                       { layers = layers, transfer_steps = N, lora = false })
        c.recipe, c.next = "distill_blocks", { recipe = "finetune", args = { steps = N }, keep = KEEP }
        cells[#cells + 1] = c
    end
end
TABLES["6"] = function(cells) -- what each component brings
    for _, m in ipairs { MAPS[2], MAPS[1] } do
        cells[#cells + 1] = cell(m[1] .. ": swap, finetune", untaught { map = m[2], window = 0 })
        cells[#cells + 1] = cell(m[1] .. ": + transfer", both { map = m[2], window = 0 })
        cells[#cells + 1] = cell(m[1] .. ": + window, transfer", both { map = m[2] })
        cells[#cells + 1] = cell(m[1] .. ": + window, no transfer", untaught { map = m[2] })
    end
end
TABLES["11"] = function(cells)
    for _, r in ipairs { 4, 8, 16, 32, 64, 128, 256 } do
        cells[#cells + 1] = cell("rank " .. r, both { rank = r, alpha = 2 * r }, r)
    end
end
TABLES["12"] = function(cells)
    for _, set in ipairs { "q", "k", "v", "o", "qk", "qv", "qo", "kv", "ko", "vo", "qkv", "qko", "kvo", "qkvo" } do
        local targets = {}
        for c in set:gmatch "." do targets[#targets + 1] = c .. "_proj" end
        cells[#cells + 1] = cell(set, both { targets = targets })
    end
end
TABLES["13"] = function(cells)
    for _, w in ipairs { 4, 16, 64, 256 } do
        cells[#cells + 1] = cell("sliding " .. w, both { window = w, kind = "sliding" }, w, "sliding")
    end
    cells[#cells + 1] = cell("terrace 64", both { window = 64, kind = "terrace" }, 64, "terrace")
end
TABLES["16"] = function(cells) -- length of the first stage; then 10 N updates of the second
    for k = 0, 9 do
        local t = both { transfer_steps = k * N, lora_steps = 10 * N }
        if k == 0 then t.transfer, t.transfer_steps = false, nil end
        cells[#cells + 1] = cell(("%d updates"):format(k * N), t, k * N)
    end
end
TABLES["beyond"] = function(cells) -- the reference's recipe, distill_smollm2's default, and the default with one thing changed
    local function add(label, given)
        local c = cell(label, both(given))
        c.recipe = "distill_smollm2"
        cells[#cells + 1] = c
    end
    add("the reference's", { schedule = "constant", transfer_lr = 1e-2, lora_lr = 1e-4, train_maps = false, fade = 0 })
    add("default", {})
    add("maps trained in stage 1 alone", { train_maps = false })
    add("KL on logits, a fifth", { kl = 0.2 })
    add("window dropped 1 in 5", { window_drop = 0.2 })
    add("4 layers kept by search", { keep_search = 4 })
    add("norm-preserving map", { map = "hedgehog_norm" })
    add("gated map", { map = "hedgehog_gated" })
    add("1 sink", { sinks = 1 })
    add("no transfer", { transfer = false })
    add("no transfer, no fade", { transfer = false, fade = 0 })
end

local cells
if args.table ~= "none" then
    cells = {}
    TABLES[args.table](cells)
else
    local axes = sweep.axes(args.sweep)
    if #axes == 0 then lc.fail("give --sweep NAME=VALUE,.. or --table; see --help") end
    cells = sweep.product(axes)
end
local fixed = args.rest
if args.tiny then
    local tiny = require "lolcats.tiny"
    local model, data = tiny.prepare(args.out, "OUT/model", "OUT/records.json", "mistral", 0)
    fixed = { "--model=" .. model, "--data=" .. data, "--seq=96", "--hold_out=8", "--eval_rows=2", "--dtype=f32",
              "--window=16", "--eval_every=1000", "--records=60",
              unpack(args.rest) }
    for _, c in ipairs(cells) do
        if c.recipe ~= "distill_blocks" and args.recipe ~= "distill_blocks" then c.args.sample = 0 end
    end
end
sweep.run { recipe = args.recipe, cells = cells, fixed = fixed, seeds = args.seeds, out = args.out, fresh = args.fresh }

local columns = { { "teacher_ppl", "teacher" }, { "swapped_ppl", "swapped" }, { "transfer_ppl", "transfer" },
                  { "lora_ppl", "LoRA" },
                  { "window_only_ppl", "window only" } }
for _, c in ipairs(cells) do
    if c.values.long_ppl then
        columns[6], columns[7] = { "long_ppl", "long rows" }, { "long_window_only_ppl", "window only" }
    end
end
if args.metric ~= "lora_ppl" then columns[#columns + 1] = { args.metric, args.metric } end
local keys = {}
for i, c in ipairs(columns) do keys[i] = c[1] end
local text = sweep.table(cells, columns)
print(text)
local series = sweep.series(cells, args.metric)
if #series > 0 then
    local how = { title = args.table ~= "none" and "table " .. args.table or "sweep", xlabel = "",
                  ylabel = args.metric }
    files.write(args.out .. "/ablate.svg", plot.svg(series, how))
    log.say("%s", plot.terminal(series,
                                { title = args.metric, width = log.width(2), color = log.has_color(2), height = 10 }))
end
files.write(args.out .. "/table.txt", text .. "\n")
files.write(args.out .. "/results.csv", sweep.csv(cells, keys))
print(("\nPerplexity on held-out rows%s; %s/table.txt, results.csv, ablate.svg"):format(#args.seeds > 1 and
        ", mean and deviation over seeds" or "", args.out))
