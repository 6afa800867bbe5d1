-- eval.lua: score a model: perplexity of a text, and multiple-choice tasks.
local lc = require "lolcats"
local files = require "lolcats.files"
local eval = require "lolcats.eval"

local args = lc.args {
    "Multiple-choice accuracy (piqa, arc_easy, arc_challenge, winogrande; zero-shot, by the rules of " ..
    "lm-evaluation-harness) and perplexity. Task files are TASK.validation.jsonl in the folder given by --data.",
    { "model", "smollm2", "folder, GGUF file, Hub id in the local cache, saved student, or smollm2" },
    { "base", "", "the model that a saved student or a checkpoint was made from, where it has moved" },
    { "tasks", { "piqa", "arc_easy", "arc_challenge", "winogrande" }, "which tasks; none: only perplexity" },
    { "data", "", "folder of the task files; default: assets/datasets/eval of $LOLCATS_TEST_DATA or ../shared" },
    { "text", "", "also the perplexity of this text file" },
    { "seq", 1024, "tokens a window of the perplexity", min = 2 },
    { "limit", 0, "at most this many items a task; 0: all", min = 0 },
    { "bos", false, "put a BOS token before every context" },
    { "max_length", 0, "longest row in tokens; 0: the model's own limit", min = 0 },
    { "teacher", false, "a linearized model with its teacher's softmax attention" },
    { "dtype", "f32", "of the weights", choices = { "f32", "bf16", "f16", "f64" } },
    { "device", "cpu", "where to compute" },
    { "json", false, "one JSON object instead of a table" },
    { "out", "", "folder for a summary.json with the scores, as a sweep reads them" },
}

local function default_folder()
    local root = os.getenv "LOLCATS_TEST_DATA"
    for _, dir in ipairs { root and root .. "/assets/datasets/eval" or "", "../shared/assets/datasets/eval" } do
        if dir ~= "" and files.is_dir(dir) then return dir end
    end
    lc.fail("no folder of task files: give one with --data")
end

local tasks = {}
for _, name in ipairs(args.tasks) do
    if name ~= "none" then
        if not eval.TASKS[name] then
            lc.fail("there is no task '%s'; there are %s", name, table.concat(eval.TASK_NAMES, ", "))
        end
        tasks[#tasks + 1] = name
    end
end
local model = lc.load(args.model, { base = args.base ~= "" and args.base or nil, dtype = args.dtype,
                                    device = args.device })
local forward = { teacher = args.teacher }
local out = { model = args.model, tasks = files.array {} }

local program = require "lolcats.program"
local tty = program.is_terminal and program.is_terminal(2)
local function progress(name)
    return tty and function(i, n)
        io.stderr:write(("\r%s %d / %d "):format(name, i, n))
        if i == n then io.stderr:write "\r\27[K" end
    end or nil
end

if args.text ~= "" then
    local ids = model.tokenizer:encode(files.read(args.text), { special = false, parse = false })
    local r = eval.perplexity(model, ids, { seq = args.seq, forward = forward, progress = progress "perplexity" })
    out.perplexity = { text = args.text, ppl = r.ppl, loss = r.loss, tokens = r.tokens, windows = r.windows }
end
if #tasks > 0 then
    local folder = args.data ~= "" and args.data or default_folder()
    for i, name in ipairs(tasks) do
        out.tasks[i] = eval.task(model, name, {
            folder = folder, limit = args.limit > 0 and args.limit or nil, bos = args.bos, forward = forward,
            max_length = args.max_length > 0 and args.max_length or nil, progress = progress(name),
        })
    end
end

if args.out ~= "" then
    local summary, sum = { model = args.model, text_ppl = out.perplexity and out.perplexity.ppl }, 0
    for _, r in ipairs(out.tasks) do -- the score that is usual for each task
        summary[r.task] = r.task == "arc_challenge" and r.acc_norm or r.acc
        sum = sum + summary[r.task]
    end
    if #out.tasks > 0 then summary.mean_accuracy = sum / #out.tasks end
    files.make_dirs(args.out)
    files.write_json(args.out .. "/summary.json", summary)
end
if args.json then
    print(files.to_json(out))
else
    local p = out.perplexity
    if p then print(("%-16s ppl %.4f over %d tokens"):format("perplexity", p.ppl, p.tokens)) end
    for _, r in ipairs(out.tasks) do
        local spread = r.acc_stderr and (" +- %.4f"):format(r.acc_stderr) or ""
        local norm = r.acc_norm and ("   acc_norm %.4f"):format(r.acc_norm) or ""
        print(("%-16s acc %.4f%s%s  (%d items)"):format(r.task, r.acc, spread, norm, r.items))
    end
end
