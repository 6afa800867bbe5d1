-- sweep.lua: many runs of a recipe that differ in some arguments: each in a process and a folder of its own, so that
-- one that fails or is killed leaves the others alone and is gone on with later; then a table and a plot of what their
-- summaries say.
local lc = require "lolcats"
local files = require "lolcats.files"
local log = require "lolcats.log"
local program = require "lolcats.program"

local M = {}

local function quote(s) return "'" .. tostring(s):gsub("'", "'\\''") .. "'" end

--- Cells of every combination of axes. axes: a list of {name =, values = {...}}. A cell is {label =, args = {["name"] =
--- value}, x = the last axis' value where it is a number, series = the others}.
function M.product(axes)
    local cells = { { parts = {}, args = {} } }
    for _, axis in ipairs(axes) do
        local out = {}
        for _, cell in ipairs(cells) do
            for _, v in ipairs(axis.values) do
                local new = { parts = { unpack(cell.parts) }, args = {} }
                for k, x in pairs(cell.args) do new.args[k] = x end
                new.args[axis.name] = v
                new.series = table.concat(new.parts, ", ")
                new.parts[#new.parts + 1] = axis.name .. " " .. tostring(v)
                new.x = tonumber(v)
                out[#out + 1] = new
            end
        end
        cells = out
    end
    for _, cell in ipairs(cells) do cell.label = table.concat(cell.parts, ", ") end
    return cells
end

--- Axes from words: "window=4", "16", "rank=4", "8" are window 4 and 16 and rank 4 and 8.
function M.axes(words)
    local out = {}
    for _, word in ipairs(words) do
        local name, first = word:match "^%-*([%w_-]+)=(.*)$"
        if name then
            out[#out + 1] = { name = (name:gsub("-", "_")), values = {} }
            word = first
        elseif #out == 0 then
            lc.fail("--sweep takes NAME=VALUE,VALUE,..., not '%s'", word)
        end
        table.insert(out[#out].values, word)
    end
    return out
end

-- The words of a cell's command line. A value may be a list; true and false are switches.
local function words_of(cell, seed, fixed, folder)
    local out, names = { unpack(fixed) }, {}
    for name in pairs(cell.args) do names[#names + 1] = name end
    table.sort(names)
    for _, name in ipairs(names) do
        local v = cell.args[name]
        if v == true then
            out[#out + 1] = "--" .. name
        elseif v == false then
            out[#out + 1] = "--no-" .. name
        else
            out[#out + 1] = ("--%s=%s"):format(name, type(v) == "table" and table.concat(v, ",") or tostring(v))
        end
    end
    out[#out + 1] = "--seed=" .. seed
    out[#out + 1] = "--out=" .. folder
    return out
end

-- Runs one command unless its summary is there already; returns the summary, or nil and why.
local function run_one(recipe, words, folder, o)
    local parts = { quote(program.path), recipe }
    for _, word in ipairs(words) do parts[#parts + 1] = quote(word) end
    local command = table.concat(parts, " ")
    local told, summary = folder .. "/command", folder .. "/summary.json"
    local same = files.exists(told) and files.read(told) == command
    if same and files.exists(summary) and not o.fresh then return files.read_json(summary) end
    files.make_dirs(folder)
    if (not same or o.fresh) and files.exists(summary) then files.remove(summary) end
    files.write(told, command)
    local status = os.execute(("%s%s > %s 2>&1 < /dev/null"):format(command, (not same or o.fresh) and " --fresh" or "",
            quote(folder .. "/log")))
    if status ~= 0 or not files.exists(summary) then
        local last = ""
        for line in files.read(folder .. "/log"):gmatch "[^\r\n]+" do
            if line:match "^lolcats: " or last == "" then last = line end
        end
        if status == 2 or status == 130 * 256 or status == 130 then lc.fail("interrupted; the same command goes on") end
        return nil, last
    end
    return files.read_json(summary)
end

-- Those of the words whose option is in `keep`, with their values.
local function only(words, keep)
    local out, i = {}, 1
    while i <= #words do
        local name, joined = words[i]:match "^%-%-([%w_-]+)(=?)"
        local wanted = name and keep[(name:gsub("-", "_"))]
        local value = name and joined == "" and words[i + 1] and not words[i + 1]:match "^%-%-" and words[i + 1]
        if wanted then
            out[#out + 1] = words[i]
            out[#out + 1] = value or nil
        end
        i = i + (value and 2 or 1)
    end
    return out
end

-- The run that follows a cell's first one and takes its student: next = {recipe =, args =, keep = {options of
-- `fixed`}}.
local function follow(cell, seed, folder, o, summary)
    local step, fixed = cell.next, only(o.fixed, cell.next.keep)
    fixed[#fixed + 1] = "--student=" .. folder .. "/student"
    local place = folder .. "/" .. step.recipe
    local second, why = run_one(step.recipe, words_of({ args = step.args }, seed, fixed, place), place, o)
    if not second then return nil, why end
    local out = {}
    for k, v in pairs(summary) do out[k] = v end
    out.transfer_ppl = summary.lora_ppl
    for k, v in pairs(second) do out[k] = v end
    return out
end

local function mean(list)
    local m, s = 0, 0
    for _, v in ipairs(list) do m = m + v / #list end
    for _, v in ipairs(list) do s = s + (v - m) ^ 2 end
    return m, #list > 1 and math.sqrt(s / (#list - 1)) or nil
end

--- Runs all cells. A cell may have a recipe of its own, and next: a run that takes its student. o: recipe, cells, fixed
--- (words that every cell gets), seeds, out, fresh. Sets cell.values = {name = {a value a seed}} and cell.problem.
function M.run(o)
    local n = 0
    for i, cell in ipairs(o.cells) do
        cell.values = {}
        for _, seed in ipairs(o.seeds) do
            n = n + 1
            log.say("%d/%d  %s, seed %s", n, #o.cells * #o.seeds, cell.label, tostring(seed))
            local name = ("%02d-%s"):format(i, cell.label:gsub("[^%w.]+", "-"):sub(1, 60))
            local folder = ("%s/%s/seed%s"):format(o.out, name, tostring(seed))
            local summary, why = run_one(cell.recipe or o.recipe, words_of(cell, seed, o.fixed, folder), folder, o)
            if summary and cell.next then summary, why = follow(cell, seed, folder, o, summary) end
            if not summary then
                cell.problem = why
                log.say("  failed: %s", why)
            end
            for k, v in pairs(summary or {}) do
                if type(v) == "number" then
                    cell.values[k] = cell.values[k] or {}
                    table.insert(cell.values[k], v)
                end
            end
        end
    end
    return o.cells
end

--- A cell's value as text: the mean over seeds, and the deviation where there are several.
function M.show(cell, key)
    local list = cell.values[key]
    if not list then return cell.problem and "failed" or "-" end
    local m, s = mean(list)
    local form = math.abs(m) >= 1000 and "%.0f" or math.abs(m) >= 10 and "%.2f" or "%.3f"
    return form:format(m) .. (s and (" ± " .. form):format(s) or "")
end

--- Table as text. columns: a list of {key, heading}.
function M.table(cells, columns)
    local rows, head = {}, { "" }
    for _, c in ipairs(columns) do head[#head + 1] = c[2] end
    for i, cell in ipairs(cells) do
        rows[i] = { cell.label }
        for _, c in ipairs(columns) do rows[i][#rows[i] + 1] = M.show(cell, c[1]) end
    end
    return log.table(rows, head)
end

--- Series for a plot of `key`: one a series name; x is the cell's number, or its place.
function M.series(cells, key)
    local out, by_name = {}, {}
    for i, cell in ipairs(cells) do
        local list = cell.values[key]
        if list then
            local name = cell.series and cell.series ~= "" and cell.series or key
            local s = by_name[name]
            if not s then
                s = { name = name, x = {}, y = {} }
                by_name[name], out[#out + 1] = s, s
            end
            s.x[#s.x + 1], s.y[#s.y + 1] = cell.x or i, (mean(list))
        end
    end
    return out
end

--- Everything measured, as comma-separated values.
function M.csv(cells, keys)
    local lines = { "cell,key,mean,deviation,seeds" }
    for _, cell in ipairs(cells) do
        for _, key in ipairs(keys) do
            local list = cell.values[key]
            if list then
                local m, s = mean(list)
                lines[#lines + 1] = ('"%s",%s,%.9g,%s,%d'):format(cell.label:gsub('"', '""'), key, m,
                        s and ("%.3g"):format(s) or "", #list)
            end
        end
    end
    return table.concat(lines, "\n") .. "\n"
end

return M
