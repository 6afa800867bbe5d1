-- plot.lua: charts: an SVG file that a browser shows, and dots of Braille in the terminal. Lines, for training curves
-- and sweeps over a number: a series is {name =, x = {...}, y = {...}, dev = {...}}; points that are no number leave a
-- gap, dev is a deviation up and down. Rows, for values that have names instead of numbers.
local log = require "lolcats.log"
local lc = require "lolcats"

local M = {}

-- ---- axes ---------------------------------------------------------------------------------------------------------
local function finite(v) return type(v) == "number" and v == v and v ~= math.huge and v ~= -math.huge end

local function range(series, key)
    local low, high = math.huge, -math.huge
    for _, s in ipairs(series) do
        for i, v in ipairs(s[key]) do
            if finite(v) and finite(s.y[i]) and finite(s.x[i]) then
                local dev = key == "y" and s.dev and s.dev[i] or 0
                low, high = math.min(low, v - dev), math.max(high, v + dev)
            end
        end
    end
    return low, high
end

-- Texts of an axis' ticks, with as many figures as keep them apart.
local function tick_texts(ticks)
    local out
    for _, form in ipairs { false, "%.5g", "%.6g", "%.8g", "%.12g" } do
        local seen, same = {}, false
        out = {}
        for i, v in ipairs(ticks) do
            out[i] = form and form:format(v) or log.number(v)
            same = same or seen[out[i]]
            seen[out[i]] = true
        end
        if not same then break end
    end
    return out
end

