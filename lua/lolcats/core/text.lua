-- Tokenizers and the sampler over FFI. Vocabularies stay in C; Lua sees ids (counted from 0, as in files) and strings.
local bridge = require "lolcats.core.ffi"
local ffi, C, check = bridge.ffi, bridge.C, bridge.check
local M = {}

local Tokenizer = {}
M.Tokenizer = Tokenizer
function Tokenizer.__index(self, key)
  if key == "size" then return C.lc_tokenizer_size(self.handle) end
  return Tokenizer[key]
end
function Tokenizer:__tostring() return ("tokenizer of %d tokens from %s"):format(self.size, self.path) end

local function wrap(out, path)
  return setmetatable({handle = ffi.gc(out[0], C.lc_tokenizer_free), path = path}, Tokenizer)
end

-- how: options as JSON text, or nil; see lc_tokenizer_open_with.
function M.open(path, how)
  local out = ffi.new("lc_tokenizer *[1]")
  check(C.lc_tokenizer_open_with(out, path, how), "tokenizer")
  return wrap(out, path)
end

-- From an open GGUF file (an object of core/io.lua).
function M.from_file(file)
  local out = ffi.new("lc_tokenizer *[1]")
  check(C.lc_tokenizer_from_gguf(out, file.handle), "tokenizer")
  return wrap(out, file.path)
end

local function is_on(options, name, default)
  local v = options and options[name]
  if v == nil then return default end
  return v
end

local function check_options(what, options, known)
  if options == nil then return end
  if type(options) ~= "table" then bridge.fail("%s: options are a table", what) end
  for key in pairs(options) do
    if not known[key] then bridge.fail("%s: no option '%s'", what, tostring(key)) end
  end
end

local ENCODE = {special = true, parse = true}
local ids_out, count_out = ffi.new("int32_t *[1]"), ffi.new("int32_t[1]")

-- Text to a table of ids. special (default true): what the tokenizer puts around a text, such as BOS; parse (default
-- true): the text of a special token becomes its id.
function Tokenizer:encode(text, options)
  if type(text) ~= "string" then bridge.fail("encode: a string is needed; got %s", type(text)) end
  check_options("encode", options, ENCODE)
  check(C.lc_tokenizer_encode(self.handle, text, #text, is_on(options, "special", true) and 1 or 0,
                              is_on(options, "parse", true) and 1 or 0, ids_out, count_out), "encode")
  local ids, p = {}, ids_out[0]
  for i = 1, count_out[0] do ids[i] = p[i - 1] end
  C.lc_free(p)
  return ids
end

local DECODE = {skip_special = true}
local text_out, length_out = ffi.new("char *[1]"), ffi.new("int32_t[1]")

-- A table of ids (or one id, or an integer tensor) to text. skip_special (default false) leaves special tokens out.
function Tokenizer:decode(ids, options)
  check_options("decode", options, DECODE)
  if type(ids) == "number" then
    ids = {ids}
  elseif bridge.is_tensor(ids) then
    ids = ids:flatten():totable()
  elseif type(ids) ~= "table" then
    bridge.fail("decode: a table of ids is needed; got %s", type(ids))
  end
  local n, size = #ids, self.size
  local cells = ffi.new("int32_t[?]", math.max(1, n))
  for i = 1, n do
    local id = ids[i]
    if type(id) ~= "number" or id < 0 or id >= size then
      bridge.fail("decode: id %s at position %d is outside [0, %d)", tostring(id), i, size)
    end
    cells[i - 1] = id
  end
  check(C.lc_tokenizer_decode(self.handle, cells, n, is_on(options, "skip_special", false) and 1 or 0, text_out,
                              length_out), "decode")
  local text = ffi.string(text_out[0], length_out[0])
  C.lc_free(text_out[0])
  return text
end

-- The id of a token's exact text, or nil.
function Tokenizer:id(token)
  local id = C.lc_tokenizer_id(self.handle, token)
  return id >= 0 and id or nil
end

