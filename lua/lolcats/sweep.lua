-- sweep.lua: many runs of a recipe that differ in some arguments: each in a process and a folder of its own, so that
-- one that fails or is killed leaves the others alone and is gone on with later; then a table and a plot of what their
-- summaries say. A cell is one of the runs: {label =, args = {name = value}, recipe = (a recipe of its own), next =
-- (runs that take its student), x =, series = (its place in a plot), paper = (what the paper found)}.
local lc = require "lolcats"
local files = require "lolcats.files"
local log = require "lolcats.log"
local plot = require "lolcats.plot"
local program = require "lolcats.program"

local M = {}

local function quote(s) return "'" .. tostring(s):gsub("'", "'\\''") .. "'" end

--- Cells of every combination of axes. axes: a list of {name =, values = {...}}. A cell's x is the last axis' value
--- where that is a number, its series the others.
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

--- What axes are over, in words.
function M.names(axes)
    local out = {}
    for i, axis in ipairs(axes) do out[i] = axis.name end
    return table.concat(out, " and ")
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
    if seed then out[#out + 1] = "--seed=" .. seed end
    out[#out + 1] = "--out=" .. folder
    return out
end

-- Is there anything of a run in a folder, beyond what was asked for and what it said?
local function has_run(folder)
    for _, name in ipairs(files.is_folder(folder) and files.list(folder) or {}) do
        if name ~= "command" and name ~= "log" then return true end
    end
    return false
end

-- Runs one command unless its summary is there already; returns the summary, or nil and why.
local function run_one(recipe, words, folder, o, plain)
    local parts = { recipe }
    for _, word in ipairs(words) do parts[#parts + 1] = quote(word) end
    local command = table.concat(parts, " ") -- wherever the program is
    local told, summary = folder .. "/command", folder .. "/summary.json"
    local same = files.exists(told) and files.read(told) == command
    if same and files.exists(summary) and not o.fresh then return files.read_json(summary) end
    if not same and not o.fresh and not plain and has_run(folder) then
        lc.fail("%s holds a run with other arguments:\n  %s\nstart over with --fresh, or take another --out", folder,
                files.read(told))
    end
    files.make_dirs(folder)
    if (not same or o.fresh) and files.exists(summary) then files.remove(summary) end
    files.write(told, command)
    local again = (not same or o.fresh) and not plain and " --fresh" or ""
    local status = os.execute(("%s %s%s > %s 2>&1 < /dev/null"):format(quote(program.path), command, again,
            quote(folder .. "/log")))
    if status ~= 0 or not files.exists(summary) then
        local last = ""
        for line in files.read(folder .. "/log"):gmatch "[^\r\n]+" do
            if line:match "^lolcats: " or last == "" then last = line end
        end
        if status == 2 or status == 130 * 256 or status == 130 then lc.fail("interrupted; the same command%s goes on", o.fresh and " without --fresh" or "") end
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

-- The runs that follow a cell's first one and take its student: steps of {recipe =, args =, keep = {options of
-- `fixed`}, takes = the option that names the student, plain = true where it has no --seed and no --fresh}. Their
-- values join the summary; also why one failed, if one did.
local function follow(cell, seed, folder, o, summary)
    local out, student = {}, folder .. "/student"
    for k, v in pairs(summary) do out[k] = v end
    local steps = { unpack(cell.next or {}) }
    for _, step in ipairs(o.after or {}) do steps[#steps + 1] = step end
    for _, step in ipairs(steps) do
        local fixed, place = only(o.fixed, step.keep), folder .. "/" .. step.recipe
        fixed[#fixed + 1] = ("--%s=%s"):format(step.takes, student)
        local words = words_of({ args = step.args }, not step.plain and seed or nil, fixed, place)
        local more, why = run_one(step.recipe, words, place, o, step.plain)
        if not more then return out, why end
        if more.before_ppl then out.transfer_ppl = more.before_ppl end
        for k, v in pairs(more) do out[k] = v end
        if files.is_folder(place .. "/student") then student = place .. "/student" end
    end
    return out
end

local function mean(list)
    local m, s = 0, 0
    for _, v in ipairs(list) do m = m + v / #list end
    for _, v in ipairs(list) do s = s + (v - m) ^ 2 end
    s = math.sqrt(s / math.max(1, #list - 1))
    return m, s > 1e-9 * math.abs(m) and s or nil -- none, too, where the seed does not matter
end

--- Runs all cells. o: recipe, cells, fixed (words that every cell gets), seeds, out, fresh, after (runs that follow
--- every cell and take its student, as a cell's next). It is an error when all of them fail. Sets cell.values = {name =
--- {a value a seed}} and cell.problem.
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
            if summary then summary, why = follow(cell, seed, folder, o, summary) end
            if why then
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
    local problem
    for _, cell in ipairs(o.cells) do
        if not cell.problem then return o.cells end
        problem = problem or cell.problem
    end
    lc.fail("every run failed; the first one: %s", tostring(problem))
end

--- A cell's value as text: the mean over seeds, and the deviation where there are several.
function M.show(cell, key)
    local list = cell.values[key]
    if not list then return cell.problem and "failed" or "-" end
    local m, s = mean(list)
    local form = math.abs(m) >= 1000 and "%.0f" or math.abs(m) >= 10 and "%.2f" or "%.3f"
    return form:format(m) .. (s and (" ± " .. form):format(s) or "")
end

--- Is a key among the columns?
function M.has(columns, key)
    for _, c in ipairs(columns) do
        if c[1] == key then return true end
    end
    return false
end

--- An error where no cell has a value under a key.
function M.check(cells, key)
    local seen, names = {}, {}
    for _, cell in ipairs(cells) do
        for k in pairs(cell.values) do
            if not seen[k] then seen[k], names[#names + 1] = true, k end
        end
    end
    table.sort(names)
    if not seen[key] then lc.fail("--metric: no run measured '%s'; they have %s", key, table.concat(names, ", ")) end
end

--- What a column says of a key.
function M.label(columns, key)
    for _, c in ipairs(columns) do
        if c[1] == key then return key:match "_ppl$" and "perplexity: " .. c[2] or c[2] end
    end
    return key
end

--- Table as text. columns: a list of {key, heading}; one that no cell has a value for is left out. Where cells know
--- what the paper found, that stands last.
function M.table(cells, columns)
    local rows, head, keys, paper = {}, { "" }, {}, false
    for _, c in ipairs(columns) do
        local found = false
        for _, cell in ipairs(cells) do found = found or cell.values[c[1]] ~= nil end
        if found then head[#head + 1], keys[#keys + 1] = c[2], c[1] end
    end
    for _, cell in ipairs(cells) do paper = paper or cell.paper ~= nil end
    if paper then head[#head + 1] = "paper" end
    for i, cell in ipairs(cells) do
        rows[i] = { cell.label }
        for _, key in ipairs(keys) do rows[i][#rows[i] + 1] = M.show(cell, key) end
        if #keys == 0 then rows[i][2] = cell.problem and "failed" or "-" end
        if paper then rows[i][#rows[i] + 1] = cell.paper and ("%g"):format(cell.paper) or "-" end
    end
    if #keys == 0 and not paper then head[2] = "" end
    return log.table(rows, head)
end

-- ---- plots ----------------------------------------------------------------------------------------------------------
--- Series for a plot of `key`: one a series name, over the cells' numbers; nil where a cell has none.
function M.series(cells, key)
    local out, by_name = {}, {}
    for _, cell in ipairs(cells) do
        if not cell.x then return nil end
        local list = cell.values[key]
        if list then
            local name = cell.series and cell.series ~= "" and cell.series or key
            local s = by_name[name]
            if not s then
                s = { name = name, x = {}, y = {}, dev = {} }
                by_name[name], out[#out + 1] = s, s
            end
            local at = #s.x + 1
            s.x[at] = cell.x
            s.y[at], s.dev[at] = mean(list)
        end
    end
    return #out > 0 and out or nil
end

-- Cells as rows of a plot.
local function items(cells, key)
    local out = {}
    for i, cell in ipairs(cells) do
        local list = cell.values[key]
        local m, s
        if list then m, s = mean(list) end
        out[i] = { label = cell.label, value = m, dev = s, text = list and M.show(cell, key) }
    end
    return out
end

-- How the numbers of the cells lie: their values as ticks where they are few, and as logarithms where each is a
-- multiple of the one before.
local function spread(series)
    local seen, list = {}, {}
    for _, s in ipairs(series) do
        for _, x in ipairs(s.x) do
            if not seen[x] then seen[x], list[#list + 1] = true, x end
        end
    end
    table.sort(list)
    return #list <= 12 and list or nil, #list > 2 and list[1] > 0 and list[#list] / list[1] >= 16
end

-- The teacher's value as a line across a plot of perplexities, or, where it would press the cells together, in words.
local function teacher_of(cells, metric)
    local teacher, low, high = nil, math.huge, -math.huge
    for _, cell in ipairs(cells) do
        teacher = teacher or (cell.values.teacher_ppl or {})[1]
        if cell.values[metric] then
            local m = mean(cell.values[metric])
            low, high = math.min(low, m), math.max(high, m)
        end
    end
    if not teacher or not metric:match "_ppl$" or metric == "text_ppl" or metric:match "^long" then return {}, "" end
    local near = 1.5 * math.max(high - low, 0.02 * high)
    if teacher >= low - near and teacher <= high + near then return { { name = "teacher", value = teacher } }, "" end
    return {}, (" (teacher: %s)"):format(log.number(teacher))
end

local function plotted(cells, how, lines, rows)
    local series = M.series(cells, how.metric)
    local marks, note = teacher_of(cells, how.metric)
    local label = how.label .. note
    if not series then return rows(items(cells, how.metric), { title = how.title, xlabel = label, lines = marks }) end
    local ticks, logarithmic = spread(series)
    if #series == 1 then series[1].name = how.label end
    return lines(series, { title = how.title, xlabel = how.xlabel or "", ylabel = label, lines = marks, xticks = ticks,
                           xlog = logarithmic })
end

--- A picture of `metric`: lines over the cells' numbers, or a row a cell where they have none. how: metric, label,
--- title, xlabel.
function M.svg(cells, how) return plotted(cells, how, plot.svg, plot.rows) end

--- The same in the terminal.
function M.terminal(cells, how)
    local width = log.width(2)
    return plotted(cells, how, function(series, opts)
        opts.width, opts.color, opts.height, opts.lines = width, log.has_color(2), 10, nil
        return plot.terminal(series, opts)
    end, function(list) return plot.terminal_rows(list, { width = width }) end)
end

--- Everything measured, as comma-separated values. columns: a list of {key, heading}.
function M.csv(cells, columns)
    local lines = { "cell,key,mean,deviation,seeds" }
    for _, cell in ipairs(cells) do
        for _, c in ipairs(columns) do
            local key = c[1]
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
