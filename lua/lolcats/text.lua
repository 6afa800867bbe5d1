-- text: tokenizers and the sampler. lc.tokenizer opens a tokenizer.json, a tokenizer.model (of SentencePiece or
-- tiktoken), a folder that holds one, a GGUF file, or one that is open already.
local core = require "lolcats.core.text"
local bridge = require "lolcats.core.ffi"
local files = require "lolcats.files"
local text = {sample = core.sample, regex_match = core.regex_match}

local OPTIONS = {style = true, added_tokens = true, add_bos = true, add_eos = true, legacy = true}
local FLAGS = {"special", "single_word", "lstrip", "rstrip", "normalized"}

local function optional_json(folder, name)
  local path = files.join(folder, name)
  return files.is_file(path) and files.read_json(path) or {}
end

local function on(v)
  if type(v) == "boolean" then return v end
end

local function to_added(id, entry)
  local token = {id = id, content = entry.content}
  for _, name in ipairs(FLAGS) do token[name] = on(entry[name]) end
  return token
end

-- Llama 3.1 gave some of Llama 3's reserved tokens names, which its tokenizer.model does not say, but Meta's params.json
-- beside it tells the generation.
local function llama31_tokens()
  local named = {[0] = "begin_of_text", [1] = "end_of_text", [4] = "finetune_right_pad_id", [6] = "start_header_id",
                 [7] = "end_header_id", [8] = "eom_id", [9] = "eot_id", [10] = "python_tag"}
  local list, reserved = {}, 0
  for i = 0, 255 do
    local name = named[i]
    if not name then
      name, reserved = "reserved_special_token_" .. reserved, reserved + 1
    end
    list[i + 1] = {id = 128000 + i, content = "<|" .. name .. "|>", special = true, normalized = false}
  end
  return list
end

-- What Hugging Face keeps beside a tokenizer.model: tokens added later, and whether texts begin or end with one. Sorted
-- by id, since tokens that the model lacks get the next free ones.
local function beside(folder)
  local config, old = optional_json(folder, "tokenizer_config.json"), optional_json(folder, "added_tokens.json")
  local by_id, list = {}, {}
  for content, id in pairs(old) do by_id[id] = {id = id, content = content, normalized = false} end
  if type(config.added_tokens_decoder) == "table" then
    for id, entry in pairs(config.added_tokens_decoder) do by_id[tonumber(id)] = to_added(tonumber(id), entry) end
  end
  for _, token in pairs(by_id) do list[#list + 1] = token end
  table.sort(list, function(a, b) return a.id < b.id end)
  if #list == 0 and optional_json(folder, "params.json").use_scaled_rope == true then list = llama31_tokens() end
  return {added_tokens = #list > 0 and list or nil, add_bos = on(config.add_bos_token),
          add_eos = on(config.add_eos_token), legacy = on(config.legacy)}
end

local function open(path, options)
  local how
  if not path:match("%.json$") then
    how = beside(files.dirname(path))
    for key, value in pairs(options) do how[key] = value end
  elseif next(options) then
    how = options
  end
  return core.open(path, how and next(how) and files.to_json(how) or nil)
end

local NAMES = {"tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1"}

-- The tokenizer file of a model's folder, or nil. model_only: pass over a tokenizer.json.
function text.find_tokenizer(folder, model_only)
  for _, name in ipairs(NAMES) do
    local path = files.join(folder, name)
    if files.is_file(path) and not (model_only and name:match("%.json$")) then return path end
  end
end

local function open_folder(folder, options)
  -- a SentencePiece model as its library runs it is not in the tokenizer.json
  local path = text.find_tokenizer(folder, options.style == "sentencepiece")
  if path then return open(path, options) end
  for _, name in ipairs(files.list(folder)) do
    if name:match("%.gguf$") then
      local file = files.open_tensors(folder)
      return core.from_file(file)
    end
  end
  bridge.raise("EIO", "tokenizer", folder .. ": there is no tokenizer.json and no tokenizer.model")
end

-- lc.tokenizer(path | file[, options]): an object with encode(text[, {special, parse}]), decode(ids[, {skip_special}]),
-- id(s), token(id), size. options, for a tokenizer.model: style = "hf" (as Hugging Face's tools run it) or
-- "sentencepiece" (as its own library does), add_bos, add_eos, added_tokens (a list as in tokenizer.json), legacy (false:
-- a space in front of a text's first part only, as transformers' flag of that name has it); what is not
-- given is looked up in the files beside it.
function text.tokenizer(source, options)
  if type(source) == "table" and source.handle then return core.from_file(source) end
  if type(source) ~= "string" then
    bridge.fail("tokenizer: a path or an open GGUF file is needed; got %s", type(source))
  end
  for key in pairs(options or {}) do
    if not OPTIONS[key] then bridge.fail("tokenizer: no option '%s'", tostring(key)) end
  end
  if files.is_folder(source) then return open_folder(source, options or {}) end
  if source:match("%.gguf$") then
    local file = files.open_tensors(source)
    local tokenizer = core.from_file(file)
    file:close()
    return tokenizer
  end
  return open(source, options or {})
end

return text
