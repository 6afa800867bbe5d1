-- ablate.lua: a sweep over any arguments of a recipe, or one of the paper's tables, at any model size; a table and a
-- plot at the end. What stands after -- goes to every run. Several seeds give means and deviations; a killed sweep goes
-- on where it was.
--   lolcats ablate --table 13 --seeds 0,1,2 -- --model smollm2 --data chitchat --seq 512
--   lolcats ablate --sweep window=16,64 --sweep rank=4,8,16 -- --model DIR --data FILE.json
--   lolcats ablate --table 16 --tiny
--   lolcats ablate --table beyond -- --data alpaca.json --seq 512 --long_seq 2048     what each improvement brings
local lc = require "lolcats"
local files, plot, sweep, log = lc.files, lc.plot, require "lolcats.sweep", require "lolcats.log"
local tables = require "lolcats.paper_tables"

local args = lc.args {
    "Run a recipe many times with different arguments and compare: a sweep, or a table of the paper.",
    { "table", "none", "a table of the paper: 1 transfer or not, 3 blocks, 6 components, 11 rank, 12 projections, " ..
      "13 window, 16 length of transfer; or beyond: what goes beyond it, one by one",
      { "none", unpack(tables.names()) } },
    { "sweep", {}, "NAME=VALUE,VALUE,..; several make a grid" },
    { "recipe", "distill", "what is run" },
    { "steps", 200, "updates a stage, from which a table's lengths follow", min = 1 },
    { "seeds", { 0 }, "seeds of the runs" },
    { "metric", "lora_ppl", "value that the plot shows" },
    { "tasks", {}, "also score every student: piqa, arc_easy, arc_challenge, winogrande" },
    { "task_data", "", "folder of the task files" },
    { "task_items", 0, "at most so many items a task; 0: all", min = 0 },
    { "text", "", "also every student's perplexity of this text file" },
    { "out", "runs/ablate", "folder; every run has one below it" },
    { "tiny", false, "on a small random model with few updates: to see it run" },
    { "fresh", false, "start over instead of going on" },
    { "rest", {}, "arguments of every run, after --", positional = true },
}

-- The runs.
local N = args.tiny and math.min(args.steps, 3) or args.steps
local chosen = tables[args.table]
local axes = sweep.axes(args.sweep)
if not chosen and #axes == 0 then lc.fail("give --sweep NAME=VALUE,.. or --table; see --help") end
local cells = chosen and chosen.cells(N) or sweep.product(axes)
local fixed = args.rest
if args.tiny then
    local model, data = require("lolcats.tiny").prepare(args.out, "OUT/model", "OUT/records.json", "mistral", 0,
                                                        { initializer_range = 0.15, num_hidden_layers = 6 })
    fixed = { "--model=" .. model, "--data=" .. data, "--seq=320", "--hold_out=20", "--eval_rows=4", "--dtype=f32",
              "--records=120", unpack(args.rest) }
    if args.recipe == "distill" and args.table ~= "3" then table.insert(fixed, 1, "--sample=0") end
end

-- What follows each of them: tasks and another text.
local after
if #args.tasks > 0 or args.text ~= "" then
    local given = { tasks = #args.tasks > 0 and args.tasks or "none", text = args.text }
    if args.task_data ~= "" then given.data = args.task_data end
    if args.task_items > 0 then given.limit = args.task_items end
    after = { { recipe = "eval", args = given, keep = { dtype = true, device = true }, takes = "model", plain = true } }
end
sweep.run { recipe = args.recipe, cells = cells, fixed = fixed, seeds = args.seeds, out = args.out, fresh = args.fresh,
            after = after }

-- The table, the plot, the values.
sweep.check(cells, args.metric)
local columns = { { "teacher_ppl", "teacher" }, { "swapped_ppl", "swapped" }, { "transfer_ppl", "transfer" },
                  { "lora_ppl", "LoRA" }, { "window_only_ppl", "window only" },
                  { "long_ppl", "long rows" }, { "long_window_only_ppl", "window only" } }
for _, name in ipairs(args.tasks) do columns[#columns + 1] = { name, name } end
if #args.tasks > 1 then columns[#columns + 1] = { "mean_accuracy", "mean" } end
if args.text ~= "" then columns[#columns + 1] = { "text_ppl", "other text" } end
if not sweep.has(columns, args.metric) then columns[#columns + 1] = { args.metric, args.metric } end
local text = sweep.table(cells, columns)
print(text)
local title = chosen and chosen.title or "sweep of " .. sweep.names(axes)
local how = { title = args.table:match "%d" and ("Table %s: %s"):format(args.table, title) or title,
              metric = args.metric, label = sweep.label(columns, args.metric),
              xlabel = chosen and chosen.xlabel or not chosen and axes[#axes].name or nil }
files.write(args.out .. "/ablate.svg", sweep.svg(cells, how))
log.say("\n%s", sweep.terminal(cells, how))
files.write(args.out .. "/table.txt", text .. "\n")
files.write(args.out .. "/results.csv", sweep.csv(cells, columns))
print(("\nPerplexity on held-out rows%s%s; %s/table.txt, results.csv, ablate.svg"):format(
    #args.seeds > 1 and ", mean and deviation over seeds" or "",
    chosen and chosen.paper and "; paper: " .. chosen.paper or "", args.out))
