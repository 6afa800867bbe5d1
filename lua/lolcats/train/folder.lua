-- folder.lua: a run's folder on disk: who may write there (a lock), what was asked for (recipe text, arguments, settings), the
-- metrics line by line, and checkpoints that hold parameters, moments and the state of the run in one file, so that a process
-- killed at any moment leaves one that fits together.
local lc = require "lolcats"
local files = require "lolcats.files"
local bridge = require "lolcats.core.ffi"
local cli = require "lolcats.cli"

local M = {}

local FORMAT, VERSION = "lolcats-run", 1
local LAST, BEST = "last.safetensors", "best.safetensors"
local OURS = { LAST, BEST, "metrics.jsonl", "summary.json", "losses.svg", "args.json", "recipe.lua" }
local MOMENTS = "~optim." -- sorts behind all parameter names, and none begins so

-- ---- the folder of a recipe, which may hold several runs ----------------------------------------------------------
local opened = {} -- out -> its lock; held until the process ends

local function clear(folder)
    for _, name in ipairs(OURS) do
        if files.exists(folder .. "/" .. name) then files.remove(folder .. "/" .. name) end
    end
end

local function is_run(folder) return files.is_folder(folder) and files.exists(folder .. "/" .. LAST) end

--- Locks `out` for this process; with `fresh`, the runs in it are forgotten, once a process.
function M.open_out(out, fresh)
    if opened[out] then return end
    local ok, why = pcall(files.make_dirs, out)
    if not ok then bridge.raise("EIO", "run", ("the run folder %s cannot be made: %s"):format(out, why.message or tostring(why))) end
    local got, lock = pcall(files.lock, out .. "/.lock")
    if not got then
        local text = lock.message or tostring(lock)
        if text:find("another process", 1, true) then
            bridge.raise("EIO", "run", ("the run folder %s is in use by another process that is training there; wait for it, stop it, " ..
                                        "or take another folder (--out)"):format(out))
        end
        bridge.raise("EIO", "run", ("the run folder %s cannot be written: %s"):format(out, text))
    end
    opened[out] = lock
    if fresh then
        for _, name in ipairs(files.list(out)) do
            if is_run(out .. "/" .. name) then clear(out .. "/" .. name) end
        end
        for _, name in ipairs { "results.json", "summary.json" } do
            if files.exists(out .. "/" .. name) then files.remove(out .. "/" .. name) end
        end
    end
end

-- ---- what was asked for -------------------------------------------------------------------------------------------
--- Recipe, its arguments and this run's settings, as plain values.
function M.request(name, settings)
    local script = cli.script or {}
    local current = cli.current
    local recipe = files.basename(script.name or script.file or "lolcats"):gsub("%.lua$", "")
    return { recipe = recipe, run = name, args = current and current.values or {}, settings = settings,
             argv = current and files.array(current.argv) or nil }
end

-- Arguments that do not change what is computed.
local NEUTRAL = { fresh = true, out = true, quiet = true, threads = true }

local function show(v)
    if v == nil or v == files.null then return "nothing" end
    if type(v) == "table" then return files.to_json(v) end
    return type(v) == "string" and ("'%s'"):format(v) or tostring(v)
end

