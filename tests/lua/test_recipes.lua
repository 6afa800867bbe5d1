-- The recipes on small random models: those of the paper's models, block by block, fine-tuning, and sweeps with their
-- table, plot, seeds and the runs that are done already; and that every recipe prints its help.
local t = dofile((arg and arg[0] or ""):match "^(.*/)" .. "harness.lua")
local lc = require "lolcats"
local files, sweep = lc.files, require "lolcats.sweep"
local program = require "lolcats.program"

local me = os.getenv "LOLCATS_PROGRAM" or program.path
local root = os.tmpname()
os.remove(root)
files.make_dirs(root)

local function run(words)
    local out = root .. "/said"
    local status = os.execute(("cd '%s' && '%s' %s > '%s.out' 2> '%s.err' < /dev/null"):format(root, me, words, out,
            out))
    if status > 255 then status = math.floor(status / 256) end
    local said, err = files.read(out .. ".out"), files.read(out .. ".err")
    return status, said, err
end

local function ok(words)
    local status, said, err = run(words)
    t.eq(status, 0, words .. "\n" .. err:sub(-2000))
    return said, err
end

t.test("every recipe has a line of its own and its help", function()
    for _, path in ipairs(program.files()) do
        local name = path:match "^recipes/([%w_]+)%.lua$"
        if name and name ~= "doctor" then
            t.ok(program.source(path):match("^%-%- " .. name .. "%.lua: "), path)
            t.ok(ok(name .. " --help"):find("Usage: lolcats " .. name, 1, true), name)
        end
    end
end)

for name, out in pairs { distill_llama3_8b = "llama3_8b_tiny", distill_llama3_1_8b = "llama3_1_8b_tiny" } do
    t.test(name .. " --tiny", function()
        local said = ok(name .. " --tiny --transfer_steps 2 --lora_steps 2 --sample 2")
        t.ok(said:find("attention transfer", 1, true), said)
        t.ok(files.read_json(root .. "/runs/" .. out .. "/summary.json").lora_ppl > 1)
    end)
end

t.test("large models in blocks, then finetune", function()
    local said = ok "distill_llama3_1_70b --tiny --transfer_steps 2 --lora_steps 2"
    t.ok(said:find("linearized in blocks of 2", 1, true), said)
    ok "distill_llama3_1_405b --tiny --transfer_steps 2 --no-lora --layers 3"
    local words = "finetune --student runs/llama3_1_405b_tiny/student --data runs/llama3_1_405b_tiny/records.json --records 40 --hold_out 8 " ..
                  "--seq 96 --steps 3 --eval_rows 2 --optim adafactor --lr 0.01"
    ok(words)
    local s = files.read_json(root .. "/runs/finetune/summary.json")
    t.ok(s.lora_ppl < s.before_ppl and s.steps == 3)
    ok(words) -- done already
    -- a model that is no student gets an adapter, which goes on top of it
    local said2 = ok((words:gsub("runs/llama3_1_405b_tiny/student", "runs/llama3_1_405b_tiny/model") .. " --out runs/plain"))
    t.ok(said2:find("runs/plain/adapter", 1, true), said2)
    ok "merge runs/plain/adapter runs/plain/merged --base runs/llama3_1_405b_tiny/model"
    ok "perplexity --model runs/plain/merged --text runs/llama3_1_405b_tiny/records.json --seq 64 --limit 2"
    local status, _, err = run "finetune --student runs/nowhere --data x"
    t.ok(status ~= 0 and err:find("runs/nowhere", 1, true), err)
end)

t.test("a table of the paper: every cell, a table, a plot, values; done runs stay", function()
    local words = "ablate --table 13 --steps 1 --tiny --out runs/t13"
    local said = ok(words)
    for _, cell in ipairs { "sliding 4 ", "sliding 16 ", "sliding 64 ", "sliding 256 ", "terrace 64 " } do
        t.ok(said:find(cell, 1, true), said)
    end
    local svg = files.read(root .. "/runs/t13/ablate.svg")
    for _, what in ipairs { "<svg", "Table 13: size and kind of the window", ">terrace<", "teacher", ">256<", "perplexity: LoRA" } do
        t.ok(svg:find(what, 1, true), what)
    end
    t.ok(said:find "sliding 4 [^\n]* 73%.3\n", "what the paper found stands beside")
    t.ok(files.read(root .. "/runs/t13/results.csv"):find('"terrace 64",lora_ppl,', 1, true))
    local summary = root .. "/runs/t13/01-sliding-4/seed0/summary.json"
    local before = files.read_json(summary)
    before.lora_ppl = 5 -- not measured again
    files.write_json(summary, before)
    t.ok(ok(words):find "sliding 4 [^\n]* 5%.000")
    local status, _, why = run(words .. " -- --rank=2")
    t.ok(status ~= 0 and why:find("holds a run with other arguments", 1, true), why)
    t.ok(not ok(words .. " --fresh -- --rank=2"):find "sliding 4 [^\n]* 5%.000", "begun anew")
end)