-- Round steps (1, 2, 5 times a power of ten) that give about `want` ticks.
local function linear_ticks(low, high, want)
    local raw = (high - low) / want
    local power = 10 ^ math.floor(math.log10(raw))
    local step = power
    for _, f in ipairs { 1, 2, 5, 10 } do
        step = f * power
        if step >= raw * 0.999 then break end
    end
    local ticks, first = {}, math.ceil(low / step - 1e-9)
    for k = first, math.floor(high / step + 1e-9) do ticks[#ticks + 1] = k * step end
    return ticks
end

-- 1, 2, 5 of every decade; only decades when there are many.
local function log_ticks(low, high)
    local ticks, a, b = {}, math.floor(math.log10(low)), math.ceil(math.log10(high))
    local parts = b - a > 4 and { 1 } or b - a > 2 and { 1, 3 } or { 1, 2, 5 }
    for k = a, b do
        for _, f in ipairs(parts) do
            local v = f * 10 ^ k
            if v >= low * 0.999 and v <= high * 1.001 then ticks[#ticks + 1] = v end
        end
    end
    return ticks
end

local function axis(low, high, logarithmic, want)
    if low > high then low, high = 0, 1 end
    if logarithmic then
        if low == high then low, high = low / 2, high * 2 end
        local ticks = log_ticks(low, high)
        if #ticks < 2 then -- less than a third of a decade: round values of the straight scale
            ticks = {}
            for _, v in ipairs(linear_ticks(low, high, want)) do ticks[#ticks + 1] = v end
        end
        local a, b = math.log(low), math.log(high)
        local pad = (b - a) * 0.04
        return { at = function(v) return (math.log(v) - a + pad) / (b - a + 2 * pad) end, ticks = ticks }
    end
    if low == high then
        local half = 0.5 * math.max(1e-9, math.abs(low))
        low, high = low - half, high + half
    end
    local pad = (high - low) * 0.04
    local function at(v) return (v - low + pad) / (high - low + 2 * pad) end
    return { at = at, ticks = linear_ticks(low, high, want) }
end

local function is_log(wish, low, high)
    if wish == nil then wish = low > 0 and high / low > 20 end
    return wish and low > 0
end

-- The scale of y: as asked, or logarithmic when all values are positive and span more than a factor of 20.
local function axes(series, opts)
    local x0, x1 = range(series, "x")
    local y0, y1 = range(series, "y")
    for _, line in ipairs(opts.lines or {}) do y0, y1 = math.min(y0, line.value), math.max(y1, line.value) end
    local logarithmic = is_log(opts.log, y0, y1)
    local ax = axis(x0, x1, opts.xlog and x0 > 0, 6)
    if opts.xlog and x0 > 0 then
        x0, x1 = math.log(x0), math.log(x1)
        ax.at = function(v) return x1 > x0 and (math.log(v) - x0) / (x1 - x0) or 0.5 end
    else
        local span = x1 - x0
        ax.at = function(v) return span > 0 and (v - x0) / span or 0.5 end
    end
    ax.ticks = opts.xticks or ax.ticks
    return ax, axis(y0, y1, logarithmic, 5), logarithmic
end

-- A centred running mean that a noisy curve is shown with; the window shrinks towards the ends, so nothing is shifted.
local function smooth(y)
    local out, n = {}, #y
    local half = math.max(2, math.floor(n / 50))
    for i = 1, n do
        local h, sum, count = math.min(half, i - 1, n - i), 0, 0
        for j = i - h, i + h do
            if finite(y[j]) then sum, count = sum + y[j], count + 1 end
        end
        out[i] = finite(y[i]) and sum / count or y[i]
    end
    return out
end

-- ---- SVG ----------------------------------------------------------------------------------------------------------
local COLORS = { "#2a6fbb", "#d1495b", "#2e8b57", "#8a5fb0", "#c07a00", "#4a4a4a" }

local ESCAPES = { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" }
local function escape(s) return (tostring(s):gsub("[&<>\"]", ESCAPES)) end

local BELOW = '<text x="%.1f" y="%d" text-anchor="middle" fill="%s">%s</text>'

local function path_of(s, px, py)
    local out, pen = {}, "M"
    for i = 1, #s.x do
        if finite(s.x[i]) and finite(s.y[i]) then
            out[#out + 1] = ("%s%.1f %.1f"):format(pen, px(s.x[i]), py(s.y[i]))
            pen = "L"
        else
            pen = "M"
        end
    end
    return table.concat(out)
end

-- At most about 2,000 points of a long curve, each the mean of its stretch.
local function thin(s)
    local n = #s.x
    if n <= 2000 then return s end
    local k, x, y = math.ceil(n / 2000), {}, {}
    for i = 1, n, k do
        local sum, count = 0, 0
        for j = i, math.min(n, i + k - 1) do
            if finite(s.y[j]) then sum, count = sum + s.y[j], count + 1 end
        end
        if count > 0 then x[#x + 1], y[#y + 1] = s.x[i], sum / count end
    end
    return { name = s.name, x = x, y = y, points = s.points }
end

local function writer()
    local out = {}
    return out, function(fmt, ...) out[#out + 1] = fmt:format(...) end
end

local function open_svg(put, w, h, left, title)
    put('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" ' ..
        'font-family="system-ui, sans-serif" font-size="12">', w, h, w, h)
    put('<rect width="%d" height="%d" fill="#ffffff"/>', w, h)
    if title then
        put('<text x="%d" y="24" font-size="15" font-weight="600" fill="#222">%s</text>', left, escape(title))
    end
end

-- The legend, on a background of its own, in the corner that covers the fewest points: the upper right where it can.
local function put_legend(put, series, px, py, frame)
    local longest = 0
    for _, s in ipairs(series) do longest = math.max(longest, log.characters(s.name or "")) end
    local w, h, best = longest * 7 + 40, 18 * #series + 8, nil
    local left, right, top, bottom = frame[1] + 8, frame[2] - w - 6, frame[3] + 4, frame[4] - h - 6
    for _, at in ipairs { { right, top }, { left, top }, { right, bottom }, { left, bottom } } do
        local covered = 0
        local function count(x, y)
            local inside = x > at[1] - 6 and x < at[1] + w + 12 and y > at[2] - 6 and y < at[2] + h + 6
            covered = covered + (inside and 1 or 0)
        end
        for _, s in ipairs(series) do
            for i = 1, #s.x - 1 do -- a line, at a few places
                if finite(s.y[i]) and finite(s.y[i + 1]) then
                    local x0, y0, x1, y1 = px(s.x[i]), py(s.y[i]), px(s.x[i + 1]), py(s.y[i + 1])
                    for k = 0, 1, 0.125 do count(x0 + k * (x1 - x0), y0 + k * (y1 - y0)) end
                end
            end
            for i, dev in pairs(s.dev or {}) do
                count(px(s.x[i]), py(s.y[i] - dev))
                count(px(s.x[i]), py(s.y[i] + dev))
            end
            if #s.x == 1 and finite(s.y[1]) then count(px(s.x[1]), py(s.y[1])) end
        end
        if not best or covered < best.covered then best = { covered = covered, x = at[1], y = at[2] } end
    end
    put('<rect x="%d" y="%d" width="%d" height="%d" fill="#ffffff" fill-opacity="0.85" stroke="#ddd"/>', best.x,
        best.y, w, h)
    for i, s in ipairs(series) do
        local y = best.y + 18 * i - 5
        put('<line x1="%d" x2="%d" y1="%d" y2="%d" stroke="%s" stroke-width="2.5"/>', best.x + 8, best.x + 28, y - 1,
            y - 1, COLORS[(i - 1) % #COLORS + 1])
        put('<text x="%d" y="%d" fill="#333">%s</text>', best.x + 34, y + 3, escape(s.name or ""))
    end
end

--- An SVG chart of lines, as text. opts: title, xlabel, ylabel, log (y axis; by itself when the values span more than
--- 20 times), xlog, xticks (values), lines (a list of {name =, value =} that stand level across the chart), width,
--- height.
function M.svg(series, opts)
    opts = opts or {}
    local w, h = opts.width or 760, opts.height or 420
    local left, right, top, bottom = 66, 18, opts.title and 44 or 20, 52
    local ax, ay, logarithmic = axes(series, opts)
    local function px(v) return left + ax.at(v) * (w - left - right) end
    local function py(v) return h - bottom - ay.at(v) * (h - top - bottom) end
    local out, put = writer()
    open_svg(put, w, h, left, opts.title)
    local texts = tick_texts(ay.ticks)
    for i, v in ipairs(ay.ticks) do
        put('<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#e4e4e4"/>', left, w - right, py(v), py(v))
        put('<text x="%d" y="%.1f" text-anchor="end" fill="#555">%s</text>', left - 8, py(v) + 4, escape(texts[i]))
    end
    texts = tick_texts(ax.ticks)
    for i, v in ipairs(ax.ticks) do
        put('<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#999"/>', px(v), px(v), h - bottom, h - bottom + 5)
        put(BELOW, px(v), h - bottom + 19, "#555", escape(texts[i]))
    end
    for _, line in ipairs(opts.lines or {}) do
        local y = py(line.value)
        put('<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#777" stroke-dasharray="5 4"/>', left, w - right, y, y)
        put('<text x="%d" y="%.1f" fill="#777">%s</text>', left + 6, y - 5, escape(line.name))
    end
    put('<path d="M%d %dV%dH%d" fill="none" stroke="#999"/>', left, top, h - bottom, w - right)
    put(BELOW, (left + w - right) / 2, h - 12, "#333", escape(opts.xlabel or "step"))
    if opts.ylabel then
        put('<text transform="translate(16 %.1f) rotate(-90)" text-anchor="middle" fill="#333">%s%s</text>',
            (top + h - bottom) / 2, escape(opts.ylabel), logarithmic and " (log)" or "")
    end
    for i, whole in ipairs(series) do
        local s, color = thin(whole), COLORS[(i - 1) % #COLORS + 1]
        local noisy = #s.x > 30 and not s.points
        put('<path d="%s" fill="none" stroke="%s" stroke-width="%s" stroke-opacity="%s" stroke-linejoin="round"/>',
            path_of(s, px, py), color, noisy and "1" or "1.8", noisy and "0.3" or "1")
        if noisy then
            put('<path d="%s" fill="none" stroke="%s" stroke-width="2" stroke-linejoin="round"/>',
                path_of({ x = s.x, y = smooth(s.y) }, px, py), color)
        end
        if s.points or #s.x <= 30 then
            for k = 1, #s.x do
                if finite(s.x[k]) and finite(s.y[k]) then
                    local x, y, dev = px(s.x[k]), s.y[k], s.dev and s.dev[k]
                    put('<circle cx="%.1f" cy="%.1f" r="2.8" fill="%s"/>', x, py(y), color)
                    if dev then
                        put('<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="%s"/>', x, x, py(y - dev),
                            py(y + dev), color)
                    end
                end
            end
        end
    end
    put_legend(put, series, px, py, { left, w - right, top, h - bottom })
    out[#out + 1] = "</svg>\n"
    return table.concat(out, "\n")
end

-- At least two percent from end to end, so that what is as good as equal looks it.
local function widened(low, high)
    local lack = 0.02 * math.max(math.abs(low), math.abs(high)) - (high - low)
    if lack > 0 and lack < math.huge then return low - lack / 2, high + lack / 2 end
    return low, high
end

--- An SVG chart of rows, as text: each item {label =, value =, dev =} a dot on a line of its own, with its value beside
--- it. opts: title, xlabel, log (by itself when the values span more than 20 times), lines (a list of {name =, value =}
--- that stand upright), width.
function M.rows(items, opts)
    opts = opts or {}
    local low, high, longest = math.huge, -math.huge, 0
    for _, it in ipairs(items) do
        longest = math.max(longest, log.characters(it.label))
        if finite(it.value) then
            low, high = math.min(low, it.value - (it.dev or 0)), math.max(high, it.value + (it.dev or 0))
        end
    end
    for _, line in ipairs(opts.lines or {}) do low, high = math.min(low, line.value), math.max(high, line.value) end
    low, high = widened(low, high)
    local logarithmic = is_log(opts.log, low, high)
    local ax = axis(low, high, logarithmic, 6)
    local left = math.min(300, 24 + 7 * longest)
    local w, row, right, bottom = opts.width or math.max(760, left + 500), 26, 96, 52
    local top = (opts.title and 44 or 20) + (opts.lines and #opts.lines > 0 and 14 or 0)
    local h = top + row * #items + 8 + bottom
    local function px(v) return left + ax.at(v) * (w - left - right) end
    local out, put = writer()
    open_svg(put, w, h, 16, opts.title)
    local texts = tick_texts(ax.ticks)
    for i, v in ipairs(ax.ticks) do
        put('<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#e4e4e4"/>', px(v), px(v), top, h - bottom)
        put(BELOW, px(v), h - bottom + 19, "#555", escape(texts[i]))
    end
    put('<path d="M%d %dV%dH%d" fill="none" stroke="#999"/>', left, top, h - bottom, w - right)
    for _, line in ipairs(opts.lines or {}) do
        local x = px(line.value)
        put('<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#777" stroke-dasharray="5 4"/>', x, x, top, h - bottom)
        put('<text x="%.1f" y="%d" text-anchor="middle" fill="#777">%s</text>', x, top - 5, escape(line.name))
    end
    for i, it in ipairs(items) do
        local y = top + row * (i - 0.5) + 4
        put('<text x="%d" y="%.1f" text-anchor="end" fill="#333">%s</text>', left - 10, y + 4, escape(it.label))
        if finite(it.value) then
            local x = px(it.value)
            put('<line x1="%d" x2="%.1f" y1="%.1f" y2="%.1f" stroke="%s" stroke-opacity="0.35"/>', left, x, y, y,
                COLORS[1])
            if it.dev then
                put('<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="3" stroke-opacity="0.5"/>',
                    px(it.value - it.dev), px(it.value + it.dev), y, y, COLORS[1])
            end
            put('<circle cx="%.1f" cy="%.1f" r="4" fill="%s"/>', x, y, COLORS[1])
            put('<text x="%.1f" y="%.1f" fill="#333">%s</text>', px(it.value + (it.dev or 0)) + 9, y + 4,
                escape(it.text or log.number(it.value)))
        else
            put('<text x="%d" y="%.1f" fill="#d1495b">failed</text>', left + 9, y + 4)
        end
    end
    put('<text x="%.1f" y="%d" text-anchor="middle" fill="#333">%s%s</text>', (left + w - right) / 2, h - 12,
        escape(opts.xlabel or ""), logarithmic and " (log)" or "")
    out[#out + 1] = "</svg>\n"
    return table.concat(out, "\n")
end

-- ---- the terminal -------------------------------------------------------------------------------------------------
local BITS = { { 1, 2, 4, 64 }, { 8, 16, 32, 128 } } -- of the dots of a Braille character, by column and row

local function braille(bits)
    local code = 0x2800 + bits
    return string.char(0xe0 + math.floor(code / 4096), 0x80 + math.floor(code / 64) % 64, 0x80 + code % 64)
end

local ANSI = { 36, 31, 32, 35, 33, 37 }

local function draw_line(set, x0, y0, x1, y1)
    local n = math.max(math.abs(x1 - x0), math.abs(y1 - y0), 1)
    for k = 0, n do set(math.floor(x0 + (x1 - x0) * k / n + 0.5), math.floor(y0 + (y1 - y0) * k / n + 0.5)) end
end

--- The chart as lines of text. opts: width, height (characters), title, log, color.
function M.terminal(series, opts)
    opts = opts or {}
    local label = 9
    local columns = math.max(20, math.min(opts.width or log.width(1), 100) - label - 1)
    local rows = opts.height or 12
    local ax, ay, logarithmic = axes(series, opts)
    local cells, owner = {}, {}
    for i, whole in ipairs(series) do
        local s = thin(whole)
        local y = (#s.x > 30 and not s.points) and smooth(s.y) or s.y
        local last_x, last_y
        local function set(dx, dy)
            local cx, cy = math.floor(dx / 2), math.floor(dy / 4)
            if cx < 0 or cx >= columns or cy < 0 or cy >= rows then return end
            local at = cy * columns + cx
            local b = BITS[dx % 2 + 1][dy % 4 + 1]
            local have = cells[at] or 0
            if math.floor(have / b) % 2 == 0 then cells[at] = have + b end
            owner[at] = i
        end
        for k = 1, #s.x do
            if finite(s.x[k]) and finite(y[k]) then
                local dx = ax.at(s.x[k]) * (columns * 2 - 1)
                local dy = (1 - ay.at(y[k])) * (rows * 4 - 1)
                draw_line(set, last_x or dx, last_y or dy, dx, dy)
                last_x, last_y = dx, dy
            else
                last_x = nil
            end
        end
    end
    local marks, texts = {}, tick_texts(ay.ticks)
    for i, v in ipairs(ay.ticks) do marks[math.floor((1 - ay.at(v)) * (rows - 1) + 0.5)] = texts[i] end
    local out = {}
    if opts.title then out[1] = (" "):rep(label + 1) .. opts.title .. (logarithmic and "  (log scale)" or "") end
    for r = 0, rows - 1 do
        local line, mark = {}, marks[r] or ""
        line[1] = (" "):rep(label - #mark - 1) .. mark .. (marks[r] and " ┤" or " │")
        for c = 0, columns - 1 do
            local at = r * columns + c
            local ch = cells[at] and braille(cells[at]) or " "
            if opts.color and cells[at] then ch = ("\27[%dm%s\27[0m"):format(ANSI[(owner[at] - 1) % #ANSI + 1], ch) end
            line[#line + 1] = ch
        end
        out[#out + 1] = (table.concat(line):gsub(" +$", ""))
    end
    local x0, x1 = range(series, "x")
    local a, b = log.number(x0 > x1 and 0 or x0), log.number(x0 > x1 and 1 or x1)
    out[#out + 1] = (" "):rep(label) .. "└" .. ("─"):rep(columns)
    out[#out + 1] = (" "):rep(label + 1) .. a .. (" "):rep(math.max(1, columns - #a - #b)) .. b
    local names = {}
    for i, s in ipairs(series) do
        local name = s.name or ""
        names[#names + 1] = opts.color and ("\27[%dm━━\27[0m %s"):format(ANSI[(i - 1) % #ANSI + 1], name) or name
    end
    out[#out + 1] = (" "):rep(label + 1) .. table.concat(names, "   ")
    return table.concat(out, "\n")
end

--- Rows as lines of text: each item {label =, value =, text =} a bar from the smallest value's place on. opts: width.
function M.terminal_rows(items, opts)
    local low, high, longest, out = math.huge, -math.huge, 0, {}
    for _, it in ipairs(items) do
        longest = math.max(longest, log.characters(it.label))
        if finite(it.value) then low, high = math.min(low, it.value), math.max(high, it.value) end
    end
    low, high = widened(low, high)
    local ax = axis(low, high, is_log(nil, low, high), 5)
    local room = math.max(10, math.min(opts and opts.width or log.width(1), 100) - longest - 14)
    for i, it in ipairs(items) do
        local bar = finite(it.value) and ("━"):rep(math.max(1, math.floor(ax.at(it.value) * room + 0.5))) or ""
        out[i] = ("%s%s  %s %s"):format((" "):rep(longest - log.characters(it.label)), it.label, bar,
                                        finite(it.value) and (it.text or log.number(it.value)) or "failed")
    end
    return table.concat(out, "\n")
end

-- ---- a run's curves -----------------------------------------------------------------------------------------------
--- Series from the lines of a metrics.jsonl: the values of each step, and those of evaluations (only of what is also a
--- step's value, if there is any such).
function M.read_metrics(path)
    local files = require "lolcats.files"
    local train, evals, order = {}, {}, {}
    local skip = { step = true, lr = true, grad_norm = true, tok_s = true, seconds = true, epoch = true }
    for line in files.read(path):gmatch "[^\n]+" do
        local row = files.parse_json(line, path)
        local into = row.eval and evals or train
        for k, v in pairs(row.eval or row) do
            if type(v) == "number" and not skip[k] then
                if not into[k] then
                    into[k] = { name = row.eval and "held-out " .. k or k, x = {}, y = {},
                                points = row.eval and true or nil }
                    order[#order + 1] = into[k]
                end
                table.insert(into[k].x, row.step)
                table.insert(into[k].y, v)
            end
        end
    end
    local shared = false
    for k in pairs(evals) do shared = shared or train[k] ~= nil end
    if shared then
        local kept = {}
        for _, s in ipairs(order) do
            local key = s.name:match "^held%-out (.*)$"
            if not key or train[key] then kept[#kept + 1] = s end
        end
        order = kept
    end
    table.sort(order, function(a, b)
        if (a.points or false) ~= (b.points or false) then return not a.points end
        return a.name < b.name
    end)
    return order
end

--- Prints the curves of a run folder in the terminal; keys: which values (all).
function M.show(folder, keys)
    local series = M.read_metrics(folder .. "/metrics.jsonl")
    local wanted = {}
    for _, s in ipairs(series) do
        local take = not keys
        for _, k in ipairs(keys or {}) do take = take or s.name == k or s.name == "held-out " .. k end
        if take then wanted[#wanted + 1] = s end
    end
    if #wanted == 0 then lc.fail("%s has no values to plot yet", folder) end
    io.stdout:write(M.terminal(wanted, { title = folder, color = log.has_color(1) }), "\n")
end

return M