-- Differences of two trees of plain values, as "name: there, here".
local function differences(there, here, path, skip, out)
    if type(there) == "table" and type(here) == "table" and there ~= files.null and here ~= files.null then
        local keys, seen = {}, {}
        for _, t in ipairs { there, here } do
            for k in pairs(t) do
                if not seen[k] then seen[k], keys[#keys + 1] = true, k end
            end
        end
        table.sort(keys, function(a, b) return tostring(a) < tostring(b) end)
        for _, k in ipairs(keys) do
            if not (skip and skip[k]) then
                differences(there[k], here[k], path == "" and tostring(k) or path .. "." .. tostring(k), nil, out)
            end
        end
    else
        if there == files.null then there = nil end
        if here == files.null then here = nil end
        if there ~= here then out[#out + 1] = ("%s: %s there, %s here"):format(path, show(there), show(here)) end
    end
    return out
end

--- Raises when what a folder was made for is not what is asked for now.
function M.compare(folder, there, here, neutral)
    local skip = {}
    for k in pairs(NEUTRAL) do skip[k] = true end
    for _, k in ipairs(neutral or {}) do skip[k] = true end
    local out = {}
    if there.recipe ~= here.recipe then out[1] = ("recipe: %s there, %s here"):format(show(there.recipe), show(here.recipe)) end
    differences(there.args or {}, here.args, "", skip, out)
    if #out == 0 then differences(there.settings or {}, here.settings or {}, "", nil, out) end
    if #out == 0 then return end
    local shown = table.concat(out, "\n  ", 1, math.min(#out, 6)) .. (#out > 6 and ("\n  and %d more"):format(#out - 6) or "")
    bridge.raise("EARG", nil, ("%s holds another run:\n  %s\nGo on with the same arguments, start over with --fresh, or take another --out")
        :format(folder, shown))
end

--- Writes the recipe's text and args.json.
function M.describe(folder, request)
    local script = cli.script or {}
    if script.source then files.write(folder .. "/recipe.lua", script.source) end
    for _, part in ipairs(script.parts or {}) do files.write(folder .. "/" .. part.name, part.text) end
    files.write_json(folder .. "/args.json", request)
end

-- ---- metrics ------------------------------------------------------------------------------------------------------
local Metrics = {}
Metrics.__index = Metrics

--- The metrics file of a folder, cut back to `bytes` (0: begun anew).
function M.metrics(folder, bytes)
    local self = setmetatable({ path = folder .. "/metrics.jsonl", bytes = 0 }, Metrics)
    local text = bytes > 0 and files.exists(self.path) and files.read(self.path):sub(1, bytes) or ""
    text = text:match "^(.*\n)" or ""
    files.write(self.path, text)
    self.bytes = #text
    return self
end

function Metrics:add(row)
    local line = files.to_json(row) .. "\n"
    files.append(self.path, line)
    self.bytes = self.bytes + #line
end

-- ---- checkpoints --------------------------------------------------------------------------------------------------
local function save(path, tensors, state)
    files.save_tensors(path, tensors, { format = FORMAT, version = tostring(VERSION), state = files.to_json(state) })
end

local function parameters(optim)
    local out = {}
    for _, p in ipairs(optim.params) do out[p.name] = p.tensor:detach() end
    return out
end

--- Parameters, moments and state, at once.
function M.save_last(folder, optim, state)
    local tensors = parameters(optim)
    for name, t in pairs(optim:tensors()) do tensors[MOMENTS .. name] = t end
    save(folder .. "/" .. LAST, tensors, state)
end

--- Parameters alone.
function M.save_best(folder, optim, state) save(folder .. "/" .. BEST, parameters(optim), state) end

local function open(path)
    local f = files.open_tensors(path)
    if f:meta "format" ~= FORMAT then
        f:close()
        lc.fail("%s is not a checkpoint of a run", path)
    end
    return f, files.parse_json(f:meta "state", path .. ": state")
end

--- The state in a folder's last checkpoint; nil when there is none.
function M.read_state(folder)
    local path = folder .. "/" .. LAST
    if not files.exists(path) then return nil end
    local f, state = open(path)
    f:close()
    if state.version ~= VERSION then
        lc.fail("%s has version %s; this program reads version %d (--fresh starts over)", path, tostring(state.version), VERSION)
    end
    return state
end

local function copy_parameters(f, path, optim)
    for _, p in ipairs(optim.params) do
        if not f:has(p.name) then lc.fail("%s has no tensor '%s'", path, p.name) end
        local from = f:tensor(p.name)
        if table.concat(from.shape, ",") ~= table.concat(p.tensor.shape, ",") then
            lc.fail("%s: '%s' is [%s], the model's is [%s]", path, p.name, table.concat(from.shape, ", "), table.concat(p.tensor.shape, ", "))
        end
        p.tensor:detach():copy_(from)
    end
end

--- Takes parameters and moments from the last checkpoint.
function M.load_last(folder, optim)
    local path = folder .. "/" .. LAST
    local f = open(path)
    lc.no_grad(lc.scope, function()
        copy_parameters(f, path, optim)
        for name, t in pairs(optim:tensors()) do t:copy_(f:tensor(MOMENTS .. name)) end
    end)
    f:close()
end

--- Takes the parameters of the best checkpoint; its state, or nil when there is none.
function M.load_best(folder, optim)
    local path = folder .. "/" .. BEST
    if not files.exists(path) then return nil end
    local f, state = open(path)
    lc.no_grad(lc.scope, copy_parameters, f, path, optim)
    f:close()
    return state
end

M.clear, M.VERSION, M.LAST, M.BEST = clear, VERSION, LAST, BEST
return M
