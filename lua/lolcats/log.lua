-- log.lua: what a run tells a person: one progress line on stderr (redrawn on a terminal, one line in 30 seconds elsewhere), lines
-- beside it, tables on stdout, and numbers in few characters. Honours NO_COLOR, TERM=dumb and COLUMNS.
local lc = require "lolcats"
local program = require "lolcats.program"

local M = {}

-- ---- numbers ------------------------------------------------------------------------------------------------------
--- 12.34, 0.0132, 1e-05, 5.1e+03: four figures or so.
function M.number(v)
    if type(v) ~= "number" then return tostring(v) end
    if v ~= v or v == math.huge or v == -math.huge then return tostring(v) end
    local a = math.abs(v)
    if a ~= 0 and (a < 1e-3 or a >= 1e5) then return ("%.3g"):format(v) end
    if v % 1 == 0 then return ("%d"):format(v) end
    return ("%.4g"):format(v)
end

--- 950, 8.4k, 1.2M
function M.count(v)
    if v >= 1e6 then return ("%.3gM"):format(v / 1e6) end
    if v >= 1e4 then return ("%.3gk"):format(v / 1e3) end
    return ("%.3g"):format(v)
end

--- 0:07, 12:40, 1:02:03
function M.duration(seconds)
    local s = math.floor(seconds + 0.5)
    if s >= 3600 then return ("%d:%02d:%02d"):format(s / 3600, s / 60 % 60, s % 60) end
    return ("%d:%02d"):format(s / 60, s % 60)
end

--- Bytes as MB or GB.
function M.bytes(v)
    return v >= 1e9 and ("%.1f GB"):format(v / 1e9) or ("%.0f MB"):format(v / 1e6)
end

local function characters(s)
    local _, n = s:gsub("[^\128-\191]", "")
    return n
end
M.characters = characters

-- ---- the terminal -------------------------------------------------------------------------------------------------
local function env(name)
    local v = os.getenv(name)
    return v and v ~= "" and v or nil
end

--- May this stream be redrawn and coloured? 1 stdout, 2 stderr.
function M.is_terminal(fd) return program.is_terminal(fd) and env "TERM" ~= "dumb" end
function M.has_color(fd) return M.is_terminal(fd) and not env "NO_COLOR" end
function M.width(fd) return program.width(fd or 2) end

local open_line -- the progress object whose line stands on the terminal

local function erase()
    if open_line and open_line.drawn then
        io.stderr:write("\r\27[K")
        open_line.drawn = false
    end
end

--- A line on stderr, above the progress line.
function M.say(fmt, ...)
    erase()
    io.stderr:write(select("#", ...) > 0 and fmt:format(...) or fmt, "\n")
    if open_line then open_line.last_draw = 0 end
end

-- ---- the progress line --------------------------------------------------------------------------------------------
local Progress = {}
Progress.__index = Progress

--- A progress line. opts: quiet (nothing at all), every (seconds between lines off a terminal, 30).
function M.progress(name, opts)
    opts = opts or {}
    return setmetatable({ name = name, quiet = opts.quiet, every = opts.every or 30, live = M.is_terminal(2), last_draw = 0,
                          started = lc.now() }, Progress)
end

-- ━━━━╸────: done in bright, the rest dim.
local function bar(share, width, color)
    local full = share * width
    local n = math.floor(full)
    local half = n < width and full - n >= 0.5
    local on = ("━"):rep(n) .. (half and "╸" or "")
    local off = ("━"):rep(width - n - (half and 1 or 0))
    if not color then return on .. ("─"):rep(width - n - (half and 1 or 0)) end
    return "\27[36m" .. on .. "\27[2m" .. off .. "\27[0m"
end

-- Parts that fit the width, the bar taking what is left.
local function compose(self, s, live)
    local head = { self.name }
    if s.epochs and s.epochs > 1 then head[#head + 1] = ("ep %d/%d"):format(math.min(s.epoch, s.epochs), s.epochs) end
    local tail = { ("%d/%d"):format(s.done, s.total) }
    for _, m in ipairs(s.metrics or {}) do tail[#tail + 1] = m[1] .. " " .. M.number(m[2]) end
    if s.lr then tail[#tail + 1] = ("lr %.2g"):format(s.lr) end
    if s.rate then tail[#tail + 1] = M.count(s.rate) .. " tok/s" end
    if s.memory then tail[#tail + 1] = M.bytes(s.memory) end
    if s.left then tail[#tail + 1] = "eta " .. M.duration(s.left) end
    local left, right = table.concat(head, "  "), table.concat(tail, "  ")
    if not live then return left .. "  " .. right end
    local columns = M.width(2) - 1
    while #tail > 1 and characters(left) + 2 + characters(right) > columns do
        table.remove(tail, #tail > 2 and #tail - 1 or #tail)
        right = table.concat(tail, "  ")
    end
    local room = math.min(30, columns - characters(left) - characters(right) - 4)
    if room < 6 then return left .. "  " .. right end
    return left .. "  " .. bar(s.total > 0 and math.min(1, s.done / s.total) or 0, room, M.has_color(2)) .. "  " .. right
end

--- Shows where things stand. s: done, total, and if known epoch, epochs, metrics ({{name, value}, ...}), lr, rate, memory, left.
function Progress:update(s)
    if self.quiet then return end
    local now = lc.now()
    if self.live then
        if now - self.last_draw < 0.1 and s.done < s.total then return end
        erase()
        io.stderr:write("\r", compose(self, s, true), "\27[K")
        self.drawn, open_line = true, self
    else
        if self.last_draw == 0 then
            if now - self.started < self.every then return end
        elseif now - self.last_draw < self.every then
            return
        end
        io.stderr:write(compose(self, s, false), "\n")
    end
    self.last_draw = now
end

--- Ends the line.
function Progress:close()
    if self.drawn then io.stderr:write("\n") end
    self.drawn = false
    if open_line == self then open_line = nil end
end

-- ---- tables -------------------------------------------------------------------------------------------------------
--- Rows of cells as aligned text; the first column to the left, numbers to the right. header: a row above a line.
function M.table(rows, header)
    local all, widths = {}, {}
    for i, row in ipairs(rows) do all[i] = row end
    if header then table.insert(all, 1, header) end
    for _, row in ipairs(all) do
        for c, cell in ipairs(row) do widths[c] = math.max(widths[c] or 0, characters(tostring(cell))) end
    end
    local out = {}
    for i, row in ipairs(all) do
        local cells = {}
        for c = 1, #widths do
            local cell = tostring(row[c] == nil and "" or row[c])
            local pad = (" "):rep(widths[c] - characters(cell))
            cells[c] = c == 1 and cell .. pad or pad .. cell
        end
        out[#out + 1] = (table.concat(cells, "  "):gsub("%s+$", ""))
        if header and i == 1 then
            local total = -2
            for _, w in ipairs(widths) do total = total + w + 2 end
            out[#out + 1] = ("─"):rep(total)
        end
    end
    return table.concat(out, "\n")
end

return M