-- The text of an id as the file has it, or nil.
function Tokenizer:token(id)
  if type(id) ~= "number" or id < 0 or id >= self.size then return nil end
  local p = C.lc_tokenizer_token(self.handle, id, length_out)
  if p == nil then return nil end
  return ffi.string(p, length_out[0])
end

function Tokenizer:is_special(id) return C.lc_tokenizer_is_special(self.handle, id) ~= 0 end

-- ---- regular expressions ------------------------------------------------------------------------------------------
local matched = ffi.new("int[1]")

-- Does a regular expression match the whole of a text?
function M.regex_match(pattern, text)
  check(C.lc_regex_match(pattern, text, matched), "regex_match")
  return matched[0] ~= 0
end

-- ---- documents in order ---------------------------------------------------------------------------------------------
local NULL, BOOL, NUMBER, STRING, ARRAY = 0, 1, 2, 3, 4

local function ordered_value(d, node, make)
  local kind = C.lc_doc_kind(d, node)
  if kind == NULL then return make.null end
  if kind == BOOL then return C.lc_doc_number(d, node) ~= 0 end
  if kind == NUMBER then
    local n = C.lc_doc_number(d, node)
    return C.lc_doc_is_integer(d, node) == 0 and make.float(n) or n
  end
  if kind == STRING then
    local p = C.lc_doc_string(d, node, length_out)
    return ffi.string(p, length_out[0])
  end
  local out, keys, child = {}, {}, C.lc_doc_first(d, node)
  while child > 0 do
    local key = #keys + 1
    if kind ~= ARRAY then
      local p = C.lc_doc_key(d, child, length_out)
      key = ffi.string(p, length_out[0])
    end
    keys[#keys + 1] = key
    out[key] = ordered_value(d, child, make)
    child = C.lc_doc_next(d, child)
  end
  return kind == ARRAY and make.list(out) or kind ~= ARRAY and make.object(out, keys)
end

-- A JSON text as values; make = {null =, float = f(number with a fraction or exponent), list = f(t), object = f(t, keys
-- in their order)} says of what kind.
function M.parse_ordered(text, make)
  local out = ffi.new("lc_doc *[1]")
  check(C.lc_doc_parse(out, "json", "JSON", text, #text))
  local d = ffi.gc(out[0], C.lc_doc_free)
  return ordered_value(d, 0, make)
end

-- ---- case -----------------------------------------------------------------------------------------------------------
-- A text in upper ("u"), lower ("l"), title ("t") or sentence ("c") case, by all of Unicode's rules.
function M.case(text, how)
  if not text:find("[\128-\255]") then
    if how == "u" then return text:upper() elseif how == "l" then return text:lower() end
  end
  check(C.lc_text_case(text, #text, how:byte(), text_out, length_out), "case")
  local out = ffi.string(text_out[0], length_out[0])
  C.lc_free(text_out[0])
  return out
end

-- ---- sampling -----------------------------------------------------------------------------------------------------
local how = ffi.new("lc_sampling")
local recent_room, recent_cells = 64, ffi.new("int32_t[64]")

-- An id (from 0) picked from a row of logits (an f32 CPU tensor). options: temperature (0 greedy), top_k, top_p, min_p,
-- repetition; recent: ids that the repetition penalty looks at; uniform: a number in [0, 1).
function M.sample(logits, options, recent, uniform)
  if C.lc_dtype_of(logits) ~= C.LC_F32 or C.lc_is_contiguous(logits) == 0 or C.lc_data(logits) == nil then
    logits = logits:detach():float():cpu():contiguous()
  end
  how.temperature, how.top_p = options.temperature or 0, options.top_p or 1
  how.min_p, how.repetition, how.top_k = options.min_p or 0, options.repetition or 1, options.top_k or 0
  local n = recent and #recent or 0
  if n > recent_room then
    recent_room = 2 * n
    recent_cells = ffi.new("int32_t[?]", recent_room)
  end
  for i = 1, n do recent_cells[i - 1] = recent[i] end
  return C.lc_sample(ffi.cast("const float *", C.lc_data(logits)), C.lc_numel(logits), how, recent_cells, n,
                     uniform or 0)
end

return M
