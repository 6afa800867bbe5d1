--- Cuts chat templates into texts and tags, and tags into tokens, with white space controlled as Jinja's lexer does it
-- under trim_blocks and lstrip_blocks. Returns the function cut(text) -> list of {kind = "text", text} and
-- {kind = "{{" or "{%", line, tokens}.

local values = require "lolcats.chat_template_values"

local fail = values.fail

local escapes = {n = "\n", t = "\t", r = "\r", b = "\b", f = "\f", v = "\v", a = "\a", ["0"] = "\0"}

local function unescape(s)
  s = s:gsub("\\u(%x%x%x%x)", function(h) return values.utf8_char(tonumber(h, 16)) end)
  s = s:gsub("\\x(%x%x)", function(h) return values.utf8_char(tonumber(h, 16)) end)
  return (s:gsub("\\(.)", function(c)
    if c == "\n" then return "" end
    return escapes[c] or (c == "\\" or c == "'" or c == '"') and c or "\\" .. c
  end))
end

local two = {["=="] = true, ["!="] = true, ["<="] = true, [">="] = true, ["//"] = true, ["**"] = true}

-- A string token's text ends at the first quote that no odd run of backslashes precedes.
local function read_string(s, at, line)
  local quote, stop = s:sub(at, at), at + 1
  while true do
    local c = s:sub(stop, stop)
    if c == "" then fail(line, "a string without its closing " .. quote) end
    if c == quote then break end
    stop = stop + (c == "\\" and 2 or 1)
  end
  -- backslashes are doubled out first, so that "\\n" stays two characters
  local parts = {}
  for piece, pair in (s:sub(at + 1, stop - 1) .. "\\\\"):gmatch("(.-)(\\\\)") do
    parts[#parts + 1] = piece
    parts[#parts + 1] = pair == "\\\\" and "\\" or ""
  end
  parts[#parts] = ""
  for i = 1, #parts, 2 do parts[i] = unescape(parts[i]) end
  return table.concat(parts), stop + 1
end

-- The tokens of what stands between two tag marks.
local function tokenize(s, line)
  local out, at = {}, 1
  while true do
    local space = s:match("^%s+", at)
    if space then
      at = at + #space
      line = line + select(2, space:gsub("\n", ""))
    end
    if at > #s then break end
    local c = s:sub(at, at)
    local token = {line = line}
    if c == "'" or c == '"' then
      token.kind = "string"
      token.text, at = read_string(s, at, line)
    elseif c:match("%d") then
      local text = s:match("^%d[%d_]*%.%d+", at) or s:match("^%d[%d_]*", at)
      text = text .. (s:match("^[eE][+-]?%d+", at + #text) or "")
      token.kind, token.text, token.value = "number", text, tonumber((text:gsub("_", "")))
      if text:find("[.eE]") then token.value = values.float(token.value) end
      at = at + #text
    elseif c:match("[%a_]") then
      token.kind, token.text = "name", s:match("^[%w_]+", at)
      at = at + #token.text
    else
      token.kind, token.text = "op", two[s:sub(at, at + 1)] and s:sub(at, at + 1) or c
      if not token.text:match("^[-+*/%%~=!<>|.,:()%[%]{}]+$") then fail(line, "an unexpected '" .. c .. "'") end
      at = at + #token.text
    end
    out[#out + 1] = token
  end
  out[#out + 1] = {kind = "end", text = "end of the tag", line = line}
  return out
end

local closing = {["{{"] = "}}", ["{%"] = "%}", ["{#"] = "#}"}

-- Where a tag opened at `from` ends: its mark outside strings (comments have none), and a minus or plus before it.
local function find_close(s, from, open, line)
  local mark, at = closing[open], from
  local depth = 0
  while at <= #s do
    local c = s:sub(at, at)
    if s:sub(at, at + 1) == mark and (open == "{#" or depth <= 0) then
      local sign = s:sub(at - 1, at - 1)
      local signed = at > from and (sign == "-" or sign == "+")
      return at - (signed and 2 or 1), at + 2, signed and sign or ""
    elseif open ~= "{#" and (c == "'" or c == '"') then
      at = select(2, read_string(s, at, line))
    else
      if c == "{" then depth = depth + 1 elseif c == "}" then depth = depth - 1 end
      at = at + 1
    end
  end
  fail(line, open .. " without " .. mark)
end

local function count_lines(s, from, to) return select(2, s:sub(from, to):gsub("\n", "")) end

-- Drops what stands between the last newline and a block tag, if it is only blanks. Without a newline the text must
-- start a line: `starting` says so.
local function strip_line(text, starting)
  local at = #text - #text:match("[^\n]*$")
  if (at > 0 or starting) and text:sub(at + 1):match("^%s*$") then return text:sub(1, at) end
  return text
end

-- The whole template.
local function cut(s)
  s = s:gsub("\r\n", "\n"):gsub("\r", "\n")
  if s:sub(-1) == "\n" then s = s:sub(1, -2) end
  local parts, at, line, starting, strip = {}, 1, 1, true, false
  local function put_text(text, open, sign)
    if strip then text = values.strip_left(text) end
    if sign == "-" then text = values.strip_right(text)
    elseif sign ~= "+" and open and open ~= "{{" then text = strip_line(text, starting and not strip) end
    if text ~= "" then parts[#parts + 1] = {kind = "text", text = text} end
  end
  while true do
    local from = s:find("{[{%%#]", at)
    if not from then break end
    local open = s:sub(from, from + 1)
    local sign = s:sub(from + 2, from + 2)
    if sign ~= "-" and not (sign == "+" and open ~= "{{") then sign = "" end
    line = line + count_lines(s, at, from - 1)
    put_text(s:sub(at, from - 1), open, sign)
    local inner = from + 2 + #sign
    local stop, after, stop_sign = find_close(s, inner, open, line)
    local body = s:sub(inner, stop)
    local first = body:match("^%s*([%a_]*)")
    strip, starting = stop_sign == "-", false
    if open == "{%" and first == "raw" then
      local a, b, left = s:find("{%%([-+]?)%s*endraw%s*[-+]?%%}", after)
      if not a then fail(line, "raw without endraw") end
      local text = s:sub(after, a - 1)
      if strip then text = values.strip_left(text) end
      if left == "-" then text = values.strip_right(text) elseif left == "" then text = strip_line(text, false) end
      parts[#parts + 1] = {kind = "text", text = text}
      strip, after = s:sub(b - 2, b - 2) == "-", b + 1
      stop_sign = s:sub(b - 2, b - 2) == "+" and "+" or ""
    elseif open ~= "{#" then
      parts[#parts + 1] = {kind = open, line = line, tokens = tokenize(body, line)}
    end
    line = line + count_lines(s, from, after - 1)
    if open ~= "{{" and not strip and stop_sign ~= "+" and s:sub(after, after) == "\n" then
      after, starting, line = after + 1, true, line + 1
    end
    at = after
  end
  put_text(s:sub(at))
  return parts
end

return cut