t.test("tables whose cells have names: a row of the plot each", function()
    for table_name, n in pairs { ["1"] = 4, ["3"] = 5 } do
        local said = ok(("ablate --table %s --steps 1 --tiny --out runs/t%s"):format(table_name, table_name))
        local rows = 0
        for line in said:gmatch "[^\n]+" do
            if line:match "%d%.%d%d" then rows = rows + 1 end
        end
        t.eq(rows, n, "table " .. table_name .. "\n" .. said)
        local svg = files.read(root .. "/runs/t" .. table_name .. "/ablate.svg")
        t.ok(svg:find(table_name == "1" and ">Hedgehog, no transfer<" or ">blocks of 9<", 1, true))
    end
end)

t.test("every table has the paper's cells, with arguments that the recipes take", function()
    local tables = require "lolcats.paper_tables"
    local counts = { ["1"] = 4, ["3"] = 5, ["6"] = 8, ["11"] = 7, ["12"] = 14, ["13"] = 5, ["16"] = 10, beyond = 11 }
    for _, name in ipairs(tables.names()) do
        local cells, found = tables[name].cells(200), 0
        t.eq(#cells, counts[name], name)
        for _, cell in ipairs(cells) do
            found = found + (cell.paper and 1 or 0)
            local source = program.source("recipes/" .. (cell.recipe or "distill"):gsub("_smollm2", "") .. ".lua")
            for option in pairs(cell.args) do
                t.ok(source:find('{ "' .. option .. '"', 1, true) or
                     program.source("lua/lolcats/recipe.lua"):find('{ "' .. option .. '"', 1, true), name .. " " .. option)
            end
        end
        t.eq(found, name == "3" and 2 or name == "beyond" and 0 or #cells, name)
    end
    local sixteen = tables["16"].cells(200)
    t.eq({ sixteen[1].args, sixteen[10].args }, { { transfer = false, lora_steps = 2000 },
                                                  { transfer_steps = 1800, lora_steps = 2000 } })
end)

t.test("students are scored by tasks and by another text", function()
    files.write(root .. "/text.txt", ("the cat sat on the mat. "):rep(30))
    files.make_dirs(root .. "/tasks")
    files.write(root .. "/tasks/piqa.validation.jsonl", '{"goal": "Sit", "sol1": "on a chair", "sol2": "on a cloud", "label": 0}\n')
    local said = ok "ablate --sweep rank=1,2 --tiny --out runs/e --tasks piqa --task_data tasks --text text.txt -- --transfer_steps=1 --lora_steps=1"
    t.ok(said:find "piqa  other text\n", said)
    t.ok(said:find "rank 2 [^\n]* [01]%.000  [^\n]*%d%.%d%d\n", said)
end)

t.test("a sweep over any arguments, with seeds; a run that fails is told and leaves the others", function()
    local said, err = ok "ablate --sweep rank=1,0 --seeds 0,1 --tiny --out runs/s -- --transfer_steps=1 --lora_steps=1"
    t.ok(said:find "rank 1 .*±", said)
    t.ok(said:find "rank 0 .*failed", said)
    t.ok(err:find("rank must be at least 1", 1, true), err)
    local status, _, why = run "ablate --sweep rank=0 --tiny --out runs/s0"
    t.ok(status ~= 0 and why:find("every run failed", 1, true) and why:find("rank must be at least 1", 1, true), why)
    status, _, why = run "ablate"
    t.ok(status ~= 0 and why:find("give --sweep", 1, true), why)
end)

t.test("axes and cells", function()
    local axes = sweep.axes { "window=4", "16", "rank=8" }
    t.eq(axes, { { name = "window", values = { "4", "16" } }, { name = "rank", values = { "8" } } })
    local cells = sweep.product(axes)
    t.eq(#cells, 2)
    t.eq({ cells[2].label, cells[2].args, cells[2].x, cells[2].series },
         { "window 16, rank 8", { window = "16", rank = "8" }, 8, "window 16" })
    t.errors(sweep.axes, "takes NAME=VALUE", { "4" })
    cells[1].values, cells[2].values = { a = { 1, 3 } }, { a = { 20 } }
    t.eq(sweep.show(cells[1], "a"), "2.000 ± 1.414")
    t.eq(sweep.show(cells[2], "a"), "20.00")
    local series = sweep.series({ cells[1], cells[2] }, "a")
    t.eq({ series[1].name, series[1].x, series[1].y, #series }, { "window 4", { 8 }, { 2 }, 2 })
    t.close({ series[1].dev[1], series[2].dev[1] or 0 }, { math.sqrt(2), 0 })
    cells[1].x = nil
    t.eq(sweep.series(cells, "a"), nil)
    local svg = sweep.svg({ cells[1], { label = "lost", values = {}, problem = "why" } }, { metric = "a", label = "a", title = "t" })
    t.ok(svg:find(">failed<", 1, true) and svg:find("2.000 ± 1.414", 1, true), svg)
end)

os.execute("rm -rf '" .. root .. "'")
t.finish()
