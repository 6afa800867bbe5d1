-- lexer.lua: cuts Lua source into tokens, for the session: which names stand at the outermost level, what is being
-- typed. Knows comments, strings and long brackets; leaves grammar to LuaJIT.
local lexer = {}

-- How a keyword changes the depth of blocks. `while` and `for` open theirs with `do`, `if` counts once for all its
-- branches.
lexer.depth = {["function"] = 1, ["do"] = 1, ["if"] = 1, ["repeat"] = 1, ["end"] = -1, ["until"] = -1}

lexer.keywords = {
  "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "goto", "if", "in", "local", "nil", "not",
  "or", "repeat", "return", "then", "true", "until", "while",
}

-- The end of a long bracket that opens at `at`, or nil when none opens there; `open` when it is not closed.
local function long_bracket(text, at)
  local level = text:match("^%[(=*)%[", at)
  if not level then return nil end
  local _, last = text:find("]" .. level .. "]", at, true)
  return last or #text, last == nil
end

-- The end of a quoted string that opens at `at`; whether it is open.
local function quoted(text, at)
  local quote, i = text:sub(at, at), at + 1
  while i <= #text do
    local c = text:sub(i, i)
    if c == "\\" then
      i = i + 1
    elseif c == quote then
      return i, false
    elseif c == "\n" then
      return i - 1, true
    end
    i = i + 1
  end
  return #text, true
end

-- List of {kind = "word" | "number" | "string" | "op", text=, first=, last=, open=}; comments are left out.
function lexer.tokens(text)
  local list, i = {}, 1
  local function put(kind, last, open)
    list[#list + 1] = {kind = kind, text = text:sub(i, last), first = i, last = last, open = open}
    i = last + 1
  end
  while true do
    i = text:find("%S", i)
    if not i then return list end
    local c = text:sub(i, i)
    if text:sub(i, i + 1) == "--" then
      local last = long_bracket(text, i + 2)
      i = (last or (text:find("\n", i, true) or #text + 1) - 1) + 1
    elseif c:match("[%a_]") then
      put("word", select(2, text:find("^[%w_]+", i)))
    elseif c:match("%d") then
      put("number", select(2, text:find("^[%w_%.]+", i)))
    elseif c == '"' or c == "'" then
      put("string", quoted(text, i))
    elseif long_bracket(text, i) then
      put("string", long_bracket(text, i))
    else
      local sign = text:match("^[=~<>]=", i) or text:match("^%.%.%.?", i) or c
      put("op", i + #sign - 1)
    end
  end
end

return lexer
